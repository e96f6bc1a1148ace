"""Benchmarks in a corpus: questions that a model will be scored on must not be learned.

An item's question is its runs of five words. A row that holds 80 % of them holds the question, wherever it stands and
however it is spelled in case and punctuation. Short questions look alike ("Which of the following is the drug of choice
for ..."): one of fewer than 16 words counts only if the row also holds half of the item's choices, or its answer. Runs
that stand in more than 50 questions are their form; they make no question a candidate, so that many questions of one
form cost nothing.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distil_jax.data.adapters import LETTERS
from distil_jax.data.formats import READERS
from distil_jax.data.words import hashes, runs, words_of
from distil_jax.errors import UserError, nearest

RUN = 5
OVERLAP = 0.8
LIKELY = 0.4  # of the runs that are an item's own, from which on all of them are counted
SHORT = 16  # words
COMMON = 50  # items; a run that stands in more of them says nothing
EXAMPLES = 5  # in a report, of each source and benchmark


class Item(NamedTuple):
    """A question of a benchmark."""

    benchmark: str
    id: str
    question: str
    options: tuple[str, ...] = ()
    answer: str = ""


class Hit(NamedTuple):
    """What was found in a row."""

    item: Item
    overlap: float


class Index:
    """Runs of words of all items, sorted. Picklable."""

    def __init__(self, items: Iterable[Item]):
        self.items = list(items)
        keys, owners, lengths = [], [], []
        for n, item in enumerate(self.items):
            words = words_of(item.question)
            found = np.unique(_runs(words))
            keys.append(found)
            owners.append(np.full(len(found), n, np.int32))
            lengths.append(len(words))
        key = np.concatenate([*keys, np.zeros(0, np.uint64)])
        owner = np.concatenate([*owners, np.zeros(0, np.int32)])
        # Runs of many questions are their form, not their matter; a question that has no others keeps them.
        _, which, times = np.unique(key, return_inverse=True, return_counts=True)
        own = times[which] <= COMMON
        own |= (np.bincount(owner[own], minlength=len(self.items)) == 0)[owner]
        key, owner = key[own], owner[own]
        order = np.argsort(key, kind="stable")
        self._keys, self._owners = key[order], owner[order]
        self._sizes = np.bincount(owner, minlength=len(self.items))
        self._lengths = np.array(lengths, np.int64)
        self._runs = keys
        self._run_lengths = sorted({min(RUN, max(1, length)) for length in lengths})

    def find(self, words: list[str]) -> Hit | None:
        """The item that a text holds most of, given its words (words.words_of); None if it holds none."""
        if not len(self._keys):
            return None
        hashed = hashes(words)
        everything = np.concatenate([runs(hashed, n) for n in self._run_lengths])
        start = np.searchsorted(self._keys, everything, "left")
        held = np.unique(everything[self._keys[np.minimum(start, len(self._keys) - 1)] == everything])
        if not len(held):
            return None
        start, stop = (np.searchsorted(self._keys, held, side) for side in ("left", "right"))
        owners = np.concatenate([self._owners[a:b] for a, b in zip(start, stop, strict=True)])
        items, counts = np.unique(owners, return_counts=True)
        share = counts / self._sizes[items]
        for at in np.lexsort((items, -share)):
            if share[at] < LIKELY:
                return None
            number = int(items[at])
            overlap = float(np.isin(self._runs[number], everything).mean())
            if overlap >= OVERLAP and (self._lengths[number] >= SHORT or _has_choices(self.items[number], words)):
                return Hit(self.items[number], round(overlap, 3))
        return None


def _runs(words: list[str]) -> np.ndarray:
    """Runs of five words; a question of fewer is one run."""
    return runs(hashes(words), min(RUN, max(1, len(words))))


def _has_choices(item: Item, words: list[str]) -> bool:
    """Whether the words hold half of the choices, or the answer of an item that has none."""
    wanted = [option for option in item.options if option] or ([item.answer] if item.answer else [])
    if not wanted:
        return True
    text = " " + " ".join(words) + " "
    found = sum(f" {' '.join(words_of(option))} " in text for option in wanted)
    return 2 * found >= len(wanted)


def report(refused: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was found, from the lines of the quarantine: {source: {benchmark: {"rows", "examples"}}}."""
    found: dict[str, dict[str, Any]] = {}
    for record in refused:
        benchmark = record["detail"].split(" ", 1)[0]
        told = found.setdefault(record["file"], {}).setdefault(benchmark, {"rows": 0, "examples": []})
        told["rows"] += 1
        if len(told["examples"]) < EXAMPLES:
            told["examples"].append({"row": record["row"], "item": record["detail"]})
    return found


# ---- benchmarks in files ---------------------------------------------------------------------------------------------

_SCHEMAS = {
    "MMLU": ("question", "choices", "answer"),
    "MedMCQA": ("question", "opa", "opb", "opc", "opd", "cop"),
    "MedQA": ("question", "options", "answer_idx"),
    "PubMedQA": ("pubid", "question"),
    "own": ("question",),
}


def read_items(path: str | Path) -> list[Item]:
    """The questions of a .parquet, .jsonl or .csv file in the schema of MMLU, MedMCQA, MedQA or PubMedQA, or with a
    `question` and, optionally, `options` (a list) and `answer` (its text). Raises UserError that names the file."""
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: config.data.benchmarks takes {', '.join(READERS)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist; check config.data.benchmarks")
    columns, records = READERS[path.suffix.lower()](path, Strict())
    if "question" not in columns:
        has = ", ".join(columns) or "no rows"
        raise UserError(f"{path}: no column 'question'{nearest('question', columns)}; it has {has}")
    schema = next(name for name, wanted in _SCHEMAS.items() if set(wanted) <= set(columns))
    return [_item(path, schema, number, record) for number, record in records]


class Strict:
    """Takes the place of a quarantine: a benchmark of which a line is lost would let that question through."""

    def add(self, file: str | Path, row: int | str, reason: str, detail: str = "") -> None:
        raise UserError(f"{file} cannot be read, row {row}: {reason}: {detail}; copy or write it again")


def _item(path: Path, schema: str, number: int, record: Mapping[str, Any]) -> Item:
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{path}, row {number}: the question is empty or no text; mend the row or take it out")
    options: Any = record.get("choices") if schema == "MMLU" else record.get("options")
    if schema == "MedMCQA":
        options = [record[f"op{letter}"] for letter in "abcd"]
    if isinstance(options, str):  # of a CSV file
        try:
            options = json.loads(options)
        except ValueError as error:
            raise UserError(f"{path}, row {number}: its choices are no JSON ({error})") from error
    letters = list(LETTERS)
    if isinstance(options, Mapping):
        letters, options = list(options), list(options.values())
    options = tuple(str(o.get("value") if isinstance(o, Mapping) else o) for o in options or () if o is not None)
    right = record.get({"MMLU": "answer", "MedMCQA": "cop", "MedQA": "answer_idx"}.get(schema, "answer"))
    if isinstance(right, str) and right in letters[: len(options)]:
        right = letters.index(right)
    elif isinstance(right, str) and right.isdigit() and options:
        right = int(right)  # of a CSV file
    answer = options[right] if isinstance(right, int) and 0 <= right < len(options) else str(right or "")
    name = str(record.get("id") or record.get("pubid") or number)
    return Item(path.stem.replace(" ", "_"), name, question, options, answer)

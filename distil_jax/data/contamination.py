"""Benchmarks in a corpus: questions that a model will be scored on must not be learned.

An item's question is its runs of five words. A row that holds 80 % of them holds the question, wherever it stands and
however it is spelled in case and punctuation. Short questions look alike ("Which of the following is the drug of choice
for ..."): one of fewer than 16 words counts only if the row also holds half of the item's choices, or its answer. Runs
that stand in more than 50 questions are their form; they make no question a candidate, so that many questions of one
form cost nothing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
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

class _Schema(NamedTuple):
    """Where a benchmark's files keep the question, its choices and the right one."""

    columns: tuple[str, ...]  # that tell the schema from others
    question: str
    options: str | tuple[str, ...] = ""  # a column with all of them, or a column for each
    right: str = "answer"
    first: int = 0  # the number of the first choice


_SCHEMAS = (
    _Schema(("question", "choices", "answer"), "question", "choices"),  # MMLU
    _Schema(("question", "opa", "cop"), "question", ("opa", "opb", "opc", "opd"), "cop"),  # MedMCQA
    _Schema(("question", "op1", "cop"), "question", ("op1", "op2", "op3", "op4"), "cop", 1),  # CareQA
    _Schema(("question", "options", "answer_idx"), "question", "options", "answer_idx"),  # MedQA
    _Schema(("sent1", "ending0", "label"), "sent1", ("ending0", "ending1", "ending2", "ending3"), "label"),  # MedQA
    _Schema(("qtext", "answers", "ra"), "qtext", "answers", "ra", 1),  # HeadQA
    _Schema(("QUESTION", "CONTEXTS", "final_decision"), "QUESTION", "", "final_decision"),  # PubMedQA
    _Schema(("question",), "question", "options"),  # PubMedQA, and one's own
)


def read_items(path: str | Path) -> list[Item]:
    """The questions of a .parquet, .jsonl or .csv file in the schema of MMLU, MedMCQA, MedQA, PubMedQA, HeadQA or
    CareQA, or with a `question` and, optionally, `options` (a list) and `answer` (its text). Raises UserError that
    names the file."""
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: config.data.benchmarks takes {', '.join(READERS)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist; check config.data.benchmarks")
    columns, records = READERS[path.suffix.lower()](path, Strict())
    _schema_of(columns, str(path))  # of an empty file too
    benchmark = path.stem.replace(" ", "_")
    return [item_of(record, benchmark, number, f"{path}, row {number}", columns) for number, record in records]


class Strict:
    """Takes the place of a quarantine: a benchmark of which a line is lost would let that question through."""

    def add(self, file: str | Path, row: int | str, reason: str, detail: str = "") -> None:
        raise UserError(f"{file} cannot be read, row {row}: {reason}: {detail}; copy or write it again")


def item_of(
    record: Mapping[str, Any], benchmark: str, number: int, where: str, columns: Sequence[str] | None = None
) -> Item:
    """The question of a benchmark's record. where: for the error; columns: of its file, where a record may lack some.

    Raises UserError for a record of no known schema, or without a question.
    """
    schema = _schema_of(list(record) if columns is None else columns, where)
    question = record.get(schema.question)
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: the question is empty or no text; mend the row or take it out")
    if isinstance(schema.options, tuple):
        options: Any = [record.get(name) for name in schema.options]
    else:
        options = record.get(schema.options)
    if isinstance(options, str):  # of a CSV file
        try:
            options = json.loads(options)
        except ValueError as error:
            raise UserError(f"{where}: its choices are no JSON ({error})") from error
    letters = list(LETTERS)
    if isinstance(options, Mapping) and "atext" in options:  # HeadQA in Parquet: a record of lists
        options = list(options["atext"])
    if isinstance(options, Mapping):
        letters, options = list(options), list(options.values())
    options = tuple(_text(option) for option in options or () if option is not None)
    right = record.get(schema.right)
    if isinstance(right, str) and right in letters[: len(options)]:
        right = letters.index(right) + schema.first
    elif isinstance(right, str) and right.isdigit() and options:
        right = int(right)  # of a CSV file
    chosen = right - schema.first if isinstance(right, int) and not isinstance(right, bool) else -1
    answer = options[chosen] if 0 <= chosen < len(options) else str(right or "")
    name = str(record.get("id") or record.get("pubid") or number)
    return Item(benchmark, name, question, options, answer)


def _schema_of(columns: Sequence[str], where: str) -> _Schema:
    for schema in _SCHEMAS:
        if set(schema.columns) <= set(columns):
            return schema
    has = ", ".join(columns) or "no rows"
    raise UserError(f"{where}: no column 'question'{nearest('question', columns)}; it has {has}")


def _text(option: Any) -> str:
    return str(option.get("value", option.get("atext")) if isinstance(option, Mapping) else option)

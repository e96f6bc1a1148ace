"""The first half of `prepare`: the rows of every source, cleaned, each text once, in blocks on disk (data/blocks.py).

Rows are read by this process and cleaned in chunks by others; what was seen before is told apart here, in the order in
which the rows stand, so the blocks are the same for any number of processes. No two rows of a source have one id. A
run that was killed reads past what the whole blocks hold and goes on.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distil_jax.data import blocks, labels
from distil_jax.data.cleaner import Cleaned, Refusal
from distil_jax.data.pool import ordered
from distil_jax.data.rows import Quarantine, Row
from distil_jax.data.words import whole
from distil_jax.metrics import Progress

_CHUNK = 512  # rows that a process takes at a time


class Refusals:
    """Takes what a reader refuses, in the place of a Quarantine, until it is asked for."""

    def __init__(self, path: Path):
        self.path = path  # where they will be found
        self.total = 0
        self._waiting: list[Refusal] = []

    def add(self, file: Any, row: int | str, reason: str, detail: str = "") -> None:
        self.total += 1
        self._waiting.append(Refusal(str(file), row, reason, detail))

    def taken(self) -> list[Refusal]:
        waiting, self._waiting = self._waiting, []
        return waiting


class Seen(Protocol):
    """Remembers prints: for each row that of the earlier one it repeats, or -1. What is new is remembered if `stays`,
    asked of its place among the prints, says so."""

    def admit(self, prints: np.ndarray, stays: Callable[[int], bool]) -> np.ndarray: ...


class Cleaner(Protocol):
    """What is done to a chunk of rows; it goes to other processes, so it is picklable."""

    def __call__(self, rows: list[Row]) -> Cleaned: ...


class Untouched:
    """Rows as they are."""

    def __call__(self, rows: list[Row]) -> Cleaned:
        return Cleaned(list(rows))


Entry = tuple[list[Refusal], Row | None]  # what the reader refused since the last row, and the next row
ReadRows = Callable[[Refusals], Iterable[Row]]


def gather(
    read_rows: ReadRows,
    folder: Path,
    quarantine: Path,
    *,
    cleaner: Cleaner | None = None,
    seen: Seen | None = None,
    processes: int = 1,
    characters: int = blocks.CHARACTERS,
    expected: int = 0,
) -> list[dict[str, Any]]:
    """Writes the blocks that `folder` lacks; returns the facts of all.

    read_rows: the rows in their order, given something to tell refusals to; read again from the start in every run.
    quarantine: the file that messages name. expected: about how many rows there are, for the progress line; 0: unknown.

    Facts of a block: `read` (entries), `rows` ({split: {source: n}}), `characters`, `specialties` ({source: {name:
    n}}), `labels` (data/labels.py), `licences`, `said` ({role: [messages, bytes]} of training conversations),
    `refused` ({file: {reason: n}}), `mended`, `same_id` (which of its prints are of rows that their id kept out).
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = blocks.facts(folder)
    ids: set[int] = set()  # hashed: of the rows that are kept
    for number in range(len(done)):
        ids.update(_id(row) for row in blocks.read(folder, number))
        kept_out = frozenset(done[number]["same_id"])
        for prints in _prints(folder, number) if seen is not None else ():
            seen.admit(prints, lambda n, kept_out=kept_out: n not in kept_out)
    with Progress(expected, "prepare, rows read") as progress:
        entries = _counted(_entries(read_rows, Refusals(quarantine)), progress)
        entries = islice(entries, sum(f["read"] for f in done), None)
        block = _Block(folder, len(done))
        # In one process nothing is gained by pickling a chunk.
        results = ordered(_clean, cleaner or Untouched(), _chunks(entries), processes if cleaner else 1)
        for refused, cleaned in results:
            rows = [outcome for outcome in cleaned.outcomes if isinstance(outcome, Row)]
            repeated, same_id = _admit(rows, cleaned.prints, seen, ids)
            block.mended.update(cleaned.counts)
            block.add_prints(cleaned.prints, same_id)
            at = 0
            for before, outcome in zip(refused, cleaned.outcomes + [None] * len(refused), strict=False):
                block.refuse(before)
                if isinstance(outcome, Refusal):
                    block.refuse([outcome])
                elif outcome is not None:
                    if repeated[at] >= 0:
                        block.refuse([_duplicate(outcome, int(repeated[at]))])
                    elif at in same_id:
                        detail = "an earlier row of this source has it too"
                        block.refuse([Refusal(outcome.source, outcome.id, "duplicate id", detail)])
                    else:
                        block.add(outcome)
                    at += 1
                block.read += 1
            if block.characters >= characters:
                done.append(block.close())
                block = _Block(folder, block.number + 1)
        if block.read or not done:
            done.append(block.close())
    return done


def _admit(
    rows: list[Row], prints: np.ndarray | None, seen: Seen | None, ids: set[int]
) -> tuple[Sequence[int], set[int]]:
    """For each row the number of the earlier text that it repeats, or -1; and which rows with a new text have the id of
    a row that is kept. Adds the ids of the others."""
    same_id: set[int] = set()

    def stays(n: int) -> bool:
        if (own := _id(rows[n])) in ids:
            same_id.add(n)
            return False
        ids.add(own)
        return True

    if seen is None or prints is None:
        for n in range(len(rows)):
            stays(n)
        return [-1] * len(rows), same_id
    return seen.admit(prints, stays), same_id


def _id(row: Row) -> int:
    """A number for the row's id in its source: two files may both count from 1."""
    return whole([f"{row.source}\0{row.id}"])


def _duplicate(row: Row, earlier: int) -> Refusal:
    return Refusal(row.source, row.id, "duplicate", f"the same text, or nearly, as row {earlier} of those cleaned")


def _entries(read_rows: ReadRows, refusals: Refusals) -> Iterator[Entry]:
    for row in read_rows(refusals):
        yield refusals.taken(), row
    if rest := refusals.taken():
        yield rest, None


def _counted(entries: Iterable[Entry], progress: Progress) -> Iterator[Entry]:
    """The entries; tells how many rows were read, the refused ones too."""
    read = 0
    for number, (refused, row) in enumerate(entries, 1):
        read += len(refused) + (row is not None)
        yield refused, row
        if number % _CHUNK == 0:
            progress.update(read)
    progress.update(read)


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    entries = iter(entries)
    while chunk := list(islice(entries, _CHUNK)):
        yield chunk


def _clean(cleaner: Cleaner, chunk: list[Entry]) -> tuple[list[list[Refusal]], Cleaned]:
    return [refused for refused, _ in chunk], cleaner([row for _, row in chunk if row is not None])


def _prints(folder: Path, number: int) -> Iterator[np.ndarray]:
    file = folder / f"{number:05d}.npy"
    if file.is_file():
        yield np.load(file)


class _Block:
    """The block that is being filled."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number
        self.quarantine = Quarantine(blocks.quarantine_file(folder, number))
        self.refused: dict[str, Counter] = defaultdict(Counter)
        self.rows: list[Row] = []
        self.prints: list[np.ndarray] = []
        self.same_id: list[int] = []
        self.mended: Counter = Counter()
        self.characters = self.read = 0

    def refuse(self, refusals: Iterable[Refusal]) -> None:
        for refusal in refusals:
            self.quarantine.add(*refusal)
            self.refused[refusal.file][refusal.reason] += 1

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.characters += blocks.size_of(row)

    def add_prints(self, prints: np.ndarray | None, same_id: Iterable[int]) -> None:
        """The prints of a chunk, and which of them are of rows that their id kept out."""
        if prints is not None:
            before = sum(map(len, self.prints))
            self.same_id += [before + n for n in sorted(same_id)]
            self.prints.append(prints)

    def close(self) -> dict[str, Any]:
        """Writes the block and returns its facts."""
        self.quarantine.close()
        if self.prints:
            np.save(self.folder / f"{self.number:05d}.npy", np.concatenate(self.prints))
        splits: dict[str, Counter] = defaultdict(Counter)
        said: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for row in self.rows:
            splits[row.split][row.source] += 1
            if row.split == "train":
                for message in row.messages:
                    said[message["role"]][0] += 1
                    said[message["role"]][1] += len(message["content"].encode())
        facts = {
            "read": self.read,
            "characters": self.characters,
            "rows": {split: dict(sources) for split, sources in splits.items()},
            "specialties": labels.by_source(self.rows),
            "labels": labels.compared(self.rows),
            "licences": dict(Counter(f"{row.source}: {row.licence or 'not stated'}" for row in self.rows)),
            "kinds": dict(Counter(row.kind for row in self.rows)),
            "said": dict(said),
            "refused": {file: dict(reasons) for file, reasons in self.refused.items()},
            "mended": dict(self.mended),
            "same_id": self.same_id,
        }
        blocks.write(self.folder, self.number, self.rows, facts)
        return facts


def total(facts: Iterable[dict[str, Any]], name: str) -> dict[str, int]:
    """One of the counters of all blocks together."""
    summed: Counter = Counter()
    for one in facts:
        summed.update(one[name])
    return dict(summed)


def total_by_source(facts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Counters by source, of all blocks together."""
    summed: dict[str, Counter] = defaultdict(Counter)
    for one in facts:
        for source, counts in one.items():
            summed[source].update(counts)
    return {source: dict(counts) for source, counts in summed.items()}


def rows_of(facts: Iterable[dict[str, Any]], split: str) -> dict[str, int]:
    """Rows of a split by source, of all blocks together."""
    return total(({"rows": one["rows"].get(split, {})} for one in facts), "rows")

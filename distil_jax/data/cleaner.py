"""What `prepare` does to rows before it keeps them: mends, refuses, replaces, finds benchmarks, makes prints."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from distil_jax.data import clean, duplicates, personal
from distil_jax.data.contamination import Index
from distil_jax.data.rows import Row, as_text
from distil_jax.data.words import words_of

PERSONAL = ("keep", "report", "replace")  # config.data.personal
CONTAMINATED = "in a benchmark"


class Refusal(NamedTuple):
    """A row that cannot be used, as Quarantine.add takes it."""

    file: str
    row: int | str
    reason: str
    detail: str = ""


class Cleaned(NamedTuple):
    """What became of a chunk of rows: each as it is now or why it is refused, and prints for finding it again."""

    outcomes: list[Row | Refusal]
    prints: np.ndarray | None = None  # uint64[rows that are left, P]; None: duplicates stay
    counts: Counter = Counter()  # of what was mended, by its name


@dataclass(frozen=True)
class RowCleaner:
    """A gather.Cleaner. Picklable.

    mend: repair texts and refuse what is empty, gigantic or in another language. prints: make what duplicates are told
    by. personal: one of PERSONAL; "report" replaces in the sources named in `forums` and counts in the others.
    """

    mend: bool = True
    limits: clean.Limits = clean.Limits()
    prints: bool = True
    personal: str = "report"
    forums: Collection[str] = ()
    benchmarks: Index | None = None

    def __call__(self, rows: list[Row]) -> Cleaned:
        outcomes: list[Row | Refusal] = []
        said: list[tuple[str, list[str]]] = []  # of the rows that are left: what a print is made of
        counts: Counter[str] = Counter()
        for row in rows:
            outcome = self._mended(row, counts)
            if isinstance(outcome, Row) and (self.prints or self.benchmarks is not None):
                text = f"{outcome.prompt}\n{outcome.completion}"
                words = words_of(text)
                if self.benchmarks is not None and (hit := self.benchmarks.find(words)):
                    detail = f"{hit.item.benchmark} {hit.item.id}, {hit.overlap:.0%}: {hit.item.question[:200]}"
                    outcome = Refusal(row.source, row.id, CONTAMINATED, detail)
                else:
                    said.append(_without_order(outcome) or (text, words))
            outcomes.append(outcome)
        return Cleaned(outcomes, duplicates.prints(said) if self.prints else None, counts)

    def _mended(self, row: Row, counts: Counter[str]) -> Row | Refusal:
        if self.mend:
            mended = _rewritten(row, clean.repaired)
            counts["mended"] += int(mended is not row and mended != row)
            row = mended
            if not all(message["content"].strip() for message in row.messages):
                return Refusal(row.source, row.id, "empty text", "nothing is left of a message")
            if refused := clean.refusal(row.prompt, row.completion, self.limits):
                return Refusal(row.source, row.id, *refused)
        return row if self.personal == "keep" else self._without_personal(row, counts)

    def _without_personal(self, row: Row, counts: Counter[str]) -> Row:
        found: Counter[str] = Counter()

        def without(text: str) -> str:
            text, kinds = personal.replaced(text)
            found.update(kinds)
            return text

        rewritten = _rewritten(row, without)
        replacing = self.personal == "replace" or row.source in self.forums
        for kind, n in found.items():
            counts[f"personal data {'replaced' if replacing else 'left'}, {kind.lower()}"] += n
        return rewritten if replacing else row


def _rewritten(row: Row, change: Callable[[str], str]) -> Row:
    """The row with its texts, or those of its messages, changed; itself where nothing changes."""
    if not row.messages:
        prompt, completion = change(row.prompt), change(row.completion)
        if (prompt, completion) == (row.prompt, row.completion):
            return row
        return replace(row, prompt=prompt, completion=completion)
    messages = tuple({"role": m["role"], "content": change(m["content"])} for m in row.messages)
    prompt, completion = as_text(messages)
    return replace(row, messages=messages, prompt=prompt, completion=completion)


def _without_order(row: Row) -> tuple[str, list[str]] | None:
    """What a question with choices says, without their order, which says nothing; None for other rows."""
    options = row.meta.get("options")
    if not options:
        return None
    text = " ".join([row.meta["question"], *sorted(options)])
    return text, words_of(text)

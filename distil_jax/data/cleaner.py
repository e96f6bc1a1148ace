"""What `prepare` does to rows before it keeps them: mends, refuses, replaces, finds benchmarks, makes prints."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

from distil_jax.data import clean, duplicates, personal
from distil_jax.data.contamination import Index
from distil_jax.data.sources import Row
from distil_jax.data.words import words_of
from distil_jax.gather import Cleaned, Refusal

PERSONAL = ("keep", "report", "replace")  # config.data.personal
CONTAMINATED = "in a benchmark"


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
        counts: Counter[str] = Counter()
        for row in rows:
            outcomes.append(self._one(row, counts))
        kept = [row for row in outcomes if isinstance(row, Row)]
        made = duplicates.prints([(said, words_of(said)) for said in map(_said, kept)]) if self.prints else None
        return Cleaned(outcomes, made, counts)

    def _one(self, row: Row, counts: Counter[str]) -> Row | Refusal:
        if self.mend and not row.messages:
            prompt, completion = clean.repaired(row.prompt), clean.repaired(row.completion)
            if (prompt, completion) != (row.prompt, row.completion):
                counts["mended"] += 1
                row = replace(row, prompt=prompt, completion=completion)
            if refused := clean.refusal(prompt, completion, self.limits):
                return Refusal(row.source, row.id, *refused)
        if self.benchmarks is not None and (hit := self.benchmarks.find(words_of(f"{row.prompt}\n{row.completion}"))):
            detail = f"{hit.item.benchmark} {hit.item.id}, {hit.overlap:.0%}: {hit.item.question[:200]}"
            return Refusal(row.source, row.id, CONTAMINATED, detail)
        return row if self.personal == "keep" or row.messages else self._without_personal(row, counts)

    def _without_personal(self, row: Row, counts: Counter[str]) -> Row:
        (prompt, of_prompt), (completion, of_completion) = map(personal.replaced, (row.prompt, row.completion))
        if not (of_prompt or of_completion):
            return row
        replacing = self.personal == "replace" or row.source in self.forums
        for kind, n in (of_prompt + of_completion).items():
            counts[f"personal data {'replaced' if replacing else 'left'}, {kind.lower()}"] += n
        return replace(row, prompt=prompt, completion=completion) if replacing else row


def _said(row: Row) -> str:
    """What a row says, without the order of its choices, which says nothing."""
    options = row.meta.get("options")
    if options:
        return " ".join([row.meta["question"], *sorted(options)])
    return f"{row.prompt} {row.completion}"

"""The specialties that sources state, beside those that the words of the same rows name.

Where a source says nothing the words decide (specialties.py); how far they can be trusted there is counted where both
are known. A sample is enough for that, and bounds what it costs.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from distil_jax.data.rows import Row
from distil_jax.data.specialties import agreement

SAMPLE = 100  # rows of a source that are compared in a block


def text_of(row: Row) -> str:
    """What the classifier reads of a row that has a label: all but the line that tells it (MMLU's prompts do)."""
    return row.prompt.removeprefix(row.meta.get("tells_label", "")) + row.completion


def compared(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Source -> `labelled` rows, and of at most SAMPLE of them, spread evenly: those that were `compared`, `decided` by
    their words, and `agreed` with the label. Sources without labels are left out."""
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.meta.get("labelled"):
            by_source[row.source].append(row)
    found = {}
    for source, members in by_source.items():
        count = min(SAMPLE, len(members))
        sample = [members[n * len(members) // count] for n in range(count)]
        counts = agreement((text_of(row), row.specialty) for row in sample).counts()
        found[source] = {"labelled": len(members), "compared": count, **counts}
    return found


def by_source(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Source -> specialty -> rows."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        counts[row.source][row.specialty] += 1
    return {source: dict(of_source) for source, of_source in counts.items()}


def describe(compared: dict[str, dict[str, int]]) -> list[str]:
    """A line for each source that states specialties."""
    lines = []
    for source, c in compared.items():
        agreed = f", {c['agreed'] / c['decided']:.1%} of them as the labels" if c["decided"] else ""
        lines.append(
            f"specialties of {source}: {c['labelled']:,} rows have a label; of {c['compared']:,} of them the words "
            f"decide {c['decided']:,}{agreed}"
        )
    return lines

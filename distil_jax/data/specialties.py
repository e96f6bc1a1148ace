"""The specialty of a row: from what its source says, else from weighted keywords.

The keywords are in specialties.toml, one table for each specialty, so that anyone can read why a row got its specialty.
"""

import functools
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

OTHER = "other"
MARGIN = 1.0  # points that the first must be ahead of the second
_FILE = Path(__file__).with_name("specialties.toml")
_WORD = re.compile(r"[a-z]+")
_LOOKED_AT = 4000  # characters: what a text is about shows at its beginning


class _Lists:
    """What the file says: names, labels of sources, weights of words and of pairs of words."""

    def __init__(self):
        told = tomllib.loads(_FILE.read_text(encoding="utf-8"))
        self.names = tuple(sorted(told))
        self.labels = {label: name for name, one in told.items() for label in one["labels"]}
        self.weights: dict[str, list[tuple[str, float]]] = {}
        for name, one in told.items():
            for key, weight in (("strong", 3.0), ("weak", 1.0)):
                for word in one[key]:
                    self.weights.setdefault(word, []).append((name, weight))


@functools.cache
def _lists() -> _Lists:
    return _Lists()


def names() -> tuple[str, ...]:
    """The vocabulary, without "other"."""
    return _lists().names


def specialty_of(source: str, label: str, text: str) -> str:
    """From the label if the list knows it, else from the text, else "other".

    label: subject and topic of MedMCQA ("Surgery/Cardiac surgery": the topic says more, so it comes first), the MMLU
    subject, MeSH headings ("Heart Failure; Humans"), the category of MedQuAD, "virology".
    """
    return of_label(label) or of_text(text)


def of_label(label: str) -> str | None:
    """The specialty of a source's label; None where no part of it is in the list."""
    labels = _lists().labels
    parts = [part.strip().lower().replace("_", " ") for part in re.split(r"[/;]", label)]
    for part in reversed(parts):
        if found := labels.get(part):
            return found
    scored = of_text(label) if ";" in label or "/" in label else OTHER  # headings are words of the field too
    return scored if scored != OTHER else None


def of_text(text: str) -> str:
    """The specialty whose keywords weigh most, each counted once: 3 for a word that is its alone, 1 for one that
    belongs to it more than to others. "other" unless it is MARGIN ahead and has at least one strong or two weak."""
    words = _WORD.findall(text[:_LOOKED_AT].lower())
    present = {*words, *(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))}
    score: Counter[str] = Counter()
    weights = _lists().weights
    for word in present & weights.keys():
        for name, weight in weights[word]:
            score[name] += weight
    first, second = (*score.most_common(2), ("", 0.0), ("", 0.0))[:2]
    return first[0] if first[1] >= 2 and first[1] - second[1] >= MARGIN else OTHER


def agreement(rows: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """How the keywords do where a source tells: {specialty: {"rows", "found", "right"}} of (specialty, text) pairs.
    right / found is the precision, right / rows the recall."""
    counts: dict[str, Counter[str]] = {}
    for told, text in rows:
        found = of_text(text)
        counts.setdefault(told, Counter())["rows"] += 1
        if found != OTHER:
            counts.setdefault(found, Counter())["found"] += 1
            counts[found]["right"] += found == told
    return {name: {key: count[key] for key in ("rows", "found", "right")} for name, count in sorted(counts.items())}

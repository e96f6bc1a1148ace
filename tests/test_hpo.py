"""The tiny corpus: obo parsing, specialties, a split by subtree without near-duplicates."""

import importlib.util
import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from distil_jax.data import hpo
from distil_jax.data.rows import Quarantine, Row
from distil_jax.errors import UserError


def words(text):
    return re.sub(r"[\W_]+", " ", text.lower()).split()


SMALL_OBO = r"""format-version: 1.2
data-version: hp/releases/2000-01-01
property_value: terms:license https://example.org/licence

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:0000002
name: Eye
def: "An \"eye\"\: sees,\nmostly   well." [https://orcid.org/0, PMID:1]
synonym: "Ocular organ" EXACT layperson []
synonym: "eye" EXACT []
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0000003
name: Neoplasm
def: "A tumor." []
is_a: HP:0000118

[Term]
id: HP:0000004
name: Eye tumor
def: "A tumor of the eye." []
comment: Rare.
is_a: HP:0000002 {source="x"} ! Eye
is_a: HP:0000003 ! Neoplasm
is_a: HP:0000099 ! Gone

[Term]
id: HP:0000005
name: Old eye
def: "Old." []
is_obsolete: true

[Term]
id: HP:0000006
name: Red eye
def: "a TUMOR of the eye." []
is_a: HP:0000002

[Term]
id: HP:0000007
name: Undefined eye
is_a: HP:0000002

[Term]
id: HP:0000008
name: Broken eye
def: no quotes
is_a: HP:0000002

[Term]
id: HP:0000009
name: Inheritance
def: "How it is passed on." []

[Typedef]
id: part_of
name: part of
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.obo").write_text(SMALL_OBO, encoding="utf-8")
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        corpus = hpo.load_corpus(quarantine, tmp_path / "small.obo")
        ontology = hpo.read_obo(tmp_path / "small.obo", Quarantine(tmp_path / "again.jsonl"))
    refused = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    return corpus, ontology, {(r["row"], r["reason"]) for r in refused}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with Quarantine(tmp_path_factory.mktemp("hpo") / "quarantine.jsonl") as quarantine:
        corpus = hpo.load_corpus(quarantine)
        ontology = hpo.read_obo(hpo.find_obo(), quarantine)
    return corpus, ontology, quarantine


def test_obo_escapes_obsolete_terms_and_broken_lines(small):
    corpus, ontology, refused = small
    assert ontology.version == "hp/releases/2000-01-01" and ontology.licence == "https://example.org/licence"
    assert ontology.obsolete == 1 and "HP:0000005" not in ontology.terms and "part_of" not in ontology.terms
    eye = next(row for row in corpus.rows if row.id == "HP:0000002")
    assert eye.prompt == "Question: What is Eye?\nAnswer:"
    assert eye.completion == ' An "eye": sees, mostly well.'
    assert {("HP:0000008", "malformed def"), ("HP:0000006", "duplicate definition")} <= refused
    assert "hp/releases/2000-01-01" in corpus.manifest["acknowledgement"]


def test_specialty_is_the_smallest_branch_and_other_outside(small):
    found = hpo.specialties(small[1])
    assert found["HP:0000004"] == "Neoplasm" and found["HP:0000007"] == "Eye" and found["HP:0000009"] == "other"


def test_a_file_that_is_no_ontology_and_a_missing_package_say_what_to_do(tmp_path, monkeypatch):
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        (tmp_path / "x.obo").write_text("hello\n")
        with pytest.raises(UserError, match="no \\[Term\\]"):
            hpo.read_obo(tmp_path / "x.obo", quarantine)
        (tmp_path / "x.obo").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="not a readable obo file"):
            hpo.read_obo(tmp_path / "x.obo", quarantine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="distil_jax\\[demo\\]"):
        hpo.find_obo()


def test_near_duplicates_by_jaccard_and_by_containment():
    long = "one two three four five six seven eight nine ten"

    def row(name, split, text):
        return Row(name, "s", split, "l", "other", "QA", "", text)

    rows = [
        row("T1", "train", long + " eleven twelve thirteen fourteen fifteen sixteen"),
        row("T2", "train", "joint pain"),
        row("contained", "test", "One two, three four five six seven!"),
        row("similar", "validation", long + " eleven twelve thirteen fourteen and more"),
        row("short", "test", "Joint pain."),
        row("free", "test", "one two three four and then something else"),
    ]
    found = hpo.near_duplicates(rows)
    assert set(found) == {"contained", "similar", "short"}
    assert found["contained"].startswith("T1 (") and found["short"].startswith("T2 (")


def test_real_corpus_has_the_promised_shape(real):
    corpus, ontology, quarantine = real
    splits = Counter(row.split for row in corpus.rows)
    total = sum(splits.values())
    assert total > 15_000 and len({row.id for row in corpus.rows}) == total
    assert 0.08 < splits["test"] / total < 0.10 and 0.03 < splits["validation"] / total < 0.045
    branches = {ontology.terms[b].name for b in ontology.children[hpo.PHENOTYPIC_ABNORMALITY]}
    assert len(branches) == 23
    held_out = {row.specialty for row in corpus.rows if row.split == "test"}
    assert held_out == branches - {"Abnormality of limbs"} | {"other"}
    assert all(row.completion.startswith(" ") and row.completion.strip() for row in corpus.rows)
    assert not any("\\" in row.completion or "  " in row.completion for row in corpus.rows)
    assert corpus.manifest["version"].startswith("hp/releases/")


def test_real_held_out_text_is_far_from_training_text_and_limbs_are_training_text(real):
    corpus, ontology, quarantine = real
    assert not hpo.near_duplicates(corpus.rows)
    leaked = corpus.manifest["leaked"]
    assert quarantine.counts["near-duplicate of a training row"] == sum(leaked[s]["rows"] for s in leaked)
    assert all(leaked[s]["rows"] < 0.1 * leaked[s]["of"] for s in leaked), "the split by subtree has stopped working"
    limbs = ontology.below[hpo.LIMBS]
    assert {row.split for row in corpus.rows if row.id in limbs} == {"train"}


def test_real_split_holds_whole_subtrees_out(real):
    """Nothing below a held-out term is training text or on the other held-out side."""
    corpus, ontology, _ = real
    split = {row.id: row.split for row in corpus.rows}
    for row in corpus.rows:
        if row.split != "train":
            assert {split.get(term, row.split) for term in ontology.below[row.id]} == {row.split}


def test_the_split_does_not_depend_on_the_order_of_the_file(real):
    _, ontology, _ = real
    backwards = replace(
        ontology,
        terms=dict(reversed(ontology.terms.items())),
        below={term: set(reversed(sorted(members))) for term, members in ontology.below.items()},
    )
    defined = {term.id for term in ontology.terms.values() if term.definition}
    specialty = hpo.specialties(ontology)
    assert hpo.specialties(backwards) == specialty
    assert hpo.split_by_subtree(backwards, defined, specialty) == hpo.split_by_subtree(ontology, defined, specialty)

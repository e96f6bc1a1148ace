"""Specialties: labels of the sources map into one vocabulary, and a text is named only where its words decide."""

import pytest

from distil_jax.data import hpo, specialties
from distil_jax.data.catalogue import MMLU_CONFIGS
from distil_jax.data.rows import Quarantine
from distil_jax.data.specialties import OTHER, SPECIALTIES, Agreement, agreement, classify

SUBJECTS = (
    *("anaesthesia", "anatomy", "biochemistry", "dental", "ENT", "forensic medicine", "gynaecology & obstetrics"),
    *("medicine", "microbiology", "ophthalmology", "orthopaedics", "pathology", "pediatrics", "pharmacology"),
    *("physiology", "psychiatry", "radiology", "skin", "social & preventive medicine", "surgery"),
)


def test_every_label_of_the_sources_has_a_specialty_in_any_case():
    assert len(SUBJECTS) == 20
    for write in (str.lower, str.upper, str.title):
        assert all(specialties.of_exam(write(subject)) in SPECIALTIES for subject in SUBJECTS)
    assert specialties.of_exam("Unknown") == "" and specialties.of_exam("Astrology") == ""
    assert all(specialties.of_mmlu(config) in SPECIALTIES for config in (*MMLU_CONFIGS, "nutrition", "virology"))
    assert specialties.of_medquad("Drugs") == "pharmacology" and specialties.of_medquad("Disease") == ""
    assert "cardiology" in SPECIALTIES and 30 <= len(SPECIALTIES) <= 40


def test_a_topic_refines_a_broad_subject_and_no_other():
    assert specialties.of_exam("Medicine", "Ischemic heart disease: Myocardial infarction") == "cardiology"
    assert specialties.of_exam("Medicine", "General") == "internal_medicine"
    assert specialties.of_exam("Unknown", "Psychiatric disorders: schizophrenia") == "psychiatry"
    assert specialties.of_exam("Anatomy", "Heart and pericardium") == "anatomy"
    assert specialties.of_mesh(["Humans", "Heart Failure", "Myocardium"]) == "cardiology"
    assert specialties.of_mesh(["Humans", "Adult", "Male"]) == ""


def test_a_text_is_named_only_where_one_specialty_is_ahead():
    assert classify("Atrial fibrillation and mitral valve disease") == "cardiology"
    assert classify("ATRIAL FIBRILLATION") == "cardiology"
    assert classify("retinal detachment") == "ophthalmology"
    assert classify("atrial retina") == OTHER  # three against three
    assert classify("pressure") == OTHER  # a weak word alone
    assert classify("artery artery artery artery") == OTHER  # a word counts once
    assert classify("") == OTHER and classify("1234 !?") == OTHER


def test_agreement_counts_by_hand():
    a = Agreement()
    for text, label in [
        ("atrial", "cardiology"),
        ("retina", "cardiology"),
        ("x", "cardiology"),
        ("iris", "ophthalmology"),
    ]:
        a.add(text, label)
    table = a.table()
    assert table["cardiology"] == {"texts": 3, "precision": 1.0, "recall": 1 / 3}
    assert table["ophthalmology"] == {"texts": 1, "precision": 0.5, "recall": 1.0}
    assert table[OTHER] == {"texts": 0, "precision": 0.0, "recall": None}
    assert a.overall() == {"texts": 4, "decided": 0.75, "accuracy": 2 / 3}
    with pytest.raises(ValueError, match="'heart' is no specialty"):
        agreement([("atrial", "heart")])


def test_on_the_embedded_definitions_it_is_right_seven_times_of_ten(tmp_path):
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        rows = hpo.load_corpus(quarantine).rows
    labelled = [(r.prompt[len("Question: What is ") :] + r.completion, specialties.of_hpo(r.specialty)) for r in rows]
    found = agreement(pair for pair in labelled if pair[1])
    overall = found.overall()
    assert overall["texts"] > 14_000 and overall["decided"] > 0.6 and overall["accuracy"] > 0.7
    heart = found.table()["cardiology"]
    assert heart["precision"] > 0.85 and heart["recall"] > 0.55

"""Specialties: labels of the sources map into one vocabulary, and a text is named only where its words decide."""

import pytest

from distil_jax.data import adapters, hpo, labels, specialties
from distil_jax.data.catalogue import MMLU_CONFIGS
from distil_jax.data.rows import Quarantine, Row
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
    assert a.counts() == {"decided": 3, "agreed": 2}
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


def row(n: int, text: str, specialty: str, source: str = "exam", **meta) -> Row:
    return Row(f"r{n}", source, "train", "CC0", specialty, "QA", "Question: ", text, meta=meta)


def test_labels_are_counted_beside_what_the_words_name():
    rows = [
        row(0, "mitral valve", "cardiology", labelled=True),
        row(1, "mitral valve", "anatomy", labelled=True),  # decided, and another
        row(2, "no such word", "anatomy", labelled=True),  # not decided
        row(3, "retina", "ophthalmology", labelled=False),  # a guess of ours is no label
        row(4, "retina", "ophthalmology", source="guessed"),
        row(5, "retina", "ophthalmology", source="articles", labelled=True),
    ]
    found = labels.compared(rows)
    assert found == {
        "exam": {"labelled": 3, "compared": 3, "decided": 2, "agreed": 1},
        "articles": {"labelled": 1, "compared": 1, "decided": 1, "agreed": 1},
    }
    assert labels.describe(found)[0] == (
        "specialties of exam: 3 rows have a label; of 3 of them the words decide 2, 50.0% of them as the labels"
    )
    none = {"exam": {"labelled": 1, "compared": 1, "decided": 0, "agreed": 0}}
    assert labels.describe(none) == ["specialties of exam: 1 rows have a label; of 1 of them the words decide 0"]
    assert labels.by_source(rows)["exam"] == {"cardiology": 1, "anatomy": 2, "ophthalmology": 1}


def test_a_sample_of_the_labels_comes_from_all_over_the_block(monkeypatch):
    monkeypatch.setattr(labels, "SAMPLE", 8)
    texts = ["mitral valve"] * 25 + ["nothing"] * 75  # a quarter is decided
    found = labels.compared([row(n, text, "cardiology", labelled=True) for n, text in enumerate(texts)])
    assert found == {"exam": {"labelled": 100, "compared": 8, "decided": 2, "agreed": 2}}


def test_the_line_of_a_prompt_that_tells_the_label_is_not_read():
    record = {"question": "Which of these is one?", "subject": "virology", "choices": ["a", "b"], "answer": 0}
    (fields,) = adapters.mmlu(record)
    told = row(0, fields.completion, fields.specialty, labelled=True, **fields.meta)
    told = Row(**(vars(told) | {"prompt": fields.prompt}))
    assert classify(fields.prompt) == fields.specialty == "microbiology"
    assert labels.text_of(told).startswith("Which of these is one?") and labels.text_of(told).endswith(" A. a")
    assert labels.compared([told])["exam"]["decided"] == 0

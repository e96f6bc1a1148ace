"""Benchmarks of several models side by side: what is averaged, what is tested, what has to be known of the training
text."""

import numpy as np
import pytest

from distil_jax.errors import UserError
from distil_jax.eval import answers, comparison
from distil_jax.eval.answers import Answers


def of(task, right, shots=0):
    """Answers to items of two choices, the first of which is right."""
    nats = np.where(np.array(right, bool)[:, None], [-1.0, -2.0], [-2.0, -1.0])
    size = np.ones((len(right), 2), np.int64)
    return Answers(
        task, shots, tuple(f"{task}{n}" for n in range(len(right))), np.zeros(len(right), np.int64), nats, size
    )


GIVEN = {
    "teacher": [of("mmlu_anatomy", [1, 1, 1, 1]), of("mmlu_virology", [1, 1]), of("medmcqa", [1, 1, 1, 0])],
    "control": [of("mmlu_anatomy", [1, 0, 0, 0]), of("mmlu_virology", [0, 1]), of("medmcqa", [1, 0, 0, 0])],
    "distilled": [of("mmlu_anatomy", [1, 1, 0, 0]), of("mmlu_virology", [1, 1]), of("medmcqa", [1, 0, 1, 0])],
}


def test_means_are_over_tasks_that_all_models_answered_and_no_probes():
    given = {name: [*told, of("medmcqa_false_question", [0, 0])] for name, told in GIVEN.items()}
    given["teacher"] = [*given["teacher"], of("pubmedqa", [1, 1]), of("mmlu_anatomy", [1, 1, 1, 1], shots=5)]
    found = comparison.compared(given, ["distilled"], 100)
    every, mmlu = found["means"]
    assert every["of"] == "all tasks" and every["tasks"] == ["mmlu_anatomy", "mmlu_virology", "medmcqa"]
    assert every["models"]["distilled"]["unweighted"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert every["models"]["distilled"]["weighted"] == pytest.approx(6 / 10)
    assert mmlu["tasks"] == ["mmlu_anatomy", "mmlu_virology"]
    assert mmlu["models"]["control"]["unweighted"] == pytest.approx((0.25 + 0.5) / 2)
    probe = next(t for t in found["tasks"] if t["probe"])
    assert probe["models"]["control"]["points"] == -0.25 and "points" not in found["tasks"][0]["models"]["control"]
    assert [(t["task"], t["shots"]) for t in found["tasks"]].count(("mmlu_anatomy", 5)) == 1


def test_a_taught_student_is_tested_against_what_there_is_to_compare_with():
    found = comparison.compared(GIVEN, ["distilled"], 100)
    assert list(found["tasks"][0]["differences"]) == ["control - distilled", "teacher - distilled"]
    against = found["tasks"][0]["differences"]["control - distilled"]
    assert against["difference"] == 0.25 and (against["only_one"], against["only_other"]) == (1, 0)
    assert comparison.compared(GIVEN, [], 100)["tasks"][0]["differences"] == {}


def test_the_answers_of_a_folder_come_in_the_order_of_the_report(tmp_path):
    (tmp_path / "answers").mkdir()
    for name in ("zebra", "control", "distilled", "teacher"):
        answers.save(tmp_path / "answers" / f"{name}.json", name, [of("t", [1])])
    assert list(comparison.read(tmp_path, ["distilled", "control"])) == ["teacher", "distilled", "control", "zebra"]
    assert comparison.read(tmp_path / "none", []) == {}
    (tmp_path / "answers" / "torn.json").write_text('{"model": "x", "answers": [{')
    with pytest.raises(UserError, match="torn.json is no file of answers"):
        comparison.read(tmp_path, [])


def test_what_the_corpus_says_of_benchmarks_is_told():
    corpus = {
        "sources": {"train": {"medical_meadow_medqa": 1200, "wikidoc": 9}, "test": {"mmlu": 4}},
        "contamination": {"in/some/folder/cards.jsonl": {"mmlu_test": {"rows": 3, "examples": []}}},
    }
    tasks = ["mmlu_anatomy", "medqa_4options", "ward_exam"]
    said = comparison.overlap(corpus, ["exams/mmlu_test.parquet", "ward-exam.jsonl"], tasks)
    assert len(said) == 3
    assert "not searched for the questions of medqa_4options:" in said[0]
    assert "1,200 training rows are of the source medical_meadow_medqa, which medqa_4options" in said[1]
    assert "3 rows of cards.jsonl held questions of mmlu_test and were taken out" in said[2]
    clean = {"sources": {"train": {"wikidoc": 9}}, "contamination": {}}
    assert comparison.overlap(clean, ["medqa_test.jsonl", "mmlu.parquet", "ward_exam.jsonl"], tasks) == []

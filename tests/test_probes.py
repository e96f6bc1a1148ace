"""Probes in the manner of Med-HALT, made of a user's multiple-choice items."""

import copy
import json

import pytest

from distil_jax import cli
from distil_jax.errors import UserError
from distil_jax.eval import own, probes, prompts, records

ITEMS = [
    {"id": "a", "question": "Which nerve lifts the arm?", "choices": ["Axillary", "Ulnar", "Radial"], "gold": 0},
    {"id": "b", "question": "What is hyposmia?", "choices": ["Less smell", "No taste"], "gold": 0, "subject": "ENT"},
    {"id": "c", "question": "Which nerve drops the wrist?", "choices": ["Median", "radial.", "Ulnar"], "gold": 1},
]


def test_none_of_the_above_stands_in_place_of_the_right_choice():
    before = copy.deepcopy(ITEMS)
    found = probes.none_of_the_above(ITEMS)
    for item, probe in zip(ITEMS, found, strict=True):
        assert probe["choices"][item["gold"]] == "None of the above" and probe["gold"] == item["gold"]
        assert item["choices"][item["gold"]] not in probe["choices"]
        rest = [n for n in range(len(item["choices"])) if n != item["gold"]]
        assert [probe["choices"][n] for n in rest] == [item["choices"][n] for n in rest]
        assert {k: v for k, v in probe.items() if k != "choices"} == {k: v for k, v in item.items() if k != "choices"}
    assert before == ITEMS  # nothing of the user's was changed


def test_in_its_control_the_right_choice_is_there_and_the_words_are_wrong():
    for item, probe in zip(ITEMS, probes.none_of_the_above_control(ITEMS), strict=True):
        assert probe["choices"][probe["gold"]] == item["choices"][item["gold"]]
        at = probe["choices"].index("None of the above")
        assert at != probe["gold"] and len(probe["choices"]) == len(item["choices"])
    assert probes.none_of_the_above_control(ITEMS) == probes.none_of_the_above_control(ITEMS)


def test_no_choice_of_a_false_question_can_answer_it():
    found = probes.false_question(ITEMS, seed=1)
    for item, probe in zip(ITEMS, found, strict=True):
        assert probe["question"] == item["question"] and probe["choices"][-1] == "I do not know"
        assert probe["gold"] == len(probe["choices"]) - 1
        kept = {c.lower().rstrip(".") for c in item["choices"]} & {c.lower().rstrip(".") for c in probe["choices"]}
        assert not kept
    # a and c have a nerve in common, in another case and with a full stop: only b will do for them.
    assert [p["choices"][:-1] for p in found][0] == ITEMS[1]["choices"] == found[2]["choices"][:-1]
    assert [p["choices"] for p in probes.false_question_control(ITEMS)] == [
        [*item["choices"], "I do not know"] for item in ITEMS
    ]


def test_items_that_no_probe_can_be_made_of_are_named():
    with pytest.raises(UserError, match="'a'.*every other item shares a choice"):
        probes.false_question([ITEMS[0], ITEMS[2]])
    with pytest.raises(UserError, match="'d'.*already"):
        probes.none_of_the_above([{"id": "d", "question": "?", "choices": ["x", "none of  the ABOVE."], "gold": 0}])
    for broken in ({"choices": ["x"], "gold": 0}, {"choices": ["x", "y"], "gold": "A"}, {"choices": "xy", "gold": 0}):
        with pytest.raises(UserError, match="'e'"):
            probes.none_of_the_above([{"id": "e", "question": "?"} | broken])
    with pytest.raises(UserError, match="gold is 2"):
        probes.false_question_control([{"id": "e", "question": "?", "choices": ["x", "y"], "gold": 2}])


def test_the_pointwise_score_and_the_names():
    assert probes.points([True, False, False, False]) == pytest.approx((1 - 0.75) / 4)
    assert all(probes.is_probe(f"medmcqa_{name}") for name in probes.PROBES) and not probes.is_probe("medmcqa")


def test_the_probes_of_a_file_are_tasks(tmp_path, capsys):
    rows = [{"question": i["question"], "choices": i["choices"], "answer": "ABC"[i["gold"]]} for i in ITEMS]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["probes", str(tmp_path / "exam.jsonl"), "--out", str(tmp_path / "made")]) == 0
    said = capsys.readouterr().out.split()
    assert [line.rsplit("/", 1)[1] for line in said] == [f"exam_{name}.jsonl" for name in probes.PROBES]
    task = own.task_of(said[0])
    asked = list(prompts.items(task, *records.read(task, None), 0))
    assert probes.is_probe(task.name) and [item.gold for item in asked] == [0, 0, 1]
    assert "A. None of the above\nB. Ulnar\nC. Radial" in asked[0].context
    task = own.task_of(said[2])
    assert [item.gold for item in prompts.items(task, *records.read(task, None), 0)] == [2, 3, 2]
    (tmp_path / "bad.jsonl").write_text('{"question": "?", "choices": ["x", "y"], "answer": "neither"}\n')
    assert cli.main(["probes", str(tmp_path / "bad.jsonl")]) == 2
    told = capsys.readouterr().err
    assert "bad.jsonl, row 1" in told and "neither" in told and told.count("\n") == 1

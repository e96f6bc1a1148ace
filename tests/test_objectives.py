"""bench/objectives.py: the table of students over seeds, and the command line it shares with the ablation."""

import json

import pytest

from distil_jax.errors import UserError
from distil_jax.tables import class_rows


def result_of(bits, digit_bits, classes=("word", "digit")):
    """What the table reads of a run. bits, digit_bits: of the models "teacher", "control" and "jsd"."""

    def model(name):
        by_class = {c: {"bits_per_byte": digit_bits[name], "accuracy": 0.25} for c in classes}
        return {"bits_per_byte": bits[name], "agreement_with_teacher": 0.5, "by_class": by_class}

    apart = {
        key: {"bits_per_byte": of["control"] - of["jsd"], "interval": [-1.0, 1.0]}
        for key, of in (("all", bits), ("digit", digit_bits))
    }
    return {
        "teacher": model("teacher"),
        "student_before": model("teacher"),
        "control": model("control"),
        "variants": {"jsd": model("jsd")},
        "runs": ["control", "jsd"],
        "differences": {"control - jsd": apart["all"]},
        "differences_by_class": {c: {"control - jsd": apart["digit"]} for c in classes},
        "seconds_per_step": {"control": 0.1, "jsd": 0.2},
    }


def test_the_table_has_every_model_seed_and_measure(bench_tool):
    tool = bench_tool("objectives")
    one = result_of({"teacher": 1.0, "control": 1.5, "jsd": 1.4}, {"teacher": 2.0, "control": 3.0, "jsd": 2.5})
    two = result_of({"teacher": 1.0, "control": 1.5, "jsd": 1.6}, {"teacher": 2.0, "control": 3.0, "jsd": 2.0})
    lines = tool.table({0: one, 4: two}).splitlines()
    assert lines[0] == "| " + " | ".join(tool.HEADER) + " |" and lines[0].count("|") == lines[1].count("|") == 10
    assert lines[2] == "| teacher | 0 | 1.0000 |  | 0.5000 | 2.0000 |  | 0.2500 |  |"
    wide = "[-1.0000, +1.0000]"
    assert lines[8:] == [
        f"| jsd | 0 | 1.4000 | +0.1000 {wide} | 0.5000 | 2.5000 | +0.5000 {wide} | 0.2500 | 0.200 |",
        f"| jsd | 4 | 1.6000 | -0.1000 {wide} | 0.5000 | 2.0000 | +1.0000 {wide} | 0.2500 | 0.200 |",
        "| jsd | mean [range] | 1.5000 [1.4000, 1.6000] | +0.0000 [-0.1000, +0.1000] | 0.5000 [0.5000, 0.5000] | "
        "2.2500 [2.0000, 2.5000] | +0.7500 [+0.5000, +1.0000] | 0.2500 [0.2500, 0.2500] | 0.200 [0.200, 0.200] |",
    ]
    wordy = result_of(*[{"teacher": 1.0, "control": 1.5, "jsd": 1.4}] * 2, classes=("word",))
    assert tool.table({0: wordy}).splitlines()[-1] == (
        "| jsd | 0 | 1.4000 | +0.1000 [-1.0000, +1.0000] | 0.5000 |  |  |  | 0.200 |"
    )


def test_seeds_are_run_with_the_overrides_in_their_order(bench_tool, tmp_path, monkeypatch):
    """The command of each seed; what it leaves is read back."""
    tool = bench_tool("several_seeds")
    commands = []

    def run(command, **_):
        commands.append(command)
        place = tmp_path / "all" / f"seed{len(commands) + 1}"
        (place / "evaluate").mkdir(parents=True)
        (place / "summary.json").write_text(json.dumps({"runs": [len(commands)]}))
        facts = {"differences_by_specialty": {"eye": 1}, "differences_by_class": {"digit": 2}, "more": 3}
        (place / "evaluate" / "manifest.json").write_text(json.dumps(facts))

    monkeypatch.setattr(tool.subprocess, "run", run)
    short = ["--config.student.training.steps=200"]
    given = ["--seeds=2,3", f"--workdir={tmp_path / 'all'}", "--config.student.training.steps=7"]
    config, folder, results = tool.run_all(given, f"{tool.TINY}:objectives", "elsewhere", short)
    assert config.student.training.steps == 7 and folder == tmp_path / "all"
    assert results[3] == {"runs": [2], "differences_by_specialty": {"eye": 1}, "differences_by_class": {"digit": 2}}
    assert [command[3:6] for command in commands] == [["run", "--config", f"{tool.TINY}:objectives"]] * 2
    assert commands[1][6:] == [*short, given[2], "--config.seed=3", f"--config.workdir={tmp_path / 'all' / 'seed3'}"]
    with pytest.raises(UserError, match="steps"):
        tool.run_all(["--config.student.training.stpes=7"], f"{tool.TINY}:objectives", "elsewhere")
    assert len(commands) == 2, "a wrong key ends it before the first run"


def test_the_table_by_class_has_every_class_and_model():
    result = result_of({"teacher": 1.0, "control": 1.5, "jsd": 1.4}, {"teacher": 2.0, "control": 3.0, "jsd": 2.5})
    rows = class_rows({"teacher": result["teacher"], "control": result["control"]})
    assert rows[0] == ("", "word", "digit")
    assert rows[1:] == [
        ("teacher", "2.0000 (25.0%)", "2.0000 (25.0%)"),
        ("student, text alone (control)", "3.0000 (25.0%)", "3.0000 (25.0%)"),
    ]

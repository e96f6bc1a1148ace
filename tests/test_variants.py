"""Variants of the objective: what an override may be, which folders a change of the config touches, the ladder."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from distil_jax import evaluate, variants
from distil_jax.config import flatten, load_config, overlaid, track_reads
from distil_jax.errors import UserError
from distil_jax.page.figures import looks
from distil_jax.tables import ladder_rows
from distil_jax.workdir import Workdir

PROJECT = Path(__file__).resolve().parent.parent
TINY = str(PROJECT / "configs" / "tiny.py")


def load(argument="", **overrides):
    return load_config(["--config", TINY + argument, *(f"--config.{k}={v}" for k, v in overrides.items())])[0]


def with_variants(**given):
    config = load()
    with config.unlocked():
        config.variants = ConfigDict(given)
    return config


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_a_variant_has_its_values_in_the_objective_and_changes_nothing_else():
    config = with_variants(hot={"temperature": {"start": 4, "kind": "linear"}, "top_k": 64})
    before, after = flatten(config), flatten(variants.applied(config, "hot"))
    changes = {"temperature.start": 4.0, "temperature.kind": "linear", "top_k": 64}
    assert after == before | {f"objective.{key}": value for key, value in changes.items()}
    assert type(after["objective.temperature.start"]) is float  # an int is taken for a float, as on the command line
    assert flatten(config) == before
    for run in ("teacher", "control", "smoothing", "distilled"):
        assert variants.applied(config, run) is config
    with pytest.raises(AttributeError):
        variants.applied(config, "hot").objective.tau = 1.0  # locked


def test_sections_without_keys_and_values_without_types_survive():
    config = ConfigDict({"a": {"x": 1.0, "none": None}, "empty": {}, "given": {"none": None}}).lock()
    assert overlaid(config, "a", "given").to_dict() == config.to_dict()


def test_a_value_counts_as_read_where_it_stands():
    config = track_reads(with_variants(hot={"temperature": {"start": 4.0}}))
    seen = variants.applied(config, "hot")
    everything = config.unread()
    assert everything == sorted(flatten(config))
    assert (seen.objective.temperature.start, seen.objective.temperature.end, seen.seed) == (4.0, 1.0, 0)
    read = {"variants.hot.temperature.start", "objective.temperature.end", "seed"}
    assert set(everything) - set(config.unread()) == read and seen.unread() == config.unread()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hot": {"temprature": {"start": 4.0}}}, "config.variants.hot.temprature.start: .*mean 'temperature.start'"),
        ({"hot": {"temperature": 4.0}}, "config.variants.hot.temperature: .*is a section, give keys such as 'temp"),
        ({"hot": {"alpha": {"start": {"value": 1.0}}}}, "config.variants.hot.alpha.start.value: .*no key"),
        ({"hot": {"alpha": {"start": "half"}}}, "config.variants.hot.alpha.start is 'half': expected float, like"),
        ({"hot": {"top_k": 1.5}}, r"config.variants.hot.top_k is 1.5: expected int, like config.objective.top_k \(0\)"),
        ({"hot": {"alpha": {"start": True}}}, "config.variants.hot.alpha.start is True: expected float"),
        ({"hot": {"alpha": {"start": None}}}, "config.variants.hot.alpha.start is None: expected float"),
        ({"hot": {"label_smoothing": 0.1}}, "label_smoothing: only the smoothing run reads it"),
        ({"hot": 4.0}, "config.variants.hot is a section"),
        ({"teacher": {}}, "config.variants.teacher: a variant's name"),
        ({"distilled": {}}, "config.variants.distilled: a variant's name"),
        ({"a b": {}}, "config.variants.a b: a variant's name"),
        ({"a/b": {}}, "a variant's name"),
        ({"Hot": {}}, "a variant's name"),
    ],
)
def test_an_override_that_cannot_be_is_one_line_that_names_it(given, said):
    with pytest.raises(UserError, match=said) as caught:
        Workdir(with_variants(**given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"runs": "control,temprature"}, r"config.runs names 'temprature'.*did you mean 'temperature'"),
        ({"runs": "control,kd,kd,attention"}, "config.runs names 'kd' twice"),
        ({"runs": "control,kd"}, r"config.export.run is 'attention', which config.runs \('control', 'kd'\)"),
        ({"export.run": "control"}, "config.export.run is 'control'"),
    ],
)
def test_runs_that_cannot_be_are_one_line_that_names_them(overrides, said):
    with pytest.raises(UserError, match=said) as caught:
        Workdir(load(":ablation", **overrides))
    assert "\n" not in str(caught.value)


# ---- keys ------------------------------------------------------------------------------------------------------------

LATER = {"evaluate", "export", "report"}
TAUGHT = {"distilled", "kd", "temperature", "specialty", "attention"}
STUDENTS = {"control", "smoothing", *TAUGHT}
ALL = {"corpus", "teacher", "projection", *STUDENTS, *LATER}
RUNS = "control,smoothing,distilled,kd,temperature,specialty,attention"


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ({}, set()),
        ({"variants.temperature.temperature.start": 4.0}, {"temperature", *LATER}),
        ({"variants.specialty.specialty_weights": "other=2"}, {"specialty", *LATER}),
        ({"objective.alpha.start": 0.4}, {"distilled", *LATER}),  # the rungs set their own
        ({"objective.temperature.start": 2.0}, {"distilled", "kd", *LATER}),
        ({"objective.divergence": "jsd"}, TAUGHT | LATER),
        ({"objective.top_k": 64}, TAUGHT | LATER),
        ({"objective.skew": 0.2}, TAUGHT | LATER),
        ({"objective.learn_projection": True}, TAUGHT | LATER),
        ({"objective.positions": "roots"}, TAUGHT | LATER),
        ({"objective.attention.pairs": 1}, TAUGHT | LATER),
        ({"objective.beta.start": 0.1}, TAUGHT - {"attention"} | LATER),
        ({"objective.projection_keep": 0.2}, TAUGHT | LATER),
        ({"teacher.dtype": "bfloat16"}, TAUGHT | LATER),
        ({"objective.label_smoothing": 0.2}, {"smoothing", *LATER}),
        ({"objective.specialty_weights": "other=2"}, STUDENTS - {"specialty", "attention"} | LATER),
        ({"objective.block": 256}, STUDENTS | LATER),
        ({"student.training.steps": 7}, STUDENTS | LATER),
        ({"teacher.training.steps": 7}, {"teacher", "projection", *TAUGHT, *LATER}),
        ({"projection.prior": 2.0}, {"projection", *TAUGHT, *LATER}),
        ({"runs": RUNS.replace("kd,temperature", "temperature,kd")}, LATER),
        ({"export.run": "kd"}, {"export", "report"}),
        ({"export.push_to": "a/b"}, set()),
        ({"seed": 1}, ALL - {"corpus"}),
        ({"data.student_length": 128}, ALL),
    ],
)
def test_a_change_remakes_what_reads_it_and_what_is_built_on_that(change, remade):
    before = Workdir(load(":ablation", runs=RUNS))
    after = Workdir(load(":ablation", **({"runs": RUNS} | change)))
    assert {stage for stage in ALL if before.key(stage) != after.key(stage)} == remade


def test_a_variant_that_says_what_the_objective_says_is_still_a_run_of_its_own():
    config = with_variants(same={"top_k": 0}, other={"top_k": 8})
    keys = {run: Workdir(config).key(run) for run in ("distilled", "same", "other")}
    assert len(set(keys.values())) == 3
    # Written or not written, a value of the objective is the same value.
    assert Workdir(with_variants(same={})).key("same") == keys["same"]


# ---- the ladder ------------------------------------------------------------------------------------------------------


def test_every_rung_is_the_one_below_it_and_one_thing_more():
    plain, ladder = load(), load(":ablation")
    own = {"workdir", "runs", "export.run"}
    rest = {k: v for k, v in flatten(ladder).items() if not k.startswith("variants.") and k not in own}
    assert rest == {k: v for k, v in flatten(plain).items() if k not in own}
    assert (plain.workdir, plain.runs, plain.export.run) == (
        "work/tiny",
        ("control", "smoothing", "distilled"),
        "distilled",
    )
    assert ladder.runs == ("control", *variants.taught(ladder.runs)) and ladder.export.run == ladder.runs[-1]
    rungs = [flatten(ladder.variants[run]) for run in variants.taught(ladder.runs)]
    for lower, upper in zip(rungs, rungs[1:], strict=False):
        assert lower.items() < upper.items()
        assert len({key.split(".")[0].split("_")[0] for key in upper.keys() - lower.keys()}) == 1
    # The first rung is the plain recipe's distilled student.
    changed, base = flatten(variants.applied(ladder, "kd").objective), flatten(plain.objective)
    assert changed == base


def test_a_rung_is_set_from_the_command_line_and_the_others_stay():
    config = load(":ablation", **{"variants.temperature.temperature.start": 4})
    starts = {run: variants.applied(config, run).objective.temperature.start for run in config.variants}
    assert starts == {"kd": 1.0, "temperature": 4.0, "specialty": 8.0, "attention": 8.0}
    with pytest.raises(UserError, match="variants.temperature.temperature.start.*expected float"):
        load(":ablation", **{"variants.temperature.temperature.start": "hot"})


def test_an_unknown_argument_names_those_that_there_are():
    known = r"no recipe 'ablatoin'.*none, or ablation, objectives, numbers, .* \(did you mean 'ablation'\?\)"
    with pytest.raises(UserError, match=known) as e:
        load(":ablatoin")
    assert "\n" not in str(e.value) and "UserError" not in str(e.value)
    with pytest.raises(UserError, match="no recipe 'nubmers'.*did you mean 'numbers'"):
        load(":objectives,nubmers")
    with pytest.raises(UserError, match="ablation and objectives.*choose one"):
        load(":objectives,ablation")


def test_arguments_combine_in_any_order_and_numbers_changes_text_and_vocabulary():
    plain, numbers, both = load(), load(":numbers"), load(":numbers,objectives")
    differing = {k for k, v in flatten(numbers).items() if flatten(plain)[k] != v}
    assert differing == {"data.corpus", "student.numerals", "student.vocab_size", "workdir"}
    assert numbers.data.corpus == "frequencies"
    assert both.to_dict() == load(":objectives,numbers").to_dict() and both.workdir == "work/objectives_numbers"
    assert both.data.corpus == "frequencies" and both.runs == load(":objectives").runs


def test_every_rival_changes_the_objective_and_is_trained():
    config = load(":objectives")
    assert set(config.runs) == {"control", "distilled", *config.variants} and len(config.variants) > 1
    objectives = [flatten(variants.applied(config, run).objective) for run in variants.taught(config.runs)]
    assert len({tuple(sorted(o.items())) for o in objectives}) == len(objectives)
    Workdir(config)  # checks them


def test_rungs_are_compared_with_the_untaught_the_teacher_and_the_rung_below():
    runs = ("smoothing", "a", "control", "b")
    assert variants.taught(runs) == ["a", "b"]
    assert [variants.below(runs, run) for run in ("a", "b")] == ["control", "a"]
    assert variants.below(("a", "b"), "a") is None
    of_b = [other for other, run in evaluate.pairs(runs) if run == "b"]
    assert of_b == ["control", "smoothing", "teacher", "student_before", "a"]
    assert evaluate.pairs(("distilled",)) == [("teacher", "distilled"), ("student_before", "distilled")]
    present = evaluate.pairs(("control", "smoothing", "distilled"))
    assert [other for other, _ in present] == ["control", "smoothing", "teacher", "student_before"]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_no_two_curves_look_alike():
    runs = ["teacher", "control", "smoothing", "distilled", *(f"v{i}" for i in range(32))]
    assert len({tuple(sorted(look.items())) for look in looks(runs).values()}) == len(runs)


def summary_of(kd, hot, seconds):
    """What the tables read of a summary. kd, hot: bits per byte."""
    bits = {"control": 1.8, "kd": kd, "hot": hot}
    apart = lambda a, b: {"bits_per_byte": bits[a] - bits[b], "interval": [bits[a] - bits[b] - 0.01, 1.0]}  # noqa: E731
    pairs = (("control", "kd"), ("control", "hot"), ("kd", "hot"))
    return {
        "teacher": {"bits_per_byte": 1.6},
        "student_before": {"bits_per_byte": 3.5},
        "control": {"bits_per_byte": bits["control"]},
        "variants": {name: {"bits_per_byte": bits[name]} for name in ("kd", "hot")},
        "runs": ["control", "kd", "hot"],
        "differences": {f"{a} - {b}": apart(a, b) for a, b in pairs},
        "differences_by_specialty": {"eye": {"control - kd": apart("control", "kd"), "kd - hot": apart("kd", "hot")}},
        "seconds_per_step": {"control": 0.1, "kd": seconds, "hot": None},
    }


def test_the_ladder_of_one_run():
    assert ladder_rows(summary_of(1.7, 1.75, 0.2))[1:] == [
        ("student, kd", "+0.1000 [+0.0900, +1.0000]", "+0.1000 [+0.0900, +1.0000]", "0.200"),
        ("student, hot", "+0.0500 [+0.0400, +1.0000]", "-0.0500 [-0.0600, +1.0000]", ""),
    ]
    alone = summary_of(1.7, 1.75, 0.2) | {"runs": ["control", "kd"]}
    assert len(ladder_rows(alone)) == 1


def test_the_ladder_of_several_seeds_is_one_table(bench_tool):
    tool = bench_tool("ablation")
    results = {0: summary_of(1.7, 1.75, 0.2), 3: summary_of(1.6, 1.75, 0.3)}
    lines = tool.table(results, ["eye"]).splitlines()
    assert lines[0] == (
        "| rung | seed | bits per byte | control - it | the rung below - it | the rung below - it, in eye | "
        "seconds a step | of the control's |"
    )
    assert lines[2:5] == [
        "| teacher | 0 | 1.6000 |  |  |  |  |  |",
        "| teacher | 3 | 1.6000 |  |  |  |  |  |",
        "| teacher | mean [range] | 1.6000 [1.6000, 1.6000] |  |  |  |  |  |",
    ]
    first, second = "+0.1000 [+0.0900, +1.0000]", "+0.2000 [+0.1900, +1.0000]"
    mean = "+0.1500 [+0.1000, +0.2000]"
    assert lines[8:11] == [
        f"| kd | 0 | 1.7000 | {first} | {first} | {first} | 0.200 | 2.00 |",
        f"| kd | 3 | 1.6000 | {second} | {second} | {second} | 0.300 | 3.00 |",
        f"| kd | mean [range] | 1.6500 [1.6000, 1.7000] | {mean} | {mean} | {mean} | 0.250 [0.200, 0.300] | "
        "2.50 [2.00, 3.00] |",
    ]
    assert lines[13].startswith(
        "| hot | mean [range] | 1.7500 [1.7500, 1.7500] | +0.0500 [+0.0500, +0.0500] | -0.1000 [-0.1500, -0.0500]"
    )
    assert len(lines) == 14
    assert len(tool.table({0: results[0]}).splitlines()) == 2 + 4

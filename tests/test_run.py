"""The walk through the whole house: text in, a distilled student out, on real medical definitions at toy size."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

import distil_jax as dj
from distil_jax import cli, evaluate, export, learners, manifest, prepare, project, report, run, score, train
from distil_jax.config import flatten, load_config, track_reads
from distil_jax.data import hpo
from distil_jax.data.loader import Loader
from distil_jax.data.rows import Quarantine
from distil_jax.errors import UserError
from distil_jax.eval import answers, likelihood
from distil_jax.gather import Refusals
from distil_jax.metrics import read_metrics
from distil_jax.models.int8 import cast
from distil_jax.plan import plan
from distil_jax.projection import Projection
from distil_jax.tables import models_of
from distil_jax.tokens.align import ROOT, align_ids
from distil_jax.workdir import Workdir

PROJECT = Path(__file__).resolve().parent.parent
SMALL = {
    "data.student_length": 128,
    "data.teacher_length": 128,
    "data.rows_per_shard": 64,
    "teacher.vocab_size": 640,
    "student.vocab_size": 512,
    "teacher.shape.hidden_size": 32,
    "teacher.shape.intermediate_size": 48,
    "teacher.shape.num_hidden_layers": 2,
    "teacher.shape.head_dim": 16,
    "student.shape.hidden_size": 16,
    "student.shape.intermediate_size": 32,
    "student.shape.num_hidden_layers": 1,
    "student.shape.head_dim": 8,
    **{
        f"{side}.training.{key}": value
        for side in ("teacher", "student")
        for key, value in {"steps": 12, "warmup": 2, "log_every": 2, "evaluate_every": 6, "checkpoint_every": 4}.items()
    },
    "objective.temperature.kind": "exponential",
    "objective.temperature.start": 2.0,
    "projection.fit_rows": 16,
    "projection.fit_steps": 5,
    "evaluation.bootstrap": 50,
    "evaluation.curve_rows": 16,
    "evaluation.batch_size": 8,
    "evaluation.answers": 2,
    "evaluation.answer_tokens": 4,
    "report.calibration_rows": 4,
    "report.turns": 1,
    "report.prompt_tokens": 4,
    "report.new_tokens": 4,
}

HOT = 3.0  # what the variant changes


def config_of(workdir, files="", **overrides):
    """The tiny recipe, small, with a variant for those who train it."""
    settings = SMALL | {"workdir": workdir, "data.files": files} | overrides
    arguments = [f"--config.{key}={value}" for key, value in settings.items()]
    config = load_config(["--config", str(PROJECT / "configs" / "tiny.py"), *arguments])[0]
    with config.unlocked():
        config.variants.hot = ConfigDict({"temperature": {"start": HOT}})
    return config


@pytest.fixture(scope="session")
def definitions(tmp_path_factory) -> Path:
    """Four hundred real definitions as a user's JSONL file, with a few rows that cannot be used."""
    folder = tmp_path_factory.mktemp("rows")
    with Quarantine(folder / "quarantine.jsonl") as quarantine:
        rows = hpo.load_corpus(quarantine).rows
    file = folder / "definitions.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for row in rows[:: len(rows) // 400]:
            record = {"prompt": row.prompt, "completion": row.completion, "specialty": row.specialty}
            out.write(json.dumps(record | {"source": "HPO", "licence": "HPO"}) + "\n")
        out.write('{"prompt": "broken\n')
        out.write(json.dumps({"prompt": "p", "completion": " the mark ▁ does not round-trip"}) + "\n")
        out.write(json.dumps({"prompt": "p", "completion": " too long" * 400}) + "\n")
        out.write(json.dumps({"prompt": "Say <bos> and <|eot_id|>", "completion": " <eos> stays text."}) + "\n")
    return file


@pytest.fixture(scope="session")
def finished(tmp_path_factory, definitions):
    """A whole run, with the config keys that nothing read."""
    runs = "control,smoothing,distilled,hot"
    config = track_reads(config_of(tmp_path_factory.mktemp("run") / "work", definitions, runs=runs))
    summary = run.main(config)
    return config, summary, config.unread()


def test_every_key_of_the_config_is_read(finished):
    assert finished[2] == []


def test_the_summary_says_what_was_promised(finished):
    config, summary, _ = finished
    assert summary == json.loads((Path(config.workdir) / "summary.json").read_text())
    for name in ("teacher", "student_before", "control", "smoothing", "distilled"):
        for key in ("bits_per_byte", "token_accuracy", "agreement_with_teacher", "parameters"):
            assert summary[name][key] > 0 or (name == "student_before" and key != "parameters")
    assert summary["teacher"]["agreement_with_teacher"] == 1
    low, high = summary["difference"]["interval"]
    assert low <= summary["difference"]["bits_per_byte"] <= high
    paired = summary["control"]["bits_per_byte"] - summary["distilled"]["bits_per_byte"]
    assert summary["difference"]["bits_per_byte"] == pytest.approx(paired)
    assert 0 < summary["projection"]["ip_kl"] <= 1 + 1e-6 and len(summary["projection"]["ip_kl_interval"]) == 2
    assert len(summary["projection"]["ip_bpb_interval"]) == 2
    roles = [summary["alignment"][role] for role in ("root", "interior", "crossing")]
    assert sum(roles) == pytest.approx(1, abs=1e-4)
    assert set(summary["seconds"]) >= {"corpus", "teacher", "projection", "control", "distilled", "evaluate", "total"}
    assert summary["peak_memory_bytes"] > 2**20
    page = (Path(config.workdir) / "report" / "index.html").read_text()
    assert "<svg" in page and "distilled" in page and "Research only" in page
    for section in ("results", "specialties", "reliability", "training", "speed", "projection", "alignment",
                    "attention", "answers", "data", "settings"):  # fmt: skip
        assert f'<section id="{section}">' in page
    assert summary["speed"]["protocol"]["turns"] == 1 and set(summary["speed"]["models"]) == {"teacher", "distilled"}


def test_what_the_page_shows_of_the_models_is_what_they_say(finished):
    config, summary, _ = finished
    work = Workdir(config)
    told = json.loads((work / "report" / "exhibits.json").read_text())
    every = {"teacher", "student_before", "control", "smoothing", "distilled", "hot"}
    assert set(told["answers"][0]) == {"prompt", "reference", *every} and set(told["calibration"]) == every
    assert told["config"]["variants.hot.temperature.start"] == HOT
    # How sure, from whole logits of the same rows.
    loader = Loader(work / "corpus", work.require("corpus")["shards"]["test"], 8, 0)
    (batch,) = loader.sweep(rows=4)
    for name, side in (("teacher", "teacher"), ("distilled", "student")):
        model, params = dj.load_pretrained(work / name / "model")
        fields = [batch[f"{side}_{field}"] for field in ("tokens", "segment_ids", "positions")]
        p = np.asarray(jax.nn.softmax(jax.jit(model.apply)(params, *fields), axis=-1))
        at = batch[f"{side}_weights"] > 0
        found = told["calibration"][name]
        assert found["tokens"] == at.sum() == sum(count for count, *_ in found["curve"])
        assert found["confidence"] == pytest.approx(p.max(-1)[at].mean(), rel=1e-4)
        assert found["accuracy"] == pytest.approx((p.argmax(-1) == batch[f"{side}_targets"])[at].mean())
        assert {k: v for k, v in found.items() if k != "curve"} == summary["calibration"][name]
    # Attention over the same bytes: rows are distributions over what came before.
    maps, labels = told["sentence"]["attention"]["maps"], told["sentence"]["attention"]["labels"]
    for side in ("teacher", "student"):
        for one in np.array(maps[side]):
            assert one.shape == (len(labels), len(labels)) and not np.triu(one, 1).any()
            assert one.sum(axis=1) == pytest.approx(1, abs=2e-3)
    tables = learners.tables_of(work)
    ids = tables["teacher"].encode(told["sentence"]["text"])
    model, params = dj.load_pretrained(work / "teacher" / "model")
    ids = np.concatenate([[tables["teacher"].roles["bos"]], ids])
    layer = told["sentence"]["attention"]["layers"]["teacher"][0]
    maps_of = jax.jit(lambda params, ids: model.hidden(params, ids, attention_layers=(layer,))[1])
    whole = maps_of(params, jnp.asarray(ids)[None])
    # The first groups are the first tokens on both sides: bos alone, and what attends to it.
    assert maps["teacher"][0][1][0] == pytest.approx(float(whole[layer][0, :, 1, 0].mean()), abs=1e-3)


@pytest.mark.parametrize("name", ["teacher", "distilled"])
def test_the_measures_are_those_of_unpacked_documents(finished, name):
    """Every held-out document by itself, with whole logits: no packing, no streamed head, no shards."""
    config, summary, _ = finished
    work = Workdir(config)
    mesh, tables = learners.mesh_of(config), learners.tables_of(work)
    side = "teacher" if name == "teacher" else "student"
    models = {"teacher": learners.trained(work, "teacher", mesh), "student": learners.trained(work, "distilled", mesh)}
    applied = {s: jax.jit(model.apply) for s, (model, _) in models.items()}
    first_piece = Projection.load(work / "projection", **tables).best()
    documents = map(json.loads, (work / "corpus" / "documents.jsonl").read_text().splitlines())
    totals = np.zeros(4)  # bits, root positions, right, agreeing
    size = 0
    for d in (d for d in documents if d["split"] == "test"):
        ids, start, log_p = {}, {}, {}
        for s, table in tables.items():
            prompt, completion = table.encode_batch([d["prompt"], d["completion"]])
            ids[s], start[s] = np.concatenate([prompt, completion]), len(prompt)
            padded = np.zeros((1, 128), np.int32)
            padded[0, : 1 + len(ids[s])] = [table.roles["bos"], *ids[s]]
            log_p[s] = np.asarray(jax.nn.log_softmax(applied[s](models[s][1], padded)[0]))[: len(ids[s])]
        own = np.arange(start[side], len(ids[side]))
        totals[0] -= log_p[side][own, ids[side][own]].sum() / np.log(2)
        size += len(d["completion"].encode())
        a = align_ids(ids["student"], ids["teacher"], tables["student"], tables["teacher"])
        roots = np.flatnonzero((a.role == ROOT) & (np.arange(len(a.role)) >= start["student"]))
        says = {
            "student": log_p["student"][roots].argmax(1),
            "teacher": log_p["teacher"][a.teacher_index[roots]].argmax(1),
        }
        true = {"student": ids["student"][roots], "teacher": ids["teacher"][a.teacher_index[roots]]}
        agree = says["student"] == first_piece[says["teacher"]] if side == "student" else np.ones(len(roots))
        totals[1:] += len(roots), (says[side] == true[side]).sum(), agree.sum()
    got = summary[name]
    assert got["bits_per_byte"] == pytest.approx(totals[0] / size, rel=1e-4)
    assert got["token_accuracy"] == pytest.approx(totals[2] / totals[1], abs=0.005)
    assert got["agreement_with_teacher"] == pytest.approx(totals[3] / totals[1], abs=0.005)


def test_what_a_student_keeps_of_its_teacher_is_told_by_specialty_and_class(finished):
    config, summary, _ = finished
    evaluated = Workdir(config).require("evaluate")
    assert evaluated["retention"].keys() == {"student_before", *config.runs}
    for name, kept in evaluated["retention"].items():
        m, teacher = models_of(summary)[name], summary["teacher"]
        assert kept["token_accuracy_retained"] == pytest.approx(m["token_accuracy"] / teacher["token_accuracy"])
        assert kept["agreement_with_teacher"] == pytest.approx(m["agreement_with_teacher"])
        for parts in (kept["by_class"], kept["by_specialty"]):
            assert sum(part["positions"] for part in parts.values()) == kept["positions"]
            agreed = sum(part["positions"] * part["agreement_with_teacher"] for part in parts.values())
            assert agreed / kept["positions"] == pytest.approx(m["agreement_with_teacher"])
        low, high = kept["kl_to_teacher_interval"]
        assert 0 < low <= kept["kl_to_teacher"] <= high
    taught, control, before = (
        evaluated["retention"][name]["kl_to_teacher"] for name in ("distilled", "control", "student_before")
    )
    assert taught < control < before


def test_unusable_rows_are_in_the_quarantine_and_counted(finished):
    config, summary, _ = finished
    lines = (Path(config.workdir) / "corpus" / "quarantine.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    counts = summary["corpus"]["quarantined"]
    assert {reason: reasons.count(reason) for reason in set(reasons)} == counts
    assert counts["does not round-trip"] == 1 and counts["too long"] >= 1 and len(counts) == 3
    used = sum(summary["corpus"]["rows"].values())
    assert used + len(lines) == len(Path(config.data.files).read_text().splitlines())


def test_the_export_loads_in_transformers_with_the_same_logits_and_text(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, summary, _ = finished
    theirs = AutoModelForCausalLM.from_pretrained(summary["export"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(summary["export"])
    work = Workdir(config)
    model, params = learners.trained(work, "distilled", learners.mesh_of(config))
    text = "Question: What is Ageusia?\nAnswer: A complete loss of taste, 100 %."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    table = dj.ByteTable.from_tokenizer(summary["export"])
    assert ids == table.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    ours = np.asarray(model.apply(params, jnp.asarray(ids)[None]))[0]
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor([ids])).logits[0].numpy(), ours, atol=1e-4)
        # Greedy text, from the beginning-of-sequence token on, as transformers writes it.
        start = torch.tensor([[table.roles["bos"], *ids]])
        out = theirs.generate(start, max_new_tokens=6, do_sample=False)[0, start.shape[1] :].tolist()
    assert dj.generate(model, params, table, [text], max_new_tokens=6) == [
        table.decode_bytes([i for i in out if table.is_text[i]]).decode(errors="replace")
    ]


def test_a_second_run_skips_everything_and_a_changed_key_remakes_only_what_reads_it(finished):
    config, summary, _ = finished
    work = Workdir(config)
    before = {stage: (work / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}
    assert run.main(config) == summary
    assert before == {stage: (work / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}
    changed = Workdir(config_of(config.workdir, config.data.files, **{"objective.alpha.start": 0.9}))
    still = {stage for stage in STAGES if changed.done(stage)}
    assert still == {"corpus", "teacher", "projection", "control", "smoothing"}  # those without a teacher have no alpha


STAGES = ("corpus", "teacher", "projection", "control", "smoothing", "distilled", "hot", "evaluate", "export", "report")
# Read in training, and no part of what is made: where, on what, in which form, beside which other runs, in which pieces
# it is scored.
HOW_NOT_WHAT = {"workdir", "mesh", "attention", "runs", "export.run", "evaluation.batch_size"}
HOW_NOT_WHAT |= {"teacher.spread", "watch.hang_seconds", "watch.profile", "watch.tensorboard", "watch.wandb"}
HOW_NOT_WHAT |= {"data.files"}  # in the key by size and time of each file
# Say which stages there are; in the keys of those that need the teacher, or learn from its scores.
HOW_NOT_WHAT |= {"teacher.adapt", "teacher.scores"}


def read_but_not_in_the_key(config, run):
    """The keys that training a run has read although its folder would stay valid if they changed."""
    key = Workdir(config).key(run)

    def matters(name):
        changed = ConfigDict(config.to_dict())
        section, _, last = name.rpartition(".")
        place = changed[section] if section else changed
        value = place[last]
        place[last] = value + "x" if isinstance(value, str) else not value if isinstance(value, bool) else value + 1
        try:
            return Workdir(changed).key(run) != key
        except UserError:
            return True  # the name of a file or source that there is not

    read = flatten(config).keys() - set(config.unread()) - HOW_NOT_WHAT
    return {name for name in read if not matters(name)}


def result_of(folder):
    """What training left: every metrics line without its clock, and the weights' bytes."""
    lines = [{k: v for k, v in m.items() if k != "time"} for m in read_metrics(folder / "metrics.jsonl")]
    return lines, (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def corpus_only(finished, tmp_path_factory):
    """Makes work folders that hold the finished stages before the students, for training runs of their own."""
    config, *_ = finished

    def make(**overrides):
        folder = tmp_path_factory.mktemp("again") / "work"
        for stage in ("corpus", "tokenizers", "teacher", "projection"):
            shutil.copytree(Path(config.workdir) / stage, folder / stage)
        return config_of(folder, config.data.files, **overrides)

    return make


def test_the_same_seed_repeats_the_run_and_another_seed_does_not(finished, corpus_only):
    config = track_reads(corpus_only())
    train.train(config, "distilled")
    assert not read_but_not_in_the_key(config, "distilled")
    first, again = result_of(Path(finished[0].workdir) / "distilled"), result_of(Path(config.workdir) / "distilled")
    assert first == again
    other = corpus_only(seed=1)
    with pytest.raises(UserError, match="run `distil-jax"):
        train.train(other, "distilled")  # the teacher and W belong to seed 0
    other = track_reads(other)
    train.train(other, "control")
    assert not read_but_not_in_the_key(other, "control")
    control = Path(finished[0].workdir) / "control"
    assert result_of(Path(other.workdir) / "control")[1] != result_of(control)[1]


def test_a_variant_is_the_distilled_student_of_its_own_objective(finished, corpus_only):
    config, summary, _ = finished
    work, same = Workdir(config), corpus_only(**{"objective.temperature.start": HOT})
    train.train(same, "distilled")
    assert result_of(work / "hot") == result_of(Path(same.workdir) / "distilled")
    assert result_of(work / "hot") != result_of(work / "distilled")
    hot = read_metrics(work / "hot" / "metrics.jsonl")
    assert [m["temperature"] for m in hot if m["step"] == 1 and "loss" in m] == [HOT]
    # It stands in every result, beside the control and the rung below.
    models = models_of(summary)
    assert list(models) == ["teacher", "student_before", "control", "smoothing", "distilled", "hot"]
    others = ("control", "smoothing", "teacher", "student_before")
    names = [*(f"{o} - distilled" for o in others), *(f"{o} - hot" for o in (*others, "distilled"))]
    assert list(summary["differences"]) == names
    for name in names:
        one, other = (models[model]["bits_per_byte"] for model in name.split(" - "))
        assert summary["differences"][name]["bits_per_byte"] == pytest.approx(one - other)
    assert set(summary["seconds_per_step"]) == {"control", "smoothing", "distilled", "hot"}
    assert all(0 < seconds < 60 for seconds in summary["seconds_per_step"].values())
    page = (work / "report" / "index.html").read_text()
    assert "student, hot" in page and f"hot: temperature.start {HOT}" in page and "Rung by rung" in page


def test_every_model_answers_the_benchmarks_and_any_checkpoint_can(finished, tmp_path, capsys):
    """config.evaluation.tasks: one more part of the stage, in its key; a checkpoint scores as the model that it is."""
    config, *_ = finished
    folder = tmp_path / "work"
    shutil.copytree(config.workdir, folder)
    rows = [{"question": f"Is {w} one?", "choices": ["yes", "no"], "answer": i % 2} for i, w in enumerate("abcdef")]
    file = tmp_path / "ward.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"evaluation.tasks": file, "evaluation.limit": 5, "runs": "distilled"}
    asked = config_of(folder, config.data.files, **more)
    assert Workdir(asked).done("evaluate") is None and Workdir(asked).done("distilled")
    found = evaluate.main(asked)
    assert set(found["benchmarks"]) == {"teacher", "student_before", "distilled"} == set(found["models"])
    said = capsys.readouterr()
    assert "ward" in said.out and "not searched for the questions" in said.err
    for name, told in found["benchmarks"].items():
        (facts,) = told["tasks"]
        model, (a,) = answers.load(folder / "evaluate" / "answers" / f"{name}.json")
        assert (model, a.task, facts["items"], facts["acc"]) == (name, "ward", 5, a.right().mean())
    # The newest checkpoint is what the run left, an earlier one is not; a damaged one is passed over.
    said = {}
    command = [f"--config.{k}={v}" for k, v in (SMALL | {"workdir": folder, "data.files": config.data.files}).items()]
    command = ["evaluate", "--config", str(PROJECT / "configs" / "tiny.py"), *command, "--run", "distilled"]
    for step in (12, 8):
        out = tmp_path / str(step)
        more = ["--tasks", str(file), "--limit", "5", "--out", str(out), *(["--step", "8"] if step == 8 else [])]
        assert cli.main([*command, *more]) == 0
        said[step] = answers.load(out / "answers" / f"distilled-{step}.json")[1][0].loglikelihood_IxC
    _, (left,) = answers.load(folder / "evaluate" / "answers" / "distilled.json")
    np.testing.assert_allclose(said[12], left.loglikelihood_IxC, atol=1e-4)
    assert np.abs(said[8] - said[12]).max() > 1e-3
    assert cli.main([*command, "--tasks", str(file), "--step", "5"]) == 2
    assert "no checkpoint of step 5; it has 8, 12" in capsys.readouterr().err
    file.write_text(file.read_text() + json.dumps(rows[0]) + "\n")
    assert Workdir(asked).done("evaluate") is None  # another file, another result


def test_the_parts_of_the_test_text_are_the_whole(finished):
    """Specialties: bits per byte and differences, weighted by bytes, sum to those of all documents."""
    config, summary, _ = finished
    work = Workdir(config)
    evaluated = work.require("evaluate")
    documents = map(json.loads, (work / "corpus" / "documents.jsonl").read_text().splitlines())
    size = Counter()
    for d in (d for d in documents if d["split"] == "test"):
        size[d["specialty"]] += len(d["completion"].encode())
    by = evaluated["bits_per_byte_by_specialty"]
    assert (
        by.keys() == size.keys() == evaluated["differences_by_specialty"].keys()
        and sum(size.values()) == evaluated["bytes"]
    )
    for model, measures in models_of(summary).items():
        total = sum(size[name] * by[name][model] for name in size)
        assert total / evaluated["bytes"] == pytest.approx(measures["bits_per_byte"], rel=1e-9)
    for name, differences in evaluated["differences_by_specialty"].items():
        assert list(differences) == ["control - distilled", "distilled - hot"]
        low, high = differences["distilled - hot"]["interval"]
        assert by[name]["distilled"] - by[name]["hot"] == pytest.approx(differences["distilled - hot"]["bits_per_byte"])
        assert low <= high


def test_the_classes_of_token_are_the_whole(finished):
    """Bits per byte by class, weighted by bytes, sum to those of all text; differences are those of the models."""
    config, summary, _ = finished
    evaluated = Workdir(config).require("evaluate")
    sizes = evaluated["classes"]
    assert {"word", "digit", "punctuation"} <= sizes.keys() == evaluated["differences_by_class"].keys()
    assert sum(size["bytes"] for size in sizes.values()) == evaluated["bytes"]
    models = models_of(summary)
    for measures in models.values():
        by = measures["by_class"]
        total = sum(sizes[kind]["bytes"] * by[kind]["bits_per_byte"] for kind in sizes)
        assert total / evaluated["bytes"] == pytest.approx(measures["bits_per_byte"], rel=1e-9)
        for kind in sizes:
            low, high = by[kind]["accuracy_interval"]
            assert 0 <= low <= by[kind]["accuracy"] <= high <= 1
    for kind, differences in evaluated["differences_by_class"].items():
        assert differences.keys() == evaluated["differences"].keys()
        for pair, found in differences.items():
            other, run = pair.split(" - ")
            for key in ("bits_per_byte", "accuracy"):
                wanted = models[other]["by_class"][kind][key] - models[run]["by_class"][kind][key]
                assert found[key] == pytest.approx(wanted, abs=1e-12)
    page = (Workdir(config) / "report" / "index.html").read_text()
    assert "<th>digit</th>" in page and f"{models['distilled']['by_class']['digit']['bits_per_byte']:.4f}" in page


def test_a_rung_that_would_fail_stops_the_first_run(corpus_only):
    config = corpus_only(runs="control,distilled,hot")
    with config.unlocked():
        config.variants.hot.temperature.start = 0.5  # below the end
    with pytest.raises(UserError, match="hot: an exponential schedule falls"):
        train.train(config, "control")


def test_another_run_is_exported_without_training_anything(finished, tmp_path):
    config, summary, _ = finished
    shutil.copytree(config.workdir, tmp_path / "work")
    runs = "control,smoothing,distilled,hot"
    other = config_of(tmp_path / "work", config.data.files, runs=runs, **{"export.run": "hot"})
    work = Workdir(other)
    assert [stage for stage in STAGES if not work.done(stage)] == ["export", "report"]
    again = run.main(other)
    weights = load_file(Path(again["export"]) / "model.safetensors")
    for name, array in load_file(work / "hot" / "model" / "model.safetensors").items():
        np.testing.assert_array_equal(weights[name], array)
    assert again["difference"]["of"] == "control - hot" and again["differences"] == summary["differences"]
    card = (Path(again["export"]) / "README.md").read_text()
    assert f"temperature tau {HOT} to 1.0" in card and "distilled - hot" in card and "control - distilled" not in card


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_killed_ends_with_the_numbers_of_an_undisturbed_one(finished, corpus_only, how):
    """A real process, stopped in the middle, then the same command again."""
    config = corpus_only()
    arguments = [f"--config.{key}={value}" for key, value in SMALL.items()]
    arguments += [f"--config.workdir={config.workdir}", f"--config.data.files={config.data.files}"]
    code = (
        "import sys; from distil_jax.config import load_config; from distil_jax import train, step; import time\n"
        "make = step.make_step\n"
        "def slow(*a, **k):\n"
        "    f = make(*a, **k)\n"
        "    return lambda *b: (time.sleep(0.3), f(*b))[1]\n"
        "train.make_step = slow\n"
        "train.train(load_config(sys.argv[1:])[0], 'distilled')"
    )
    tiny = str(PROJECT / "configs" / "tiny.py")
    process = subprocess.Popen([sys.executable, "-c", code, "--config", tiny, *arguments], cwd=PROJECT)
    metrics = Path(config.workdir) / "distilled" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and '"step": 6' in metrics.read_text():
            break
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be stopped"
    os.kill(process.pid, how)
    process.wait(timeout=120)
    assert manifest.read(Path(config.workdir) / "distilled") is None
    facts = train.train(config, "distilled")
    assert 4 <= facts["resumed_at"] < 12
    assert result_of(Path(config.workdir) / "distilled") == result_of(Path(finished[0].workdir) / "distilled")


def test_too_many_updates_that_are_not_finite_end_the_run_and_name_the_rows(corpus_only):
    config = corpus_only(**{"student.training.learning_rate": 1e38, "student.training.max_skipped": 2})
    with pytest.raises(
        UserError, match=r"3 updates were not finite, the last by step \d+, whose batch holds documents \d+,"
    ):
        train.train(config, "control")


@pytest.mark.parametrize("run", ["teacher", "control", "distilled"])
@pytest.mark.parametrize("mesh", ["data:8", "data:2,fsdp:2,tensor:2"])
def test_a_plan_describes_the_arguments_of_the_step_that_training_runs(corpus_only, monkeypatch, run, mesh):
    """The real state, frozen part and batch of a run, caught at its first step, against the plan's descriptions."""
    config = corpus_only(mesh=mesh)
    caught = {}

    class Caught(Exception):
        pass

    def catching(*args, **kwargs):
        def first(state, frozen, batch):
            caught.update(state=state, frozen=frozen, batch=batch)
            raise Caught

        return first

    monkeypatch.setattr(train, "make_step", catching)
    if run == "teacher":
        with config.unlocked():
            config.teacher.training.steps += 1  # another run than the one that is there
    with pytest.raises(Caught):
        train.train(config, run)
    planned = plan(config, run, learners.mesh_of(config))
    estimated = ("projection", "inside", "teacher_rows", "specialty_weights_S")  # in them the number of entries is
    real = {"state": caught["state"], "batch": caught["batch"]}
    real["frozen"] = caught["frozen"]._replace(**dict.fromkeys(estimated))
    described = {"state": planned.state, "batch": planned.batch}
    described["frozen"] = planned.frozen._replace(**dict.fromkeys(estimated))
    assert jax.tree.structure(real) == jax.tree.structure(described)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(real), jax.tree.leaves(described), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (path, a.sharding, b.sharding)
    if (W := planned.frozen.projection) is not None and caught["frozen"].projection.rest is None:
        planned = planned._replace(frozen=planned.frozen._replace(projection=W._replace(rest=None)))
    for name in estimated:  # the same kinds of array, of other lengths
        a, b = getattr(caught["frozen"], name), getattr(planned.frozen, name)
        assert jax.tree.structure(a) == jax.tree.structure(b), name
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert (x.ndim, x.dtype) == (len(y.shape), y.dtype) and x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_the_best_point_of_the_curve_is_what_a_run_leaves_if_asked(corpus_only):
    """The rate grows until the student forgets what it had learned; taken up again before, the run leaves the same."""
    settings = {
        "learning_rate": 0.2,
        "end_fraction": 20.0,
        "keep_best": True,
        "evaluate_every": 1,
        "checkpoint_every": 4,
    }
    wild = {f"student.training.{key}": value for key, value in settings.items()}
    config = corpus_only(**wild)
    facts = train.train(config, "control")
    folder = Path(config.workdir) / "control"
    curve = {
        m["step"]: m["validation_bits_per_byte"] for m in read_metrics(folder / "metrics.jsonl") if "loss" not in m
    }
    assert facts["best_step"] == min(curve, key=curve.get) and 0 < facts["best_step"] < 12
    assert facts["validation_bits_per_byte"] == curve[facts["best_step"]] < curve[12]
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "manifest.json").unlink()
    for step in (p for p in (folder / "checkpoints").iterdir() if p.name.isdigit() and int(p.name) > 8):
        shutil.rmtree(step)
    again = train.train(config, "control")
    assert again["resumed_at"] == 8 and again["best_step"] == facts["best_step"]
    assert (folder / "model" / "model.safetensors").read_bytes() == weights


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, definitions):
    theirs = tmp_path / "work" / "corpus" / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    assert "not ours" in bad(tmp_path, definitions)
    assert theirs.read_text() == "years of work"


def test_a_stage_without_its_inputs_says_which_command_makes_them(tmp_path, definitions):
    config = config_of(tmp_path / "work", definitions)
    for stage in (lambda: train.train(config, "control"), lambda: evaluate.main(config), lambda: report.main(config)):
        with pytest.raises(UserError, match="run `distil-jax prepare`|run `distil-jax"):
            stage()


def exchanged(folder: Path) -> None:
    """Each of two tokenizers in the place of the other."""
    (folder / "teacher").rename(folder / "between")
    (folder / "student").rename(folder / "teacher")
    (folder / "between").rename(folder / "student")


def test_tokenizers_that_are_not_those_of_the_corpus_are_refused_by_every_stage(finished, definitions, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(Path(finished[0].workdir), work)
    config = config_of(work, definitions, runs="control,smoothing,distilled,hot")
    exchanged(work / "tokenizers")
    made = {
        "teacher": lambda: train.train(config, "teacher"),
        "control": lambda: train.train(config, "control"),
        "projection": lambda: project.main(config),
        "scores": lambda: score.main(config),
        "evaluate": lambda: evaluate.main(config),
        "export": lambda: export.make(config),
        "report": lambda: report.main(config),
    }
    wrong = (
        rf"the (teacher|student)'s tokenizer in {work}/tokenizers/\1 is the one that {work}/corpus was made with for "
    )
    for stage, make in made.items():
        shutil.rmtree(work / stage, ignore_errors=True)
        with pytest.raises(UserError, match=wrong + "the (teacher|student): the two are exchanged. Put the"):
            make()
        shutil.rmtree(work / stage, ignore_errors=True)
        if (Path(finished[0].workdir) / stage).exists():
            shutil.copytree(Path(finished[0].workdir) / stage, work / stage)
    exchanged(work / "tokenizers")
    backwards = [line[::-1] for line in definitions.read_text(encoding="utf-8").splitlines()]
    prepare.train_tokenizer(config, "student", backwards, work / "tokenizers" / "student")
    with pytest.raises(UserError, match="the student's tokenizer in .* is not the one that .*corpus was made with"):
        train.train(config_of(work, definitions, seed=1), "control")


def test_exchanged_paths_are_named(finished, definitions, tmp_path):
    run_of = Workdir(finished[0])
    paths = {"teacher.path": run_of / "teacher" / "model", "student.path": run_of / "control" / "model"}
    mine = config_of(tmp_path / "work", definitions, **paths)
    prepare.main(mine)
    turned = config_of(tmp_path / "work", definitions, **dict(zip(paths, reversed(paths.values()), strict=True)))
    for stage in (lambda: train.train(turned, "control"), lambda: project.main(turned), lambda: evaluate.main(turned)):
        with pytest.raises(
            UserError, match="teacher and student are exchanged: it was made with teacher.path='.*prepare"
        ):
            stage()
    other = config_of(tmp_path / "work", definitions, **{"teacher.path": paths["teacher.path"]})
    with pytest.raises(UserError, match=r"another config \(it was made with student.path=.*model' and not ''\): run"):
        train.train(other, "control")


def test_a_teacher_and_a_student_of_ones_own(finished, definitions, tmp_path):
    """Local Hugging Face directories with their own tokenizers: nothing is trained but the student."""
    config, *_ = finished
    work = Workdir(config)
    paths = {"teacher.path": work / "teacher" / "model", "student.path": work / "control" / "model"}
    mine = config_of(tmp_path / "work", definitions, **paths, runs="control,distilled")
    summary = run.main(mine)
    assert not (tmp_path / "work" / "teacher").exists() and not (tmp_path / "work" / "tokenizers").exists()
    assert summary["teacher"]["bits_per_byte"] == pytest.approx(finished[1]["teacher"]["bits_per_byte"], rel=1e-5)
    # The untouched student is the checkpoint that was brought.
    before = summary["student_before"]["bits_per_byte"]
    assert before == pytest.approx(finished[1]["control"]["bits_per_byte"], rel=1e-5)
    assert "smoothing" not in summary


def test_the_public_corpus_goes_the_same_way(tmp_path):
    config = config_of(tmp_path / "work")
    read, provenance, expected = prepare.rows_to_read(config)
    rows = list(read(Refusals(tmp_path / "q.jsonl")))
    assert len(rows) > 15_000 and expected >= len(rows) and len({row.specialty for row in rows}) >= 23
    assert "Human Phenotype Ontology" in provenance["acknowledgement"] and provenance["version"]


def bad(tmp_path, definitions, **overrides):
    with pytest.raises(UserError) as error:
        prepare.main(config_of(tmp_path / "work", definitions, **overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_line_that_names_it(tmp_path, definitions):
    assert "nowhere.jsonl" in bad(tmp_path, tmp_path / "nowhere.jsonl")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"promt": "a", "completion": "b"}\n')
    assert "wrong.jsonl" in bad(tmp_path, wrong) and "prompt" in bad(tmp_path, wrong)
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a single row", "split": "train"}\n')
    assert "validation split is empty" in bad(tmp_path, few)
    folder = tmp_path / "model"
    folder.mkdir()
    assert "config.json is missing" in bad(tmp_path, definitions, **{"teacher.path": folder})
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    assert "mamba" in bad(tmp_path, definitions, **{"teacher.path": folder})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "tokenizer" in bad(tmp_path, definitions, **{"teacher.path": folder})
    assert "nowhere" in bad(tmp_path, definitions, **{"student.path": tmp_path / "nowhere"})
    assert "student_length" in bad(tmp_path, definitions, **{"data.student_length": 4, "data.teacher_length": 4})
    with pytest.raises(UserError, match="export.run is 'distilled', which config.runs .*'control'"):
        Workdir(config_of(tmp_path / "work", definitions, runs="control"))


def test_prompts_that_cannot_be_continued_are_refused(finished):
    config, *_ = finished
    model, params = learners.trained(Workdir(config), "control", learners.mesh_of(config))
    table = dj.ByteTable.from_tokenizer(Workdir(config) / "control" / "model")
    with pytest.raises(UserError, match="no prompt"):
        dj.generate(model, params, table, [])
    with pytest.raises(UserError, match="context"):
        dj.generate(model, params, table, ["a"], max_new_tokens=5000)
    # Prompts of different lengths do not disturb each other.
    both = dj.generate(
        model, params, table, ["Question: What", "Question: What is Ageusia?\nAnswer:"], max_new_tokens=5
    )
    assert both[0] == dj.generate(model, params, table, ["Question: What"], max_new_tokens=5)[0]
    assert len(jax.devices()) == 8


def test_a_teacher_in_8_bits_keeps_its_perplexity(finished):
    config, *_ = finished
    work = Workdir(config)
    mesh = learners.mesh_of(config)
    loader = Loader(work / "corpus", work.require("corpus")["shards"]["test"], 8, 0)
    nats = {}
    for dtype in ("float32", "int8"):
        model, params = learners.teacher(work, mesh, dtype)
        scorer = likelihood.make_scorer(model, "teacher", mesh=mesh)
        nats[dtype] = likelihood.sweep(scorer, cast(params, "float32"), loader.sweep(), mesh)["nats"].astype(np.float64)
    tokens = np.count_nonzero(nats["float32"])
    perplexity = {dtype: np.exp(n.sum() / tokens) for dtype, n in nats.items()}
    assert 0 < abs(perplexity["int8"] / perplexity["float32"] - 1) < 0.005


def test_the_exported_student_answers_by_its_config(finished, capsys):
    config, summary, _ = finished
    arguments = ["--config", str(PROJECT / "configs" / "tiny.py"), f"--config.workdir={config.workdir}"]
    assert cli.main(["generate", *arguments, "--prompt", "Question: What", "--max-new-tokens", "5"]) == 0
    model, params = dj.load_pretrained(summary["export"])
    assert (
        capsys.readouterr().out
        == dj.generate(model, params, summary["export"], ["Question: What"], max_new_tokens=5)[0] + "\n"
    )


def widen(work):
    """Gives every teacher token of W a second student token: at this size the corpus shows just one."""
    W = Projection.load(work / "projection", **learners.tables_of(work))
    assert (W.ids[:, 1:] < 0).all()
    ids, logits = W.ids.copy(), W.logits.copy()
    ids[:, 1] = np.where(W.mapped, (ids[:, 0] + 7) % W.student_vocab, -1)
    logits[:, 1] = logits[:, 0] - 1
    dataclasses.replace(W, ids=ids, logits=logits, start_logits=logits).save(work / "projection")


def test_every_part_of_the_objective_on_spread_vocabularies(finished, tmp_path):
    """The distilled run again with a W that learns, attention maps and hidden states, on a mesh that cuts both
    vocabularies and on one that cuts none."""
    config, *_ = finished
    lines = {}
    for name, mesh in (("cut", {"mesh": "data:2,fsdp:2,tensor:2"}), ("whole", {})):
        folder = tmp_path / name
        shutil.copytree(config.workdir, folder, ignore=shutil.ignore_patterns("distilled", "export", "report"))
        widen(Workdir(config_of(folder, config.data.files)))
        learning = {"objective.learn_projection": True, "student.training.steps": 4} | mesh
        learning |= {"objective.beta.start": 0.2, "objective.beta.end": 0.1, "objective.beta.kind": "linear"}
        learning |= {"objective.hidden_states": 0.1, "objective.attention.heads": "mixed"}
        again = config_of(folder, config.data.files, **learning)
        train.train(again, "distilled")
        logged = [m for m in read_metrics(folder / "distilled" / "metrics.jsonl") if "loss" in m]
        parts = ("loss", "ce", "kl", "attention", "hidden_states", "beta")
        lines[name], drift = [[m[part] for part in parts] for m in logged], logged[-1]["projection_drift"]
    np.testing.assert_allclose(lines["cut"], lines["whole"], rtol=5e-5)
    assert (np.array(lines["whole"]) > 0).all()
    tables = learners.tables_of(Workdir(again))
    before, after = (Projection.load(folder / at, **tables) for at in ("projection", "distilled/projection"))
    moved = np.sum((after.weights() - before.weights()) ** 2)
    assert moved > drift > 0  # it is logged before the last update

"""Promise: what is stored of the teacher is what it says of every row, to a stated error, and it trains the student."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax import learners, prepare, project, run, score, sharding, train
from distil_jax.config import load_config
from distil_jax.data import hpo, scores
from distil_jax.data.loader import Loader
from distil_jax.data.rows import Quarantine
from distil_jax.data.scores import Layout, Scores, needed, pack_ids, unpack_ids
from distil_jax.errors import UserError
from distil_jax.losses import stored
from distil_jax.losses.schedules import schedule
from distil_jax.losses.stored import LARGEST_CODE, STEP
from distil_jax.losses.vocabulary import LOWEST
from distil_jax.metrics import read_metrics
from distil_jax.objective import Frozen, Loss, Objective
from distil_jax.projection import Projection
from distil_jax.tokens.align import NONE, ROOT
from distil_jax.workdir import Workdir

PROJECT = Path(__file__).resolve().parent.parent
TEMPERATURES = (1.0, 1.5, 2.5)
K = 16
FEW = {"steps": 8, "warmup": 2, "log_every": 1, "evaluate_every": 8, "checkpoint_every": 4}
SMALL = {
    "data.student_length": 96,
    "data.teacher_length": 96,
    "data.rows_per_shard": 24,
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
    **{f"{side}.training.{key}": value for side in ("teacher", "student") for key, value in FEW.items()},
    "teacher.training.learning_rate": 0.05,  # so that the few steps leave it with something to say
    "objective.temperature.kind": "exponential",
    "objective.temperature.start": 2.5,
    "teacher.scores": "stored",
    "objective.positions": "boundaries",
    "score.top_k": K,
    "score.temperatures": ",".join(map(str, TEMPERATURES)),
    "projection.fit_rows": 16,
    "projection.fit_steps": 5,
    "evaluation.bootstrap": 50,
    "evaluation.curve_rows": 8,
    "evaluation.batch_size": 8,
    "evaluation.answers": 1,
    "evaluation.answer_tokens": 2,
    "report.calibration_rows": 4,
    "report.turns": 1,
    "report.prompt_tokens": 4,
    "report.new_tokens": 4,
    "runs": "distilled",
}


def arguments_of(workdir, files, **overrides):
    settings = SMALL | {"workdir": workdir, "data.files": files} | overrides
    return ["--config", str(PROJECT / "configs" / "tiny.py"), *(f"--config.{k}={v}" for k, v in settings.items())]


def config_of(workdir, files="", **overrides):
    return load_config(arguments_of(workdir, files, **overrides))[0]


@pytest.fixture(scope="module")
def definitions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    with Quarantine(folder / "quarantine.jsonl") as quarantine:
        rows = hpo.load_corpus(quarantine).rows
    file = folder / "definitions.jsonl"
    lines = ({"prompt": r.prompt, "completion": r.completion, "specialty": r.specialty} for r in rows[::60])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def scored(tmp_path_factory, definitions):
    """(config, manifest of the scores): corpus, teacher, projection and scores are there. Tests read only."""
    config = config_of(tmp_path_factory.mktemp("scored") / "work", definitions)
    prepare.main(config)
    train.train(config, "teacher")
    project.main(config)
    return config, score.main(config)


def without_scores(scored, folder, **overrides):
    """A copy of the run before its scores were made."""
    for stage in ("corpus", "tokenizers", "teacher", "projection"):
        shutil.copytree(Path(scored[0].workdir) / stage, folder / stage)
    return config_of(folder, scored[0].data.files, **overrides)


def parts_of(config):
    """(corpus part of the training shards, scores as a loader joins them)."""
    work = Workdir(config)
    part = work.require("corpus")["shards"]["train"]
    return part, Scores(work / "scores", work.require("scores"), part)


# ---- what is stored of a position ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 64])
def test_ids_come_back_up_to_18_bits_and_larger_ones_are_refused(count):
    edges = [0, 1, 3, 2**16 - 1, 2**16, 2**17, 2**17 + 1, 2**18 - 1]
    ids = np.random.default_rng(0).integers(0, 2**18, (500, count)).astype(np.int32)
    ids[: len(edges), 0] = ids[: len(edges), -1] = edges
    low, high = pack_ids(ids)
    assert (low.dtype, high.dtype, high.shape) == (np.uint16, np.uint8, (500, -(-count // 4)))
    np.testing.assert_array_equal(unpack_ids(low, high, count), ids)
    for wrong in (2**18, -1):
        ids[7, 0] = wrong
        with pytest.raises(UserError, match="teacher.scores=online"):
            pack_ids(ids)


@pytest.mark.parametrize(
    ("top_k", "temperatures", "size"), [(64, (1.0,), 276), (64, (1.0, 2.0, 4.0, 8.0), 296), (5, (1.0, 2.0), 34)]
)
def test_a_record_comes_back_bit_for_bit(top_k, temperatures, size):
    layout, r = Layout(top_k, temperatures), np.random.default_rng(1)
    assert layout.position_bytes == size <= 300
    for n in (0, 1, 37):
        ids = r.integers(0, 2**18, (n, top_k)).astype(np.int32)
        codes = r.integers(0, 2**16, (n, top_k)).astype(np.uint16)
        rest = r.normal(0, 10, (n, len(temperatures), 2)).astype(np.float32)
        rest[..., 1] = rest[..., 1].astype(np.float16) if len(temperatures) > 1 else 0
        record = layout.pack(ids, codes, rest)
        assert len(record) == 4 + n * size
        for got, expected in zip(layout.unpack(record), (ids, codes, rest), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)
    for wrong in (record[:-1], record + b"x", b"", record[:3]):
        with pytest.raises(ValueError, match="bytes"):
            layout.unpack(wrong)
    with pytest.raises(ValueError, match="are not scores of"):
        layout.pack(ids[:, :-1], codes, rest)


def test_a_logit_is_kept_to_half_a_step_and_clamped_at_the_end_of_the_range():
    z = -np.random.default_rng(2).uniform(0, 63.9, (50, 40)).astype(np.float32)
    z[:, 0] = 0
    codes = stored.codes_of(jnp.asarray(z))
    kept = np.asarray(stored.logits_of(codes), np.float64)
    assert np.abs(kept - z).max() <= STEP / 2 and (kept[:, 0] == 0).all()
    assert np.abs(kept - z).max() > 0.45 * STEP
    far = stored.codes_of(jnp.float32([[0, -64, -1e3, LOWEST]]))
    assert far.tolist() == [[0, LARGEST_CODE, LARGEST_CODE, LARGEST_CODE]]


@pytest.mark.parametrize(("V", "k"), [(640, 64), (1000, 5), (130, 130), (4096, 64), (7, 7)])
def test_the_largest_are_those_of_top_k_ties_included(V, k):
    r = np.random.default_rng(V)
    for t in (r.normal(size=(V, 9)), r.integers(0, 4, (V, 9)), np.zeros((V, 9))):
        t = jnp.asarray(t, jnp.float32)
        values, ids = stored.largest(t, k)
        expected_values, expected_ids = jax.lax.top_k(t.T, k)
        np.testing.assert_array_equal(values, expected_values)
        np.testing.assert_array_equal(ids, expected_ids)


def some_logits(V=6000, N=40, seed=3):
    """A broad crowd and a few tokens far above it, as a confident model's logits are; the last 50 rows are unmapped."""
    r = np.random.default_rng(seed)
    z = r.normal(0, 3, (V, N))
    for n in range(N):
        chosen = r.choice(V, r.integers(3, 60), replace=False)
        z[chosen, n] += 8 + r.exponential(3 + 0.1 * n, len(chosen))
    z[-50:] = LOWEST
    return z.astype(np.float32)


def kept_of(t_VxN, k, temperatures):
    t = jnp.asarray(t_VxN)
    z, ids = stored.largest(t, k)
    others = t.at[ids.T, jnp.arange(t.shape[1])[None]].set(LOWEST)
    rest = stored.rest_of(jnp.maximum(others - z[:, 0][None], LOWEST), temperatures)
    return np.asarray(ids), stored.codes_of(z - z[:, :1]), rest


def log_softmax64(t_VxN, tau):
    x = t_VxN.astype(np.float64) / tau
    x -= x.max(0)
    return x - np.log(np.exp(x).sum(0))


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0, 4.0, 8.0)])
def test_log_probabilities_at_a_stored_temperature_are_within_a_step(temperatures):
    """Half a step of the logit itself and at most as much of the normaliser; the rest's mass is known too."""
    t = some_logits()
    ids, codes, rest = kept_of(t, 64, temperatures)
    for tau in temperatures:
        exact = np.take_along_axis(log_softmax64(t, tau), ids.T, axis=0).T
        said = np.asarray(stored.log_probs(codes, rest, temperatures, tau), np.float64)
        assert np.abs(said - exact).max() <= (STEP + 1e-4) / tau
        np.testing.assert_allclose(1 - np.exp(said).sum(1), 1 - np.exp(exact).sum(1), atol=STEP / tau)


def hermite64(betas, values, slopes, beta):
    """The cubic with these values and slopes, from its linear system."""
    i = min(max(int(np.searchsorted(betas, beta)) - 1, 0), len(betas) - 2)
    a, b = betas[i], betas[i + 1]
    rows = [[1, x, x**2, x**3] for x in (a, b)] + [[0, 1, 2 * x, 3 * x**2] for x in (a, b)]
    found = [
        np.linalg.solve(np.array(rows), [v[0], v[1], s[0], s[1]]) @ [1, beta, beta**2, beta**3]
        for v, s in zip(values[i : i + 2].T, slopes[i : i + 2].T, strict=True)
    ]
    return np.array(found)


def test_between_stored_temperatures_the_error_stays_below_a_few_steps():
    """As docs/scores.md says; and the whole normaliser, interpolated from the same numbers, would be off by tenths."""
    t, temperatures = some_logits(V=30_000), (1.0, 2.0, 4.0, 8.0)
    ids, codes, rest = kept_of(t, 64, temperatures)
    betas = 1 / np.array(temperatures[::-1])
    logits = (t - t.max(0)).astype(np.float64)
    q = [np.exp(log_softmax64(t, 1 / b)) for b in betas]
    values = np.array([np.log(np.exp(b * logits).sum(0)) for b in betas])
    slopes = np.array([(p * np.where(p > 0, logits, 0)).sum(0) for p in q])
    ours, whole = [], []
    for tau in 1 / np.linspace(betas[0], betas[-1], 41):
        exact = np.take_along_axis(log_softmax64(t, tau), ids.T, axis=0).T
        ours.append(np.abs(np.asarray(stored.log_probs(codes, rest, temperatures, tau)) - exact).max())
        normaliser = np.log(np.exp(logits / tau).sum(0))
        whole.append(np.abs(hermite64(betas, values, slopes, 1 / tau) - normaliser).max())
    assert max(ours) < 3 * STEP
    assert max(whole) > 0.2


def test_where_every_token_is_named_nothing_is_left():
    t = some_logits(V=90)  # 40 of them are mapped
    ids, codes, rest = kept_of(t, 40, (1.0, 3.0))
    assert (ids < 40).all() and np.isfinite(rest).all()
    for tau in (1.0, 2.0, 3.0):
        said = np.asarray(stored.log_probs(codes, rest, (1.0, 3.0), tau))
        np.testing.assert_allclose(np.exp(said).sum(1), 1, atol=1e-6)


def test_needed_positions_are_those_of_supervised_tokens_with_a_role():
    row = {
        "student_weights": np.array([0, 1, 1, 1, 1, 1, 0, 1]),
        "role": np.array([1, 1, 2, 3, 0, 1, 1, 1]),
        "teacher_position": np.array([9, 4, 4, 2, 0, 7, 8, 2]),
    }
    positions, slot = needed(row)
    assert positions.tolist() == [2, 4, 7]
    assert slot.tolist() == [0, 1, 1, 0, 0, 2, 0, 0]


# ---- the stage -------------------------------------------------------------------------------------------------------


def test_every_row_holds_what_the_teacher_says_of_it(scored):
    """Against the whole logits of the model, row by row and position by position."""
    config, facts = scored
    work = Workdir(config)
    part, found = parts_of(config)
    model, params = learners.trained(work, "teacher", learners.mesh_of(config))
    mapped = Projection.load(work / "projection", **learners.tables_of(work)).mapped
    apply, log_probs = jax.jit(model.apply), jax.jit(stored.log_probs, static_argnums=2)
    positions = tokens = roots = number = 0
    for batch in Loader(work / "corpus", part, 8, 0).sweep():
        arguments = [batch[f"teacher_{name}"] for name in ("tokens", "segment_ids", "positions")]
        logits = np.asarray(apply(params, *arguments))
        for r in range(min(8, part["records"] - number)):
            row = {name: x[r] for name, x in batch.items()}
            fields = found.fields(number, row)
            number += 1
            asks = np.flatnonzero((row["student_weights"] > 0) & (row["role"] != NONE))
            at = row["teacher_position"][asks]
            slots = fields["score_slot"][asks]
            assert len(set(zip(at, slots, strict=True))) == len(set(at)) == len(set(slots))
            t = np.where(mapped[:, None], logits[r, at].T[: len(mapped)], LOWEST)
            ids = fields["score_ids"][slots]
            # The likeliest first; two whose logits differ by less than rounding may change places.
            assert all(len(set(of_one)) == K for of_one in ids.tolist())
            largest = -np.sort(-t.T, axis=1)[:, :K]
            np.testing.assert_allclose(np.take_along_axis(t, ids.T, axis=0).T, largest, rtol=0, atol=1e-5)
            for tau in (*TEMPERATURES, 1.2, 2.0):
                said = np.asarray(log_probs(fields["score_codes"], fields["score_rest"], TEMPERATURES, tau))[slots]
                assert np.abs(said - np.take_along_axis(log_softmax64(t, tau), ids.T, axis=0).T).max() < 1.5 * STEP
            positions += len(set(at))
            tokens += int((row["student_weights"] > 0).sum())
            roots += len(set(row["teacher_position"][(row["student_weights"] > 0) & (row["role"] == ROOT)]))
            assert len(set(at)) <= facts["most"]
    assert number == facts["records"] == part["records"]
    assert (positions, tokens) == (facts["positions"], facts["tokens"])
    assert positions < 1.01 * roots  # interiors and crossings cost next to nothing


def test_the_manifest_says_what_was_kept_and_how_exactly(scored):
    config, facts = scored
    layout = Layout(K, TEMPERATURES)
    assert (facts["top_k"], tuple(facts["temperatures"])) == (K, TEMPERATURES)
    assert facts["bytes_per_position"] == layout.position_bytes
    folder = Path(config.workdir) / "scores"
    assert facts["bytes"] == sum((folder / f["name"]).stat().st_size for f in facts["files"])
    assert facts["bytes_per_token"] == pytest.approx(facts["bytes"] / facts["tokens"], abs=0.01)
    assert facts["clamped"] == 0 and len(facts["files"]) > 2
    error = facts["error"]
    assert error["positions"] > 100
    assert 0 < error["log_prob"]["mean"] < error["log_prob"]["max"] < 1.5 * STEP
    assert 0 < error["loss"]["mean"] < error["loss"]["max"] < STEP and error["loss_value"] > 100 * error["loss"]["mean"]
    assert not list(folder.glob(".*"))


def files_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "scores").iterdir() if "arrayrecord" in path.name}


def test_a_pass_that_was_killed_goes_on_with_the_next_file_and_ends_with_the_same_bytes(scored, definitions, tmp_path):
    """A real process, killed when its first file is there, in the middle of the second."""
    config = without_scores(scored, tmp_path / "work")
    code = (
        "import sys, time; from distil_jax.config import load_config; from distil_jax import score, scorer\n"
        "read = scorer._read\n"
        "scorer._read = lambda *a: (time.sleep(0.5), read(*a))[1]\n"
        "score.main(load_config(sys.argv[1:])[0])"
    )
    arguments = arguments_of(config.workdir, definitions)
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=PROJECT)
    folder = tmp_path / "work" / "scores"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if list(folder.glob("*.json")) and list(folder.glob(".*.partial")):
            break
        time.sleep(0.02)
    assert process.poll() is None, "the pass ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("train*")}
    assert there and Workdir(config).done("scores") is None
    said = subprocess.run(
        [sys.executable, "-m", "distil_jax.score", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stderr
    assert "of" in said and "files are there already; going on with train-block00000-0000" in said
    assert there == {name: (folder / name).stat().st_mtime_ns for name in there}
    assert files_of(tmp_path / "work") == files_of(Path(scored[0].workdir))
    assert not list(folder.glob(".*"))


def test_processes_share_the_files_and_the_first_ends_the_stage_when_all_are_there(scored, tmp_path):
    config = without_scores(scored, tmp_path / "work")
    work = Workdir(config)
    stage = work.begin("scores")
    names = [f["name"] for f in scored[1]["files"]]
    for p in (2, 0, 1):
        assert score.finish(config, work, stage) is None
        score.score_files(config, work, stage, p, 3)
        assert {path.name for path in stage.folder.glob("*.arrayrecord")} >= set(names[p::3])
    facts = score.finish(config, work, stage)
    assert facts["files"] == scored[1]["files"]
    assert files_of(tmp_path / "work") == files_of(Path(scored[0].workdir))


def test_the_scores_are_the_same_on_another_mesh(scored, tmp_path):
    """The teacher cut over fsdp and tensor sums in another order; what it says is the same to the last bits."""
    config = without_scores(scored, tmp_path / "work", **{"mesh": "data:2,fsdp:2,tensor:2"})
    for stage in ("corpus", "teacher"):
        assert Workdir(config).done(stage)
    facts = score.main(config)
    assert facts["positions"] == scored[1]["positions"]
    (part, ours), (_, theirs) = parts_of(config), parts_of(scored[0])
    rows = Loader(Path(config.workdir) / "corpus", part, part["records"], 0).sweep()
    batch = next(iter(rows))
    same = 0
    for n in range(0, part["records"], 7):
        row = {name: x[n] for name, x in batch.items()}
        a, b = ours.fields(n, row), theirs.fields(n, row)
        same += (a["score_ids"] == b["score_ids"]).mean() / len(range(0, part["records"], 7))
        assert np.abs(a["score_codes"].astype(int) - b["score_codes"]).max() <= 1
        np.testing.assert_allclose(a["score_rest"], b["score_rest"], atol=0.01)  # a slope may round to its neighbour
    assert same > 0.999


def test_the_scores_outlast_another_fit_of_W_and_another_student(scored):
    config = scored[0]
    for key, value in {"projection.fit_steps": 9, "student.training.learning_rate": 1.0, "objective.top_k": 3}.items():
        changed = Workdir(config_of(config.workdir, config.data.files, **{key: value}))
        assert changed.done("scores")
    for key, value in {"score.top_k": 8, "teacher.dtype": "bfloat16", "teacher.training.steps": 9}.items():
        assert not Workdir(config_of(config.workdir, config.data.files, **{key: value})).done("scores")
    tables = learners.tables_of(Workdir(config))
    nothing = np.zeros(0, np.int32)
    by_bytes = Projection.build(**tables, counts=(nothing, nothing), k=1).mapped
    fitted = Projection.load(Workdir(config) / "projection", **tables).mapped
    np.testing.assert_array_equal(by_bytes, fitted)
    assert 0 < by_bytes.sum() < len(by_bytes)


# ---- joined to the rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 4])
def test_a_batch_brings_each_row_its_scores(scored, processes):
    """Over more than two epochs, in shuffled order, and in a sweep whose last batch is filled up."""
    part, found = parts_of(scored[0])
    folder = Path(scored[0].workdir) / "corpus"
    plain = Loader(folder, part, 12, 5)
    rows = [{name: x[0] for name, x in batch.items()} for batch in plain.sweep(1)]
    by_content = {row["student_tokens"].tobytes() + row["document"].tobytes(): n for n, row in enumerate(rows)}
    assert len(by_content) == len(rows)
    dealt = [range(p * 12 // processes, (p + 1) * 12 // processes) for p in range(processes)]
    joined = [Loader(folder, part, 12, 5, places=places, joined=found, verify=False) for places in dealt]
    seen = set()
    for step in range(2 * len(rows) // 12 + 2):
        parts = [loader.batch(step) for loader in joined]
        batch = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        for name, values in plain.batch(step).items():
            np.testing.assert_array_equal(batch[name], values)
        for r in range(12):
            number = by_content[batch["student_tokens"][r].tobytes() + batch["document"][r].tobytes()]
            seen.add(number)
            for name, values in found.fields(number, rows[number]).items():
                np.testing.assert_array_equal(batch[name][r], values)
                assert batch[name].dtype == values.dtype
    assert len(seen) == len(rows)
    swept = [list(loader.sweep()) for loader in joined]
    for n, parts in enumerate(zip(*swept, strict=True)):
        ids = np.concatenate([p["score_ids"] for p in parts])
        for r in range(12):
            number = 12 * n + r
            expected = found.fields(number, rows[number])["score_ids"] if number < len(rows) else np.zeros_like(ids[r])
            np.testing.assert_array_equal(ids[r], expected)


def test_a_score_file_that_is_missing_damaged_or_foreign_is_named(scored, tmp_path):
    config, facts = scored
    folder = tmp_path / "scores"
    shutil.copytree(Path(config.workdir) / "scores", folder)
    part, found = parts_of(config)
    name = facts["files"][1]["name"]
    whole = (folder / name).read_bytes()

    def message(facts=facts, part=part):
        with pytest.raises(UserError, match=name) as caught:
            Scores(folder, facts, part)
        assert "run `distil-jax score` again" in str(caught.value)
        return str(caught.value)

    middle = len(whole) // 2
    (folder / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "checksum" in message()
    (folder / name).write_bytes(whole[:-1])
    assert "bytes, the manifest says" in message()
    (folder / name).unlink()
    assert "missing" in message()
    (folder / name).write_bytes(whole)
    other = [dict(f) for f in part["files"]]
    other[1]["sha256"] = "0" * 64
    assert "not of the corpus' shard" in message(part=part | {"files": other})
    assert "not of the corpus' shard" in message(facts=facts | {"files": facts["files"][:1]})
    # A file of the right size and checksum for rows in another order: found when the first row is read.
    rows = [{k: x[0] for k, x in b.items()} for b in Loader(Path(config.workdir) / "corpus", part, 8, 0).sweep(1)]
    counts = [len(needed(row)[0]) for row in rows]
    first, second = next((a, b) for a in range(24) for b in range(24) if counts[a] != counts[b])
    with pytest.raises(UserError, match=f"{facts['files'][0]['name']} holds {counts[first]} positions"):
        found.fields(first, rows[second])
    loader = Loader(Path(config.workdir) / "corpus", part, 8, 0)
    with pytest.raises(UserError, match="make them again"):
        Loader(Path(config.workdir) / "corpus", part | {"records": 24, "files": part["files"][:1]}, 8, 0, joined=found)
    assert loader.records == found.records


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(scored):
    """(batch with scores, student, its parameters, teacher, its parameters, W) of the finished run."""
    config = scored[0]
    work, mesh = Workdir(config), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    part, found = parts_of(config)
    batch = Loader(work / "corpus", part, 8, 1, joined=found).batch(3)
    student, params = learners.untrained(work, "student", mesh)
    teacher, teacher_params = learners.teacher(work, mesh)
    W = with_more_pieces(Projection.load(work / "projection", **learners.tables_of(work)))
    return batch, student, jax.tree.map(np.asarray, params), teacher, jax.tree.map(np.asarray, teacher_params), W


def with_more_pieces(W):
    """Two more student tokens in most rows. Tokenizers as small as these cut every teacher token in one way, so the W
    of the run has one entry a row, and a loss that took the weights wrongly would pass."""
    r, rows = np.random.default_rng(4), np.flatnonzero(W.mapped)
    ids, logits = W.ids.copy(), W.logits.copy()
    for v in rows[r.uniform(size=len(rows)) < 0.8]:
        others = r.choice(np.setdiff1d(np.arange(W.student_vocab), ids[v]), 2, replace=False)
        ids[v, 1:3], logits[v, :3] = others, r.normal(0, 1, 3)
    more = dataclasses.replace(W, ids=ids, logits=logits)
    np.testing.assert_array_equal(more.mapped, W.mapped)
    assert (ids >= 0).sum() > 2 * len(rows)
    return more


def losses(pair, mesh=None, top_k=0, divergence="forward", keep=0.0):
    """{"online": ..., "stored": ...}: each (jitted value, metrics and gradient; frozen) of the same recipe."""
    batch, student, params, teacher, teacher_params, W = pair
    specialties = jnp.linspace(0.5, 1.5, int(batch["specialty"].max()) + 1)
    common = {
        "alpha": schedule("constant", 0.3, 0.3, 10),
        "temperature": schedule("linear", 1.0, 2.5, 10),
        "divergence": divergence,
        "mesh": mesh,
        "keep": keep,
    }
    online = Objective(student, teacher=teacher, top_k=top_k or K, **common)
    kept = Objective(student, scores=TEMPERATURES, top_k=top_k, **common)
    return {
        "online": (_jitted(online), Frozen(specialties, teacher_params, W.table(), W.rows())),
        "stored": (_jitted(kept), Frozen(specialties, projection=W.rows(), rows=W.rows())),
    }


_compiled = {}


def _jitted(objective):
    """The same recipe compiles once for the module: its schedules are functions of the step."""
    o = objective
    key = (o.scores, o.top_k, o.divergence, o.keep, o.mesh)
    return _compiled.setdefault(key, jax.jit(jax.value_and_grad(Loss(objective), has_aux=True)))


def value_and_gradient(case, params, batch, step):
    gradient_of, frozen = case
    return gradient_of({"model": params}, frozen, batch, jnp.int32(step))


@pytest.mark.parametrize("divergence", ["forward", "jsd"])
@pytest.mark.parametrize("step", [0, 3, 10])
def test_the_stored_loss_is_the_online_loss_of_the_same_K_tokens(pair, step, divergence):
    """tau = 1 and 2.5, which are stored, and 1.45, which is not; value, gradient and metrics."""
    batch, _, params, *_ = pair
    results = {n: value_and_gradient(c, params, batch, step) for n, c in losses(pair, divergence=divergence).items()}
    (online, metrics), gradient = results["online"]
    (kept, kept_metrics), kept_gradient = results["stored"]
    tau = float(metrics["temperature"][0])
    assert tau == pytest.approx(1 + 0.15 * step)
    assert float(online) == pytest.approx(float(kept), rel=1e-5)
    for name in ("kl", "kl_at_1"):
        assert float(metrics[name][0]) == pytest.approx(float(kept_metrics[name][0]), rel=2e-5)
        assert float(metrics[name][1]) == float(kept_metrics[name][1]) > 100
    assert float(metrics["ce"][0]) == pytest.approx(float(kept_metrics["ce"][0]), rel=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * largest), gradient, kept_gradient)


def test_W_learns_from_the_stored_scores_as_from_the_teacher(pair):
    batch, _, params, *_, W = pair
    learning = {
        "model": params,
        "projection": jnp.asarray(W.logits) + 0.1 * jnp.sin(jnp.arange(W.logits.shape[1]))[None],
    }
    found = {n: f(learning, frozen, batch, jnp.int32(3)) for n, (f, frozen) in losses(pair, keep=0.01).items()}
    (online, metrics), gradient = found["online"]
    (kept, kept_metrics), kept_gradient = found["stored"]
    assert float(online) == pytest.approx(float(kept), rel=1e-5)
    drift = float(metrics["projection_drift"][0])
    assert drift == pytest.approx(float(kept_metrics["projection_drift"][0])) and drift > 0.01
    largest = float(jnp.abs(gradient["projection"]).max())
    assert largest > 1e-4
    np.testing.assert_allclose(gradient["projection"], kept_gradient["projection"], atol=1e-3 * largest)


def test_fewer_of_the_stored_tokens_are_the_online_loss_of_fewer(pair):
    batch, _, params, *_ = pair
    values = {n: float(value_and_gradient(c, params, batch, 3)[0][0]) for n, c in losses(pair, top_k=4).items()}
    assert values["online"] == pytest.approx(values["stored"], rel=1e-5)
    all_of_them = float(value_and_gradient(losses(pair)["stored"], params, batch, 3)[0][0])
    assert abs(all_of_them - values["stored"]) > 10 * STEP


@pytest.mark.parametrize("step", [0, 3])
def test_the_stored_loss_is_its_formula(pair, step):
    """From whole logits of both models in float64: KL over the student tokens reached and one remainder."""
    batch, student, params, teacher, teacher_params, W = pair
    alpha, tau = 0.3, 1 + 0.15 * step

    def logits(model, params, side):
        args = (batch[f"{side}_tokens"], batch[f"{side}_segment_ids"], batch[f"{side}_positions"])
        return np.asarray(model.apply(params, *args), np.float64)

    z = logits(student, params, "student")
    log_s = np.moveaxis(log_softmax64(np.moveaxis(z, -1, 0), tau), 0, -1)
    log_s1 = np.moveaxis(log_softmax64(np.moveaxis(z, -1, 0), 1), 0, -1)
    t = np.where(W.mapped, logits(teacher, teacher_params, "teacher"), LOWEST)
    weights, mask = (
        np.linspace(0.5, 1.5, batch["specialty"].max() + 1)[batch["specialty"]],
        batch["student_weights"] > 0,
    )
    loss, shares = 0.0, W.weights()
    for b, p in zip(*np.nonzero(mask), strict=True):
        ce = -log_s1[b, p, batch["student_targets"][b, p]]
        if batch["role"][b, p] != ROOT:
            loss += weights[b, p] * ce
            continue
        log_q = log_softmax64(t[b, batch["teacher_position"][b, p]][:, None], tau)[:, 0]
        mass = np.zeros(z.shape[-1])
        follows = batch["teacher_targets"][b, batch["teacher_position"][b, p]]
        for v in np.argsort(-log_q, kind="stable")[:K]:
            if v == follows:
                mass[batch["student_targets"][b, p]] += np.exp(log_q[v])
                continue
            for u, w in zip(W.ids[v], shares[v], strict=True):
                if u >= 0:
                    mass[u] += np.exp(log_q[v]) * w
        reached = mass > 0
        rest, rest_s = 1 - mass.sum(), 1 - np.exp(log_s[b, p][reached]).sum()
        kl = (mass[reached] * (np.log(mass[reached]) - log_s[b, p][reached])).sum() + rest * np.log(rest / rest_s)
        loss += weights[b, p] * (alpha * ce + (1 - alpha) * tau**2 * kl)
    loss /= (weights * mask).sum()
    (value, _), _ = value_and_gradient(losses(pair)["stored"], params, batch, step)
    assert float(value) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_the_stored_loss_is_the_same_on_a_mesh(pair, shape):
    batch, student, params, *_ = pair
    (one, _), gradient = value_and_gradient(losses(pair)["stored"], params, batch, 3)
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.param_shardings(student, mesh))
        many = value_and_gradient(losses(pair, mesh)["stored"], spread, sharding.put_batch(batch, mesh), 3)
    assert float(many[0][0]) == pytest.approx(float(one), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, many[1])


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_the_student_learns_from_the_scores_with_no_teacher_there(scored, tmp_path):
    """The teacher's weights are gone; the curve is that of the teacher in memory, to the error of the scores."""
    config = without_scores(scored, tmp_path / "work")
    shutil.copytree(Path(scored[0].workdir) / "scores", tmp_path / "work" / "scores")
    shutil.rmtree(tmp_path / "work" / "teacher" / "model")
    train.train(config, "distilled")
    online = without_scores(scored, tmp_path / "online", **{"teacher.scores": "online", "objective.top_k": K})
    train.train(online, "distilled")
    curves = [
        {m["step"]: m for m in read_metrics(Path(c.workdir) / "distilled" / "metrics.jsonl") if "loss" in m}
        for c in (config, online)
    ]
    assert curves[0].keys() == curves[1].keys() == set(range(1, 9))
    for step, line in curves[0].items():
        for name in ("loss", "ce", "kl", "kl_at_1"):
            assert line[name] == pytest.approx(curves[1][step][name], abs=2 * STEP), (step, name)
        assert line["temperature"] == pytest.approx(curves[1][step]["temperature"])


def test_a_whole_run_scores_once_and_uses_it(scored, tmp_path):
    config = without_scores(scored, tmp_path / "work")
    summary = run.main(config)
    assert summary["seconds"]["scores"] > 0 and summary["seconds_of_the_teacher"]["scoring"] > 0
    before = files_of(tmp_path / "work")
    assert before == files_of(Path(scored[0].workdir)) and run.main(config) == summary


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"teacher.scores": "strored"}, "use online or stored"),
        ({"score.top_k": 0}, "at least 1"),
        ({"score.temperatures": "2.0,1.0"}, "ascending"),
        ({"score.temperatures": "1.0,1.0"}, "ascending"),
        ({"score.temperatures": "2.0,3.0"}, "1.0 among them"),
        ({"score.temperatures": "1.0,2.0"}, "reaches from 1 to 2.5, score.temperatures only from 1 to 2"),
        ({"score.temperatures": "1.0", "objective.temperature.kind": "constant"}, "from 2.5 to 2.5"),
        ({"objective.temperature.end": 0.5}, "reaches from 0.5"),
        ({"objective.beta.start": 0.2}, "teacher.scores=online"),
        ({"objective.hidden_states": 0.1}, "not stored"),
        ({"objective.top_k": 17}, "only score.top_k=16"),
        ({"objective.positions": "all"}, "'boundaries' or 'roots'"),
    ],
)
def test_settings_that_training_would_stumble_over_stop_the_first_stage(tmp_path, overrides, said):
    config = config_of(tmp_path / "work", **overrides)
    for stage in (run.main, score.main):
        with pytest.raises(UserError, match=said):
            stage(config)
    assert not (tmp_path / "work").exists()


def test_what_is_not_reached_is_not_asked_for(tmp_path):
    scores.check(config_of(tmp_path, **{"teacher.scores": "online", "score.temperatures": "1.0"}))
    constant = {"objective.temperature.kind": "constant", "objective.temperature.start": 1.0}
    scores.check(config_of(tmp_path, **constant, **{"objective.temperature.end": 9.0, "score.temperatures": "1.0"}))

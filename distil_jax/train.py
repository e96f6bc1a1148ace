"""Stage 2: training. The tiny teacher, the controls and the distilled student go through this one loop.

    distil-jax train --config configs/tiny.py

Each run writes its folder: checkpoints/, metrics.jsonl (the truth about the run) and model/, a Hugging Face directory.
A run that was stopped goes on from its newest whole checkpoint and ends with the numbers of an undisturbed one, because
the batch is a function of the seed and the step.
"""

import dataclasses
import itertools
import signal
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from distil_jax import freezing, learners, sharding
from distil_jax.checkpoint import Checkpoints, on_sigterm
from distil_jax.data import scores
from distil_jax.data.loader import Loader
from distil_jax.errors import UserError
from distil_jax.eval import likelihood
from distil_jax.losses import attention
from distil_jax.losses.divergence import checked
from distil_jax.losses.kd import PlacedTable, place, rows_of
from distil_jax.losses.schedules import learning_rate, schedule
from distil_jax.losses.vocabulary import Shards
from distil_jax.losses.weights import parse_weights, specialty_weights
from distil_jax.metrics import MetricsWriter, Progress, read_metrics
from distil_jax.models import hub
from distil_jax.objective import Alignment, Frozen, Loss, Objective
from distil_jax.projection import Projection
from distil_jax.step import init_state, make_optimizer, make_step
from distil_jax.workdir import Workdir

ALIGNMENT_SEED = 3  # beside learners.SEED_OF


class Run(NamedTuple):
    """What distinguishes one training run from another."""

    name: str
    side: str  # whose tokens are learned
    training: ConfigDict


def main(config: ConfigDict) -> dict[str, Any]:
    """Trains the teacher (if it is ours to train) and every student of config.runs; skips what is done."""
    work = Workdir(config)
    names = (("teacher",) if work.teacher_is_trained() else ()) + tuple(config.runs)
    return {name: train(config, name) for name in names}


def train(config: ConfigDict, name: str) -> dict[str, Any]:
    """One run, "teacher", "control", "smoothing" or "distilled"; returns its manifest."""
    work = Workdir(config)
    if found := work.done(name):
        return found
    corpus = work.require("corpus")
    stage = work.begin(name)

    # ---- models -------------------------------------------------------------------------------------------------
    mesh = learners.mesh_of(config)
    with jax.set_mesh(mesh):
        run = run_of(config, name)
        check_frozen(work)
        scores.check(config)
        model, params = learners.untrained(work, run.side, mesh)
        tables = learners.tables_of(work)
        objective, frozen = recipe(config, work, run, model, mesh, corpus, tables)

        # ---- state --------------------------------------------------------------------------------------------------
        t = run.training
        rate = learning_rate(t.learning_rate, t.warmup, t.steps, t.end_fraction)
        optimizer = make_optimizer(
            rate, weight_decay=t.weight_decay, clip=t.clip,
            projection_rate=config.objective.projection_learning_rate / t.learning_rate,
        )  # fmt: skip
        parameters = learners.count(params)
        params, own = freezing.split(params, t.freeze)
        frozen, trainable = frozen._replace(own=own), learners.count(params)
        learning = {"model": params}
        shardings = {"model": freezing.split(sharding.param_shardings(model, mesh), t.freeze)[0]}
        if frozen.rows is not None:
            learning["projection"], shardings["projection"] = (
                projection_of(work, tables).logits,
                sharding.replicated(mesh),
            )
        if objective.alignment:
            key = jax.random.fold_in(jax.random.key(config.seed), ALIGNMENT_SEED)
            align = attention.init(
                key, objective.alignment.pairs, model, objective.teacher,
                mixed=config.objective.attention.heads == "mixed", hidden=objective.alignment.hidden_weight > 0,
            )  # fmt: skip
            if align:
                whole = sharding.replicated(mesh)
                learning["alignment"], shardings["alignment"] = align, jax.tree.map(lambda _: whole, align)
        state = placed(jax.jit(init_state, static_argnums=1)(learning, optimizer), optimizer, shardings, mesh)
        del params, learning
        checkpoints = Checkpoints(stage.folder / "checkpoints", keep=2, save_every=t.checkpoint_every)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        if restored := checkpoints.restore_latest(abstract):
            _, state = restored
        start = int(state["step"])

        # ---- data ---------------------------------------------------------------------------------------------------
        shards = corpus["shards"]["train"]
        stored = scores.Scores(work / "scores", work.require("scores"), shards) if objective.scores else None
        loader = Loader(
            work / "corpus", shards, t.batch_size, config.seed,
            process_index=jax.process_index(), process_count=jax.process_count(), joined=stored,
        )  # fmt: skip
        curve = Curve(config, work, corpus, run.side, model, mesh, tables)
        update = make_step(Loss(objective), optimizer, rate)

        # ---- loop: dispatch step n, then read what step n - 1 reported ----------------------------------------------
        metrics = MetricsWriter(stage.folder / "metrics.jsonl", resume_step=start + 1 if start else 0)
        names = corpus["specialties"]
        with metrics, Progress(t.steps, name, start=start) as progress, on_sigterm() as stop:
            if start == 0:
                sizes = {"parameters": parameters, "trainable_parameters": trainable}
                metrics.write(0, **sizes, **curve(freezing.merge(state["params"]["model"], own)))
            pending = None
            for done, batch in enumerate(itertools.islice(loader.iterate(start), t.steps - start), start + 1):
                tokens = int((batch[f"{run.side}_segment_ids"] > 0).sum())
                state, report = update(state, frozen, sharding.put_batch(batch, mesh))
                if pending:
                    log(metrics, progress, *pending, t, names, stage.folder)
                pending = (done, report, tokens, batch["document"][batch["student_segment_ids"] > 0])
                evaluates = done % t.evaluate_every == 0 or done == t.steps
                saves = done % t.checkpoint_every == 0 or stop.requested
                if evaluates or saves:  # what a checkpoint contains has to be in metrics.jsonl before it
                    log(metrics, progress, *pending, t, names, stage.folder)
                    pending = None
                if evaluates:
                    metrics.write(done, **curve(freezing.merge(state["params"]["model"], own)))
                if saves:
                    checkpoints.save(done, state, force=stop.requested)
                if stop.requested:
                    checkpoints.close()
                    print(f"{name}: stopped at step {done}, state saved; start it again to go on", file=sys.stderr)
                    raise SystemExit(128 + signal.SIGTERM)
        checkpoints.close()
        params = freezing.merge(state["params"]["model"], own)
        if start == t.steps:  # it was finished, but stopped before it could say so
            curve(params)
        tokenizer = learners.hf_tokenizer(work, run.side)
        hub.save_pretrained(model, params, stage.folder / "model", tokenizer=tokenizer)
        if frozen.rows is not None:
            learned = np.asarray(state["params"]["projection"])
            dataclasses.replace(projection_of(work, tables), logits=learned).save(stage.folder / "projection")
    return stage.finish(
        steps=t.steps,
        parameters=parameters,
        trainable_parameters=trainable,
        skipped=int(state["skipped"]),
        validation_bits_per_byte=curve.last,
        loop_seconds=seconds_of(stage.folder / "metrics.jsonl"),
        resumed_at=start,
    )


def run_of(config: ConfigDict, name: str) -> Run:
    """The run of that name."""
    if name == "teacher":
        return Run(name, "teacher", config.teacher.training)
    return Run(name, "student", config.student.training)


def recipe(config, work, run, model, mesh, corpus, tables) -> tuple[Objective, Frozen]:
    """What is optimised, and what it reads without learning it."""
    o, t = config.objective, run.training
    common = {"block": o.block, "compute_dtype": t.compute_dtype, "remat": t.remat, "mesh": mesh}
    if run.side == "teacher":
        return Objective(model, "teacher", **common), Frozen(jnp.ones(1))
    names = corpus["specialties"]
    weights = specialty_weights(
        o.specialty_weighting, parse_weights(o.specialty_weights), names, corpus["supervised_tokens"]
    )
    smoothing = o.label_smoothing if run.name == "smoothing" else 0.0
    if run.name != "distilled":
        return Objective(model, label_smoothing=smoothing, **common), Frozen(jnp.asarray(weights))
    work.require("projection")
    projection = projection_of(work, tables)
    distilling = common | {
        "alpha": schedule(o.alpha.kind, o.alpha.start, o.alpha.end, t.steps),
        "temperature": schedule(o.temperature.kind, o.temperature.start, o.temperature.end, t.steps),
        "divergence": checked(o.divergence),
        "skew": o.skew,
        "top_k": o.top_k,
        "keep": o.projection_keep,
    }
    learned = projection.rows() if o.learn_projection else None
    weights = jnp.asarray(weights)
    if work.scores_are_stored():
        temperatures = tuple(work.require("scores")["temperatures"])
        W = jax.device_put(projection.rows(), sharding.replicated(mesh))
        return Objective(model, scores=temperatures, **distilling), Frozen(weights, projection=W, rows=learned)
    teacher, teacher_params = learners.teacher(work, mesh, config.teacher.dtype)
    shards = Shards.of(mesh)
    table, rows = place(projection.table(), shards), None
    if shards.size > 1:
        lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), PlacedTable.specs(shards))
        table = jax.device_put(table, lies)
        rows = jax.jit(rows_of, out_shardings=lies.weights)(teacher.unembedding(teacher_params), table)
    distilling["alignment"] = alignment_of(o, model, teacher, t.steps)
    return Objective(model, teacher=teacher, **distilling), Frozen(weights, teacher_params, table, learned, rows)


def alignment_of(o: ConfigDict, student: Any, teacher: Any, steps: int) -> Alignment | None:
    """What of the inside of the models is aligned; None, at no cost, where both weights are 0 throughout."""
    if o.attention.heads not in ("mean", "mixed"):
        raise UserError(f"objective.attention.heads is {o.attention.heads!r}; use 'mean' or 'mixed'")
    pairs = attention.choose(
        student, teacher, count=o.attention.pairs,
        student_layers=o.attention.student_layers, teacher_layers=o.attention.teacher_layers,
    )  # fmt: skip
    if min(o.beta.start, o.beta.end, o.hidden_states) < 0:
        raise UserError("objective.beta and objective.hidden_states are weights: give numbers of at least 0")
    if o.beta.start == o.beta.end == o.hidden_states == 0:
        return None
    return Alignment(pairs, schedule(o.beta.kind, o.beta.start, o.beta.end, steps), o.hidden_states)


def projection_of(work: Workdir, tables: dict[str, Any]) -> Projection:
    """W as it was built and fitted."""
    return Projection.load(work / "projection", teacher=tables["teacher"], student=tables["student"])


def check_frozen(work: Workdir) -> None:
    """Raises UserError now for a training.freeze that the last run of a recipe would stumble over."""
    for side in (("teacher",) if work.teacher_is_trained() else ()) + ("student",):
        abstract = learners.description(work, side).abstract_params()
        freezing.split(abstract, work.config[side].training.freeze)


def placed(state: dict[str, Any], optimizer: optax.GradientTransformation, shardings: Any, mesh: Any) -> dict[str, Any]:
    """Every array of the state on the mesh; optimiser moments lie as their parameters do."""
    whole = sharding.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        jax.device_put,
        state["opt_state"],
        shardings,
        transform_non_params=lambda x: jax.device_put(x, whole),
    )
    rest = {k: jax.device_put(state[k], whole) for k in ("step", "skipped")}
    return {"params": jax.device_put(state["params"], shardings), "opt_state": opt_state} | rest


class Curve:
    """Held-out bits per byte while training, on the first rows of the validation split."""

    def __init__(self, config, work, corpus, side, model, mesh, tables):
        size = config.evaluation.batch_size
        loader = Loader(work / "corpus", corpus["shards"]["validation"], size, 0)
        wanted = max(1, config.evaluation.curve_rows // size)
        self._batches = [batch for batch, _ in zip(loader.sweep(size), range(wanted), strict=False)]
        self._rows = {k: np.concatenate([b[k] for b in self._batches]) for k in self._batches[0]}
        self._scorer = likelihood.make_scorer(model, side, block=config.objective.block, mesh=mesh)
        self._side, self._mesh, self._lengths = side, mesh, tables[side].lengths
        self.last = float("nan")

    def __call__(self, params: Any) -> dict[str, float]:
        nats = likelihood.sweep(self._scorer, params, self._batches, self._mesh)["nats"]
        self.last = likelihood.bits_per_byte(nats, self._rows, self._side, self._lengths)
        return {"validation_bits_per_byte": self.last}


def log(metrics, progress, done, report, tokens, documents, t, specialties, folder) -> None:
    """Writes what step `done` reported, every t.log_every steps; stops the run after too many bad updates."""
    skipped = int(report["skipped"])
    if done % t.log_every == 0 or done in (1, t.steps):
        values = {k: np.asarray(v).tolist() for k, v in report.items() if k != "ce_by_specialty"}
        values["tokens"] = tokens
        if "ce_by_specialty" in report:
            by = np.asarray(report["ce_by_specialty"]).tolist()
            values |= {f"ce/{name}": v for name, v in zip(specialties, by, strict=True) if v > 0}
        metrics.write(done, **values)
    shown = {k: report[k] for k in ("loss", "ce", "kl_at_1", "attention") if k in report}
    progress.update(done, tokens=tokens, **shown)
    if skipped > t.max_skipped:
        some = ", ".join(map(str, np.unique(documents)[:20]))
        raise UserError(
            f"{folder}: {skipped} updates were not finite, the last by step {done}, whose batch holds documents {some} "
            "of the train split (at most 20 are named). Lower training.learning_rate, or look at "
            "those rows; metrics.jsonl has the history"
        )


def seconds_of(file: Any) -> float:
    """Wall time between the first and the last line of metrics.jsonl, without the gaps of interruptions."""
    times = [row["time"] for row in read_metrics(file)]
    gaps = np.diff(times)
    return round(float(np.minimum(gaps, 10 * max(np.median(gaps), 0.1)).sum()), 2) if len(gaps) else 0.0


if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))

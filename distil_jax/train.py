"""Stage 2: training. The tiny teacher, the controls and the distilled student go through this one loop.

    distil-jax train --config configs/tiny.py

Each run writes its folder: checkpoints/, metrics.jsonl (the truth about the run) and model/, a Hugging Face directory.
A run that was stopped goes on from its newest whole checkpoint and ends with the numbers of an undisturbed one, because
the batch is a function of the seed and the step.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from distil_jax import flops, hosts, learners, lora, recipe, sharding, variants, watch
from distil_jax.best import Best
from distil_jax.checkpoint import Checkpoints, on_sigterm
from distil_jax.data import scores
from distil_jax.data.loader import Loader
from distil_jax.errors import STOPPED, Diverged
from distil_jax.eval import likelihood
from distil_jax.losses.schedules import learning_rate
from distil_jax.metrics import MetricsWriter, Progress, read_metrics
from distil_jax.models import hub
from distil_jax.objective import Loss
from distil_jax.step import init_state, make_optimizer, make_step, to_use
from distil_jax.workdir import Workdir


def main(config: ConfigDict) -> dict[str, Any]:
    """Trains the teacher (if it is ours to train) and every student of config.runs; skips what is done."""
    work = Workdir(config)
    names = (("teacher",) if work.teacher_is_trained() else ()) + tuple(config.runs)
    return {name: train(config, name) for name in names}


def train(config: ConfigDict, name: str) -> dict[str, Any]:
    """One run, "teacher", "control", "smoothing", "distilled" or a variant; returns its manifest."""
    work = Workdir(config)
    if found := work.done(name):
        return found
    corpus = work.require("corpus")
    stage = work.begin(name)
    config = variants.applied(config, name)

    # ---- models -------------------------------------------------------------------------------------------------
    mesh = learners.mesh_of(config)
    with jax.set_mesh(mesh):
        run = recipe.run_of(config, name)
        recipe.check(work, corpus, mesh)
        model, params, own, shardings = learners.learning(work, run.side, mesh)
        tables = learners.tables_of(work)
        objective, frozen = recipe.make(config, work, run, model, mesh, corpus, tables)

        # ---- state --------------------------------------------------------------------------------------------------
        t = run.training
        rate = learning_rate(t.learning_rate, t.warmup, t.steps, t.end_fraction)
        optimizer = make_optimizer(
            rate, weight_decay=t.weight_decay, clip=t.clip, projection_rate=recipe.projection_rate(config, objective)
        )  # fmt: skip
        parameters, trainable = learners.count(model.abstract_params()), learners.count(params)
        frozen, reweigh = frozen._replace(own=own), recipe.reweighing(config, run, corpus)
        others = recipe.beside_the_model(config, work, model, objective, frozen, tables)
        params |= others
        shardings |= jax.tree.map(lambda _: sharding.replicated(mesh), others)
        start_weights = frozen.specialty_weights_S if reweigh else None
        begin = jax.jit(functools.partial(init_state, optimizer=optimizer, ema=t.ema))
        state = begin(params, weights_S=start_weights)
        state = jax.device_put(state, sharding.of_state(state, optimizer, shardings, mesh))
        whole = lambda state: lora.whole(to_use(state), own, objective.adapter_scale)  # noqa: E731
        del params, others
        checkpoints = Checkpoints(stage.folder / "checkpoints", keep=t.keep, save_every=t.checkpoint_every)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        if restored := checkpoints.restore_latest(abstract):
            _, state = restored
        start = int(state["step"])
        best = Best(stage.folder, t.keep_best, start)

        # ---- data ---------------------------------------------------------------------------------------------------
        shards = corpus["shards"]["train"]
        stored = scores.Scores(work / "scores", work.require("scores"), shards) if objective.scores else None
        loader = Loader(
            work / "corpus", shards, t.batch_size, config.seed,
            places=sharding.places(mesh, t.batch_size), joined=stored,
        )  # fmt: skip
        curve = Curve(config, work, corpus, run.side, model, mesh, tables)
        update = make_step(
            Loss(objective), optimizer, rate, accumulate=t.accumulate, ema=t.ema, reweigh=reweigh
        )  # fmt: skip

        # ---- loop: dispatch step n, then read what step n - 1 reported ----------------------------------------------
        any_of = hosts.AnyOf(mesh)
        shapes = {k: np.empty((t.batch_size, n), np.bool_) for k, n in loader.fields.items()}
        model_flops = flops.of_step(objective, state["params"], frozen.projection, shapes).model
        watching = watch.Watch(config.watch, stage.folder, name, start=start, model_flops=model_flops)
        also = watch.sinks(config.watch, stage.folder, name, start)
        metrics = MetricsWriter(stage.folder / "metrics.jsonl", resume_step=start + 1 if start else 0, also=also)
        names = corpus["specialties"]
        with metrics, watching, Progress(t.steps, name, start=start) as progress, on_sigterm() as stop:
            if start == 0:
                sizes = {"parameters": parameters, "trainable_parameters": trainable}
                metrics.write(0, **sizes, **curve(whole(state)))
                best.offer(0, curve.last, to_use(state))
            pending, asked, stopping, done = None, False, False, start
            batches = itertools.islice(loader.iterate(start), t.steps - start)
            for done, batch in enumerate(watching.waiting(batches), start + 1):
                watching.before(done)
                before, asked = asked, any_of.told(stop.requested)
                state, report = update(state, frozen, sharding.put_batch(batch, mesh, t.batch_size))
                if pending:
                    log(metrics, progress, watching, *pending, t, names, stage.folder)
                pending, stopping = (done, report, batch["document"][batch["student_segment_ids"] > 0]), bool(before)
                evaluates = done % t.evaluate_every == 0 or done == t.steps
                saves = done % t.checkpoint_every == 0 or done == t.steps or stopping
                if evaluates or saves:  # what a checkpoint contains has to be in metrics.jsonl before it
                    log(metrics, progress, watching, *pending, t, names, stage.folder)
                    pending = None
                with watching.paused() if evaluates or saves else contextlib.nullcontext():
                    if evaluates:
                        metrics.write(done, **curve(whole(state)))
                        best.offer(done, curve.last, to_use(state))
                    if saves:
                        metrics.sync()
                        checkpoints.save(done, state, force=True)
                if stopping:
                    break
            with watching.paused():
                checkpoints.close()  # while SIGTERM is still ours: the last steps are not lost either
            if stopping or any_of.told(stop.requested):
                if hosts.is_first_process():
                    print(f"{name}: stopped at step {done}, state saved; start it again to go on", file=sys.stderr)
                raise SystemExit(STOPPED)
        used = best.take(to_use(state))
        params = lora.whole(used, own, objective.adapter_scale)
        if start == t.steps or t.keep_best:  # finished, but stopped before it could say so; or another point
            curve(params)
        tokenizer = learners.hf_tokenizer(work, run.side)
        hub.save_pretrained(model, params, stage.folder / "model", tokenizer=tokenizer, dtype="float32")
        if frozen.rows is not None:
            learned = sharding.to_host(used["projection"])
        if frozen.rows is not None and hosts.is_first_process():
            dataclasses.replace(recipe.projection_of(work, tables), logits=learned).save(stage.folder / "projection")
    return stage.finish(
        steps=t.steps,
        **({"best_step": best.step} if t.keep_best else {}),
        parameters=parameters,
        trainable_parameters=trainable,
        skipped=int(state["skipped"]),
        validation_bits_per_byte=curve.last,
        loop_seconds=seconds_of(stage.folder / "metrics.jsonl"),
        resumed_at=start,
    )


class Curve:
    """Held-out bits per byte while training, on the first rows of the validation split."""

    def __init__(self, config, work, corpus, side, model, mesh, tables):
        size = config.evaluation.batch_size
        loader = Loader(work / "corpus", corpus["shards"]["validation"], size, 0)
        wanted = max(1, config.evaluation.curve_rows // size)
        self._batches = [batch for batch, _ in zip(loader.sweep(size), range(wanted), strict=False)]
        self._rows = {k: np.concatenate([b[k] for b in self._batches]) for k in self._batches[0]}
        options = {"block": config.objective.block, "attention": config.attention, "mesh": mesh}
        self._scorer = likelihood.make_scorer(model, side, **options)
        self._side, self._mesh, self._lengths = side, mesh, tables[side].lengths
        self.last = float("nan")

    def __call__(self, params: Any) -> dict[str, float]:
        nats = likelihood.sweep(self._scorer, params, self._batches, self._mesh)["nats"]
        self.last = likelihood.bits_per_byte(nats, self._rows, self._side, self._lengths)
        return {"validation_bits_per_byte": self.last}


def log(metrics, progress, watching, done, report, documents, t, specialties, folder) -> None:
    """Writes what step `done` reported, every t.log_every steps; stops the run after too many bad updates."""
    skipped = int(report["skipped"])
    watching.after(done, int(report["tokens"]))
    if done % t.log_every == 0 or done in (1, t.steps):
        values = {k: np.asarray(v).tolist() for k, v in report.items() if not k.endswith("_by_specialty")}
        for prefix in ("ce", "weight"):
            if f"{prefix}_by_specialty" in report:
                by = np.asarray(report[f"{prefix}_by_specialty"]).tolist()
                values |= {f"{prefix}/{name}": v for name, v in zip(specialties, by, strict=True) if v > 0}
        metrics.write(done, **values)
        watching.write(done)
    shown = {k: report[k] for k in ("loss", "ce", "kl_at_1", "attention") if k in report}
    progress.update(done, tokens=int(report["tokens"]), **shown)
    if skipped > t.max_skipped:
        some = ", ".join(map(str, np.unique(documents)[:20]))
        raise Diverged(
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

"""Stage 3: the vocabulary projection. Builds W from bytes and counts, fits it on training text, measures it held out.

    distil-jax project --config configs/tiny.py

Writes projection/ (projection.safetensors and the measures in manifest.json).
"""

import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distil_jax import hosts, information, learners, sharding
from distil_jax.data.loader import Loader
from distil_jax.losses.kd import teacher_logits
from distil_jax.projection import Projection
from distil_jax.tokens.align import NONE, token_classes
from distil_jax.workdir import Workdir


def main(config: ConfigDict) -> dict[str, Any]:
    """Builds, fits and measures W unless that is done; returns the manifest."""
    work = Workdir(config)
    if found := work.done("projection"):
        return found
    corpus = work.require("corpus")
    stage = work.begin("projection")
    mesh = learners.mesh_of(config)
    tables = learners.tables_of(work)
    c = config.projection
    with jax.set_mesh(mesh):
        teacher, params = learners.teacher(work, mesh, config.teacher.dtype)
        unembedding = teacher.unembedding(params)

        def loader(split):
            return Loader(work / "corpus", corpus["shards"][split], config.evaluation.batch_size, config.seed)

        # Every co-occurrence of the training split: token ids alone, no model.
        train = loader("train")
        pairs = [boundary_pairs(batch) for batch in train.sweep()]
        counts = np.concatenate([p["teacher"] for p in pairs]), np.concatenate([p["student"] for p in pairs])
        built = Projection.build(
            teacher=tables["teacher"], student=tables["student"], counts=counts, k=c.size, prior=c.prior
        )

        # Fitted on what the teacher says at the shared boundaries of some training rows.
        unigram = np.load(work / "corpus" / "student_unigram.npy")
        hidden_of = jax.jit(lambda params, batch: teacher_states(teacher, params, batch, config.attention, mesh))
        fitting = gather(hidden_of, params, first(train, c.fit_rows), mesh)
        ids, probs = top(unembedding, built, fitting["hidden"], c.fit_top)
        fitted, fit = built.fit(
            ids, probs, fitting["student"], unigram_Vs=unigram, steps=c.fit_steps, learning_rate=c.fit_learning_rate,
            keep=c.fit_keep, seed=config.seed,
        )  # fmt: skip
        if hosts.is_first_process():
            fitted.save(stage.folder)

        # Measured on held-out text: from bytes alone, with counts, fitted, and shuffled, which must be worse.
        held_out = gather(hidden_of, params, loader("test").sweep(rows=config.evaluation.rows), mesh)
        positions = information.Positions(
            held_out["hidden"], held_out["teacher"], held_out["student"], held_out["document"],
            tables["student"].lengths[held_out["student"]], one_to_one(held_out, tables),
            token_classes(tables["student"])[held_out["student"]], held_out["specialty"],
        )  # fmt: skip
        resampled = {"samples": config.evaluation.bootstrap, "seed": config.seed}
        first_piece = Projection.build(teacher=tables["teacher"], student=tables["student"], k=c.size)
        forms = {"first_piece": first_piece, "built": built, "fitted": fitted, "shuffled": built.shuffled(config.seed)}
        common = {"unigram_Vs": unigram, "tables": tables}
        common["pi_Vt"] = information.mean_teacher(built, positions, unembedding)  # all of them map the same tokens
        values = {
            name: information.values(W, positions, unembedding, tail=64 * (name == "built"), **common)
            for name, W in forms.items()
        }
        values = {name: {"kl_tail": values["built"]["kl_tail"]} | v for name, v in values.items()}  # whatever W is
        specialties = corpus["specialties"]
        measures = {
            name: information.summary(v, positions, specialties=specialties, **resampled) for name, v in values.items()
        }
        samples = config.evaluation.bootstrap
        sorted_match = information.sorted_match(positions, unembedding, built.table().mapped, samples=samples)
        gain = {
            f"{after}_over_{before}": information.gain(values[before], values[after], positions, **resampled)
            for before, after in (("first_piece", "built"), ("first_piece", "fitted"), ("built", "fitted"))
        }
    return stage.finish(
        **measures,
        sorted_match=sorted_match,
        fit=fit,
        gain=gain,
        rows=int(built.mapped.sum()),
        mean_support=float((built.ids >= 0).sum() / max(int(built.mapped.sum()), 1)),
    )


def boundary_pairs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The supervised positions of a batch where both tokenizations have a boundary: both next tokens, document and
    specialty, and where they stand; arrays [n]."""
    shared = (batch["role"] != NONE) & (batch["offset"] == 0)
    rows, columns = np.nonzero(shared & (batch["student_weights"] > 0))
    at = batch["teacher_position"][rows, columns]
    return {
        "student": batch["student_targets"][rows, columns],
        "teacher": batch["teacher_targets"][rows, at],
        "document": batch["document"][rows, columns],
        "specialty": batch["specialty"][rows, columns],
        "row": rows,
        "at": at,
    }


def teacher_states(
    teacher: Any, params: Any, batch: dict[str, jax.Array], attention: str = "auto", mesh: Mesh | None = None
) -> jax.Array:
    """The teacher's hidden states of a batch, [B, Lt, Dt]."""
    fields = {name: batch[f"teacher_{name}"] for name in ("segment_ids", "positions")}
    return teacher.hidden(params, batch["teacher_tokens"], attention=attention, mesh=mesh, **fields)


def first(loader: Loader, rows: int) -> Iterable[dict[str, np.ndarray]]:
    """The first shuffled batches that make up at least `rows` rows, at most one epoch."""
    return (loader.batch(n) for n in range(-(-min(rows, loader.records) // loader.batch_size)))


def gather(hidden_of: Any, params: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Any) -> dict[str, np.ndarray]:
    """`boundary_pairs` of all batches, with the teacher state that predicts each, as "hidden" [n, Dt] float32."""
    parts = []
    for batch in batches:
        hidden = sharding.to_host(hidden_of(params, sharding.put_batch(batch, mesh)).astype(jnp.float32))
        pairs = boundary_pairs(batch)
        parts.append(pairs | {"hidden": hidden[pairs["row"], pairs["at"]]})
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def top(unembedding: jax.Array, W: Projection, hidden_NxDt: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's `k` likeliest tokens at each position, (ids [N, k], probabilities [N, k]), block by block."""
    mapped = jnp.asarray(W.mapped)

    @jax.jit
    def block(hidden, unembedding):
        q = jax.nn.softmax(teacher_logits(hidden, unembedding, mapped), axis=0)
        probs, ids = jax.lax.top_k(q.T, min(k, q.shape[0]))
        return ids, probs

    size, ids, probs = 512, [], []
    for at in range(0, len(hidden_NxDt), size):
        part = hidden_NxDt[at : at + size]
        i, p = block(np.pad(part, ((0, size - len(part)), (0, 0))), unembedding)
        ids.append(sharding.to_host(i)[: len(part)])
        probs.append(sharding.to_host(p)[: len(part)])
    return np.concatenate(ids), np.concatenate(probs)


def one_to_one(pairs: dict[str, np.ndarray], tables: dict[str, Any]) -> np.ndarray:
    """bool [n]: the positions where both next tokens are text of the same length, so of the same bytes."""
    student = tables["student"].lengths[pairs["student"]]
    return (student > 0) & (student == tables["teacher"].lengths[pairs["teacher"]])


if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))

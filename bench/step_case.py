"""What bench/step.py and bench/step_profile.py measure: a pair of models, W, and one batch of real text."""

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distil_jax import sharding
from distil_jax.data import hpo
from distil_jax.data.rows import Quarantine
from distil_jax.losses import stored
from distil_jax.losses.kd import teacher_logits
from distil_jax.losses.vocabulary import LOWEST
from distil_jax.models import hub
from distil_jax.objective import Frozen, Loss, Objective
from distil_jax.projection import Projection
from distil_jax.step import init_state, make_optimizer, make_step
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.pack import Example, make_example, pack

ALPHA, RATE, DECAY, CLIP, B1, B2 = 0.5, 1e-5, 0.01, 1.0, 0.9, 0.95


class Case(NamedTuple):
    """`batch` has the fields of tokens/pack.py, one document a row, so that no form needs a block mask."""

    folders: dict[str, Path]  # "teacher", "student"
    tables: dict[str, ByteTable]
    batch: dict[str, np.ndarray]
    projection: Projection
    temperature: float


def arguments(description: str) -> argparse.ArgumentParser:
    """What a script about this case is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=126)
    parser.add_argument("--block", type=int, default=0, help="config.objective.block")
    parser.add_argument("--remat", default="dots", help="config.student.training.remat")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def make_case(teacher: str, student: str, *, rows: int, length: int, temperature: float) -> Case:
    """`rows` documents of definitions of the Human Phenotype Ontology, each as many words as fit in `length` tokens."""
    folders = {"teacher": Path(teacher), "student": Path(student)}
    tables = {side: ByteTable.from_tokenizer(folder) for side, folder in folders.items()}
    with tempfile.TemporaryDirectory() as folder, Quarantine(Path(folder) / "quarantine.jsonl") as quarantine:
        terms = hpo.read_obo(hpo.find_obo(), quarantine).terms.values()
    words = " ".join(term.definition for term in terms if term.definition).split(" ")
    examples: list[Example] = []
    while len(examples) < rows:
        taken = length
        while True:
            text = " ".join(words[:taken])
            example = make_example("", text, tables["student"], tables["teacher"], document=len(examples))
            if max(len(example["student_tokens"]), len(example["teacher_tokens"])) <= length:
                break
            taken -= 1
        examples.append(example)
        words = words[taken:]
    batch = pack(examples, length, length).rows
    if len(batch["role"]) != rows:
        raise SystemExit(f"two of the {rows} documents went into one row of {length}: give a smaller --length")
    projection = Projection.build(teacher=tables["teacher"], student=tables["student"])
    return Case(folders, tables, batch, projection, temperature)


class Ours(NamedTuple):
    """The training step as distil_jax/train.py builds it, and what it is called with."""

    update: Any  # update(state, frozen, batch) -> (state, report); the state is donated
    state: dict[str, Any]
    frozen: Frozen
    batch: dict[str, jax.Array]
    loss: Loss
    optimizer: Any


def make_ours(case: Case, block: int, remat: str, top_k: int = 0) -> Ours:
    """float32 on one device. With `top_k`, from that many stored tokens of the teacher, which is then dropped."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    models = {}
    constant = lambda value: lambda step: jnp.float32(value)  # noqa: E731
    with jax.set_mesh(mesh):
        for side, folder in case.folders.items():
            model, params = hub.load_pretrained(folder, dtype="float32", mesh=mesh)
            models[side] = model.with_tokenizer(case.tables[side].vocab_size), params
        (student, params), (teacher, teacher_params) = models.pop("student"), models.pop("teacher")
        batch = sharding.put_batch({k: np.asarray(v) for k, v in case.batch.items()}, mesh)
        common = {
            "alpha": constant(ALPHA), "temperature": constant(case.temperature), "block": block, "remat": remat,
            "mesh": mesh,
        }  # fmt: skip
        table = case.projection.table()
        if top_k:
            batch |= stored_scores(teacher, teacher_params, batch, table, case.temperature, top_k)
            objective = Objective(student, scores=(case.temperature,), **common)
            frozen = Frozen(jnp.ones(1), projection=case.projection.rows())
        else:
            objective = Objective(student, teacher=teacher, **common)
            frozen = Frozen(jnp.ones(1), teacher_params, table)
        rate = lambda step: RATE  # noqa: E731
        optimizer = make_optimizer(rate, weight_decay=DECAY, clip=CLIP, b1=B1, b2=B2)
        state = jax.jit(init_state, static_argnums=1)({"model": params}, optimizer)
        loss = Loss(objective)
        return Ours(make_step(loss, optimizer, rate), state, frozen, batch, loss, optimizer)


def stored_scores(teacher, params, batch, table, temperature: float, top_k: int) -> dict[str, jax.Array]:
    """What `distil-jax score` keeps of the teacher, at every position of the batch."""

    @jax.jit
    def keep(tokens_1xL, segment_ids_1xL, positions_1xL):
        hidden = teacher.hidden(params, tokens_1xL, segment_ids=segment_ids_1xL, positions=positions_1xL)[0]
        t_VxN = teacher_logits(hidden, teacher.unembedding(params), table.mapped)
        z_NxK, ids_NxK = stored.largest(t_VxN, top_k)
        others_VxN = t_VxN.at[ids_NxK.T, jnp.arange(len(hidden))[None]].set(LOWEST)
        rest = stored.rest_of(jnp.maximum(others_VxN - z_NxK[:, 0][None], LOWEST), (temperature,))
        return {"score_ids": ids_NxK, "score_codes": stored.codes_of(z_NxK - z_NxK[:, :1]), "score_rest": rest}

    rows = [
        keep(*(batch[f"teacher_{name}"][row : row + 1] for name in ("tokens", "segment_ids", "positions")))
        for row in range(len(batch["role"]))
    ]
    return jax.tree.map(lambda *of_rows: jnp.stack(of_rows), *rows) | {"score_slot": batch["teacher_position"]}

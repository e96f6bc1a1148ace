"""What the models of a run expect at each position: their likeliest next tokens."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from distil_jax import learners, sharding
from distil_jax.errors import UserError
from distil_jax.losses.kd import ProjectionTable, project, teacher_logits
from distil_jax.models.layers import unembed
from distil_jax.projection import Projection
from distil_jax.tokens.align import ROOT
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.pack import Example
from distil_jax.workdir import Workdir

BEST = 5  # tokens that are shown of a distribution
BLOCK = 64  # positions whose distributions exist at one time: 64 MiB at 262,144 tokens
LENGTHS = 64  # sequences are padded to a multiple of this, so that few programs are compiled

Top = dict[int, list[tuple[int, float]]]  # index of a token -> what was expected in its place: (id, probability)


class Expected(NamedTuple):
    """Of a sample: what the student expected in place of its tokens, what the teacher did through W (at roots, in the
    student's tokens), and what the teacher did in place of its own tokens. Empty where there is no such model."""

    student: Top
    projected: Top
    teacher: Top


def expected(
    work: Workdir, tables: dict[str, ByteTable], examples: Sequence[Example]
) -> tuple[list[Expected], list[str]]:
    """(what the models of a run expect in each example, and in words which models these are and what is missing)."""
    student, projected, teacher = ([{} for _ in examples] for _ in range(3))
    notes: list[str] = []
    mesh = learners.mesh_of(work.config)
    hidden = functools.partial(_hidden, mesh=mesh, attention=work.config.attention)
    with jax.set_mesh(mesh):
        if found := _found(notes, "student", lambda: _student(work, mesh)):
            student = _ask(*hidden(*found, examples, "student"), examples, "student", _following, _own(found[0]))
        if found := _found(notes, "teacher", lambda: _teacher(work, mesh)):
            states = hidden(*found, examples, "teacher")
            teacher = _ask(*states, examples, "teacher", _following, _own(found[0]))
            if W := _found(notes, "projection", lambda: _projection(work, tables)):
                head = functools.partial(_projected_top, table=W.table(), student_vocab=W.student_vocab)
                projected = _ask(*states, examples, "teacher", _at_roots, jax.jit(head))
    return [Expected(*parts) for parts in zip(student, projected, teacher, strict=True)], notes


def _found(notes: list[str], what: str, find: Callable[[], tuple[str, Any]]) -> Any:
    """What `find` finds; its name, or the reason why there is none, goes to the notes."""
    try:
        name, found = find()
    except UserError as error:
        notes.append(f"no {what}: {error}")
        return None
    notes.append(f"{what}: {name}")
    return found


def _student(work: Workdir, mesh: Mesh) -> tuple[str, tuple[Any, Any]]:
    """The run that is exported, else another that is finished, else the model that was brought."""
    for run in dict.fromkeys((work.config.export.run, *work.config.runs)):
        if work.done(run):
            return f"the run {run}", learners.trained(work, run, mesh)
    if not work.config.student.path:
        raise UserError(f"none is trained in {work.root} yet")
    return f"{work.config.student.path}, untrained", learners.untrained(work, "student", mesh)


def _teacher(work: Workdir, mesh: Mesh) -> tuple[str, tuple[Any, Any]]:
    if work.teacher_is_trained() and not work.done("teacher"):
        raise UserError(f"none is trained in {work.root} yet")
    name = "as trained here" if work.teacher_is_trained() else work.config.teacher.path
    return name, learners.teacher(work, mesh, work.config.teacher.dtype)


def _projection(work: Workdir, tables: dict[str, ByteTable]) -> tuple[str, Projection]:
    if not work.done("projection"):
        raise UserError(f"none is made in {work.root} yet; `distil-jax project` makes it")
    return "as fitted", Projection.load(work / "projection", **tables)


def _own(model: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(_own_top, text_vocab=model.config.text_vocab_size))


def _following(example: Example, side: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, the positions that predict them): all but the first."""
    tokens = np.arange(1, len(example[f"{side}_tokens"]))
    return tokens, tokens - 1


def _at_roots(example: Example, side: str) -> tuple[np.ndarray, np.ndarray]:
    """(student tokens, the teacher's positions that predict them): where both stand at the same byte."""
    tokens = np.flatnonzero((example["role"] == ROOT) & (example["teacher_index"] > 0))
    return tokens, example["teacher_index"][tokens] - 1


def _ask(
    hidden_BxLxD: np.ndarray, unembedding: Any, examples: Sequence[Example], side: str, positions_of: Any, head: Any
) -> list[Top]:
    """The likeliest tokens of each example at the positions that `positions_of` chooses, by the tokens it names."""
    found: list[Top] = []
    for row_LxD, example in zip(hidden_BxLxD, examples, strict=False):
        tokens, positions = positions_of(example, side)
        top: Top = {}
        for start in range(0, len(tokens), BLOCK):
            at, block_NxD = tokens[start : start + BLOCK], row_LxD[positions[start : start + BLOCK]]
            filled = np.pad(block_NxD, ((0, BLOCK - len(at)), (0, 0)))
            ids_NxK, probs_NxK = jax.device_get(head(filled, unembedding))
            for token, ids, probs in zip(at.tolist(), ids_NxK.tolist(), probs_NxK.tolist(), strict=False):
                top[token] = [(i, p) for i, p in zip(ids, probs, strict=True) if p > 0]
        found.append(top)
    return found


def _hidden(
    model: Any, params: Any, examples: Sequence[Example], side: str, mesh: Mesh, attention: str
) -> tuple[Float[np.ndarray, "B L D"], Any]:
    """(the model's hidden states of all examples, in rows that fill the mesh; its unembedding)."""
    tokens = [example[f"{side}_tokens"] for example in examples]
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    shape = -(-len(tokens) // parts) * parts, -(-max(map(len, tokens)) // LENGTHS) * LENGTHS
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row, ids in enumerate(tokens):
        batch["tokens"][row, : len(ids)] = ids
        batch["segment_ids"][row, : len(ids)] = 1
        batch["positions"][row, : len(ids)] = np.arange(len(ids))

    @jax.jit
    def hidden_of(params, batch):
        fields = {name: batch[name] for name in ("segment_ids", "positions")}
        states = model.hidden(params, batch["tokens"], attention=attention, mesh=mesh, **fields)
        return states.astype(jnp.float32)

    return sharding.to_host(hidden_of(params, sharding.put_batch(batch, mesh))), model.unembedding(params)


def _own_top(hidden_NxD: Array, unembedding: Any, *, text_vocab: int) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    """The likeliest of a model's own tokens; rows of the vocabulary that are no token count for nothing."""
    logits_NxV = unembed(unembedding, hidden_NxD).T
    logits_NxV = jnp.where(jnp.arange(logits_NxV.shape[1])[None] < text_vocab, logits_NxV, -jnp.inf)
    return _largest(jax.nn.softmax(logits_NxV, axis=1))


def _projected_top(
    hidden_NxDt: Array, unembedding: Any, *, table: ProjectionTable, student_vocab: int
) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    """The likeliest student tokens by the projected teacher, at tau = 1."""
    q_VtxN = jax.nn.softmax(teacher_logits(hidden_NxDt, unembedding, table.mapped), axis=0)
    return _largest(project(q_VtxN, table, student_vocab).T)


def _largest(p_NxV: Float[Array, "N V"]) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    probs_NxK, ids_NxK = jax.lax.top_k(p_NxV, min(BEST, p_NxV.shape[1]))
    return ids_NxK, probs_NxK

"""What the teacher says at one block of tokens, as a distribution over the student's tokens.

Everything here is laid out `[V, n]`, vocabulary first. The projection is then a sorted segment sum over whole rows,
which XLA turns into streams on every backend; the `[n, V]` form is a scatter with one scalar per update (measured 30
times slower on CPU, 3 times on TPU v5e).

W is held in three forms. `ProjectionTable` lists its entries for a device that has both vocabularies whole.
`PlacedTable` is for vocabularies that are spread over devices: each device has the entries of its own student tokens
and a copy of the teacher's rows that they start from, so that the projection moves nothing at all between devices.
`ProjectionRows` are the rows of W, for a teacher that names a few tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distil_jax.losses.vocabulary import LOWEST, Shards, floor_of_largest
from distil_jax.models.int8 import Int8
from distil_jax.models.layers import unembed

_ROWS = 128  # the rows of a placed table are a multiple of this: tiles of the matrix unit


class ProjectionTable(NamedTuple):
    """The sparse `W: [Vt, Vs]` as a list of its entries, sorted by student token.

    `weights` are probabilities: the entries of one teacher token sum to 1. `mapped` tells which teacher tokens have
    entries; the others (control tokens without a counterpart, unused ids, padding rows) are in no softmax of the
    teacher.
    """

    teacher_ids: Int[Array, " nnz"]
    student_ids: Int[Array, " nnz"]
    weights: Float[Array, " nnz"]
    mapped: Bool[Array, " Vt"]


class PlacedTable(NamedTuple):
    """The entries of W on the devices of their student tokens, R to each of S shards, shard after shard.

    Each entry has a row of the teacher's head of its own (`rows_of`), so a token with entries on several devices is
    scored on each of them; `first` marks one entry of each token. Entries that fill up a shard have weight 0.
    """

    teacher_ids: Int[Array, " SR"]
    student_rows: Int[Array, " SR"]  # on their shard (vocabulary.Shards), ascending within it
    weights: Float[Array, " SR"]
    first: Bool[Array, " SR"]


class ProjectionRows(NamedTuple):
    """The rows of W: student tokens of each teacher token (-1 at empty places) and their probabilities (0 there)."""

    ids: Int[Array, "Vt k"]
    weights: Float[Array, "Vt k"]


def place(table: ProjectionTable, shards: Shards) -> ProjectionTable | PlacedTable:
    """`table` as the shards of a mesh need it; itself where there is one shard. Reads values, so it is for the host.

    The number of teacher rows grows by W's mean support (1.12 for Gemma 3 into Llama 3) and by what the fullest shard
    has above the mean.
    """
    if shards.size == 1:
        return table
    teacher_ids, student_ids, weights = (np.asarray(x) for x in table[:3])
    first = np.zeros(len(teacher_ids), bool)
    first[np.unique(teacher_ids, return_index=True)[1]] = True
    owner = student_ids % shards.size
    counts = np.bincount(owner, minlength=shards.size)
    rows = -(-int(counts.max()) // _ROWS) * _ROWS
    order = np.argsort(owner, kind="stable")  # student ids stay ascending within a shard
    at = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts) + owner[order] * rows
    full = np.iinfo(np.int32).max
    columns = [np.zeros(shards.size * rows, d) for d in (np.int32, np.int32, np.float32, bool)]
    columns[1][:] = full
    for column, values in zip(columns, (teacher_ids, student_ids // shards.size, weights, first), strict=True):
        column[at] = values[order]
    filling = columns[1] == full
    columns[1][filling] = int(student_ids.max()) // shards.size  # stays sorted
    return PlacedTable(*map(jnp.asarray, columns))


def rows_of(unembedding: "Float[Array, 'Vt Dt'] | Int8", table: ProjectionTable | PlacedTable):
    """The rows of the teacher's head that a table scores: the head itself, or a row for each placed entry."""
    if isinstance(table, ProjectionTable):
        return unembedding
    return jax.tree.map(lambda x: jnp.take(x, table.teacher_ids, axis=0), unembedding)


def project(q_VtxN: Float[Array, "Vt N"], table: ProjectionTable, student_vocab: int) -> Float[Array, "Vs N"]:
    """`p = W^T q`: the teacher's next-token distribution, as a distribution over the student's tokens."""
    mass = q_VtxN[table.teacher_ids] * table.weights[:, None]
    return jax.ops.segment_sum(mass, table.student_ids, student_vocab, indices_are_sorted=True)


def teacher_logits(
    hidden_NxDt: Float[Array, "N Dt"], unembedding_VtxDt: "Float[Array, 'Vt Dt'] | Int8", mapped_Vt: Bool[Array, " Vt"]
) -> Float[Array, "Vt N"]:
    """The teacher's logits for a block of positions, with every token that W does not map removed.

    The head may have more rows than the tokenizer has ids (padding: removed too), or fewer (Gemma 3's tokenizer has an
    image token that the text models leave out).
    """
    t_VtxN = unembed(unembedding_VtxDt, hidden_NxDt)
    return jnp.where(_fit(mapped_Vt, unembedding_VtxDt.shape[0])[:, None], t_VtxN, LOWEST)


def _fit(mapped_Vt: Bool[Array, " Vt"], rows: int) -> Bool[Array, " rows"]:
    return jnp.pad(mapped_Vt[:rows], (0, max(0, rows - mapped_Vt.shape[0])))


class Target(NamedTuple):
    """The projected teacher at a temperature: its mass on this device's student tokens, and what is left besides (None:
    nothing is)."""

    p_VxN: Float[Array, "Vs N"]
    rest_N: Float[Array, " N"] | None


def full_target(
    hidden_NxDt: Float[Array, "N Dt"],
    head_RxDt: "Float[Array, 'R Dt'] | Int8",
    table: ProjectionTable | PlacedTable,
    student_rows: int,
    *,
    top_k: int = 0,
    shards: Shards = Shards(),  # noqa: B008
):
    """`at(temperature) -> Target` for the whole distribution of the teacher: softmax first, then W, with which a
    temperature does not commute.

    top_k: only the teacher's K likeliest tokens (and what equals the K-th) are projected; the mass of the others is the
    remainder.
    """
    if isinstance(table, ProjectionTable):
        t_RxN = teacher_logits(hidden_NxDt, head_RxDt, table.mapped)
        counted_R, share_Rx1 = _fit(table.mapped, t_RxN.shape[0]).astype(jnp.float32), 1.0
    else:
        t_RxN = jnp.where((table.weights > 0)[:, None], unembed(head_RxDt, hidden_NxDt), LOWEST)
        counted_R, share_Rx1 = table.first.astype(jnp.float32), table.weights[:, None]
    kept = None
    if top_k:
        ordered, floor_N = floor_of_largest(t_RxN, counted_R[:, None], top_k, shards.sum)
        kept = ordered >= floor_N[None]
    largest_N = shards.max(jnp.max(t_RxN, axis=0))

    def at(temperature):
        e_RxN = jnp.exp((t_RxN - largest_N[None]) / temperature) * share_Rx1
        total_N = shards.sum(jnp.sum(e_RxN, axis=0))
        rest_N = None
        if kept is not None:
            e_RxN = jnp.where(kept, e_RxN, 0)
            rest_N = jnp.maximum(1 - shards.sum(jnp.sum(e_RxN, axis=0)) / total_N, 0)
        if isinstance(table, ProjectionTable):
            mass_VxN = project(e_RxN, table, student_rows)
        else:
            mass_VxN = jax.ops.segment_sum(e_RxN, table.student_rows, student_rows, indices_are_sorted=True)
        return Target(mass_VxN / total_N[None], rest_N)

    return at


def named_target(
    ids_NxK: Int[Array, "N K"],
    log_probs_NxK: Float[Array, "N K"],
    rows: ProjectionRows,
    student_rows: int,
    shards: Shards = Shards(),  # noqa: B008
) -> Target:
    """The same for a teacher of which K tokens are known: their mass through W, and 1 less that mass."""
    ids, weights = rows.ids[ids_NxK], rows.weights[ids_NxK]
    here = (ids >= 0) & (ids % shards.size == shards.index())
    mass = jnp.exp(log_probs_NxK.astype(jnp.float32))[..., None] * weights
    at = jnp.where(here, ids // shards.size, student_rows).reshape(len(ids), -1)  # what is not here falls off the end
    columns = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    p_VxN = jnp.zeros((student_rows, len(ids)), jnp.float32)
    p_VxN = p_VxN.at[at, columns].add(mass.reshape(at.shape), mode="drop")
    return Target(p_VxN, jnp.maximum(1 - shards.sum(jnp.sum(p_VxN, axis=0)), 0))

"""What the teacher says at one block of tokens, as a distribution over the student's tokens.

Everything here is laid out `[V, n]`, vocabulary first. The projection is then a sorted segment sum over whole rows,
which XLA turns into streams on every backend; the `[n, V]` form is a scatter with one scalar per update (measured 30
times slower on CPU, 3 times on TPU v5e).

W is held in three forms. `ProjectionTable` lists its entries for a device that has both vocabularies whole.
`PlacedTable` is for vocabularies that are spread over devices: each device has the entries of its own student tokens
and a copy of the teacher's rows that they start from, so that the projection moves nothing at all between devices.
`ProjectionRows` are the rows of W, for a teacher that names a few tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from distil_jax.losses.vocabulary import LOWEST, Shards, floor_of_largest
from distil_jax.models.int8 import Int8
from distil_jax.models.layers import unembed

EMPTY = -1  # the id at an empty place of a row of W
REST = -2  # the id of a row's remainder: student tokens that it does not name
_HEAVY = 16  # a student token with more than this part of a shard's mean number of entries is heavy
_ROWS = 128  # the rows of a placed table are a multiple of this: tiles of the matrix unit


class ProjectionTable(NamedTuple):
    """The sparse `W: [Vt, Vs]` as a list of its entries, sorted by student token.

    `weights` are probabilities: the entries of one teacher token and its `rest`, which is what the row leaves to
    student tokens that it does not name, sum to 1. `mapped` tells which teacher tokens have entries; the others
    (control tokens without a counterpart, unused ids, padding rows) are in no softmax of the teacher.
    """

    teacher_ids: Int[Array, " nnz"]
    student_ids: Int[Array, " nnz"]
    weights: Float[Array, " nnz"]
    mapped: Bool[Array, " Vt"]
    slots: Int[Array, " nnz"]  # where the entry stands in the rows of W, [Vt * k]
    rest: Float[Array, " Vt"] | None = None  # None: no row leaves anything


class PlacedTable(NamedTuple):
    """The entries of W on the devices of their student tokens, R to each of S shards, shard after shard.

    Each entry has a row of the teacher's head of its own (`rows_of`), so a token with entries on several devices is
    scored on each of them; `first` marks one entry of each token. A few student tokens are the first piece of thousands
    of teacher tokens: the entries of these H heavy ones lie wherever there is room, and the H sums travel. Entries that
    fill up a shard have weight 0.
    """

    teacher_ids: Int[Array, " SR"]
    segments: Int[Array, " SR"]  # ascending in a shard: which of the heavy tokens, or H + the row on the shard
    weights: Float[Array, " SR"]
    first: Bool[Array, " SR"]
    slots: Int[Array, " SR"]
    heavy: Int[Array, " H"]  # student ids, the same on all shards
    rest: Float[Array, " SR"] | None = None  # of the token of each `first` entry, 0 elsewhere

    @classmethod
    def specs(cls, shards: Shards, rest: bool = False) -> "PlacedTable":
        """How each field lies on the mesh, with a remainder or without."""
        cut = PartitionSpec(shards.axes)
        return cls(cut, cut, cut, cut, cut, PartitionSpec(), cut if rest else None)

    def gather(self, mass_RxN: Float[Array, "R N"], rows: int, shards: Shards) -> Float[Array, "V N"]:
        """The sums of this device's entries, for its student rows."""
        H = len(self.heavy)
        sums = jax.ops.segment_sum(mass_RxN, self.segments, H + rows, indices_are_sorted=True)
        return sums[H:].at[self._heavy_rows(rows, shards)].add(shards.sum(sums[:H]), mode="drop")

    def spread(self, d_p_VxN: Float[Array, "V N"], shards: Shards) -> Float[Array, "R N"]:
        """The way back of `gather`: for each entry what stands at its student token."""
        at = self._heavy_rows(len(d_p_VxN), shards)
        d_heavy_HxN = shards.sum(d_p_VxN.at[at].get(mode="fill", fill_value=0))
        return jnp.concatenate([d_heavy_HxN, d_p_VxN])[self.segments]

    def _heavy_rows(self, rows: int, shards: Shards) -> Int[Array, " H"]:
        """The rows of the heavy tokens on this device; past the end where another has them."""
        return jnp.where(self.heavy % shards.size == shards.index(), self.heavy // shards.size, rows)


class ProjectionRows(NamedTuple):
    """The rows of W: student tokens of each teacher token and their probabilities (0 where the id is EMPTY). The last
    place of a row may be its REST."""

    ids: Int[Array, "Vt k"]
    weights: Float[Array, "Vt k"]


def place(table: ProjectionTable, shards: Shards) -> ProjectionTable | PlacedTable:
    """`table` as the shards of a mesh need it; itself where there is one shard. Reads values, so it is for the host.

    The number of teacher rows grows by W's mean support (1.12 for Gemma 3 into Llama 3) and what rounding fills up.
    """
    if shards.size == 1:
        return table
    student_ids = np.asarray(table.student_ids)
    load = np.bincount(student_ids)
    heavy = np.flatnonzero(load > len(student_ids) / shards.size / _HEAVY)
    is_heavy = np.isin(student_ids, heavy)
    # Light entries go to the shard of their student token; heavy ones fill every shard up to the same height.
    owner = student_ids % shards.size
    light = np.bincount(owner[~is_heavy], minlength=shards.size)
    height = _height(light, int(is_heavy.sum()))
    owner[is_heavy] = np.repeat(np.arange(shards.size), np.maximum(height - light, 0))[: is_heavy.sum()]
    counts = np.bincount(owner, minlength=shards.size)
    rows = -(-int(counts.max()) // _ROWS) * _ROWS

    segment = np.where(is_heavy, np.searchsorted(heavy, student_ids), len(heavy) + student_ids // shards.size)
    first = np.zeros(len(student_ids), bool)
    first[np.unique(np.asarray(table.teacher_ids), return_index=True)[1]] = True
    order = np.lexsort((segment, owner))
    at = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts) + owner[order] * rows

    def placed(values, filling=0):
        column = np.full(shards.size * rows, filling, np.asarray(values).dtype)
        column[at] = np.asarray(values)[order]
        return jnp.asarray(column)

    rest = None
    if table.rest is not None:
        rest = placed(np.where(first, np.asarray(table.rest)[np.asarray(table.teacher_ids)], 0))
    return PlacedTable(
        placed(table.teacher_ids),
        placed(segment.astype(np.int32), int(segment.max())),  # filled up at the end, so that they stay sorted
        placed(table.weights),
        placed(first),
        placed(table.slots),
        jnp.asarray(heavy, jnp.int32),
        rest,
    )


def _height(light_S: np.ndarray, more: int) -> int:
    """The smallest height up to which the shards have room for `more` entries above what they hold."""
    ordered = np.sort(light_S)
    room = ordered * np.arange(1, len(ordered) + 1) - np.cumsum(ordered)  # below the height of each shard
    filled = int(np.searchsorted(room, more, side="right"))  # that many shards stand lower than the surface
    return -(-(more + int(ordered[:filled].sum())) // filled)


def rows_of(unembedding: "Float[Array, 'Vt Dt'] | Int8", table: ProjectionTable | PlacedTable):
    """The rows of the teacher's head that a table scores: the head itself, or a row for each placed entry."""
    if isinstance(table, ProjectionTable):
        return unembedding
    return jax.tree.map(lambda x: jnp.take(x, table.teacher_ids, axis=0), unembedding)


def row_log_softmax(logits: Float[Array, "... k"], ids: Int[Array, "... k"]) -> Float[Array, "... k"]:
    """Log-probabilities of the filled places of each row of W."""
    return jax.nn.log_softmax(jnp.where(ids == EMPTY, jnp.float32(-1e9), logits), axis=-1)


def row_softmax(logits: Float[Array, "... k"], ids: Int[Array, "... k"]) -> Float[Array, "... k"]:
    """Softmax over the filled places of each row; 0 at empty ones, also in a row that is wholly empty."""
    return jnp.where(ids == EMPTY, 0.0, jnp.exp(row_log_softmax(logits, ids)))


def with_weights(table: ProjectionTable | PlacedTable, weights_Vtxk: Float[Array, "Vt k"]):
    """The table of a W that learns: the same entries, with probabilities from its rows. For a jitted function."""
    weights = jnp.where(table.weights > 0, weights_Vtxk.reshape(-1)[table.slots], 0)
    if table.rest is None:
        return table._replace(weights=weights)
    last = weights_Vtxk[:, -1]
    rest = jnp.where(table.rest > 0, last if isinstance(table, ProjectionTable) else last[table.teacher_ids], 0)
    return table._replace(weights=weights, rest=rest)


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
    """The projected teacher at a temperature."""

    p_VxN: Float[Array, "Vs N"]  # its mass on this device's student tokens
    rest_N: Float[Array, " N"] | None  # what is left besides; None: nothing is
    pull: Callable[[Array], Array] | None  # from a gradient with respect to p to one with respect to the weights of W


def scored(
    hidden_NxDt: Float[Array, "N Dt"],
    head_RxDt: "Float[Array, 'R Dt'] | Int8",
    table: ProjectionTable | PlacedTable,
) -> Float[Array, "R N"]:
    """The teacher's logits in the rows that `rows_of` gave this device; LOWEST where a row is no token that W maps."""
    if isinstance(table, ProjectionTable):
        return teacher_logits(hidden_NxDt, head_RxDt, table.mapped)
    return jnp.where((table.weights > 0)[:, None], unembed(head_RxDt, hidden_NxDt), LOWEST)


def counted(table: ProjectionTable | PlacedTable, rows: int) -> Bool[Array, " R"]:
    """One of these rows for each token that W maps."""
    return _fit(table.mapped, rows) if isinstance(table, ProjectionTable) else table.first


class Taken(NamedTuple):
    """What really follows: the teacher's token and the student's, which begin at the same byte.

    What W says of that teacher token is known better: its mass goes to this student token. W guesses what it becomes
    from the token alone, but whether the digit 5 is a number or begins one is in the text. Where the text is as the
    teacher expects it, the target stays right on average.
    """

    token_N: Int[Array, " N"]
    label_N: Int[Array, " N"]

    def add(self, p_VxN: Float[Array, "V N"], mass_N: Float[Array, " N"], shards: Shards) -> Float[Array, "V N"]:
        """A mass on the student's token of each column."""
        return p_VxN + jnp.where(shards.ids(p_VxN.shape[0])[:, None] == self.label_N[None], mass_N[None], 0)


def full_target(
    t_RxN: Float[Array, "R N"],
    table: ProjectionTable | PlacedTable,
    student_rows: int,
    *,
    top_k: int = 0,
    taken: Taken | None = None,
    shards: Shards = Shards(),  # noqa: B008
):
    """`at(temperature) -> Target` for the whole distribution of the teacher, from its `scored` logits: softmax first,
    then W, with which a temperature does not commute.

    top_k: only the teacher's K likeliest tokens (and what equals the K-th) are projected; the mass of the others is the
    remainder, with what the rows of W leave. taken: what really follows (`Taken`).

    `pull` takes the rows of W to sum to 1 whatever their weights, as a softmax makes them: the normaliser then does not
    depend on W, and a gradient counts against that of the remainder (divergence.divergence).
    """
    whole = isinstance(table, ProjectionTable)
    kept = None
    if top_k:
        ones_Rx1 = counted(table, t_RxN.shape[0]).astype(jnp.float32)[:, None]
        ordered, floor_N = floor_of_largest(t_RxN, ones_Rx1, top_k, shards.sum)
        kept = ordered >= floor_N[None]
    largest_N = shards.max(jnp.max(t_RxN, axis=0))
    ids_R = jnp.arange(t_RxN.shape[0]) if whole else table.teacher_ids
    taken_RxN = None if taken is None else ids_R[:, None] == taken.token_N[None]

    def at(temperature):
        e_RxN = jnp.exp((t_RxN - largest_N[None]) / temperature)
        share_RxN = e_RxN if whole else e_RxN * table.weights[:, None]  # of the placed entries of a token, each its own
        left_RxN = None if table.rest is None else e_RxN * table.rest[:, None]
        total_N = jnp.sum(share_RxN, axis=0)
        if left_RxN is not None and not whole:
            total_N += jnp.sum(left_RxN, axis=0)
        total_N, rest_N = shards.sum(total_N), None
        if kept is not None:
            e_RxN, share_RxN = jnp.where(kept, e_RxN, 0), jnp.where(kept, share_RxN, 0)
            left_RxN = None if left_RxN is None else jnp.where(kept, left_RxN, 0)
        known_N = 0.0  # the mass of the token that follows, which needs no W
        if taken is not None:
            with_rest = share_RxN if whole or left_RxN is None else share_RxN + left_RxN
            known_N = shards.sum(jnp.sum(jnp.where(taken_RxN, with_rest, 0), axis=0))
            e_RxN, share_RxN = jnp.where(taken_RxN, 0, e_RxN), jnp.where(taken_RxN, 0, share_RxN)
            left_RxN = None if left_RxN is None else jnp.where(taken_RxN, 0, left_RxN)
        if kept is not None:
            named_N = jnp.sum(share_RxN, axis=0)
            if left_RxN is not None and whole:
                named_N -= jnp.sum(left_RxN, axis=0)
            rest_N = jnp.maximum(1 - (shards.sum(named_N) + known_N) / total_N, 0)
        elif left_RxN is not None:
            rest_N = shards.sum(jnp.sum(left_RxN, axis=0)) / total_N
        if whole:
            mass_VxN = project(e_RxN, table, student_rows)
        else:
            mass_VxN = table.gather(share_RxN, student_rows, shards)
        if taken is not None:
            mass_VxN = taken.add(mass_VxN, known_N, shards)

        def pull(d_p_VxN):
            per_e = d_p_VxN / total_N[None]
            if whole:
                return jnp.sum(e_RxN[table.teacher_ids] * per_e[table.student_ids], axis=1)
            return jnp.sum(e_RxN * table.spread(per_e, shards), axis=1)

        return Target(mass_VxN / total_N[None], rest_N, pull)

    return at


def named_target(
    ids_NxK: Int[Array, "N K"],
    log_probs_NxK: Float[Array, "N K"],
    rows: ProjectionRows,
    student_rows: int,
    shards: Shards = Shards(),  # noqa: B008
    taken: Taken | None = None,
) -> Target:
    """The same for a teacher of which K tokens are known: their mass through W, and 1 less that mass."""
    ids_NxKxk = rows.ids[ids_NxK]
    known_N = 0.0
    if taken is not None:
        is_taken = ids_NxK == taken.token_N[:, None]
        known_N = jnp.sum(jnp.where(is_taken, jnp.exp(log_probs_NxK.astype(jnp.float32)), 0), axis=1)
        ids_NxKxk = jnp.where(is_taken[..., None], EMPTY, ids_NxKxk)
    here = (ids_NxKxk >= 0) & (ids_NxKxk % shards.size == shards.index())
    q_NxKx1 = jnp.exp(log_probs_NxK.astype(jnp.float32))[..., None]
    at = jnp.where(here, ids_NxKxk // shards.size, student_rows)  # what is not here falls off the end
    columns = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    p_VxN = jnp.zeros((student_rows, len(ids_NxK)), jnp.float32)
    p_VxN = p_VxN.at[at, columns].add(q_NxKx1 * rows.weights[ids_NxK], mode="drop")
    if taken is not None:
        p_VxN = taken.add(p_VxN, known_N, shards)

    def pull(d_p_VxN):
        d_mass = d_p_VxN.at[at, columns].get(mode="fill", fill_value=0)
        return jnp.zeros_like(rows.weights).at[ids_NxK].add(q_NxKx1 * d_mass)

    return Target(p_VxN, jnp.maximum(1 - shards.sum(jnp.sum(p_VxN, axis=0)), 0), pull)

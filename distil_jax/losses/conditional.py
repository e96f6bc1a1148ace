"""What the teacher says at positions that are no shared boundary: inside one of its tokens, or across several.

Let the student's next token t begin after o bytes of teacher token i, and let w be these bytes.

    inside    The teacher's distribution at the start of i, given that its token begins with w:
              q(v | w) = q_i(v) / sum_{v' begins with w} q_i(v'). What v has left after w is cut by the student's own
              BPE; its first piece gets the mass. A v that is w and nothing more says nothing about t.
    across    t ends inside or with a later teacher token j. Along the way that the teacher really took,
              m = q(v_i | w) prod_{i < k < j} q_k(v_k), the student tokens that leave the way within j get m q_j(v): for
              numbers, all that share the digits so far. What leaves the way at i counts as above. What is left of
              q(v_i | w) is t's: of the ways that part between, what is known is that t came out (kd.Taken).

Mass that is not named is one remainder cell, so that nothing is claimed of tokens the teacher did not speak about
(divergence.divergence). Only other ways of writing the same bytes w are left out, as a teacher trained on its own
tokenization hardly ever writes them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distil_jax.losses import stored
from distil_jax.losses.kd import PlacedTable, ProjectionRows, ProjectionTable, Target, counted
from distil_jax.losses.vocabulary import LOWEST, Shards
from distil_jax.tokens.align import CROSSING, INTERIOR
from distil_jax.tokens.prefixes import PrefixTables

Likelihood = Callable[[Array, Array, Array], Array]
LIKELIEST = 32  # teacher tokens that are followed at each position; the others join the remainder
_NONE = -1


class Tables(NamedTuple):
    """What the vocabularies say of tokens cut in two, and W for what begins where the teacher's token does."""

    prefixes: PrefixTables
    W: ProjectionRows


class Reading(NamedTuple):
    """Where a student token stands in what the teacher wrote; the second half counts where it runs across."""

    conditional: Bool[Array, "*n"]  # whether the target comes from here and not from W alone
    across: Bool[Array, "*n"]
    offset: Int[Array, "*n"]  # o
    token: Int[Array, "*n"]  # teacher token i
    last_hidden: Float[Array, "*n Dt"]  # the state that predicts token j
    before_last: Int[Array, "*n"]  # bytes of t before token j
    between: Float[Array, "*n"]  # log prod_{i < k < j} q_k(v_k), at the temperature of the step
    between1: Float[Array, "*n"]  # and at temperature 1


def read(
    batch: dict[str, Array],
    tables: PrefixTables,
    hidden_BxLtxDt: Float[Array, "B Lt Dt"],
    temperature: Float[Array, ""],
    likelihood: Likelihood,
) -> Reading:
    """The reading of every target of packed rows, [B, Ls], from the teacher's states.

    likelihood: `(hidden, tokens, mask) -> -log p(token)` in nats [B, Lt] by the teacher's whole softmax, 0 where the
      mask is. It is asked about the tokens between i and j alone.
    """
    at, tokens = batch["teacher_position"], batch["teacher_targets"]
    across = (batch["role"] == CROSSING) & (batch["student_weights"] > 0)
    last, before_last, mask = places(batch, tables, across)
    take = lambda x, i: jnp.take_along_axis(x, i, axis=1)  # noqa: E731

    def between(tau):
        log_probs = -likelihood(hidden_BxLtxDt / tau.astype(hidden_BxLtxDt.dtype), tokens, mask.astype(jnp.float32))
        sums = jnp.cumsum(log_probs, axis=1)
        return jnp.where(last > at + 1, take(sums, jnp.maximum(last - 1, 0)) - take(sums, at), 0.0)

    at_1 = between(jnp.float32(1))
    return Reading(
        conditional=(batch["role"] == INTERIOR) | (batch["role"] == CROSSING),
        across=across,
        offset=batch["offset"],
        token=take(tokens, at),
        last_hidden=jnp.take_along_axis(hidden_BxLtxDt, last[..., None], axis=1),
        before_last=before_last,
        between=jax.lax.cond(temperature == 1, lambda: at_1, lambda: between(temperature)),
        between1=at_1,
    )


def places(
    batch: dict[str, Array], tables: PrefixTables, across: Bool[Array, "B Ls"]
) -> tuple[Int[Array, "B Ls"], Int[Array, "B Ls"], Bool[Array, "B Lt"]]:
    """Of each target that runs across: the teacher position that predicts its last token j, and how many of its bytes
    stand before j; 0 elsewhere. And which teacher positions predict a token between an i and its j."""
    segments, at = batch["teacher_segment_ids"], batch["teacher_position"]
    follows = jnp.pad(segments[:, :-1] == segments[:, 1:], ((0, 0), (0, 1)))
    sizes_BxLt = jnp.where(follows & (segments > 0), tables.length[batch["teacher_targets"]], 0)
    ends_BxLt = jnp.cumsum(sizes_BxLt, axis=1)  # where the token that a position predicts ends, in bytes of the row
    begins_BxLt = ends_BxLt - sizes_BxLt
    start = jnp.take_along_axis(begins_BxLt, at, axis=1) + batch["offset"]
    end = start + tables.student_length[batch["student_targets"]]
    last = jnp.where(across, jax.vmap(jnp.searchsorted)(ends_BxLt, end), 0).astype(jnp.int32)
    before = jnp.where(across, jnp.take_along_axis(begins_BxLt, last, axis=1) - start, 0)
    # Positions i + 1 .. j - 1, marked where such stretches begin and where they end.
    rows = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    inner = (across & (last > at + 1)).astype(jnp.int32)
    marks = jnp.zeros((segments.shape[0], segments.shape[1] + 1), jnp.int32)
    marks = marks.at[rows, at + 1].add(inner).at[rows, last].add(-inner)
    return last, before, jnp.cumsum(marks, axis=1)[:, :-1] > 0


class Rows(NamedTuple):
    """The teacher's logits at a block of positions, as this device has them."""

    ids_R: Int[Array, " R"]  # teacher token of each row
    counted_R: Bool[Array, " R"]  # one row of each token that has a softmax share
    shards: Shards

    def log_sum_exp(self, t_RxN: Array, where: Array) -> Array:
        return self.shards.log_sum_exp(jnp.where(where, t_RxN, LOWEST))

    def of(self, t_RxN: Array, token_N: Array) -> Array:
        """The logit of one token of each column."""
        here = (self.ids_R[:, None] == token_N[None]) & self.counted_R[:, None]
        return self.shards.sum(jnp.sum(jnp.where(here, t_RxN, 0), axis=0))

    def likeliest(self, t_RxN: Array, where: Array) -> tuple[Array, Array]:
        """The largest logits of each column and their tokens, [N, K]; LOWEST where there are fewer."""
        values, at = stored.largest(jnp.where(where, t_RxN, LOWEST), min(LIKELIEST, t_RxN.shape[0]))
        ids = self.ids_R[jnp.minimum(at, len(self.ids_R) - 1)]
        if self.shards.size == 1:
            return values, ids
        values, ids = (jax.lax.all_gather(x, self.shards.axes, axis=1, tiled=True) for x in (values, ids))
        values, best = jax.lax.top_k(values, min(LIKELIEST, values.shape[1]))
        return values, jnp.take_along_axis(ids, best, axis=1)


def rows_of(table: ProjectionTable | PlacedTable, rows: int, shards: Shards) -> Rows:
    """The rows of the teacher's head that `kd.scored` gives."""
    placed = isinstance(table, PlacedTable)
    ids = table.teacher_ids if placed else jnp.arange(rows, dtype=jnp.int32)
    return Rows(ids, counted(table, rows), shards)


def cells(
    t_RxN: Float[Array, "R N"],
    last_RxN: Float[Array, "R N"],
    rows: Rows,
    reading: Reading,
    target_N: Int[Array, " N"],
    tables: Tables,
    temperatures: tuple[Float[Array, ""], ...],
) -> tuple[Int[Array, "N C"], tuple[Float[Array, "N C"], ...]]:
    """Student tokens and their masses at each temperature; the id is -1 where a cell names none.

    t, last: the teacher's logits where it predicts i and j. target: t. A token may come more than once.
    """
    o, i = reading.offset, reading.token
    tables, W = tables
    rank_Rx1 = tables.rank[jnp.minimum(rows.ids_R, len(tables.rank) - 1)][:, None]

    def range_of(token_N, bytes_N):
        """The teacher's tokens that begin with the first bytes of one."""
        at = tables.start[token_N] + jnp.minimum(bytes_N, tables.length[token_N] - 1)
        within = (rank_Rx1 >= tables.low[at][None]) & (rank_Rx1 < tables.high[at][None])
        return rows.counted_R[:, None] & (within | (bytes_N == 0)[None])

    # What the teacher may write at i, given o bytes of it.
    begins = range_of(i, o)
    values_NxK, tokens_NxK = rows.likeliest(t_RxN, begins)
    there_NxK = values_NxK > LOWEST / 2
    longer_NxK = tables.length[tokens_NxK] > o[:, None]
    piece = tables.piece[tables.start[tokens_NxK] + jnp.where(longer_NxK, o[:, None], 0)]
    taken_NxK = tokens_NxK == i[:, None]
    piece = jnp.where(taken_NxK, target_N[:, None], piece)  # the student has cut this one itself
    use_W = (o == 0)[:, None, None]
    alone = jax.lax.broadcasted_iota(jnp.int32, (1, 1, W.ids.shape[1]), 2) == 0
    ids_NxKxk = jnp.where(use_W, W.ids[tokens_NxK], jnp.where(alone & longer_NxK[..., None], piece[..., None], _NONE))
    share_NxKxk = jnp.where(use_W, W.weights[tokens_NxK], alone.astype(jnp.float32))
    gone = (reading.across[:, None] & taken_NxK) | ~there_NxK
    ids_NxKxk = jnp.where(gone[..., None], _NONE, ids_NxKxk)

    # What it may write at j, after what is between, and the student tokens that this completes.
    n = reading.before_last
    last_values_NxK, last_tokens_NxK = rows.likeliest(last_RxN, rows.counted_R[:, None])
    node = tables.student_start[target_N] + jnp.minimum(n, tables.student_length[target_N] - 1)
    completed_NxK = _completed(tables, tables.split_low[node], tables.split_high[node], last_tokens_NxK)
    completed_NxK = jnp.where((completed_NxK == target_N[:, None]) | ~reading.across[:, None], _NONE, completed_NxK)

    ids_NxC = jnp.concatenate(
        [
            ids_NxKxk.reshape(len(o), -1),
            completed_NxK,
            jnp.where(reading.across, target_N, _NONE)[:, None],
        ],
        axis=1,
    )

    def masses(temperature, between_N):
        all_N = rows.log_sum_exp(t_RxN / temperature, begins)
        log_q = values_NxK / temperature - all_N[:, None]
        log_i_N = rows.of(t_RxN, i) / temperature - all_N
        log_way_N = log_i_N + between_N  # what is left of the teacher's mass where j begins
        last_N = rows.log_sum_exp(last_RxN / temperature, rows.counted_R[:, None])
        log_last = (log_way_N - last_N)[:, None] + last_values_NxK / temperature
        beside_NxK = jnp.where(completed_NxK >= 0, jnp.exp(log_last), 0)
        t_N = jnp.maximum(jnp.exp(log_i_N) - jnp.sum(beside_NxK, axis=1), 0)
        first_NxKxk = jnp.exp(log_q)[..., None] * share_NxKxk
        parts = [first_NxKxk.reshape(len(o), -1), beside_NxK, t_N[:, None]]
        return jnp.where(ids_NxC >= 0, jnp.concatenate(parts, axis=1), 0)

    return ids_NxC, tuple(
        masses(tau, x) for tau, x in zip(temperatures, (reading.between, reading.between1), strict=False)
    )


def _completed(tables: PrefixTables, low_N: Array, high_N: Array, tokens_NxK: Array) -> Int[Array, "N K"]:
    """The student token that each teacher token completes, by a search in [low, high); -1: none."""
    end = len(tables.split_teacher) - 1

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        smaller = tables.split_teacher[jnp.minimum(middle, end)] < tokens_NxK
        smaller &= low < high
        return jnp.where(smaller, middle + 1, low), jnp.where(smaller | (low >= high), high, middle)

    low = jnp.broadcast_to(low_N[:, None], tokens_NxK.shape)
    high = jnp.broadcast_to(high_N[:, None], tokens_NxK.shape)
    at, _ = jax.lax.fori_loop(0, int(end + 1).bit_length() + 1, halve, (low, high))
    found = (at < high_N[:, None]) & (tables.split_teacher[jnp.minimum(at, end)] == tokens_NxK)
    return jnp.where(found, tables.split_student[jnp.minimum(at, end)], _NONE)


def target(ids_NxC: Int[Array, "N C"], mass_NxC: Float[Array, "N C"], student_rows: int, shards: Shards) -> Target:
    """The cells as a target: their masses on this device's student tokens, and 1 less all of them."""
    here = (ids_NxC >= 0) & (ids_NxC % shards.size == shards.index())
    at = jnp.where(here, ids_NxC // shards.size, student_rows)  # what is not here falls off the end
    columns = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    p_VxN = jnp.zeros((student_rows, len(ids_NxC)), jnp.float32).at[at, columns].add(mass_NxC, mode="drop")
    return Target(p_VxN, jnp.maximum(1 - jnp.sum(mass_NxC, axis=1), 0), None)

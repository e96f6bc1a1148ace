"""KL over the tokens that both vocabularies have, at the positions where both tokenizations have one token.

    D = sum_{v in A} q_v log(q_v / s_v) + q_rest log(q_rest / s_rest),    A = top 16 of q that have a match

q and s are the full softmaxes at the temperature; s_v is the student's probability of the token with v's bytes; the
rest is what both put elsewhere, one cell. Positions: one-to-one groups. Source: the strict top-k baseline of arXiv
2610.08448 (its teacher's top 16, byte-identical tokens), as docs/rivals.md describes it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from distil_jax.losses.rivals import positions, vocabularies
from distil_jax.losses.rivals.stream import Sides, Told, compare, log_softmax, safe_log
from distil_jax.tokens.bytes import ByteTable

TOP = 16


class Tables(NamedTuple):
    mapped: Bool[Array, " Vt"]
    match: Int[Array, " Vt"]  # the student token with the same bytes or role; -1: none
    lengths: vocabularies.Lengths


def tables(teacher: ByteTable, student: ByteTable) -> Tables:
    """From the bytes of both vocabularies."""
    match = np.full(teacher.vocab_size, -1, np.int32)
    teacher_ids, student_ids = vocabularies.matched(teacher, student)
    match[teacher_ids] = student_ids
    known = jnp.asarray(vocabularies.mapped(teacher, student))
    return Tables(known, jnp.asarray(match), vocabularies.lengths(teacher, student))


def taught(tables: Tables, batch: dict[str, Array]) -> Bool[Array, "B L"]:
    """One-to-one tokens."""
    return positions.one_to_one(batch, tables.lengths)


def told(tables: Tables, learned: None, sides: Sides, batch: dict[str, Array], temperature: Array, **options) -> Told:
    """D at each taught position."""

    def cells(z_VsxN, t_VtxN, more, match_Vt):
        log_s_VsxN = log_softmax(z_VsxN, temperature)
        log_q_NxK, ids_NxK = jax.lax.top_k(log_softmax(t_VtxN, temperature).T, min(TOP, t_VtxN.shape[0]))
        # A head may have more rows than the tokenizer has ids; those are in no softmax and never among the likeliest
        # unless there are fewer than 16 tokens.
        ids_NxK = match_Vt.at[ids_NxK].get(mode="fill", fill_value=-1)
        q_NxK = jnp.where(ids_NxK >= 0, jnp.exp(log_q_NxK), 0)
        s_at_NxK = jnp.take_along_axis(log_s_VsxN, jnp.maximum(ids_NxK, 0).T, axis=0).T
        s_NxK = jnp.where(ids_NxK >= 0, jnp.exp(s_at_NxK), 0)
        named_N = jnp.sum(q_NxK * (safe_log(q_NxK) - s_at_NxK), axis=1)
        return named_N + rest_kl(1 - jnp.sum(q_NxK, axis=1), 1 - jnp.sum(s_NxK, axis=1))

    values = compare(
        cells, tables.mapped, sides, batch, taught(tables, batch), shared=tables.match, **options
    )  # fmt: skip
    return Told(values)


def rest_kl(q_N: Array, s_N: Array) -> Array:
    """`q log(q / s)` of one remainder cell, which rounding may leave a little below 0."""
    q_N = jnp.maximum(q_N, 0)
    s_N = jnp.maximum(s_N, jnp.finfo(jnp.float32).eps)
    return q_N * (safe_log(q_N) - jnp.log(s_N))

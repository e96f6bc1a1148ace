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
from jaxtyping import Array, Bool, Float, Int

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
        log_s_VsxN, log_q_VtxN = log_softmax(z_VsxN, temperature), log_softmax(t_VtxN, temperature)
        log_q_NxK, teacher_NxK = jax.lax.top_k(log_q_VtxN.T, min(TOP, t_VtxN.shape[0]))
        # A head may have more rows than the tokenizer has ids: they have no match.
        student_NxK = match_Vt.at[teacher_NxK].get(mode="fill", fill_value=-1)
        named = student_NxK >= 0
        log_s_NxK = jnp.take_along_axis(log_s_VsxN, jnp.maximum(student_NxK, 0).T, axis=0).T
        named_N = jnp.sum(jnp.where(named, jnp.exp(log_q_NxK) * (log_q_NxK - log_s_NxK), 0), axis=1)
        q_rest_N = without(jnp.exp(log_q_VtxN), teacher_NxK, named)
        return named_N + rest_kl(q_rest_N, without(jnp.exp(log_s_VsxN), student_NxK, named))

    values = compare(
        cells, tables.mapped, sides, batch, taught(tables, batch), shared=tables.match, **options
    )  # fmt: skip
    return Told(values)


def without(p_VxN: Float[Array, "V N"], ids_NxK: Int[Array, "N K"], named: Bool[Array, "N K"]) -> Float[Array, " N"]:
    """The mass of the tokens that are not `named`, added up: 1 less the others loses its digits where it is small."""
    at = jnp.where(named, ids_NxK, p_VxN.shape[0])  # what is not named falls off the end
    columns = jax.lax.broadcasted_iota(jnp.int32, at.shape, 0)
    return jnp.sum(p_VxN.at[at, columns].set(0, mode="drop"), axis=0)


def rest_kl(q_N: Float[Array, " N"], s_N: Float[Array, " N"]) -> Float[Array, " N"]:
    """`q log(q / s)` of one remainder cell."""
    return q_N * (safe_log(q_N) - jnp.log(jnp.maximum(s_N, jnp.finfo(jnp.float32).tiny)))

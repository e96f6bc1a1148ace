"""Byte-prefix marginalisation: each teacher token counts as the longest student token that its bytes begin with.

    p_u = sum_{v: longest prefix of v is u} q_v,    D = sum_{u in R} p_u log(p_u / s_u) + p_rest log(p_rest / s_rest)

R holds the student tokens that some teacher token becomes. The remainder holds the teacher's tokens that become none,
and the student's tokens outside R, which so are not pushed to zero one by one. Control tokens correspond by role. Both
full softmaxes at the temperature; root positions.

A run of white space that the student lacks would become a shorter run, and the student would learn to write less of it
than the text has; such tokens go into the remainder. Source: arXiv 2607.22334, as docs/rivals.md describes it. The
longest prefix is another token than the student's own tokenizer begins with for 17.9 % of Gemma 3's vocabulary into
Llama 3's; our W (projection.py) takes the latter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from distil_jax.losses.rivals import positions, vocabularies
from distil_jax.losses.rivals.stream import Sides, Told, compare, log_softmax, safe_log
from distil_jax.losses.rivals.strict import rest_kl
from distil_jax.tokens.bytes import ByteTable


class Tables(NamedTuple):
    known: Bool[Array, " Vt"]  # every id of the teacher's tokenizer
    teacher_ids: Int[Array, " E"]  # the tokens that become a student token, by that token
    student_ids: Int[Array, " E"]
    reached: Bool[Array, " Vs"]  # R


def tables(teacher: ByteTable, student: ByteTable) -> Tables:
    """From the bytes of both vocabularies."""
    prefix = vocabularies.longest_prefixes(teacher, student)
    for t in np.flatnonzero(teacher.is_text & (prefix >= 0)).tolist():
        piece = teacher.token_bytes(t)
        if piece.isspace() and len(piece) != student.lengths[prefix[t]]:
            prefix[t] = -1
    ids = np.flatnonzero(prefix >= 0)
    ids = ids[np.argsort(prefix[ids], kind="stable")].astype(np.int32)
    reached = np.zeros(student.vocab_size, bool)
    reached[prefix[ids]] = True
    return Tables(*map(jnp.asarray, (np.ones(teacher.vocab_size, bool), ids, prefix[ids], reached)))


def taught(tables: Tables, batch: dict[str, Array]) -> Bool[Array, "B L"]:
    """Root positions."""
    return positions.roots(batch)


def told(tables: Tables, learned: None, sides: Sides, batch: dict[str, Array], temperature: Array, **options) -> Told:
    """D at each taught position."""

    def cells(z_VsxN, t_VtxN, more, tables):
        log_s_VsxN = log_softmax(z_VsxN, temperature)
        q_VtxN = jnp.exp(log_softmax(t_VtxN, temperature))
        mass = q_VtxN.at[tables.teacher_ids].get(mode="fill", fill_value=0)  # ids that the head lacks have none
        p_VsxN = jax.ops.segment_sum(mass, tables.student_ids, z_VsxN.shape[0], indices_are_sorted=True)
        named_N = jnp.sum(p_VsxN * (safe_log(p_VsxN) - log_s_VsxN), axis=0)
        s_rest_N = jnp.sum(jnp.where(tables.reached[:, None], 0, jnp.exp(log_s_VsxN)), axis=0)
        q_rest_N = jnp.sum(q_VtxN.at[tables.teacher_ids].set(0, mode="drop"), axis=0)
        return named_N + rest_kl(q_rest_N, s_rest_N)

    return Told(compare(cells, tables.known, sides, batch, taught(tables, batch), shared=tables, **options))

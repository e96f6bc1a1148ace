"""X-Token: the student's distribution carried into the teacher's vocabulary, or common tokens found by that map.

    P:  D = KL(q || W s)                                                      (equation 2)
    H:  D = sum_{(v, u) in C} q_v log(q_v / s_u) + sum_i |q'_(i) - s'_(i)|    (equations 3 and 4)

q and s are the full softmaxes at the temperature. Column u of W says how the student's token u reads in the teacher's
vocabulary: teacher pieces t_0, t_1, ... of u's bytes get 0.9 * 0.1^i, at most four, divided by their sum. C pairs each
teacher token with the student token that W sends to it with its largest weight, if that is at least 0.6; q' and s' are
the masses of the tokens that are in no pair, sorted. Neither is renormalised. At root positions.

Source: Sreenivas et al. 2026, "X-Token", arXiv 2605.21699. The release (NeMo-RL) compares means of distributions over
a span and only the teacher's likeliest 8,192 tokens; here it is the divergence of the paper at the span's first token,
over the whole vocabulary. W is fixed here; the paper's W may also learn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from distil_jax.losses.rivals import positions, vocabularies
from distil_jax.losses.rivals.stream import Sides, Told, compare, forward_kl, log_softmax
from distil_jax.losses.rivals.uld import sorted_l1
from distil_jax.tokens.bytes import ByteTable

FIRST, DECAY, PIECES, COMMON = 0.9, 0.1, 4, 0.6
FLOOR = 1e-10  # under W s: teacher tokens that no student token becomes, which would make the divergence infinite


class ProjectedTables(NamedTuple):
    """W as a list of its entries, sorted by teacher token."""

    mapped: Bool[Array, " Vt"]
    teacher_ids: Int[Array, " nnz"]
    student_ids: Int[Array, " nnz"]
    weights: Array


class HybridTables(NamedTuple):
    """Tokens in pairs, and those in none."""

    mapped: Bool[Array, " Vt"]
    teacher_ids: Int[Array, " C"]
    student_ids: Int[Array, " C"]
    teacher_rest: Int[Array, " Rt"]
    student_rest: Int[Array, " Rs"]


def entries(teacher: ByteTable, student: ByteTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(teacher ids, student ids, weights) of W, by student token and piece. A piece that comes twice is two entries."""
    cut = [ids[:PIECES] for ids in vocabularies.pieces(student, teacher)]
    counts = np.array([len(ids) for ids in cut])
    student_ids = np.repeat(np.arange(len(cut)), counts)
    at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    weights = FIRST * DECAY**at
    weights /= np.bincount(student_ids, weights, minlength=len(cut))[student_ids]
    return np.concatenate([*map(np.asarray, cut)]).astype(np.int32), student_ids.astype(np.int32), weights


def projected_tables(teacher: ByteTable, student: ByteTable) -> ProjectedTables:
    """From the bytes of both vocabularies."""
    teacher_ids, student_ids, weights = entries(teacher, student)
    order = np.argsort(teacher_ids, kind="stable")
    known = jnp.asarray(vocabularies.mapped(teacher, student))
    by_teacher = (teacher_ids[order], student_ids[order], weights[order].astype(np.float32))
    return ProjectedTables(known, *map(jnp.asarray, by_teacher))


def hybrid_tables(teacher: ByteTable, student: ByteTable) -> HybridTables:
    """From the bytes of both vocabularies. Of several student tokens with one largest weight, the shortest counts."""
    teacher_ids, student_ids, weights = entries(teacher, student)
    first = np.flatnonzero(weights >= COMMON)
    order = first[np.lexsort((student_ids[first], student.lengths[student_ids[first]], -weights[first]))]
    paired, at = np.unique(teacher_ids[order], return_index=True)
    partners = student_ids[order][at]
    known = vocabularies.mapped(teacher, student)
    rest = (np.setdiff1d(np.flatnonzero(known), paired), np.setdiff1d(np.arange(student.vocab_size), partners))
    return HybridTables(*(jnp.asarray(x) for x in (known, paired, partners, *(r.astype(np.int32) for r in rest))))


def taught(tables: ProjectedTables | HybridTables, batch: dict[str, Array]) -> Bool[Array, "B L"]:
    """Root positions."""
    return positions.roots(batch)


def projected(tables: ProjectedTables, learned: None, sides: Sides, batch, temperature: Array, **options) -> Told:
    """P at each taught position."""

    def cells(z_VsxN, t_VtxN, more, tables):
        mass = jnp.exp(log_softmax(z_VsxN, temperature))[tables.student_ids] * tables.weights[:, None]
        carried_VtxN = jax.ops.segment_sum(mass, tables.teacher_ids, t_VtxN.shape[0], indices_are_sorted=True)
        q_VtxN = jnp.exp(log_softmax(t_VtxN, temperature))
        return forward_kl(q_VtxN, jnp.log(jnp.maximum(carried_VtxN, FLOOR)))

    return Told(compare(cells, tables.mapped, sides, batch, taught(tables, batch), shared=tables, **options))


def hybrid(tables: HybridTables, learned: None, sides: Sides, batch, temperature: Array, **options) -> Told:
    """H at each taught position."""

    def cells(z_VsxN, t_VtxN, more, tables):
        log_s_VsxN, log_q_VtxN = log_softmax(z_VsxN, temperature), log_softmax(t_VtxN, temperature)
        common_N = forward_kl(jnp.exp(log_q_VtxN[tables.teacher_ids]), log_s_VsxN[tables.student_ids])
        rest = (log_q_VtxN[tables.teacher_rest], log_s_VsxN[tables.student_rest])
        return common_N + sorted_l1(*map(jnp.exp, rest))

    return Told(compare(cells, tables.mapped, sides, batch, taught(tables, batch), shared=tables, **options))

"""GOLD: groups of tokens with the same bytes, compared on matched tokens by JSD and on the others by sorted masses.

    Q_v = q_v(first) * prod_{i > first} q(y_i),   S likewise
    D = c sum_{v in M} (b Q_v log(Q_v / m_v) + (1 - b) S_v log(S_v / m_v)) + (1 - c) sum_i |Q'_(i) - S'_(i)|

over a group between common boundaries: the distribution of its first token times the realised probabilities of its
later ones. m = b Q + (1 - b) S with b = 0.5; M pairs the tokens with the same bytes or role; Q', S' are the masses of
the others, sorted; c is the share of the teacher's tokens that are in M. Nothing is renormalised, so D is at least 0
in every cell.

Source: Patino et al. 2025, "Unlocking On-Policy Distillation for Any Model Family", and the weights of its release
(TRL, GOLDTrainer). The release's default merge takes the realised probability one position late and refuses tokenizers
that are not byte-level; here q(y_i) is what the position before y_i gives it, and groups come from bytes.

A group's D is dealt out equally to the positions that predict its student tokens: all of them give up their share of
cross-entropy for it, and it counts once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distil_jax.losses.rivals import positions, vocabularies
from distil_jax.losses.rivals.stream import Sides, Told, block_size, compare, log_softmax, safe_log, token_log_probs
from distil_jax.losses.rivals.uld import sorted_l1
from distil_jax.tokens.bytes import ByteTable

BETA = 0.5


class Tables(NamedTuple):
    mapped: Bool[Array, " Vt"]
    teacher_ids: Int[Array, " M"]  # of the matched pairs
    student_ids: Int[Array, " M"]
    teacher_rest: Int[Array, " Rt"]
    student_rest: Int[Array, " Rs"]
    share: Float[Array, ""]  # c
    lengths: vocabularies.Lengths


def tables(teacher: ByteTable, student: ByteTable) -> Tables:
    """From the bytes of both vocabularies."""
    known = vocabularies.mapped(teacher, student)
    teacher_ids, student_ids = vocabularies.matched(teacher, student)
    teacher_rest = np.setdiff1d(np.flatnonzero(known), teacher_ids).astype(np.int32)
    student_rest = np.setdiff1d(np.arange(student.vocab_size), student_ids).astype(np.int32)
    share = np.float32(len(teacher_ids) / known.sum())
    arrays = (known, teacher_ids, student_ids, teacher_rest, student_rest, share)
    return Tables(*map(jnp.asarray, arrays), vocabularies.lengths(teacher, student))


def taught(tables: Tables, batch: dict[str, Array]) -> Bool[Array, "B L"]:
    """The tokens of groups that are wholly supervised."""
    return positions.groups(batch, tables.lengths).student_BxLs > 0


def told(
    tables: Tables, learned: None, sides: Sides, batch: dict[str, Array], temperature: Array, *, text_vocab, block
) -> Told:
    """D of each group, dealt out to its positions."""
    block = block or block_size(sides)
    groups = positions.groups(batch, tables.lengths)
    G = groups.size_BxG.shape[1]
    ours = (sides.hidden_BxLsxD, sides.unembedding_VsxD[:text_vocab], batch["student_targets"])
    theirs = (sides.teacher_hidden_BxLtxDt, sides.teacher_unembedding_VtxDt, batch["teacher_targets"])
    student_known = jnp.ones(text_vocab, bool)

    def later(side, groups_BxL, mapped_V):
        """Log of the product over the later tokens of each group, [B, G]."""
        used_BxL = (groups_BxL > 0) & ~positions.first_of_group(groups_BxL)
        log_p_BxL, _ = token_log_probs(*side, used_BxL, mapped_V, temperature=temperature, block=block)
        return positions.sum_by(groups_BxL, log_p_BxL, G)

    student_BxG = later(ours, groups.student_BxLs, student_known)
    teacher_BxG = jax.lax.stop_gradient(later(theirs, groups.teacher_BxLt, tables.mapped))
    here = lambda x_BxG: jnp.take_along_axis(x_BxG, groups.student_BxLs, axis=1)  # noqa: E731

    def cells(z_VsxN, t_VtxN, more, tables):
        student_N, teacher_N = more
        S_VsxN = jnp.exp(log_softmax(z_VsxN, temperature) + student_N[None])
        Q_VtxN = jnp.exp(log_softmax(t_VtxN, temperature) + teacher_N[None])
        matched_N = jsd(Q_VtxN[tables.teacher_ids], S_VsxN[tables.student_ids])
        others_N = sorted_l1(Q_VtxN[tables.teacher_rest], S_VsxN[tables.student_rest])
        return tables.share * matched_N + (1 - tables.share) * others_N

    D_BxL = compare(
        cells, tables.mapped, sides, batch, positions.first_of_group(groups.student_BxLs), text_vocab=text_vocab,
        block=block, more=(here(student_BxG), here(teacher_BxG)), shared=tables,
    )  # fmt: skip
    D_BxG = positions.sum_by(groups.student_BxLs, D_BxL, G)
    return Told(positions.share_out(D_BxG, groups.student_BxLs))


def jsd(q_VxN: Float[Array, "V N"], s_VxN: Float[Array, "V N"]) -> Float[Array, " N"]:
    """Generalised Jensen-Shannon divergence of masses that need not sum to 1 (Agarwal et al. 2024, "GKD")."""
    log_m = safe_log(BETA * q_VxN + (1 - BETA) * s_VxN)
    from_q, from_s = q_VxN * (safe_log(q_VxN) - log_m), s_VxN * (safe_log(s_VxN) - log_m)
    return jnp.sum(BETA * from_q + (1 - BETA) * from_s, axis=0)

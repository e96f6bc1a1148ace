"""Approximate likelihood matching: how likely each model holds a chunk of text, as one yes or no.

    log P(c) = sum_{i in c} log p(y_i) + log p(a word may begin after c)
    D = T KL(Bernoulli(P_teacher(c)^(1/T)) || Bernoulli(P_student(c)^(1/T))),    T = 100

A chunk is a run of groups between common boundaries that ends where the teacher gives at least 0.1 to the tokens that
begin a word (white space or a control token). The second term takes out the tokenization bias: a tokenizer that would
rather go on with the word than end a token there says less for the same text. Both at temperature 1.

Source: Minixhofer, Vulic, Ponti 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
arXiv 2503.20083, and its release (tokenkit: binary divergence at temperature 100, chunks merged and debiased by the
probability of a space, threshold 0.1, and 1e-6 taken off the exponents). The factor T is ours: without it D shrinks as
1/T, and a share of the loss would mean nothing. As T grows D goes to `a log(a/b) - a + b`, a and b the two negative
log-likelihoods.

A chunk's D is dealt out equally to the positions that predict its student tokens: it counts once, in place of their
share of cross-entropy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distil_jax.losses.rivals import positions, vocabularies
from distil_jax.losses.rivals.stream import Sides, Told, block_size, token_log_probs
from distil_jax.tokens.bytes import ByteTable

T = 100.0
THRESHOLD = 0.1  # of the teacher's mass on tokens that begin a word, where a chunk may end
_EPSILON = 1e-6  # taken off log P / T, so that a chunk is never certain
_SPACE = b" \t\n\r\x0b\x0c"


class Tables(NamedTuple):
    mapped: Bool[Array, " Vt"]
    teacher_begins: Bool[Array, " Vt"]  # tokens before which a word has ended
    student_begins: Bool[Array, " Vs"]
    lengths: vocabularies.Lengths


def tables(teacher: ByteTable, student: ByteTable) -> Tables:
    """From the bytes of both vocabularies."""
    known = vocabularies.mapped(teacher, student)
    begins = begins_word(teacher, known), begins_word(student, np.ones(student.vocab_size, bool))
    return Tables(jnp.asarray(known), *map(jnp.asarray, begins), vocabularies.lengths(teacher, student))


def begins_word(table: ByteTable, known: np.ndarray) -> Bool[np.ndarray, " V"]:
    """The known tokens that begin with white space, and control tokens."""
    first = [table.token_bytes(i)[:1] for i in range(table.vocab_size)]
    return known & np.array([not b or b in _SPACE for b in first])


def taught(tables: Tables, batch: dict[str, Array]) -> Bool[Array, "B L"]:
    """The tokens of groups that are wholly supervised."""
    return positions.groups(batch, tables.lengths).student_BxLs > 0


def told(
    tables: Tables, learned: None, sides: Sides, batch: dict[str, Array], temperature: Array, *, text_vocab, block
) -> Told:
    """D of each chunk, dealt out to its positions. `temperature` is not used."""
    block = block or block_size(sides)
    groups = positions.groups(batch, tables.lengths)
    G = groups.size_BxG.shape[1]

    def side(hidden, unembedding, labels, groups_BxL, mapped_V, begins_V):
        """(log p of each token in a group, log p that a word begins after it), [B, L] at the predicting positions."""
        used_BxL = (groups_BxL > 0) | jnp.pad(groups_BxL[:, :-1] > 0, ((0, 0), (1, 0)))
        log_p_BxL, begins_BxL = token_log_probs(
            hidden, unembedding, labels, used_BxL, mapped_V, members_V=begins_V, block=block
        )
        after_BxL = jnp.pad(begins_BxL[:, 1:], ((0, 0), (0, 1)))
        return jnp.where(groups_BxL > 0, log_p_BxL, 0), after_BxL

    ours = side(
        sides.hidden_BxLsxD, sides.unembedding_VsxD[:text_vocab], batch["student_targets"], groups.student_BxLs,
        jnp.ones(text_vocab, bool), tables.student_begins,
    )  # fmt: skip
    theirs = jax.lax.stop_gradient(side(
        sides.teacher_hidden_BxLtxDt, sides.teacher_unembedding_VtxDt, batch["teacher_targets"], groups.teacher_BxLt,
        tables.mapped, tables.teacher_begins,
    ))  # fmt: skip
    chunk_BxG = chunks(groups, theirs[1])

    def likelihood(values, groups_BxL):
        chunk_BxL = jnp.take_along_axis(chunk_BxG, groups_BxL, axis=1)
        tokens_BxL, after_BxL = values
        ends_BxL = jnp.where(positions.last_of_group(chunk_BxL), after_BxL, 0)
        return positions.sum_by(chunk_BxL, tokens_BxL + ends_BxL, G), chunk_BxL

    student_BxC, student_chunk_BxL = likelihood(ours, groups.student_BxLs)
    teacher_BxC, _ = likelihood(theirs, groups.teacher_BxLt)
    return Told(positions.share_out(binary_kl(teacher_BxC, student_BxC), student_chunk_BxL))


def chunks(groups: positions.Groups, after_BxLt: Float[Array, "B Lt"]) -> Int[Array, "B G"]:
    """The chunk of each group, numbered from 1 through the row; 0 for groups that are not compared.

    after: the teacher's log-mass on tokens that begin a word, behind each token. A chunk also ends where the next
    group is not compared: another document, or a token that is not supervised.
    """
    G = groups.valid_BxG.shape[1]
    ends_BxL = positions.last_of_group(groups.teacher_BxLt) & (after_BxLt >= jnp.log(THRESHOLD))
    closed_BxG = positions.sum_by(groups.teacher_BxLt, ends_BxL.astype(jnp.int32), G) > 0
    closed_BxG |= ~jnp.pad(groups.valid_BxG[:, 1:], ((0, 0), (0, 1)))
    closed_BxG &= groups.valid_BxG
    before_BxG = jnp.cumsum(closed_BxG, axis=1) - closed_BxG
    return jnp.where(groups.valid_BxG, 1 + before_BxG, 0).astype(jnp.int32)


def binary_kl(teacher: Float[Array, "B C"], student: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """`T KL` of the two Bernoullis from log-likelihoods, at most 0.

    The logarithm of (1 - q) / (1 - s) is taken from the difference of q and s: both are close to 1, and the logarithms
    of what is left to 1 would lose half of a float's digits against each other.
    """
    log_q, log_s = teacher / T - _EPSILON, student / T - _EPSILON
    q, no_q, no_s = jnp.exp(log_q), -jnp.expm1(log_q), -jnp.expm1(log_s)
    apart = (student - teacher) / T
    return T * (no_q * jnp.log1p(q * jnp.expm1(apart) / no_s) - q * apart)

"""Where a rival teaches: roots, one-to-one tokens, or groups of tokens between common boundaries.

All in the prediction coordinates of tokens/pack.py: position p speaks of the token that follows it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from distil_jax.losses.attention import byte_groups
from distil_jax.losses.rivals.vocabularies import Lengths
from distil_jax.tokens.align import ROOT


class Groups(NamedTuple):
    """Groups of tokens that a rival may compare. 0: the position predicts no token of such a group."""

    student_BxLs: Int[Array, "B Ls"]
    teacher_BxLt: Int[Array, "B Lt"]
    size_BxG: Int[Array, "B G"]  # student tokens of each group
    valid_BxG: Bool[Array, "B G"]


def roots(batch: dict[str, Array]) -> Bool[Array, "B L"]:
    """Supervised tokens that begin where a teacher token begins, and end in it."""
    return (batch["role"] == ROOT) & (batch["student_weights"] > 0)


def one_to_one(batch: dict[str, Array], lengths: Lengths) -> Bool[Array, "B L"]:
    """The roots that are exactly one teacher token: as long as the one that begins there, or control tokens of one
    role."""
    teacher_BxL = jnp.take_along_axis(batch["teacher_targets"], batch["teacher_position"], axis=1)
    same = lengths.student_Vs[batch["student_targets"]] == lengths.teacher_Vt[teacher_BxL]
    return roots(batch) & same


def groups(batch: dict[str, Array], lengths: Lengths) -> Groups:
    """The groups of `attention.byte_groups` whose likelihood both models know, and whose every token is supervised.

    Left out: groups with the first token of a document, which nothing predicts; with a control token, unless it is one
    token on both sides; and those whose bytes differ, because one template has text that the other lacks.
    """
    student_BxLs, teacher_BxLt = byte_groups(batch)
    G = max(student_BxLs.shape[1], teacher_BxLt.shape[1]) + 1

    def total(groups_BxL, x_BxL):
        return jax.vmap(lambda g, x: jax.ops.segment_sum(x, g, G))(groups_BxL, x_BxL.astype(jnp.int32))

    def side(name, groups_BxL, bytes_V):
        bytes_BxL = bytes_V[batch[f"{name}_tokens"]]
        ids = batch[f"{name}_segment_ids"]
        first_BxL = ids != jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
        columns = (jnp.ones_like(ids), bytes_BxL, bytes_BxL == 0, first_BxL)
        return tuple(total(groups_BxL, x) for x in columns)

    size, student_bytes, student_control, student_first = side("student", student_BxLs, lengths.student_Vs)
    teacher_size, teacher_bytes, teacher_control, teacher_first = side("teacher", teacher_BxLt, lengths.teacher_Vt)
    supervised_BxLs = jnp.pad(batch["student_weights"][:, :-1] > 0, ((0, 0), (1, 0)))
    text = (student_control + teacher_control == 0) | ((size == 1) & (teacher_size == 1))
    valid_BxG = (size > 0) & (teacher_size > 0) & text & (student_bytes == teacher_bytes)
    valid_BxG &= (total(student_BxLs, supervised_BxLs) == size) & (student_first + teacher_first == 0)
    valid_BxG &= jnp.arange(G)[None] > 0  # 0 is padding

    def predicted(groups_BxL):
        after_BxL = jnp.pad(groups_BxL[:, 1:], ((0, 0), (0, 1)))
        return jnp.where(jnp.take_along_axis(valid_BxG, after_BxL, axis=1), after_BxL, 0)

    return Groups(predicted(student_BxLs), predicted(teacher_BxLt), size, valid_BxG)


def first_of_group(groups_BxL: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """The position that predicts the first token of each group."""
    return (groups_BxL > 0) & (groups_BxL != jnp.pad(groups_BxL[:, :-1], ((0, 0), (1, 0))))


def last_of_group(groups_BxL: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """The position that predicts the last token of each group."""
    return (groups_BxL > 0) & (groups_BxL != jnp.pad(groups_BxL[:, 1:], ((0, 0), (0, 1))))


def sum_by(groups_BxL: Int[Array, "B L"], x_BxL: Array, size: int) -> Array:
    """The sum of x over the positions of each group, [B, size]; what belongs to group 0 is not a sum of anything."""
    return jax.vmap(lambda g, x: jax.ops.segment_sum(x, g, size))(groups_BxL, x_BxL)


def share_out(x_BxG: Array, groups_BxL: Int[Array, "B L"]) -> Array:
    """The value of each group dealt out equally to its positions, so that a sum over positions is one over groups."""
    size_BxG = sum_by(groups_BxL, jnp.ones(groups_BxL.shape, x_BxG.dtype), x_BxG.shape[1])
    here = jnp.take_along_axis(x_BxG / jnp.maximum(size_BxG, 1), groups_BxL, axis=1)
    return jnp.where(groups_BxL > 0, here, 0)

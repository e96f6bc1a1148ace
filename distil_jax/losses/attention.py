"""Alignment of what happens inside: attention maps, and hidden states, of two models that read other tokens.

A document is cut wherever both tokenizations have a boundary; what lies between two cuts is a byte group, the finest
thing that both sequences consist of. A map over tokens becomes a map over groups: the mean over the queries of a group,
since each of them attends for itself, and the sum over its keys, since attention to a group is attention to any part of
it. A pooled row is a distribution again. DistilLLM-Med compares maps as they are (L_att); between tokenizers there is
nothing to compare then.

Maps never exist for a batch: rows are taken one by one, heads one by one within a row, and both are computed again in
the backward pass. What the models hand over for it are the queries and keys of the chosen layers.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from distil_jax.errors import UserError
from distil_jax.models import layers
from distil_jax.models.decoder import Seen
from distil_jax.sharding import BATCH_AXES
from distil_jax.tokens.align import NONE

LEFT = 0.05  # of a row of a map, inside a window: what it is divided by at least


@dataclass(frozen=True)
class Pair:
    """A student layer and the teacher layer that it is to resemble, with their sliding windows (None: sees all)."""

    student: int
    teacher: int
    student_window: int | None = None
    teacher_window: int | None = None


class Distances(NamedTuple):
    """Sums over the query groups of a batch, means over the pairs of layers."""

    attention: Float[Array, ""]  # squared Frobenius distance of pooled maps
    hidden: Float[Array, ""]  # mean squared difference of normalised states


def layer_pairs(student: int, teacher: int, count: int) -> tuple[tuple[int, int], ...]:
    """`count` pairs of layers at equal relative depths, the last layers among them.

    student, teacher: their numbers of layers. Pair i of n stands at depth i/n; layers count from 0.
    """
    depths = [i / count for i in range(1, count + 1)]
    pairs = [tuple(max(0, round(depth * n) - 1) for n in (student, teacher)) for depth in depths]
    return tuple(dict.fromkeys(pairs))


def byte_groups(batch: dict[str, Array]) -> tuple[Int[Array, "B Ls"], Int[Array, "B Lt"]]:
    """The group of each token of packed rows, the same numbers on both sides: 1, 2, ... through the row, 0 for padding.

    A token with no counterpart (a control token that one side has, the bos of one side) belongs to the group before it,
    at the start of a document to the first.
    """
    segments, teacher_segments = batch["student_segment_ids"], batch["teacher_segment_ids"]
    # At p the fields speak of the token after p. A boundary of both: it begins where a teacher token begins.
    shared = (batch["role"] != NONE) & (batch["offset"] == 0)
    begins = _first_of_segment(segments) | jnp.pad(shared[:, :-1], ((0, 0), (1, 0)))
    length = teacher_segments.shape[1]
    there = jnp.where(shared, batch["teacher_position"] + 1, length)  # what is no boundary falls off the end
    rows = jax.lax.broadcasted_iota(jnp.int32, there.shape, 0)
    marks = jnp.zeros(teacher_segments.shape, bool).at[rows, there].set(True, mode="drop")
    numbered = lambda begins, ids: jnp.cumsum(begins & (ids > 0), axis=1) * (ids > 0)  # noqa: E731
    return numbered(begins, segments), numbered(_first_of_segment(teacher_segments) | marks, teacher_segments)


def group_count(group_BxL: Int[Array, "B L"]) -> Float[Array, ""]:
    """How many groups a batch has: what sums over query groups are divided by."""
    return jnp.sum(jnp.max(group_BxL, axis=1)).astype(jnp.float32)


def distances(
    student: tuple[Seen, ...],
    teacher: tuple[Seen, ...],
    batch: dict[str, Array],
    pairs: tuple[Pair, ...],
    *,
    mixing: dict[str, Float[Array, "P H"]] | None = None,
    projections: tuple[Float[Array, "Ds Dt"], ...] | None = None,
    mesh: Mesh | None = None,
) -> Distances:
    """How far the student's chosen layers are from the teacher's, summed over the query groups of all documents.

    student, teacher: what each pair's layer handed over. Nothing flows back into the teacher.

    Attention: `sum_g |a_g - b_g|^2` over the rows of the pooled maps. Heads are averaged first, or mixed with the
    softmax of `mixing["student"]` and `mixing["teacher"]`, [pairs, heads]. If a layer has a sliding window, both rows
    are cut to the key groups that lie wholly inside the narrower window of every query of the group, and each is
    divided by what is left of it, so that a layer is not asked for attention that it cannot pay; by 5 % at least, as
    less is noise.

    Hidden states, with `projections`: the student's state at the last token of each group, through a matrix that
    learns, against the teacher's there, both divided by their root mean square; mean over the teacher's width.
    """
    teacher = jax.lax.stop_gradient(teacher)
    groups = byte_groups(batch)
    rows = {
        "student": student,
        "teacher": teacher,
        "groups": groups,
        "segments": (batch["student_segment_ids"], batch["teacher_segment_ids"]),
    }

    def local(rows, mixing, projections):
        one_row = jax.checkpoint(lambda row: _row(row, pairs, mixing, projections))
        return jax.tree.map(lambda x: jnp.sum(x) / len(pairs), jax.lax.map(one_row, rows))

    if mesh is None:
        return local(rows, mixing, projections)
    axes = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
    return jax.shard_map(
        lambda *arguments: jax.tree.map(lambda x: jax.lax.psum(x, axes), local(*arguments)),
        mesh=mesh,
        in_specs=(PartitionSpec(axes), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(rows, mixing, projections)


def pooled(map_LxL: Float[Array, "L L"], group_L: Int[Array, " L"], groups: int) -> Float[Array, "G1 G1"]:
    """A map over byte groups 0 to `groups` (0 is padding): mean over the queries of a group, sum over its keys.

    As two products with the matrix of membership, for the matrix unit of an accelerator: with scatters the TPU
    compiler had not ended after minutes, though a CPU is faster with them (bench/RESULTS.md). HIGHEST, as each weight
    of the map must come through whole.
    """
    member_G1xL = (jnp.arange(groups + 1)[:, None] == group_L[None]).astype(map_LxL.dtype)
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    queries = jnp.maximum(jnp.sum(member_G1xL, axis=1), 1)
    return dot(dot(member_G1xL, map_LxL), member_G1xL.T) / queries[:, None]


def _row(row, pairs, mixing, projections) -> Distances:
    """The distances of one packed row, summed over groups and pairs."""
    (group, teacher_group), segments = row["groups"], row["segments"]
    groups = group.shape[0]
    real = (jnp.arange(groups + 1) > 0) & (jnp.arange(groups + 1) <= jnp.max(group))
    attention = hidden = jnp.float32(0)
    for n, pair in enumerate(pairs):
        a, b = row["student"][n], row["teacher"][n]
        weights = (None, None) if mixing is None else (jax.nn.softmax(mixing[s][n]) for s in ("student", "teacher"))
        maps = [
            pooled(_mean_map(seen, ids, window, w), g, groups)
            for seen, ids, window, w, g in zip(
                (a, b), segments, (pair.student_window, pair.teacher_window), weights, row["groups"], strict=True
            )
        ]
        kept = _inside(group, groups, pair.student_window) & _inside(teacher_group, groups, pair.teacher_window)
        if pair.student_window or pair.teacher_window:
            maps = [jnp.where(kept, m, 0) for m in maps]
            maps = [m / jnp.maximum(jnp.sum(m, axis=1, keepdims=True), LEFT) for m in maps]
        difference = jnp.sum((maps[0] - maps[1]) ** 2, axis=1)
        attention += jnp.sum(jnp.where(real, difference, 0))
        if projections is not None:
            states = [_at_last(seen.x_BxLxD, g, groups) for seen, g in ((a, group), (b, teacher_group))]
            states[0] = states[0] @ projections[n].astype(states[0].dtype)
            difference = jnp.mean((_normed(states[0]) - _normed(states[1])) ** 2, axis=1)
            hidden += jnp.sum(jnp.where(real, difference, 0))
    return Distances(attention, hidden)


def _mean_map(seen: Seen, segments_L: Int[Array, " L"], window: int | None, weights_H) -> Float[Array, "L L"]:
    """The weighted mean (default: the plain one) of a layer's maps in one row, a head at a time."""
    q_LxHxK, k_LxGxK = seen.q_BxLxHxK, seen.k_BxLxGxK  # of one row
    H = q_LxHxK.shape[1]
    weights_H = jnp.full(H, 1 / H) if weights_H is None else weights_H
    mask = layers.attention_mask(segments_L[None], window)
    k_LxHxK = layers.repeat_heads(k_LxGxK[None], H)[0]

    @jax.checkpoint
    def add(total, head):
        q, k, weight = head
        return total + weight * layers.attention_map(q[None, :, None], k[None, :, None], mask)[0, 0], None

    total = jnp.zeros((len(segments_L), len(segments_L)), jnp.float32)
    heads = (jnp.swapaxes(q_LxHxK, 0, 1), jnp.swapaxes(k_LxHxK, 0, 1), weights_H)
    return jax.lax.scan(add, total, heads)[0]


def _inside(group_L: Int[Array, " L"], groups: int, window: int | None):
    """bool [G1, G1]: every key of the second group lies inside the window of every query of the first."""
    if window is None:
        return jnp.ones((1, 1), bool)
    last, first = _ends(group_L, groups)
    return last[:, None] - first[None, :] < window


def _ends(group_L: Int[Array, " L"], groups: int) -> tuple[Int[Array, " G1"], Int[Array, " G1"]]:
    """Last and first position of each group."""
    at = jnp.arange(len(group_L))
    last = jax.ops.segment_max(at, group_L, groups + 1)
    first = jax.ops.segment_min(at, group_L, groups + 1)
    return jnp.clip(last, 0, len(group_L) - 1), jnp.clip(first, 0, len(group_L) - 1)  # an empty group has neither


def _at_last(x_LxD: Float[Array, "L D"], group_L: Int[Array, " L"], groups: int) -> Float[Array, "G1 D"]:
    return x_LxD[_ends(group_L, groups)[0]]


def _normed(x: Float[Array, "G1 D"]) -> Float[Array, "G1 D"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _first_of_segment(segments_BxL: Int[Array, "B L"]) -> Array:
    before = jnp.pad(segments_BxL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return segments_BxL != before


def choose(
    student: Any, teacher: Any, *, count: int, student_layers: str = "", teacher_layers: str = ""
) -> tuple[Pair, ...]:
    """The pairs of layers of two models: `count` by relative depth, or those that are named ("3,7"), in their order.

    Raises UserError naming the config key for layers that do not exist or do not pair up.
    """
    sizes = [model.config.num_hidden_layers for model in (student, teacher)]
    named = [
        _numbers(text, size, f"objective.attention.{side}_layers")
        for side, text, size in zip(("student", "teacher"), (student_layers, teacher_layers), sizes, strict=True)
    ]
    if len(named[0]) != len(named[1]):
        raise UserError(
            f"objective.attention names {len(named[0])} student and {len(named[1])} teacher layers: name one teacher "
            "layer for each student layer, or none of either"
        )
    if not named[0] and count < 1:
        raise UserError(f"objective.attention.pairs={count}: give at least 1, or set objective.beta to 0")
    pairs = zip(*named, strict=True) if named[0] else layer_pairs(*sizes, count)

    def window(model, layer):
        kinds, kind_of_layer = model.layer_kinds()
        return kinds[kind_of_layer[layer]].window

    return tuple(Pair(s, t, window(student, s), window(teacher, t)) for s, t in pairs)


def _numbers(text: str, count: int, key: str) -> tuple[int, ...]:
    try:
        chosen = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        chosen = (-1,)
    if any(not 0 <= layer < count for layer in chosen):
        raise UserError(f"{key}={text!r}: give layer numbers from 0 to {count - 1}, separated by commas")
    return chosen


def init(key: Array, pairs: tuple[Pair, ...], student: Any, teacher: Any, *, mixed: bool, hidden: bool) -> dict:
    """What the alignment itself learns: head mixtures (equal at first), and a matrix for each pair's hidden states."""
    learned: dict[str, Any] = {}
    if mixed:
        heads = {"student": student, "teacher": teacher}
        learned["mixing"] = {
            side: jnp.zeros((len(pairs), model.config.num_attention_heads)) for side, model in heads.items()
        }
    if hidden:
        shape = (student.config.hidden_size, teacher.config.hidden_size)
        keys = jax.random.split(key, len(pairs))
        learned["hidden"] = tuple(jax.random.normal(k, shape) * shape[0] ** -0.5 for k in keys)
    return learned

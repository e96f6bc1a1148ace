"""What the rivals share: both models' logits for one block of positions at a time, and gradients by autodiff.

The head of the project's own objective (losses/head.py) writes its gradients by hand; the rivals are here to be
compared with and not to be fast, so they are plain functions of one block of logits, `[V, n]` vocabulary first, that a
scan runs over blocks and computes again in the backward pass (`jax.checkpoint`). Neither vocabulary is ever whole for
a batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distil_jax.losses import head
from distil_jax.losses.kd import teacher_logits
from distil_jax.losses.vocabulary import LOWEST
from distil_jax.models.int8 import Int8
from distil_jax.models.layers import unembed


class Sides(NamedTuple):
    """What both models say of a batch: hidden states in their own positions, and the rows of their heads."""

    hidden_BxLsxD: Float[Array, "B Ls D"]
    unembedding_VsxD: Float[Array, "Vs D"]
    teacher_hidden_BxLtxDt: Float[Array, "B Lt Dt"]
    teacher_unembedding_VtxDt: "Float[Array, 'Vt Dt'] | Int8"


class Told(NamedTuple):
    """What a rival makes of a batch, at the student's positions; 0 where it teaches nothing. Nats, or what it has."""

    divergence_BxL: Float[Array, "B L"]
    own_BxL: Float[Array, "B L"] | None = None  # the loss of what the rival itself learns; None: it learns nothing


def stream(
    one_block: Callable[[Any, Any], Any], used_BxL: Bool[Array, "B L"], per_token: Any, shared: Any, block: int
) -> Any:
    """`one_block(shared, per_token)` for all positions that are `used`, `block` of them at a time; 0 elsewhere.

    per_token: a pytree of arrays [B, L, ...]; shared: one of arrays that every block reads. one_block gets them with
    [n, ...] and returns a pytree of [n], finite also at positions that are not used. Differentiable in both.
    """
    shape = used_BxL.shape
    tokens = shape[0] * shape[1]
    block = min(block, tokens)
    padded = -(-tokens // block) * block
    used = used_BxL.reshape(tokens)
    order = jnp.argsort(~used, stable=True)  # used positions first: whole blocks of nothing are skipped

    def blocks(x):
        flat = x.reshape((tokens, *x.shape[2:]))[order]
        flat = jnp.pad(flat, ((0, padded - tokens),) + ((0, 0),) * (flat.ndim - 1))
        return flat.reshape((padded // block, block, *flat.shape[1:]))

    inputs = (blocks(used_BxL), jax.tree.map(blocks, per_token))
    values = jax.eval_shape(one_block, shared, jax.tree.map(lambda x: x[0], inputs[1]))

    def body(_, one):
        on_N, each = one

        def compute(shared, each):
            return jax.tree.map(lambda v: jnp.where(on_N, v, 0), one_block(shared, each))

        def skip(shared, each):
            return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), values)

        return None, jax.lax.cond(jnp.any(on_N), compute, skip, shared, each)

    _, out = jax.lax.scan(jax.checkpoint(body), None, inputs)

    def restore(x):
        flat = x.reshape(padded)[:tokens]
        return jnp.zeros_like(flat).at[order].set(flat, unique_indices=True).reshape(shape)

    return jax.tree.map(restore, out)


def compare(
    cells: Callable[..., Any],
    mapped_Vt: Bool[Array, " Vt"],
    sides: Sides,
    batch: dict[str, Array],
    used_BxL: Bool[Array, "B L"],
    *,
    text_vocab: int,
    block: int,
    more: Any = None,
    shared: Any = None,
) -> Any:
    """`cells(z_VsxN, t_VtxN, more, shared)` at each used position of the student, streamed; a pytree of [B, L].

    z: the student's logits, of its `text_vocab` tokens; t: the teacher's at the position that predicts the teacher
    token which begins there, `LOWEST` for tokens that are not `mapped`. more: arrays [B, L, ...] that go along.
    """
    at = batch["teacher_position"][..., None]
    each = (sides.hidden_BxLsxD, jnp.take_along_axis(sides.teacher_hidden_BxLtxDt, at, axis=1), more)

    def one_block(heads, each):
        (unembedding, teacher_unembedding, shared), (hidden_NxD, teacher_hidden_NxDt, more) = heads, each
        z_VsxN = unembed(unembedding, hidden_NxD)
        t_VtxN = jax.lax.stop_gradient(teacher_logits(teacher_hidden_NxDt, teacher_unembedding, mapped_Vt))
        return cells(z_VsxN, t_VtxN, more, shared)

    heads = (sides.unembedding_VsxD[:text_vocab], sides.teacher_unembedding_VtxDt, shared)
    return stream(one_block, used_BxL, each, heads, block or block_size(sides))


def token_log_probs(
    hidden_BxLxD: Float[Array, "B L D"],
    unembedding_VxD: "Float[Array, 'V D'] | Int8",
    labels_BxL: Int[Array, "B L"],
    used_BxL: Bool[Array, "B L"],
    mapped_V: Bool[Array, " V"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    members_V: Bool[Array, " V"] | None = None,
    block: int,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Log-probabilities at the used positions, streamed and differentiable: of the label, and of `members_V` together.

    The softmax at `temperature` is over the tokens that are `mapped`. Without members the second is 0.
    """

    def one_block(shared, each):
        unembedding, (hidden_NxD, labels_N) = shared, each
        log_p_VxN = log_softmax(teacher_logits(hidden_NxD, unembedding, mapped_V), temperature)
        label_N = jnp.take_along_axis(log_p_VxN, labels_N[None], axis=0)[0]
        if members_V is None:
            return label_N, jnp.zeros_like(label_N)
        rows = log_p_VxN.shape[0]
        inside = jnp.pad(members_V[:rows], (0, max(0, rows - members_V.shape[0])))
        return label_N, jax.nn.logsumexp(jnp.where(inside[:, None], log_p_VxN, LOWEST), axis=0)

    return stream(one_block, used_BxL, (hidden_BxLxD, labels_BxL), unembedding_VxD, block)


def block_size(sides: Sides) -> int:
    """Half of what the head takes at once: autodiff keeps about twice as many arrays of a block."""
    teacher = head.Teacher(None, sides.teacher_unembedding_VtxDt, None)
    return max(8, head.block_size(sides.unembedding_VsxD.shape[0], teacher) // 16 * 8)


def log_softmax(z_VxN: Float[Array, "V N"], temperature: Float[Array, ""] | float) -> Float[Array, "V N"]:
    """Log-probabilities at a temperature; finite at tokens that are in no softmax."""
    return jnp.maximum(jax.nn.log_softmax(z_VxN / temperature, axis=0), LOWEST)


def forward_kl(p_VxN: Float[Array, "V N"], log_s_VxN: Float[Array, "V N"]) -> Float[Array, " N"]:
    """`sum_v p (log p - log s)`, in nats, over the cells that are given; p may sum to less than 1."""
    return jnp.sum(p_VxN * (safe_log(p_VxN) - log_s_VxN), axis=0)


def safe_log(x: Array) -> Array:
    """log x, and 0 with no gradient where x is 0, which the caller multiplies by 0."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), 0.0)

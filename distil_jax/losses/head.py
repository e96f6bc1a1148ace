"""The streamed loss head: from hidden states and unembedding matrices to a scalar, without whole logit matrices.

At 262,144 x 128,256 tokens the logits of one batch are larger than the models. So the head walks over blocks of tokens,
forms both sets of logits for one block, reduces them, and forgets them. As the loss is a scalar, its gradient with
respect to the student's logits is known up to one factor as soon as a block is seen; the head therefore forms its
gradients while it streams forward, and the backward pass only scales them: nothing is computed twice and nothing of
size `[tokens, vocabulary]` is kept. Blocks with nothing to learn (prompts, padding) are skipped, teacher blocks
likewise where no token has a teacher target.

Over a mesh, each device streams its own tokens and the sums are added once, at the end.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from distil_jax.losses.kd import ProjectionTable, mask_rows, project, projected_kl, teacher_logits
from distil_jax.models.layers import unembed
from distil_jax.sharding import BATCH_AXES

NONE, HIDDEN, ALL = range(3)  # the gradients that a pass forms: of nothing, of the hidden states, of both inputs
BLOCK = 512  # tokens per block: at the real vocabularies 512 x (262,144 + 128,256) float32 is 0.8 GB


class Teacher(NamedTuple):
    """What the teacher says at the student's positions: its hidden state there, and the way to the student's tokens."""

    hidden_BxLxDt: Float[Array, "B L Dt"]
    unembedding_VtxDt: Float[Array, "Vt Dt"]
    projection: ProjectionTable


class HeadOutput(NamedTuple):
    """Per-token values (nats), zero where the weights that ask for them are zero. They carry no gradient."""

    ce_BxL: Float[Array, "B L"]
    kl_BxL: Float[Array, "B L"]  # at the temperature of the step
    kl1_BxL: Float[Array, "B L"]  # at temperature 1, so that runs with different schedules compare
    prediction_BxL: Int[Array, "B L"]  # the student's most likely token


@dataclass(frozen=True)
class _Spec:
    """What is static in a head."""

    text_vocab: int
    block: int
    label_smoothing: float
    mesh: Mesh | None


def distill(
    hidden_BxLxD: Float[Array, "B L D"],
    unembedding_VsxD: Float[Array, "Vs D"],
    labels_BxL: Int[Array, "B L"],
    ce_weights_BxL: Float[Array, "B L"],
    *,
    teacher: Teacher | None = None,
    kl_weights_BxL: Float[Array, "B L"] | None = None,
    temperature: Float[Array, ""] | float = 1.0,
    label_smoothing: float = 0.0,
    text_vocab: int | None = None,
    block: int = BLOCK,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], HeadOutput]:
    """`sum_n ce_weight_n CE_n + kl_weight_n tau^2 KL(W^T q_n || s_n)` over all tokens n of the batch.

    `CE_n` is the cross-entropy of the student's distribution at temperature 1 against `labels` (against the label mixed
    with the uniform distribution if `label_smoothing` > 0; Szegedy et al. 2016, section 7). `q_n` and `s_n` are the
    teacher's and the student's full softmax at `temperature`; the temperature is applied before the projection, with
    which it does not commute. Weights are final: whoever calls has divided them by the global sum.

    The gradient flows into `hidden_BxLxD` and `unembedding_VsxD` only; the second, [Vs, D], is formed only where it is
    asked for (a frozen embedding is not). Rows of the student's head at or above
    `text_vocab`, and teacher tokens that the projection does not map, are in no softmax. `block` is the number of
    tokens handled at once on a device.

    Returns the scalar in float32 and the per-token values.
    """
    spec = _Spec(
        text_vocab=text_vocab or unembedding_VsxD.shape[0],
        block=block,
        label_smoothing=label_smoothing,
        mesh=mesh,
    )
    if kl_weights_BxL is None:
        kl_weights_BxL = jnp.zeros_like(ce_weights_BxL)
    temperature = jnp.asarray(temperature, jnp.float32)
    return _head(spec, hidden_BxLxD, unembedding_VsxD, labels_BxL, ce_weights_BxL, kl_weights_BxL, teacher, temperature)


def score(
    hidden_BxLxD: Float[Array, "B L D"],
    unembedding_VxD: Float[Array, "V D"],
    labels_BxL: Int[Array, "B L"],
    mask_BxL: Float[Array, "B L"],
    *,
    text_vocab: int | None = None,
    block: int = BLOCK,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B L"], Int[Array, "B L"]]:
    """`-log p(label)` in nats and the most likely token at every position with a mask above 0; zeros elsewhere."""
    _, output = distill(
        hidden_BxLxD, unembedding_VxD, labels_BxL, mask_BxL, text_vocab=text_vocab, block=block, mesh=mesh
    )
    return output.ce_BxL, output.prediction_BxL


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(spec, hidden, unembedding, labels, ce_weights, kl_weights, teacher, temperature):
    return _on_mesh(spec, NONE, hidden, unembedding, labels, ce_weights, kl_weights, teacher, temperature)[0]


def _head_forward(spec, *perturbed):
    """With symbolic zeros each array comes with the word whether anything differentiates with respect to it."""
    wanted = ALL if perturbed[1].perturbed else HIDDEN
    values = jax.tree.map(lambda leaf: leaf.value, perturbed, is_leaf=lambda x: hasattr(x, "perturbed"))
    return _on_mesh(spec, wanted, *values)


def _head_backward(spec, gradients, cotangents):
    d_hidden, d_unembedding = gradients
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):  # only per-token values were differentiated, and they carry no gradient
        return (None,) * 7
    if d_unembedding is not None:
        d_unembedding *= scale.astype(d_unembedding.dtype)
    return (d_hidden * scale.astype(d_hidden.dtype), d_unembedding) + (None,) * 5


_head.defvjp(_head_forward, _head_backward, symbolic_zeros=True)


def _on_mesh(spec, wanted, hidden, unembedding, labels, ce_weights, kl_weights, teacher, temperature):
    """Each device streams its own tokens; scalar and unembedding gradient are summed over devices once."""
    stream = functools.partial(_stream, spec, wanted)
    if spec.mesh is None:
        return stream((), hidden, unembedding, labels, ce_weights, kl_weights, teacher, temperature)
    axes = tuple(a for a in BATCH_AXES if a in spec.mesh.axis_names)
    tokens, whole = PartitionSpec(axes), PartitionSpec()
    teacher_specs = None if teacher is None else Teacher(tokens, whole, ProjectionTable(*(whole,) * 4))
    gradient_specs = {NONE: None, HIDDEN: (tokens, None), ALL: (tokens, whole)}[wanted]
    return jax.shard_map(
        functools.partial(stream, axes),
        mesh=spec.mesh,
        in_specs=(tokens, whole, tokens, tokens, tokens, teacher_specs, whole),
        out_specs=((whole, HeadOutput(tokens, tokens, tokens, tokens)), gradient_specs),
        check_vma=False,
    )(hidden, unembedding, labels, ce_weights, kl_weights, teacher, temperature)


def _stream(
    spec, wanted, axes, hidden_BxLxD, unembedding_VxD, labels_BxL, ce_weights, kl_weights, teacher, temperature
):
    shape = labels_BxL.shape
    tokens = shape[0] * shape[1]
    block = min(spec.block, tokens)
    padded = -(-tokens // block) * block

    # Tokens with a teacher target first, then those with a label only, then the rest: whole blocks of nothing are
    # skipped.
    flat_kl, flat_ce = kl_weights.reshape(tokens), ce_weights.reshape(tokens)
    order = jnp.argsort(jnp.where(flat_kl != 0, 0, jnp.where(flat_ce != 0, 1, 2)), stable=True)

    def blocks(array, trailing=()):
        flat = array.reshape((tokens, *trailing))[order]
        flat = jnp.pad(flat, ((0, padded - tokens),) + ((0, 0),) * len(trailing))
        return flat.reshape((padded // block, block, *trailing))

    inputs = {
        "hidden": blocks(hidden_BxLxD, hidden_BxLxD.shape[2:]),
        "labels": blocks(labels_BxL),
        "ce_weights": blocks(ce_weights),
        "kl_weights": blocks(kl_weights),
    }
    if teacher is not None:
        inputs["teacher_hidden"] = blocks(teacher.hidden_BxLxDt, teacher.hidden_BxLxDt.shape[2:])

    compute = functools.partial(_block, spec, wanted, unembedding_VxD, teacher, temperature)

    def body(carry, one):
        loss, d_unembedding = carry
        used = jnp.any(one["ce_weights"] != 0) | jnp.any(one["kl_weights"] != 0)
        block_loss, values, d_hidden, d_unembedding = jax.lax.cond(
            used, compute, functools.partial(_skip, wanted), one, d_unembedding
        )
        return (loss + block_loss, d_unembedding), (values, d_hidden)

    empty = jnp.zeros(unembedding_VxD.shape, jnp.float32) if wanted == ALL else None
    (loss, d_unembedding), (values, d_hidden) = jax.lax.scan(body, (jnp.float32(0), empty), inputs)

    def restore(array, trailing=()):
        flat = array.reshape((padded, *trailing))[:tokens]
        return jnp.zeros_like(flat).at[order].set(flat, unique_indices=True).reshape(shape + trailing)

    output = HeadOutput(*(restore(v) for v in values))
    loss = jax.lax.psum(loss, axes) if axes else loss
    if wanted == NONE:
        return (loss, output), None
    d_hidden = restore(d_hidden, hidden_BxLxD.shape[2:])
    if wanted == HIDDEN:
        return (loss, output), (d_hidden, None)
    d_unembedding = jax.lax.psum(d_unembedding, axes) if axes else d_unembedding
    return (loss, output), (d_hidden, d_unembedding.astype(unembedding_VxD.dtype))


def _skip(wanted, one, d_unembedding):
    zero = jnp.zeros(one["labels"].shape, jnp.float32)
    d_hidden = jnp.zeros_like(one["hidden"]) if wanted != NONE else None
    return jnp.float32(0), (zero, zero, zero, jnp.zeros_like(one["labels"])), d_hidden, d_unembedding


def _block(spec, wanted, unembedding_VxD, teacher, temperature, one, d_unembedding):
    hidden_NxD, labels_N, w_ce, w_kl = one["hidden"], one["labels"], one["ce_weights"], one["kl_weights"]
    z_VxN = mask_rows(unembed(unembedding_VxD, hidden_NxD), spec.text_vocab)
    used_N = (w_ce != 0) | (w_kl != 0)

    log_normaliser_N = jax.nn.logsumexp(z_VxN, axis=0)
    label_logit_N = jnp.take_along_axis(z_VxN, labels_N[None], axis=0)[0]
    ce_N = log_normaliser_N - label_logit_N
    loss_N = ce_N
    smoothing = spec.label_smoothing
    if smoothing:
        mean_logit_N = jnp.sum(z_VxN[: spec.text_vocab], axis=0) / spec.text_vocab
        loss_N = (1 - smoothing) * ce_N + smoothing * (log_normaliser_N - mean_logit_N)
    prediction_N = jnp.argmax(z_VxN, axis=0).astype(labels_N.dtype)

    zero_N = jnp.zeros_like(ce_N)
    kl_N, kl1_N, d_kl_VxN = zero_N, zero_N, None
    if teacher is not None:
        kl_N, kl1_N, d_kl_VxN = jax.lax.cond(
            jnp.any(w_kl != 0),
            functools.partial(_teacher_block, teacher),
            lambda *args: (zero_N, zero_N, jnp.zeros_like(z_VxN)),
            one["teacher_hidden"],
            z_VxN,
            temperature,
        )
    loss = jnp.sum(w_ce * loss_N) + jnp.sum(w_kl * temperature**2 * kl_N)
    taught_N = w_kl != 0
    values = (
        jnp.where(used_N, ce_N, 0),
        jnp.where(taught_N, kl_N, 0),
        jnp.where(taught_N, kl1_N, 0),
        jnp.where(used_N, prediction_N, 0),
    )
    if wanted == NONE:
        return loss, values, None, None

    is_label = jnp.arange(z_VxN.shape[0])[:, None] == labels_N[None]
    target_VxN = jnp.where(is_label, 1 - smoothing, 0.0)
    if smoothing:
        is_text_V = jnp.arange(z_VxN.shape[0]) < spec.text_vocab
        target_VxN += jnp.where(is_text_V, smoothing / spec.text_vocab, 0.0)[:, None]
    d_z = w_ce[None] * (jnp.exp(z_VxN - log_normaliser_N[None]) - target_VxN)
    if d_kl_VxN is not None:
        d_z += (w_kl * temperature**2)[None] * d_kl_VxN
    d_z = d_z.astype(unembedding_VxD.dtype)
    d_hidden = jnp.einsum("vn,vd->nd", d_z, unembedding_VxD, preferred_element_type=jnp.float32)
    if wanted == ALL:
        d_unembedding += jnp.einsum("vn,nd->vd", d_z, hidden_NxD, preferred_element_type=jnp.float32)
    return loss, values, d_hidden.astype(hidden_NxD.dtype), d_unembedding


def _teacher_block(teacher, teacher_hidden_NxDt, z_VxN, temperature):
    """The KL at the temperature of the step with its gradient, and the KL at temperature 1."""
    t_VtxN = teacher_logits(teacher_hidden_NxDt, teacher.unembedding_VtxDt, teacher.projection.mapped)

    def at(tau):
        p = project(jax.nn.softmax(t_VtxN / tau, axis=0), teacher.projection, z_VxN.shape[0])
        return projected_kl(p, z_VxN, tau)

    kl, gradient = at(temperature)
    kl1 = jax.lax.cond(temperature == 1, lambda: kl, lambda: at(jnp.float32(1))[0])
    return kl, kl1, gradient

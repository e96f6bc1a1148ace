"""The streamed loss head: from hidden states and unembedding matrices to a scalar, without whole logit matrices.

At 262,144 x 128,256 tokens the logits of one batch are larger than the models. So the head walks over blocks of tokens,
forms both sets of logits for one block, reduces them, and forgets them. As the loss is a scalar, its gradient with
respect to the student's logits is known up to one factor as soon as a block is seen; the head therefore forms its
gradients while it streams forward, and the backward pass only scales them: nothing is computed twice and nothing of
size `[tokens, vocabulary]` is kept. Blocks with nothing to learn (prompts, padding) are skipped, teacher blocks
likewise where no token has a teacher target.

Over a mesh, tokens are spread over the batch axes and both vocabularies over the axes that cut parameters
(vocabulary.Shards). An axis may do both: its devices then hand each other the hidden states of one block, score all of
them against their own rows, and hand back gradients. So no device ever holds a whole unembedding matrix or its
gradient, and what moves is [block, D] (docs/heads.md).
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from distil_jax.losses import conditional
from distil_jax.losses.divergence import divergence
from distil_jax.losses.kd import (
    PlacedTable,
    ProjectionRows,
    ProjectionTable,
    Taken,
    Target,
    full_target,
    named_target,
    scored,
)
from distil_jax.losses.vocabulary import Shards, text_rows
from distil_jax.models.int8 import Int8, dequantize
from distil_jax.models.layers import unembed
from distil_jax.sharding import BATCH_AXES

_PIECES = 8  # of the gradient of the unembedding, each added in its turn


class Teacher(NamedTuple):
    """What the teacher says at the student's positions: its hidden state there, and the way to the student's tokens."""

    hidden_BxLxDt: Float[Array, "B L Dt"]
    rows_RxDt: Float[Array, "R Dt"]  # kd.rows_of its unembedding; the unembedding itself on one device
    projection: ProjectionTable | PlacedTable
    tokens_BxL: Int[Array, "B L"] | None = None  # the teacher's tokens that follow (kd.Taken); None: W alone
    reading: conditional.Reading | None = None  # [B, L]: targets where the tokenizations have no common boundary
    tables: conditional.Tables | None = None  # with which these are made


class TopKTeacher(NamedTuple):
    """The teacher's K likeliest tokens at the student's positions; what is left of its mass is one remainder cell."""

    ids_BxLxK: Int[Array, "B L K"]  # teacher token ids
    log_probs_BxLxK: Float[Array, "B L K"]  # log q at the temperature of the step
    log_probs1_BxLxK: Float[Array, "B L K"]  # log q at temperature 1
    projection: ProjectionRows
    tokens_BxL: Int[Array, "B L"] | None = None  # as of Teacher


class HeadOutput(NamedTuple):
    """Per-token values (nats), zero where the weights that ask for them are zero. They carry no gradient."""

    ce_BxL: Float[Array, "B L"]
    kl_BxL: Float[Array, "B L"]  # the divergence of the loss, at the temperature of the step
    kl1_BxL: Float[Array, "B L"]  # KL(p || s) at temperature 1, so that runs with different losses compare
    prediction_BxL: Int[Array, "B L"]  # the student's most likely token


class _Wanted(NamedTuple):
    """The gradients that a pass forms."""

    hidden: bool = False
    unembedding: bool = False
    weights: bool = False  # of W

    @property
    def sums(self) -> tuple[str, ...]:
        """Those that add up over blocks."""
        return tuple(name for name in ("unembedding", "weights") if getattr(self, name))


@dataclass(frozen=True)
class _Spec:
    """What is static in a head."""

    text_vocab: int
    block: int
    label_smoothing: float
    divergence: str
    skew: float
    top_k: int
    mesh: Mesh | None
    shards: Shards


def distill(
    hidden_BxLxD: Float[Array, "B L D"],
    unembedding_VsxD: Float[Array, "Vs D"],
    labels_BxL: Int[Array, "B L"],
    ce_weights_BxL: Float[Array, "B L"],
    *,
    teacher: Teacher | TopKTeacher | None = None,
    kl_weights_BxL: Float[Array, "B L"] | None = None,
    temperature: Float[Array, ""] | float = 1.0,
    divergence: str = "forward",
    skew: float = 0.1,
    top_k: int = 0,
    label_smoothing: float = 0.0,
    text_vocab: int | None = None,
    block: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], HeadOutput]:
    """`sum_n ce_weight_n CE_n + kl_weight_n tau^2 D(W^T q_n, s_n)` over all tokens n of the batch.

    `CE_n` is the cross-entropy of the student's distribution at temperature 1 against `labels` (against the label mixed
    with the uniform distribution if `label_smoothing` > 0; Szegedy et al. 2016, section 7). `q_n` and `s_n` are the
    teacher's and the student's full softmax at `temperature`; the temperature is applied before the projection, with
    which it does not commute. `D` is one of divergence.KINDS, "forward" for KL(W^T q || s). With `tokens_BxL` of the
    teacher, the mass of the one that follows goes to the label, whatever W says of it (kd.Taken). With `top_k`, or with
    a `TopKTeacher`, only the teacher's K likeliest tokens are projected; where rows of W leave a remainder, they are
    projected without it. D then compares the tokens that are reached and one cell for all others, which holds the rest
    of both distributions. At a target inside or across the teacher's tokens (`Teacher.reading`) only the share of the
    teacher's mass that has a name counts as its KL weight; the other share stays with cross-entropy. Weights are final:
    whoever calls has divided them by the global sum.

    The gradient flows into `hidden_BxLxD`, `unembedding_VsxD` and the weights of the projection; the last two are
    formed only where they are asked for (a frozen embedding is not). That of W takes its rows to sum to 1, as a softmax
    makes them. Rows of the student's head at or above `text_vocab`, and teacher tokens that the projection does not
    map, are in no softmax. `block` is the number of tokens that a device takes at once; 0 chooses it (`block_size`). On
    a mesh whose axes spread the vocabulary, the teacher's projection is `kd.place`d for it.

    Returns the scalar in float32 and the per-token values.
    """
    shards = Shards.of(mesh)
    if isinstance(teacher, Teacher) and isinstance(teacher.projection, PlacedTable) != (shards.size > 1):
        raise ValueError(f"a vocabulary over {shards.size} devices needs the projection of kd.place(table, shards)")
    spec = _Spec(
        text_vocab=text_vocab or unembedding_VsxD.shape[0],
        block=block or block_size(unembedding_VsxD.shape[0], teacher, mesh),
        label_smoothing=label_smoothing,
        divergence=divergence,
        skew=skew,
        top_k=top_k,
        mesh=mesh,
        shards=shards,
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
    block: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B L"], Int[Array, "B L"]]:
    """`-log p(label)` in nats and the most likely token at every position with a mask above 0; zeros elsewhere."""
    _, output = distill(
        hidden_BxLxD, unembedding_VxD, labels_BxL, mask_BxL, text_vocab=text_vocab, block=block, mesh=mesh
    )
    return output.ce_BxL, output.prediction_BxL


def block_size(student_vocab: int, teacher: Teacher | TopKTeacher | None = None, mesh: Mesh | None = None) -> int:
    """Tokens that a device takes at once, so that what exists for them stays within a sixteenth of its memory.

    Measured on a compiled head, a token needs about three floats for each teacher row and five for each student row
    that the device has. A CPU counts with 8 GB (caches, not memory, decide there) and takes at most 512 tokens, an
    accelerator at most 2,048: a matrix unit is busy with fewer, but the gradient of the unembedding is read and written
    once for each block.
    """
    device = jax.local_devices()[0]
    cpu = (device if mesh is None else mesh.devices.flat[0]).platform == "cpu"
    stats = None if cpu or device.platform == "cpu" else device.memory_stats()
    memory = 8e9 if cpu else (stats or {}).get("bytes_limit", 16e9)  # 16e9: a device that is only compiled for
    teacher_rows = teacher.rows_RxDt.shape[0] if isinstance(teacher, Teacher) else 0
    columns = 1
    for axis in set(Shards.of(mesh).axes) & set(BATCH_AXES):
        columns *= mesh.shape[axis]  # a block of each of their devices is scored at once
    per_token = 4 * (3 * teacher_rows + 5 * student_vocab) * columns / Shards.of(mesh).size
    tokens = int(memory / 16 / per_token)
    return max(8, min(tokens // 8 * 8, 512 if cpu else 2048))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(spec, hidden, unembedding, labels, ce_weights, kl_weights, teacher, temperature):
    return _on_mesh(spec, _Wanted(), hidden, unembedding, labels, ce_weights, kl_weights, teacher, temperature)[0]


def _head_forward(spec, *perturbed):
    """With symbolic zeros each array comes with the word whether anything differentiates with respect to it."""
    teacher = perturbed[5]
    learned = teacher is not None and teacher.projection.weights.perturbed
    wanted = _Wanted(True, perturbed[1].perturbed, learned)
    values = jax.tree.map(lambda leaf: leaf.value, perturbed, is_leaf=lambda x: hasattr(x, "perturbed"))
    output, gradients = _on_mesh(spec, wanted, *values)
    nothing = jax.tree.map(lambda leaf: None, values[5])
    return output, (gradients, nothing)


def _head_backward(spec, kept, cotangents):
    gradients, teacher = kept
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):  # only per-token values were differentiated, and they carry no gradient
        return (None,) * 7
    gradients = {name: g * scale.astype(g.dtype) for name, g in gradients.items()}
    if "weights" in gradients:
        teacher = teacher._replace(projection=teacher.projection._replace(weights=gradients["weights"]))
    return (gradients["hidden"], gradients.get("unembedding"), None, None, None, teacher, None)


_head.defvjp(_head_forward, _head_backward, symbolic_zeros=True)


def _on_mesh(spec, wanted, hidden, unembedding, labels, ce_weights, kl_weights, teacher, temperature):
    """((loss, per-token values), {name: gradient}). Tokens lie over the batch axes, vocabularies over the shards' axes;
    one sum at the end over what is left."""
    arguments = (labels, ce_weights, kl_weights, teacher, temperature)
    if spec.mesh is None:
        return _stream(spec, wanted, (), (), hidden, unembedding, *arguments)
    batch_axes = tuple(a for a in BATCH_AXES if a in spec.mesh.axis_names)
    handed = tuple(a for a in spec.shards.axes if a in batch_axes)  # their devices score each other's tokens
    summed = tuple(a for a in batch_axes if a not in handed)
    tokens, whole, cut = PartitionSpec(batch_axes), PartitionSpec(), PartitionSpec(spec.shards.axes or None)
    projection = whole
    if spec.shards.axes and isinstance(teacher, Teacher):
        projection = PlacedTable.specs(spec.shards, rest=teacher.projection.rest is not None)
    teacher_specs = {
        type(None): None,
        Teacher: Teacher(tokens, cut, projection, tokens, tokens, whole),
        TopKTeacher: TopKTeacher(tokens, tokens, tokens, whole, tokens),
    }[type(teacher)]
    if isinstance(unembedding, Int8):  # scored, never learned: dealt out in the dtype of what it meets
        unembedding = dequantize(unembedding).astype(hidden.dtype)
    V, D = unembedding.shape
    weights = whole if isinstance(teacher, TopKTeacher) else cut
    specs = {"hidden": tokens, "unembedding": spec.shards.stored, "weights": weights}

    def stream(hidden, part, *arguments):
        rows = spec.shards.deal(part)[:, :D]
        result, gradients = _stream(spec, wanted, handed, summed, hidden, rows, *arguments)
        if wanted.unembedding:
            columns = part.shape[1] * (spec.mesh.shape["fsdp"] if "fsdp" in spec.shards.axes else 1)
            whole_columns = jnp.pad(gradients["unembedding"], ((0, 0), (0, columns - D)))
            gradients["unembedding"] = spec.shards.collect(whole_columns)
        return result, gradients

    result, gradients = jax.shard_map(
        stream,
        mesh=spec.mesh,
        in_specs=(tokens, spec.shards.stored, tokens, tokens, tokens, teacher_specs, whole),
        out_specs=((whole, HeadOutput(tokens, tokens, tokens, tokens)), {n: specs[n] for n in _names(wanted)}),
        check_vma=False,
    )(hidden, spec.shards.padded(unembedding, spec.mesh), *arguments)
    if wanted.unembedding:
        gradients["unembedding"] = gradients["unembedding"][:V, :D]
    return result, gradients


def _names(wanted: _Wanted) -> tuple[str, ...]:
    return (("hidden",) if wanted.hidden else ()) + wanted.sums


def _stream(
    spec, wanted, handed, summed, hidden_BxLxD, unembedding_VxD, labels_BxL, ce_weights, kl_weights, teacher, tau
):
    """One device's part. handed: axes whose devices share each block of tokens; summed: those with other tokens."""
    shape = labels_BxL.shape
    tokens = shape[0] * shape[1]
    block = min(spec.block, tokens)
    padded = -(-tokens // block) * block

    # Tokens with a teacher target first, then those with a label only, then the rest: whole blocks of nothing are
    # skipped.
    flat_kl, flat_ce = kl_weights.reshape(tokens), ce_weights.reshape(tokens)
    taught = jnp.zeros(tokens, jnp.int32)
    if isinstance(teacher, Teacher) and teacher.reading is not None:
        taught = teacher.reading.conditional.reshape(tokens).astype(jnp.int32)  # in blocks of their own: they cost more
    order = jnp.argsort(jnp.where(flat_kl != 0, taught, jnp.where(flat_ce != 0, 2, 3)), stable=True)

    def blocks(array):
        flat = array.reshape((tokens, *array.shape[2:]))[order]
        flat = jnp.pad(flat, ((0, padded - tokens),) + ((0, 0),) * (flat.ndim - 1))
        return flat.reshape((padded // block, block, *flat.shape[1:]))

    inputs = jax.tree.map(
        blocks,
        {
            "hidden": hidden_BxLxD,
            "labels": labels_BxL,
            "ce_weights": ce_weights,
            "kl_weights": kl_weights,
            "teacher": _per_token(teacher),
        },
    )

    def mine(x_N):
        """This device's part of what was computed for the tokens of all devices of the handed axes."""
        return jax.lax.dynamic_slice_in_dim(x_N, jax.lax.axis_index(handed) * block, block) if handed else x_N

    def compute(one, sums):
        if handed:
            one = jax.tree.map(lambda x: jax.lax.all_gather(x, handed, axis=0, tiled=True), one)
        loss, values, d_hidden, sums = _block(spec, wanted, unembedding_VxD, teacher, tau, one, sums)
        values = tuple(map(mine, values))
        if wanted.hidden:
            if handed:
                d_hidden = jax.lax.psum_scatter(d_hidden, handed, scatter_dimension=0, tiled=True)
            rest = tuple(a for a in spec.shards.axes if a not in handed)
            d_hidden = jax.lax.psum(d_hidden, rest) if rest else d_hidden
            d_hidden = d_hidden.astype(hidden_BxLxD.dtype)
        return loss, values, d_hidden, sums

    def skip(one, sums):
        zero = jnp.zeros(one["labels"].shape, jnp.float32)
        d_hidden = jnp.zeros_like(one["hidden"]) if wanted.hidden else None
        return jnp.float32(0), (zero, zero, zero, jnp.zeros_like(one["labels"])), d_hidden, sums

    def body(carry, one):
        loss, sums = carry
        used = jnp.any(one["ce_weights"] != 0) | jnp.any(one["kl_weights"] != 0)
        if handed:  # they take this branch together
            used = jax.lax.pmax(used.astype(jnp.int32), handed) > 0
        block_loss, values, d_hidden, sums = jax.lax.cond(used, compute, skip, one, sums)
        return (loss + block_loss, sums), (values, d_hidden)

    learned = {"unembedding": unembedding_VxD, "weights": None if teacher is None else teacher.projection.weights}
    empty = {name: jnp.zeros(learned[name].shape, jnp.float32) for name in wanted.sums}
    (loss, sums), (values, d_hidden) = jax.lax.scan(body, (jnp.float32(0), empty), inputs)

    def restore(array):
        flat = array.reshape((padded, *array.shape[2:]))[:tokens]
        return jnp.zeros_like(flat).at[order].set(flat, unique_indices=True).reshape(shape + flat.shape[1:])

    def over(axes, x):
        return jax.lax.psum(x, axes) if axes else x

    # Rows of W are whole on every device, and each has counted its own student tokens only.
    axes = {"unembedding": summed, "weights": summed + spec.shards.axes * isinstance(teacher, TopKTeacher)}
    gradients = {name: over(axes[name], x).astype(learned[name].dtype) for name, x in sums.items()}
    if wanted.hidden:
        gradients["hidden"] = restore(d_hidden)
    return (over(summed, loss), HeadOutput(*map(restore, values))), gradients


def _per_token(teacher: Teacher | TopKTeacher | None) -> Any:
    """The part of a teacher that has a value for each token."""
    if isinstance(teacher, TopKTeacher):
        return (*teacher[:3], teacher.tokens_BxL)
    return None if teacher is None else (teacher.hidden_BxLxDt, teacher.tokens_BxL, teacher.reading)


def _block(spec, wanted, unembedding_VxD, teacher, temperature, one, sums):
    """Loss, per-token values and gradients of one block against the vocabulary rows of this device."""
    hidden_NxD, labels_N, w_ce, w_kl = one["hidden"], one["labels"], one["ce_weights"], one["kl_weights"]
    shards, smoothing = spec.shards, spec.label_smoothing
    z_VxN = text_rows(unembed(unembedding_VxD, hidden_NxD), spec.text_vocab, shards)
    is_text_Vx1 = (shards.ids(z_VxN.shape[0]) < spec.text_vocab)[:, None]
    used_N = (w_ce != 0) | (w_kl != 0)

    log_normaliser_N = shards.log_sum_exp(z_VxN)
    ce_N = log_normaliser_N - shards.take(z_VxN, labels_N)
    loss_N = ce_N
    if smoothing:
        mean_logit_N = shards.sum(jnp.sum(jnp.where(is_text_Vx1, z_VxN, 0), axis=0)) / spec.text_vocab
        loss_N = (1 - smoothing) * ce_N + smoothing * (log_normaliser_N - mean_logit_N)
    prediction_N = shards.argmax(z_VxN).astype(labels_N.dtype)

    zero_N = jnp.zeros_like(ce_N)
    kl_N, kl1_N, d_kl_VxN = zero_N, zero_N, None
    if teacher is not None:
        weights = jnp.zeros_like(teacher.projection.weights) if wanted.weights else None
        kl_N, kl1_N, d_kl_VxN, share_N, d_weights = jax.lax.cond(
            jnp.any(w_kl != 0),
            functools.partial(_taught, spec, wanted, teacher, w_kl),
            lambda *args: (zero_N, zero_N, jnp.zeros_like(z_VxN), jnp.ones_like(zero_N), weights),
            one["teacher"],
            labels_N,
            z_VxN,
            temperature,
        )
        w_ce, w_kl = w_ce + w_kl * (1 - share_N), w_kl * share_N
    loss = jnp.sum(w_ce * loss_N) + jnp.sum(w_kl * temperature**2 * kl_N)
    taught_N = one["kl_weights"] != 0
    values = (
        jnp.where(used_N, ce_N, 0),
        jnp.where(taught_N, kl_N, 0),
        jnp.where(taught_N, kl1_N, 0),
        jnp.where(used_N, prediction_N, 0),
    )
    if not wanted.hidden:
        return loss, values, None, sums

    is_label = shards.ids(z_VxN.shape[0])[:, None] == labels_N[None]
    target_VxN = jnp.where(is_label, 1 - smoothing, 0.0)
    if smoothing:
        target_VxN += jnp.where(is_text_Vx1, smoothing / spec.text_vocab, 0.0)
    d_z = w_ce[None] * (jnp.exp(z_VxN - log_normaliser_N[None]) - target_VxN)
    if d_kl_VxN is not None:
        d_z += (w_kl * temperature**2)[None] * d_kl_VxN
    d_z = d_z.astype(unembedding_VxD.dtype)
    d_hidden = jnp.einsum("vn,vd->nd", d_z, unembedding_VxD, preferred_element_type=jnp.float32)
    if wanted.unembedding:
        sums = sums | {"unembedding": _add_outer(sums["unembedding"], d_z, hidden_NxD)}
    if wanted.weights:
        sums = sums | {"weights": sums["weights"] + d_weights}
    return loss, values, d_hidden, sums


def _add_outer(
    sum_VxD: Float[Array, "V D"], d_z_VxN: Float[Array, "V N"], hidden_NxD: Float[Array, "N D"]
) -> Float[Array, "V D"]:
    """`sum + d_z hidden`, some rows at a time: a product to be added is an array of its own, and that of all rows would
    be a second gradient of the whole matrix."""
    V = len(d_z_VxN)
    rows = max(1, -(-V // _PIECES))

    def add(total, start, rows):
        d_z = jax.lax.dynamic_slice_in_dim(d_z_VxN, start, rows)
        here = jax.lax.dynamic_slice_in_dim(total, start, rows)
        added = jnp.einsum("vn,nd->vd", d_z, hidden_NxD, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(total, here + added, start, axis=0)

    whole = V // rows
    total = jax.lax.fori_loop(0, whole, lambda n, total: add(total, n * rows, rows), sum_VxD)
    return add(total, whole * rows, V - whole * rows) if V % rows else total


def _taught(spec, wanted, teacher, w_kl, per_token, labels_N, z_VxN, temperature):
    """The divergence at the temperature of the step, KL(p || s) at temperature 1, the gradient of the first, how much
    of each token's weight the teacher takes, and what the block adds to the gradient of W."""
    rows, shards = z_VxN.shape[0], spec.shards
    all_N = jnp.ones_like(w_kl)

    def against(target, tau, kind):
        options = {"kind": kind, "skew": spec.skew, "text_vocab": spec.text_vocab, "shards": shards}
        return divergence(target.p_VxN, z_VxN, tau, rest_N=target.rest_N, **options)

    def compare(now, one, share_N=all_N):
        target = now()
        value, gradient, d_p = against(target, temperature, spec.divergence)
        d_weights = target.pull(d_p * (w_kl * temperature**2)[None]) if wanted.weights else None
        at_1 = lambda: against(one(), jnp.float32(1), "forward")[0]  # noqa: E731
        value1 = at_1() if spec.divergence != "forward" else jax.lax.cond(temperature == 1, lambda: value, at_1)
        return value, value1, gradient, share_N, d_weights

    if isinstance(teacher, TopKTeacher):
        ids, log_probs, log_probs1, tokens_N = per_token
        taken = None if tokens_N is None else Taken(tokens_N, labels_N)
        at = lambda log_probs: named_target(ids, log_probs, teacher.projection, rows, shards, taken)  # noqa: E731
        return compare(functools.partial(at, log_probs), functools.partial(at, log_probs1))

    hidden_NxDt, tokens_N, reading = per_token
    taken = None if tokens_N is None else Taken(tokens_N, labels_N)
    t_RxN = scored(hidden_NxDt, teacher.rows_RxDt, teacher.projection)
    full = full_target(t_RxN, teacher.projection, rows, top_k=spec.top_k, taken=taken, shards=shards)
    if reading is None:
        return compare(functools.partial(full, temperature), functools.partial(full, jnp.float32(1)))

    def at_boundaries(tau):
        target = full(tau)
        return target if target.rest_N is not None else target._replace(rest_N=jnp.zeros_like(w_kl))

    def some_inside():
        last_RxN = scored(reading.last_hidden, teacher.rows_RxDt, teacher.projection)
        scores = conditional.rows_of(teacher.projection, t_RxN.shape[0], shards)
        ids, masses = conditional.cells(
            t_RxN, last_RxN, scores, reading, labels_N, teacher.tables, (temperature, jnp.float32(1))
        )

        def mixed(tau, mass):
            outside, inside = at_boundaries(tau), conditional.target(ids, mass, rows, shards)
            here = reading.conditional
            return Target(
                jnp.where(here[None], inside.p_VxN, outside.p_VxN),
                jnp.where(here, inside.rest_N, outside.rest_N),
                lambda d_p: outside.pull(jnp.where(here[None], 0, d_p)),
            )

        named_N = jnp.where(reading.conditional, jnp.minimum(jnp.sum(masses[0], axis=1), 1), 1)
        return compare(
            functools.partial(mixed, temperature, masses[0]),
            functools.partial(mixed, jnp.float32(1), masses[1]),
            named_N,
        )

    def none_inside():
        return compare(functools.partial(at_boundaries, temperature), functools.partial(at_boundaries, jnp.float32(1)))

    return jax.lax.cond(jnp.any(reading.conditional & (w_kl != 0)), some_inside, none_inside)

"""Which computation attends: one function, three forms of it that agree to rounding (docs/models.md).

    explicit    the scores of a quarter of the queries at a time, with a mask [B, L, L]; the fastest for short rows
    blocks      tiles of queries and keys in plain XLA (attention_blocks.py); any device, memory grows with L
    splash      JAX's Pallas kernel for TPUs; elsewhere it can only be interpreted, which is for tests

cuDNN is no form of it: `jax.nn.dot_product_attention` takes lengths and a window there, but segment ids only as a bias
of L x L numbers.
"""

import functools
from collections.abc import Callable, Sequence
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from distil_jax.errors import UserError, nearest
from distil_jax.models import attention_blocks, layers
from distil_jax.sharding import BATCH_AXES

IMPLEMENTATIONS = ("auto", "explicit", "blocks", "splash")
SHORT = 512  # rows up to this are faster whole on a CPU (bench/RESULTS.md)
LANES = 128  # a splash block is a multiple of these positions
SPLASH_BLOCK = 512


def chosen(implementation: str, length: int, mesh: Mesh | None = None) -> str:
    """The form that rows of `length` take on the devices of the mesh, which need not be here.

    Without a mesh, on ours: if there are several, XLA may cut the arrays as it likes, which a kernel does not let it.
    Raises UserError for a name that is none of IMPLEMENTATIONS.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"config.attention is {implementation!r}: use one of {', '.join(IMPLEMENTATIONS)}"
            f"{nearest(implementation, IMPLEMENTATIONS)}"
        )
    if implementation != "auto":
        return implementation
    if platform_of(mesh) == "tpu" and (mesh is not None or jax.device_count() == 1):
        return "splash" if length >= LANES else "explicit"
    return "blocks" if length > SHORT else "explicit"


def check(implementation: str, mesh: Mesh) -> None:
    """Raises UserError for a config.attention that training on this mesh would stumble over."""
    chosen(implementation, LANES, mesh)
    if implementation == "splash" and platform_of(mesh) != "tpu":
        raise UserError(
            f"config.attention=splash is a kernel for TPUs, and config.mesh has {platform_of(mesh)} devices: set it to "
            "blocks, or to auto, which takes splash where it runs"
        )


def platform_of(mesh: Mesh | None) -> str:
    """Of the mesh's devices: a plan for a TPU is made on a CPU."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def attention(
    q_BxLxHxK: Float[Array, "B L H K"],
    k_BxLxGxK: Float[Array, "B L G K"],
    v_BxLxGxK: Float[Array, "B L G K"],
    segment_ids_BxL: Int[Array, "b L"],
    window: int | None = None,
    implementation: str = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "B L H K"]:
    """Causal attention of scaled queries within segments, in the dtype of the values.

    Query i sees key j where `i - window < j <= i` and both have the same segment id; a segment must be contiguous.
    What a query of segment 0 (padding) gets is finite, differs between the forms and means nothing.
    mesh: rows lie over data and fsdp, heads over tensor, where these divide them.
    Raises UserError as `chosen`.
    """
    form = chosen(implementation, q_BxLxHxK.shape[1], mesh)
    if form == "explicit":
        mask = layers.attention_mask(segment_ids_BxL, window)
        return layers.attend(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, mask)
    segment_ids_BxL = jnp.broadcast_to(segment_ids_BxL, q_BxLxHxK.shape[:2])
    if form == "blocks":
        local = functools.partial(attention_blocks.attend, window=window)
    else:
        local = functools.partial(splash, window=window, interpret=platform_of(mesh) != "tpu")
    return spread(local, q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, segment_ids_BxL, mesh)


def over_kinds(
    windows: Sequence[int | None], segment_ids_BxL: Int[Array, "b L"], implementation: str, mesh: Mesh | None
) -> Callable[[Array, Array, Array, Any], Array]:
    """`attend(q, k, v, kind)` for a scan over layers whose kinds differ in their window; kind may be traced.

    A window that reaches over the whole row is none, and kinds with one window are one program.
    """
    length = segment_ids_BxL.shape[1]
    windows = [None if w is None or w >= length else w for w in windows]
    distinct = list(dict.fromkeys(windows))
    place = [distinct.index(w) for w in windows]
    if chosen(implementation, length, mesh) == "explicit":  # masks once for all layers
        masks = jnp.stack([layers.attention_mask(segment_ids_BxL, w) for w in distinct])
        each = lambda q, k, v, at: layers.attend(q, k, v, masks[at])  # noqa: E731
    else:
        forms = [_of_window(segment_ids_BxL, w, implementation, mesh) for w in distinct]

        def each(q, k, v, at):
            return forms[at](q, k, v) if isinstance(at, int) else jax.lax.switch(at, forms, q, k, v)

    def attend(q, k, v, kind):
        if len(distinct) == 1:
            return each(q, k, v, 0)
        return each(q, k, v, place[kind] if isinstance(kind, int) else jnp.asarray(place)[kind])

    return attend


def _of_window(segment_ids, window, implementation, mesh) -> Callable[[Array, Array, Array], Array]:
    return lambda q, k, v: attention(q, k, v, segment_ids, window, implementation, mesh)


def spread(
    local: Callable[[Array, Array, Array, Array], Array], q: Array, k: Array, v: Array, segment_ids: Array, mesh
) -> Float[Array, "B L H K"]:
    """`local(q, k, v, segment_ids)` on each device of the mesh with its own rows and heads: nothing is sent.

    Where the tensor axis cuts the query heads finer than the key heads, a key head goes to each part that reads it.
    """
    if mesh is None or mesh.size == 1:
        return local(q, k, v, segment_ids)
    (B, _, H, _), G = q.shape, k.shape[2]
    cut = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
    parts = 1
    for axis in cut:
        parts *= mesh.shape[axis]
    rows = cut if B % parts == 0 else None
    tensor = mesh.shape.get("tensor", 1)
    heads = "tensor" if tensor > 1 and H % tensor == 0 else None
    if heads:
        k, v = (layers.repeat_heads(x, lcm(G, tensor)) for x in (k, v))
    spec = PartitionSpec(rows, None, heads)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec, check_vma=False
    )
    return run(q, k, v, segment_ids)


def splash(
    q_BxLxHxK: Float[Array, "B L H K"],
    k_BxLxGxK: Float[Array, "B L G K"],
    v_BxLxGxK: Float[Array, "B L G K"],
    segment_ids_BxL: Int[Array, "B L"],
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B L H K"]:
    """JAX's splash attention, forward and backward, on one device. Any head width; rows are filled up with padding to
    whole blocks. Source: jax.experimental.pallas.ops.tpu.splash_attention."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    L, H = q_BxLxHxK.shape[1:3]
    block = min(SPLASH_BLOCK, -(-L // LANES) * LANES)
    fill = -L % block
    q, k, v = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))), 1, 2) for x in (q_BxLxHxK, k_BxLxGxK, v_BxLxGxK)
    )
    segments = jnp.pad(segment_ids_BxL, ((0, 0), (0, fill)))
    square = (L + fill, L + fill)
    mask = kernels.CausalMask(square) if window is None else kernels.LocalMask(square, (window - 1, 0), 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * H), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids)))(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2)[:, :L]

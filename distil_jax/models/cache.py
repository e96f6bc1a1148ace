"""Keys and values of what a model has read, so that each new token costs one pass over the weights.

`prefill` reads a batch of prompts, `decode` one more token for each. Both run the same blocks as training does; only
the `mix` of the attention differs. Full layers keep every column. Sliding layers keep a ring of their window: the
column c lies in slot c % window, so a long text costs them no more than a short one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from distil_jax.models import layers
from distil_jax.models.decoder import Model, Params


class Cache(NamedTuple):
    """Columns are counted over the batch, prompts are flush right: row b begins at column `start_B[b]`.

    `keys` and `values` hold one array [N, B, G, T, K] for each kind of layer (`Model.layer_kinds`): N layers of that
    kind, G key heads, T slots, in the dtype of the model.
    """

    keys: tuple[Float[Array, "N B G T K"], ...]
    values: tuple[Float[Array, "N B G T K"], ...]
    start_B: Int[Array, " B"]
    length: Int[Array, ""]  # columns so far, the same for every row


def slots(model: Model, capacity: int) -> tuple[int, ...]:
    """T of each kind of layer in a cache of `capacity` columns."""
    kinds, _ = model.layer_kinds()
    return tuple(capacity if kind.window is None else min(kind.window, capacity) for kind in kinds)


def nbytes(model: Model, rows: int, capacity: int, dtype) -> int:
    """Bytes of a cache."""
    c, (_, kind_of_layer) = model.config, model.layer_kinds()
    columns = sum(slots(model, capacity)[kind] for kind in kind_of_layer)
    return 2 * rows * columns * c.num_key_value_heads * c.head_dim * jnp.dtype(dtype).itemsize


def prefill(
    model: Model, params: Params, tokens_BxL: Int[Array, "B L"], start_B: Int[Array, " B"], capacity: int
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads prompts that are flush right (row b is `tokens_BxL[b, start_B[b]:]`, of any length from 1 to L).

    capacity: columns that the cache has room for, at least L. Returns the hidden state at the last column, and the
    cache.
    """
    length = tokens_BxL.shape[1]
    if capacity < length:
        raise ValueError(f"a cache of {capacity} columns cannot hold a prompt of {length}")
    kinds, _ = model.layer_kinds()
    segment_ids = (jnp.arange(length)[None] >= start_B[:, None]).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(length)[None] - start_B[:, None], 0)
    tables = [layers.rope_table(positions, kind.frequencies) for kind in kinds]
    masks = [layers.attention_mask(segment_ids, kind.window) for kind in kinds]

    def body(kind, T, block, x, caches, place):
        def mix(q, k, v):
            stored = tuple(_columns_to_slots(y, T) for y in (k, v))
            return layers.attend(q, k, v, masks[kind]), stored

        x, stored = block(x, tables[kind], mix)
        return x, tuple(
            jax.lax.dynamic_update_index_in_dim(cache, new, place, 0) for cache, new in zip(caches, stored, strict=True)
        )

    empty = _empty(model, params, tokens_BxL.shape[0], capacity)
    x, keys, values = _walk(model, params, model.embed(params, tokens_BxL), empty, empty, body)
    return model.normed(params, x[:, -1:])[:, 0], Cache(keys, values, start_B, jnp.int32(length))


def decode(model: Model, params: Params, cache: Cache, tokens_B: Int[Array, " B"]) -> tuple[Float[Array, "B D"], Cache]:
    """Reads one more token of each row. The caller sees to it that the cache has room (`capacity` of `prefill`)."""
    kinds, _ = model.layer_kinds()
    positions = (cache.length - cache.start_B)[:, None]
    tables = [layers.rope_table(positions, kind.frequencies) for kind in kinds]
    masks = [_visible(cache, keys.shape[3]) for keys in cache.keys]

    def body(kind, T, block, x, caches, place):
        def mix(q, k, v):
            at = (place, 0, 0, cache.length % T, 0)
            updated = tuple(
                jax.lax.dynamic_update_slice(old, jnp.swapaxes(new, 1, 2)[None], at)
                for old, new in zip(caches, (k, v), strict=True)
            )
            keys, values = (jax.lax.dynamic_index_in_dim(c, place, 0, keepdims=False) for c in updated)
            return _attend_one(q, keys, values, masks[kind]), updated

        return block(x, tables[kind], mix)

    x = model.embed(params, tokens_B[:, None])
    x, keys, values = _walk(model, params, x, cache.keys, cache.values, body)
    return model.normed(params, x)[:, 0], Cache(keys, values, cache.start_B, cache.length + 1)


def _walk(model, params, x, keys, values, body):
    """All layers, one scan for each run of layers of a kind, whose caches are carried through it.

    Layers are picked by index inside the scan: a slice of the stacked parameters would be a copy of them.
    """
    block_def, stacked = model.stacked_blocks(params)
    _, kind_of_layer = model.layer_kinds()
    keys, values = list(keys), list(values)
    first = 0
    seen = [0] * len(keys)  # layers of each kind so far
    while first < len(kind_of_layer):
        kind = kind_of_layer[first]
        last = first
        while last < len(kind_of_layer) and kind_of_layer[last] == kind:
            last += 1
        offset = seen[kind] - first
        T = keys[kind].shape[3]

        def one(carry, layer, kind=kind, T=T, offset=offset):
            x, caches = carry
            pick = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)  # noqa: E731
            block = nnx.merge(block_def, jax.tree.map(pick, stacked))
            return body(kind, T, block, x, caches, layer + offset), None

        (x, (keys[kind], values[kind])), _ = jax.lax.scan(one, (x, (keys[kind], values[kind])), jnp.arange(first, last))
        seen[kind] += last - first
        first = last
    return x, tuple(keys), tuple(values)


def _empty(model, params, rows, capacity):
    """Caches of every kind of layer, zeros."""
    c, (kinds, kind_of_layer) = model.config, model.layer_kinds()
    dtype = params["final_norm"]["scale"].dtype
    return tuple(
        jnp.zeros((kind_of_layer.count(kind), rows, c.num_key_value_heads, T, c.head_dim), dtype)
        for kind, T in zip(range(len(kinds)), slots(model, capacity), strict=True)
    )


def _columns_to_slots(x_BxLxGxK: Float[Array, "B L G K"], T: int) -> Float[Array, "B G T K"]:
    """The last T columns of a prompt, each at slot column % T; the rest of a longer cache is zero."""
    length = x_BxLxGxK.shape[1]
    x_BxGxLxK = jnp.swapaxes(x_BxLxGxK, 1, 2)
    if length <= T:
        return jnp.pad(x_BxGxLxK, ((0, 0), (0, 0), (0, T - length), (0, 0)))
    return jnp.roll(x_BxGxLxK[:, :, length - T :], (length - T) % T, axis=2)


def _visible(cache: Cache, T: int) -> Bool[Array, "B T"]:
    """Which slots the next column (which is stored first) sees: slot s holds the newest column c with c % T == s."""
    columns = cache.length - (cache.length - jnp.arange(T)) % T
    return columns[None] >= jnp.maximum(cache.start_B, 0)[:, None]


def _attend_one(
    q_Bx1xHxK: Float[Array, "B 1 H K"],
    keys: Float[Array, "B G T K"],
    values: Float[Array, "B G T K"],
    mask_BxT: Bool[Array, "B T"],
) -> Float[Array, "B 1 H K"]:
    """Attention of one query per row; the H/G query heads of a key head are the rows of one matrix product."""
    B, _, H, K = q_Bx1xHxK.shape
    q_BxGxRxK = q_Bx1xHxK.reshape(B, keys.shape[1], H // keys.shape[1], K)
    scores = jnp.einsum("bgrk,bgtk->bgrt", q_BxGxRxK, keys, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(jnp.where(mask_BxT[:, None, None, :], scores, layers.MASKED), axis=-1)
    out = jnp.einsum("bgrt,bgtk->bgrk", probabilities.astype(values.dtype), values)
    return out.reshape(B, 1, H, K)

"""Keys and values of what a model has read, so that each new token costs one pass over the weights.

`prefill` reads a batch of prompts, `decode` one more token for each. Both run the same blocks as training does; only
the `mix` of the attention differs. Full layers keep every column. Sliding layers keep a ring of their window: the
column c lies in slot c % window, so a long text costs them no more than a short one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def layer_views(params: Params) -> Params:
    """The parameters with `layers` as a list of layers, each in the memory of the stacked arrays. CPU only.

    XLA's CPU backend copies a layer out of a stacked array before it multiplies; a layer that is an array of its own
    is read where it lies.
    """
    stacked, tree = jax.tree.flatten(params["layers"])
    hosts = [np.asarray(leaf) for leaf in stacked]
    (device,) = stacked[0].devices()
    layers_of = [tree.unflatten([jax.device_put(host[i], device) for host in hosts]) for i in range(len(hosts[0]))]
    return params | {"layers": layers_of}


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

    def body(kind, block, x, caches, place):
        def mix(q, k, v):
            stored = (_columns_to_slots(new, old.shape[3]) for new, old in zip((k, v), caches, strict=True))
            updated = tuple(
                jax.lax.dynamic_update_index_in_dim(old, new, place, 0) for old, new in zip(caches, stored, strict=True)
            )
            return layers.attend(q, k, v, masks[kind]), updated

        return block(x, tables[kind], mix)

    c, (_, kind_of_layer) = model.config, model.layer_kinds()
    dtype = params["final_norm"]["scale"].dtype
    empty = tuple(
        jnp.zeros((kind_of_layer.count(kind), len(tokens_BxL), c.num_key_value_heads, T, c.head_dim), dtype)
        for kind, T in enumerate(slots(model, capacity))
    )
    x, keys, values = _walk(model, params, model.embed(params, tokens_BxL), empty, empty, body)
    return model.normed(params, x[:, -1:])[:, 0], Cache(keys, values, start_B, jnp.int32(length))


def decode(model: Model, params: Params, cache: Cache, tokens_B: Int[Array, " B"]) -> tuple[Float[Array, "B D"], Cache]:
    """Reads one more token of each row. The caller sees to it that the cache has room (`capacity` of `prefill`)."""
    kinds, _ = model.layer_kinds()
    positions = (cache.length - cache.start_B)[:, None]
    tables = [layers.rope_table(positions, kind.frequencies) for kind in kinds]
    masks = [_visible(cache, keys.shape[3]) for keys in cache.keys]

    def body(kind, block, x, caches, place):
        def mix(q, k, v):
            at = (place, 0, 0, cache.length % caches[0].shape[3], 0)
            updated = tuple(
                jax.lax.dynamic_update_slice(old, jnp.swapaxes(new, 1, 2)[None], at)
                for old, new in zip(caches, (k, v), strict=True)
            )
            keys, values = (jax.lax.dynamic_index_in_dim(new, place, 0, keepdims=False) for new in updated)
            return _attend_one(q, keys, values, masks[kind]), updated

        return block(x, tables[kind], mix)

    x = model.embed(params, tokens_B[:, None])
    x, keys, values = _walk(model, params, x, cache.keys, cache.values, body)
    return model.normed(params, x)[:, 0], Cache(keys, values, cache.start_B, cache.length + 1)


def _walk(model, params, x, keys, values, body):
    """All layers, those of a kind with the caches of that kind.

    Stacked layers are scanned, neighbours of a kind at a time. They are picked by index inside the scan: a slice of the
    stacked parameters would be a copy of them.
    """
    _, kind_of_layer = model.layer_kinds()
    caches = list(zip(keys, values, strict=True))
    stacked = isinstance(params["layers"], dict)
    done = [0] * len(caches)  # layers of each kind
    first = 0
    while first < len(kind_of_layer):
        kind = kind_of_layer[first]
        if stacked:
            last = next((i for i in range(first, len(kind_of_layer)) if kind_of_layer[i] != kind), len(kind_of_layer))
            place = done[kind] - first

            def one(carry, layer, kind=kind, place=place):
                x, mine = carry
                pick = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False)
                return body(kind, model.block_of(jax.tree.map(pick, params["layers"])), x, mine, layer + place), None

            (x, caches[kind]), _ = jax.lax.scan(one, (x, caches[kind]), jnp.arange(first, last))
        else:
            last = first + 1
            x, caches[kind] = body(kind, model.block_of(params["layers"][first]), x, caches[kind], done[kind])
        done[kind] += last - first
        first = last
    keys, values = zip(*caches, strict=True)
    return x, keys, values


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
    return columns[None] >= cache.start_B[:, None]


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

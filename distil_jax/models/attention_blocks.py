"""Causal attention in tiles of b queries by b keys, in plain XLA: memory grows with L, not with L x L, on any device.

The softmax is taken as the tiles come by (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"),
and the backward pass forms each tile again from its queries, its keys and one number a query (Dao et al. 2022,
"FlashAttention", algorithms 1 and 4). Tiles that the causal mask or the window hides whole are never visited: the list
of the others is known while tracing, so that a loop over it has a fixed length, as a GPU wants it.

Shapes: n blocks of b positions; X = R b rows of a tile, the R = H / G query heads of a key head one below the other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distil_jax.models.layers import MASKED

LARGEST = 512  # positions in a block
TILE_BYTES = 2**28  # of float32 scores in a tile, over all rows and heads of a device, where that leaves 64 positions


def block_of(rows: int, length: int, heads: int) -> int:
    """Positions in a block: at most LARGEST, fewer where tiles would be too large, and blocks of about equal length."""
    most = LARGEST
    while most > 64 and 4 * rows * heads * most * most > TILE_BYTES:
        most //= 2
    count = -(-length // most)
    return min(length, -(-length // (16 * count)) * 16)


def tiles(count: int, block: int, window: int | None) -> Int[np.ndarray, "tiles 2"]:
    """(query block, key block) of every tile in which some query sees some key; for each query block its own keys come
    first, then what is further back."""
    seen = []
    for i in range(count):
        farthest = 0 if window is None else max(0, i * block - window + 1) // block
        seen += [(i, j) for j in range(i, farthest - 1, -1)]
    return np.asarray(seen, np.int32)


def tile_mask(
    queries_Bxb: Int[Array, "B b"], keys_Bxb: Int[Array, "B b"], distance: Int[Array, ""] | int, window: int | None
) -> Bool[Array, "B b b"]:
    """True where a query sees a key: `0 <= distance of positions < window`, equal segment ids.

    distance: from the first key of the tile to its first query. Padding (segment 0) sees padding: each query sees at
    least itself, and no softmax is empty.
    """
    b = queries_Bxb.shape[1]
    apart = distance + jax.lax.broadcasted_iota(jnp.int32, (b, b), 0) - jax.lax.broadcasted_iota(jnp.int32, (b, b), 1)
    near = apart >= 0 if window is None else (apart >= 0) & (apart < window)
    return near[None] & (queries_Bxb[:, :, None] == keys_Bxb[:, None, :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    q_BxLxHxK: Float[Array, "B L H K"],
    k_BxLxGxK: Float[Array, "B L G K"],
    v_BxLxGxK: Float[Array, "B L G K"],
    segment_ids_BxL: Int[Array, "B L"],
    window: int | None,
    block: int = 0,
) -> Float[Array, "B L H K"]:
    """Attention as layers.attend computes it, of scaled queries; what padding queries get is finite and means nothing.

    window: keys that a query sees, its own included; None: all before it. block: positions in a block; 0: `block_of`.
    """
    return _forward(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, segment_ids_BxL, window, block)[0]


def _forward(q, k, v, segment_ids, window, block):
    B, L, H, _ = q.shape
    G = k.shape[2]
    b = block or block_of(B, L, H)
    queries, keys, values = _queries(q, b, G), _keys(k, b), _keys(v, b)
    segments_nxBxb = _blocks(segment_ids, b)
    n, X = len(queries), queries.shape[3]
    rows = (B, G, X)

    def visit(carry, tile):
        out, log_sums, o, m, l = carry  # noqa: E741
        i, j = tile
        s = _scores(queries, keys, segments_nxBxb, i, j, b, window)
        # Its own keys come first, and there every query sees itself: from then on m is the score of a key that is seen,
        # and exp(MASKED - m) is 0.
        begins = i == j
        before = jnp.where(begins, MASKED, m)
        m = jnp.maximum(before, jnp.max(s, axis=-1))
        p = jnp.exp(s - m[..., None])
        kept = jnp.where(begins, 0.0, jnp.exp(before - m))
        l = kept * l + jnp.sum(p, axis=-1)  # noqa: E741
        o = kept[..., None] * o + _dot("bgxy,bgyk->bgxk", p.astype(v.dtype), values[j])
        out = jax.lax.dynamic_update_index_in_dim(out, (o / l[..., None]).astype(v.dtype), i, 0)
        log_sums = jax.lax.dynamic_update_index_in_dim(log_sums, m + jnp.log(l), i, 0)
        return (out, log_sums, o, m, l), None

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    empty = (jnp.zeros((n, *rows, v.shape[-1]), v.dtype), zeros((n, *rows)))
    start = (*empty, zeros((*rows, v.shape[-1])), zeros(rows), zeros(rows))
    (out, log_sums, *_), _ = jax.lax.scan(visit, start, _steps(n, b, window))
    return _from_queries(out, L, H, b), (q, k, v, segment_ids, out, log_sums)


def _backward(window, block, kept, given_BxLxHxK):
    q, k, v, segment_ids, out, log_sums = kept
    B, L, H, _ = q.shape
    G = k.shape[2]
    b = block or block_of(B, L, H)
    queries, keys, values = _queries(q, b, G), _keys(k, b), _keys(v, b)
    segments_nxBxb, given = _blocks(segment_ids, b), _queries(given_BxLxHxK, b, G)
    through = jnp.sum(given.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # sum_y p_y dp_y of each query

    def visit(carry, tile):
        dq, dk, dv, mine = carry
        i, j = tile
        s = _scores(queries, keys, segments_nxBxb, i, j, b, window)
        p = jnp.exp(s - log_sums[i][..., None])
        dp = _dot("bgxk,bgyk->bgxy", given[i], values[j])
        ds = (p * (dp - through[i][..., None])).astype(q.dtype)
        mine = jnp.where(i == j, 0.0, mine) + _dot("bgxy,bgyk->bgxk", ds, keys[j])
        dq = jax.lax.dynamic_update_index_in_dim(dq, mine.astype(q.dtype), i, 0)
        dk = _add(dk, _dot("bgxy,bgxk->bgyk", ds, queries[i]), j)
        dv = _add(dv, _dot("bgxy,bgxk->bgyk", p.astype(given.dtype), given[i]), j)
        return (dq, dk, dv, mine), None

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    start = (jnp.zeros(queries.shape, q.dtype), zeros(keys.shape), zeros(values.shape), zeros(queries.shape[1:]))
    (dq, dk, dv, _), _ = jax.lax.scan(visit, start, _steps(len(queries), b, window))
    back = _from_queries(dq, L, H, b), _from_keys(dk, L).astype(k.dtype), _from_keys(dv, L).astype(v.dtype)
    return *back, None


attend.defvjp(_forward, _backward)


def _steps(count: int, block: int, window: int | None) -> tuple[Array, Array]:
    visited = tiles(count, block, window)
    return jnp.asarray(visited[:, 0]), jnp.asarray(visited[:, 1])


def _scores(queries, keys, segments, i, j, b: int, window: int | None) -> Float[Array, "B G X b"]:
    """The float32 scores of a tile, MASKED where a query does not see a key."""
    s = _dot("bgxk,bgyk->bgxy", queries[i], keys[j])
    mask = tile_mask(segments[i], segments[j], (i - j) * b, window)
    B, G, X, _ = s.shape
    return jnp.where(mask[:, None, None], s.reshape(B, G, X // b, b, b), MASKED).reshape(s.shape)


def _dot(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _add(sums: Array, x: Array, at: Array) -> Array:
    """sums[at] += x, where they lie."""
    return jax.lax.dynamic_update_index_in_dim(sums, sums[at] + x, at, 0)


def _blocks(x_BxL: Array, b: int) -> Array:
    """[B, L, ...] -> [n, B, b, ...], filled up with zeros."""
    B, L, *rest = x_BxL.shape
    padded = jnp.pad(x_BxL, ((0, 0), (0, -L % b), *((0, 0) for _ in rest)))
    return jnp.moveaxis(padded.reshape(B, -1, b, *rest), 1, 0)


def _keys(x_BxLxGxK: Float[Array, "B L G K"], b: int) -> Float[Array, "n B G b K"]:
    return jnp.swapaxes(_blocks(x_BxLxGxK, b), 2, 3)


def _from_keys(x: Float[Array, "n B G b K"], L: int) -> Float[Array, "B L G K"]:
    n, B, G, b, K = x.shape
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(B, n * b, G, K)[:, :L]


def _queries(x_BxLxHxK: Float[Array, "B L H K"], b: int, G: int) -> Float[Array, "n B G X K"]:
    B, _, H, K = x_BxLxHxK.shape
    heads = jnp.swapaxes(_blocks(x_BxLxHxK, b), 2, 3)
    return heads.reshape(-1, B, G, H // G * b, K)


def _from_queries(x: Float[Array, "n B G X K"], L: int, H: int, b: int) -> Float[Array, "B L H K"]:
    n, B, *_, K = x.shape
    return _from_keys(x.reshape(n, B, H, b, K), L)

"""A model over rows that continue one shared text, each of them into several branches.

What all rows begin with is read once (`read`): its keys and values serve every row. A row holds the rest of a context
(branch 0) and, after it, continuations of that context (branches 1, 2, ...), which see the context and themselves but
not each other: so a context is read once for all of its continuations. Positions count through context and branch, as
if each continuation stood alone, and a sliding window is a distance in them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distil_jax.models import layers
from distil_jax.models.decoder import Model, Params

PADDING = -1  # the branch of what is no token


class Prefix(NamedTuple):
    """Keys and values of a shared text of `length` tokens, in all N layers; what stands beyond is padding."""

    keys: Float[Array, "N P G K"]
    values: Float[Array, "N P G K"]
    length: Int[Array, ""]


def read(model: Model, params: Params, tokens_P: Int[Array, " P"], length: Int[Array, ""]) -> Prefix:
    """The shared text tokens_P[:length]; the rest of the array only fills its shape."""
    place = jnp.arange(tokens_P.shape[0], dtype=jnp.int32)
    branch = jnp.where(place < length, 0, PADDING)
    _, (keys, values) = _run(model, params, None, tokens_P[None], place[None], branch[None], keep=True)
    return Prefix(keys[:, 0], values[:, 0], length)


def hidden(
    model: Model,
    params: Params,
    prefix: Prefix | None,
    tokens_BxL: Int[Array, "B L"],
    positions_BxL: Int[Array, "B L"],
    branch_BxL: Int[Array, "B L"],
) -> Float[Array, "B L D"]:
    """Hidden states after the final norm. positions: counted from the start of the prefix. branch: 0 for the context,
    then numbers of the continuations, PADDING for no token."""
    return _run(model, params, prefix, tokens_BxL, positions_BxL, branch_BxL, keep=False)[0]


def _run(model, params, prefix, tokens_BxL, positions_BxL, branch_BxL, *, keep):
    kinds, kind_of_layer = model.layer_kinds()
    tables = jnp.stack([layers.rope_table(positions_BxL, kind.frequencies) for kind in kinds])
    masks = jnp.stack([_own_mask(positions_BxL, branch_BxL, kind.window) for kind in kinds])
    before = None
    if prefix is not None:
        before = jnp.stack([_prefix_mask(prefix, positions_BxL, kind.window) for kind in kinds])

    def body(x, xs):
        kind, layer, shared = xs

        def mix(q, k, v):
            mask = None if before is None else before[kind]
            return attend(q, k, v, masks[kind], shared, mask), (k, v) if keep else None

        return model.block_of(layer)(x, tables[kind], mix)

    shared = None if prefix is None else (prefix.keys, prefix.values)
    xs = (jnp.asarray(kind_of_layer, jnp.int32), params["layers"], shared)
    x, kept = jax.lax.scan(body, model.embed(params, tokens_BxL), xs)
    return model.normed(params, x), kept


def _own_mask(
    positions_BxL: Int[Array, "B L"], branch_BxL: Int[Array, "B L"], window: int | None
) -> Bool[Array, "B L L"]:
    """True where query i sees key j of its row: of the context or its own branch, not after it, within the window."""
    distance = positions_BxL[:, :, None] - positions_BxL[:, None, :]
    key, query = branch_BxL[:, None, :], branch_BxL[:, :, None]
    seen = (distance >= 0) & ((key == 0) | (key == query)) & (query != PADDING) & (key != PADDING)
    return seen if window is None else seen & (distance < window)


def _prefix_mask(prefix: Prefix, positions_BxL: Int[Array, "B L"], window: int | None) -> Bool[Array, "B L P"]:
    """True where a query sees a token of the shared text: all of them, within the window."""
    place = jnp.arange(prefix.keys.shape[1], dtype=jnp.int32)
    seen = (place < prefix.length)[None, None, :]
    if window is None:
        return jnp.broadcast_to(seen, (*positions_BxL.shape, place.shape[0]))
    return seen & (positions_BxL[:, :, None] - place[None, None, :] < window)


def attend(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, mask_BxLxL, shared=None, mask_BxLxP=None) -> Float[Array, "B L H K"]:
    """Attention to a row's own keys and to those that it shares with all rows, which are not copied for each.

    shared: (keys [P, G, K], values [P, G, K]). Blocks of queries as in layers.attend.
    """
    B, L, H, K = q_BxLxHxK.shape
    G = k_BxLxGxK.shape[2]
    k_BxLxHxK, v_BxLxHxK = (layers.repeat_heads(x, H) for x in (k_BxLxGxK, v_BxLxGxK))
    block = max(64, -(-L // 4))
    outputs = []
    for start in range(0, L, block):
        q, own = q_BxLxHxK[:, start : start + block], mask_BxLxL[:, start : start + block]
        # Branches lie after what they see, so later columns are of no use here either.
        stop = min(start + block, L)
        scores = jnp.einsum("blhk,bmhk->bhlm", q, k_BxLxHxK[:, :stop], preferred_element_type=jnp.float32)
        scores = jnp.where(own[:, None, :, :stop], scores, layers.MASKED)
        if shared is None:
            outputs.append(layers.average(jax.nn.softmax(scores, axis=-1), v_BxLxHxK[:, :stop]))
            continue
        keys_PxGxK, values_PxGxK = shared
        q_grouped = q.reshape(B, q.shape[1], G, H // G, K)
        early = jnp.einsum("blgrk,mgk->bgrlm", q_grouped, keys_PxGxK, preferred_element_type=jnp.float32)
        early = early.reshape(B, H, q.shape[1], -1)
        early = jnp.where(mask_BxLxP[:, None, start:stop], early, layers.MASKED)
        P = early.shape[-1]
        probabilities = jax.nn.softmax(jnp.concatenate([early, scores], axis=-1), axis=-1).astype(v_BxLxGxK.dtype)
        first = probabilities[..., :P].reshape(B, G, H // G, q.shape[1], P)
        out = jnp.einsum("bgrlm,mgk->blgrk", first, values_PxGxK).reshape(q.shape)
        outputs.append(out + jnp.einsum("bhlm,bmhk->blhk", probabilities[..., P:], v_BxLxHxK[:, :stop]))
    return jnp.concatenate(outputs, axis=1)

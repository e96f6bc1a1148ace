"""The pieces of a decoder layer: RMSNorm, rotary positions, masks, grouped-query attention, gated MLP.

Shapes: B rows, L positions, D width, H query heads, G key/value heads, K head width, F MLP width. Kernels are stored
[inputs, outputs]. Norms, rotary angles and softmax are float32 whatever the dtype of the parameters. Everything here
broadcasts explicitly, so it runs under `jax_numpy_rank_promotion="raise"`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

MASKED = float(np.finfo(np.float32).min)  # finite, so a query that sees nothing gets a uniform softmax and no NaN


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple, std: float, dtype) -> nnx.Param:
    """A Gaussian parameter; `axes` names its logical axes for sharding (one name or None per axis)."""
    return nnx.Param((std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype), axes=axes)


class RMSNorm(nnx.Module):
    """Root mean square norm, in the two forms of the field (initialised to the identity scale in both).

    one_plus=True (Gemma): float32 `x_hat * (1 + w)`, then the cast; stored w starts at 0.
    one_plus=False (Llama): the cast comes first, `w * cast(x_hat)`; stored w starts at 1.
    Source: Hugging Face transformers, modeling_gemma3 and modeling_llama.
    """

    def __init__(self, size: int, eps: float, *, one_plus: bool, dtype):
        self.eps, self.one_plus = eps, one_plus
        self.scale = nnx.Param((jnp.zeros if one_plus else jnp.ones)((size,), dtype), axes=(None,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale = jax.lax.expand_dims(self.scale[...], range(x.ndim - 1))
        if self.one_plus:
            return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return scale * normed.astype(x.dtype)


def rope_table(positions_BxL: Int[Array, "B L"], frequencies: Float[np.ndarray, "K2"]) -> Float[Array, "2 B L K2"]:
    """Cosine and sine of every position's angles, stacked on the first axis (float32)."""
    angles = positions_BxL.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies)[None, None, :]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def apply_rope(x_BxLxHxK: Float[Array, "B L H K"], table: Float[Array, "2 b L K2"]) -> Float[Array, "B L H K"]:
    """Rotates the pairs (i, i + K/2) of each head; float32 inside, as half precision loses far positions."""
    cos, sin = table[0][:, :, None, :], table[1][:, :, None, :]
    first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxLxHxK.dtype)


def segment_positions(segment_ids_BxL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Index of each position within its run of equal segment ids."""
    index = jax.lax.broadcasted_iota(jnp.int32, segment_ids_BxL.shape, 1)
    before = jnp.pad(segment_ids_BxL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return index - jax.lax.cummax(jnp.where(segment_ids_BxL != before, index, 0), axis=1)


def attention_mask(segment_ids_BxL: Int[Array, "B L"], window: int | None = None) -> Bool[Array, "B L L"]:
    """True where query i sees key j: `i - window < j <= i` within one segment; segment 0 (padding) sees nothing.

    Distances are row distances, so the positions of a segment must be contiguous in the row.
    """
    length = segment_ids_BxL.shape[1]
    query = jax.lax.broadcasted_iota(jnp.int32, (length, length), 0)
    key = jax.lax.broadcasted_iota(jnp.int32, (length, length), 1)
    seen = key <= query
    if window is not None:
        seen = seen & (query - key < window)
    same = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
    return same & (segment_ids_BxL != 0)[:, :, None] & seen[None, :, :]


def attention_map(
    q_BxLxHxK: Float[Array, "B Lq H K"], k_BxLxHxK: Float[Array, "B Lk H K"], mask: Bool[Array, "b Lq Lk"]
) -> Float[Array, "B H Lq Lk"]:
    """Softmax of the scores over the keys, float32; q is already scaled."""
    scores = jnp.einsum("blhk,bmhk->bhlm", q_BxLxHxK, k_BxLxHxK, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(mask[:, None, :, :], scores, MASKED), axis=-1)


def attend(
    q_BxLxHxK: Float[Array, "B L H K"],
    k_BxLxHxK: Float[Array, "B L H K"],
    v_BxLxHxK: Float[Array, "B L H K"],
    mask_BxLxL: Bool[Array, "b L L"],
) -> Float[Array, "B L H K"]:
    """Causal attention in at most four blocks of queries, each against the keys up to its own end.

    Keys after a block's end are masked for all of its queries, so leaving them out changes no number and saves up to
    3/8 of the arithmetic and of the score memory (the whole square is only a tile when L <= 64).
    """
    length = q_BxLxHxK.shape[1]
    block = max(64, -(-length // 4))
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        probabilities = attention_map(q_BxLxHxK[:, start:end], k_BxLxHxK[:, :end], mask_BxLxL[:, start:end, :end])
        outputs.append(jnp.einsum("bhlm,bmhk->blhk", probabilities.astype(v_BxLxHxK.dtype), v_BxLxHxK[:, :end]))
    return jnp.concatenate(outputs, axis=1)


def linear(x: Float[Array, "B L ..."], kernel: Float[Array, "..."], *, inputs: int) -> Float[Array, "B L ..."]:
    """`x @ kernel` over the last `inputs` axes of x, which are the first ones of the kernel.

    As one matrix product over all tokens: with [B, L] kept apart, XLA's CPU backend transposes activations for the
    kernel's gradient inside element-wise loops (measured 1.4 times slower, forward and backward, for a whole model).
    """
    outputs = kernel.shape[inputs:]
    product = x.reshape(-1, math.prod(kernel.shape[:inputs])) @ kernel.reshape(-1, math.prod(outputs))
    return product.reshape(*x.shape[: x.ndim - inputs], *outputs)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and, for Gemma, a norm on each head's query and key."""

    def __init__(self, config, rngs: nnx.Rngs, dtype, *, scale: float, head_norm: Callable[[], RMSNorm] | None = None):
        D, K = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        std = D**-0.5
        # The residual stream adds 2N outputs, so each starts smaller by sqrt(2N) (GPT-2 report, section 2.3).
        out_std = (H * K) ** -0.5 * (2 * config.num_hidden_layers) ** -0.5
        self.scale = scale
        self.q = normal(rngs, (D, H, K), ("embed", "heads", "head_dim"), std, dtype)
        self.k = normal(rngs, (D, G, K), ("embed", "kv_heads", "head_dim"), std, dtype)
        self.v = normal(rngs, (D, G, K), ("embed", "kv_heads", "head_dim"), std, dtype)
        self.o = normal(rngs, (H, K, D), ("heads", "head_dim", "embed"), out_std, dtype)
        self.q_norm = head_norm() if head_norm else None
        self.k_norm = head_norm() if head_norm else None

    def __call__(
        self,
        x_BxLxD: Float[Array, "B L D"],
        table: Float[Array, "2 b L K2"],
        mask_BxLxL: Bool[Array, "b L L"],
        return_map: bool = False,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B H L L"] | None]:
        """Output, and the float32 softmax maps if asked (else None; the whole map is then never in memory)."""
        q, k, v = (linear(x_BxLxD, kernel[...], inputs=1) for kernel in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, table) * self.scale, apply_rope(k, table)
        groups = q.shape[2] // k.shape[2]
        if groups > 1:  # query head h reads key/value head h // groups
            k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
        probabilities = None
        if return_map:
            probabilities = attention_map(q, k, mask_BxLxL)
            out = jnp.einsum("bhlm,bmhk->blhk", probabilities.astype(v.dtype), v)
        else:
            out = attend(q, k, v, mask_BxLxL)
        return linear(out, self.o[...], inputs=2), probabilities


class GatedMLP(nnx.Module):
    """`down(act(gate x) * up x)`: SwiGLU or GeGLU by the activation (Shazeer 2020, "GLU variants")."""

    def __init__(self, config, rngs: nnx.Rngs, dtype, *, activation: Callable):
        D, F = config.hidden_size, config.intermediate_size
        self.activation = activation
        self.gate = normal(rngs, (D, F), ("embed", "mlp"), D**-0.5, dtype)
        self.up = normal(rngs, (D, F), ("embed", "mlp"), D**-0.5, dtype)
        self.down = normal(rngs, (F, D), ("mlp", "embed"), (F * 2 * config.num_hidden_layers) ** -0.5, dtype)

    def __call__(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x_NxD = x_BxLxD.reshape(-1, x_BxLxD.shape[-1])  # see `linear`
        gated_NxF = self.activation(x_NxD @ self.gate[...]) * (x_NxD @ self.up[...])
        return (gated_NxF @ self.down[...]).reshape(x_BxLxD.shape)

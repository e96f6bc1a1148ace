"""The pieces of a decoder layer: RMSNorm, rotary positions, masks, grouped-query attention, gated MLP.

Shapes: B rows, L positions, D width, H query heads, G key/value heads, K head width, F MLP width. Kernels are stored
[inputs, outputs]. Norms, rotary angles and softmax are float32 whatever the dtype of the parameters. Everything here
broadcasts explicitly, so it runs under `jax_numpy_rank_promotion="raise"`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from distil_jax.models.int8 import Int8
from distil_jax.models.lora import Lora

MASKED = float(np.finfo(np.float32).min)  # finite, so a query that sees nothing gets a uniform softmax and no NaN


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple, std: float, dtype) -> nnx.Param:
    """A Gaussian parameter; `axes` names its logical axes for sharding (one name or None per axis)."""
    return nnx.Param((std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype), axes=axes)


def zeros(shape: tuple[int, ...], axes: tuple, dtype) -> nnx.Param:
    """A parameter that starts at 0 (a bias)."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def value(parameter: nnx.Param | None):
    """The array behind a parameter (or the Int8 or Lora in its place), None for one that this model lacks."""
    return None if parameter is None else parameter.get_value()


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
    q_BxLxHxK: Float[Array, "B Lq H K"], k_BxLxGxK: Float[Array, "B Lk G K"], mask: Bool[Array, "b Lq Lk"]
) -> Float[Array, "B H Lq Lk"]:
    """Softmax of the scores over the keys, float32; q is already scaled; query head h reads key head h // (H/G)."""
    k_BxLxHxK = repeat_heads(k_BxLxGxK, q_BxLxHxK.shape[2])
    scores = jnp.einsum("blhk,bmhk->bhlm", q_BxLxHxK, k_BxLxHxK, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(mask[:, None, :, :], scores, MASKED), axis=-1)


def repeat_heads(x_BxLxGxK: Float[Array, "B L G K"], heads: int) -> Float[Array, "B L H K"]:
    """Each key/value head once for every query head that reads it."""
    groups = heads // x_BxLxGxK.shape[2]
    return x_BxLxGxK if groups == 1 else jnp.repeat(x_BxLxGxK, groups, axis=2)


def average(probabilities: Float[Array, "B H Lq Lk"], v_BxLxGxK: Float[Array, "B Lk G K"]) -> Float[Array, "B Lq H K"]:
    """The values averaged by an attention map, in the dtype of the values."""
    v_BxLxHxK = repeat_heads(v_BxLxGxK, probabilities.shape[1])
    return jnp.einsum("bhlm,bmhk->blhk", probabilities.astype(v_BxLxHxK.dtype), v_BxLxHxK)


def attend(
    q_BxLxHxK: Float[Array, "B L H K"],
    k_BxLxGxK: Float[Array, "B L G K"],
    v_BxLxGxK: Float[Array, "B L G K"],
    mask_BxLxL: Bool[Array, "b L L"],
) -> Float[Array, "B L H K"]:
    """Causal attention in at most four blocks of queries, each against the keys up to its own end.

    Keys after a block's end are masked for all of its queries, so leaving them out changes no number and saves up to
    3/8 of the arithmetic and of the score memory (the whole square is only a tile when L <= 64).
    """
    length = q_BxLxHxK.shape[1]
    k, v = (repeat_heads(x, q_BxLxHxK.shape[2]) for x in (k_BxLxGxK, v_BxLxGxK))  # once, not in every block
    block = max(64, -(-length // 4))
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        probabilities = attention_map(q_BxLxHxK[:, start:end], k[:, :end], mask_BxLxL[:, start:end, :end])
        outputs.append(average(probabilities, v[:, :end]))
    return jnp.concatenate(outputs, axis=1)


def linear(
    x: Float[Array, "B L ..."], kernel: "Float[Array, '...'] | Int8 | Lora", *, inputs: int, bias: Array | None = None
) -> Float[Array, "B L ..."]:
    """`x @ kernel + bias` over the last `inputs` axes of x, which are the first ones of the kernel.

    As one matrix product over all tokens: with [B, L] kept apart, XLA's CPU backend transposes activations for the
    kernel's gradient inside element-wise loops (measured 1.4 times slower, forward and backward, for a whole model).
    """
    if isinstance(kernel, Lora):  # two thin products; the sum of kernel and update never exists
        narrow = linear(x, kernel.a.astype(x.dtype), inputs=inputs)
        update = linear(narrow, kernel.b.astype(x.dtype), inputs=1)
        return linear(x, kernel.kernel, inputs=inputs, bias=bias) + kernel.scale * update
    outputs = kernel.shape[inputs:]
    matrix, scale = (kernel.values, kernel.scale) if isinstance(kernel, Int8) else (kernel, None)
    matrix = matrix.reshape(-1, math.prod(outputs))
    product = x.reshape(-1, matrix.shape[0]) @ (matrix if scale is None else matrix.astype(x.dtype))
    if scale is not None:
        product = product * scale.reshape(1, -1).astype(x.dtype)
    if bias is not None:
        product = product + bias.reshape(1, -1)
    return product.reshape(*x.shape[: x.ndim - inputs], *outputs)


def unembed(unembedding: "Float[Array, 'V D'] | Int8", hidden_NxD: Float[Array, "N D"]) -> Float[Array, "V N"]:
    """The score of every token at every position, float32, vocabulary first (see losses/kd.py for why)."""
    if isinstance(unembedding, Int8):
        values = unembedding.values.astype(hidden_NxD.dtype)
        scores = jnp.einsum("vd,nd->vn", values, hidden_NxD, preferred_element_type=jnp.float32)
        return scores * unembedding.scale[:, None]
    return jnp.einsum("vd,nd->vn", unembedding, hidden_NxD, preferred_element_type=jnp.float32)


# What attention does between its projections: (q, k, v) -> (values mixed for each query, whatever else the caller
# wants of this layer: a map, keys and values to cache, or None).
Mix = Callable[[Array, Array, Array], tuple[Array, Any]]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and, for Gemma, a norm on each head's query and key."""

    def __init__(
        self,
        config,
        rngs: nnx.Rngs,
        dtype,
        *,
        scale: float,
        head_norm: Callable[[], RMSNorm] | None = None,
        bias: bool = False,
    ):
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
        self.q_bias = zeros((H, K), ("heads", "head_dim"), dtype) if bias else None
        self.k_bias = zeros((G, K), ("kv_heads", "head_dim"), dtype) if bias else None
        self.v_bias = zeros((G, K), ("kv_heads", "head_dim"), dtype) if bias else None
        self.o_bias = zeros((D,), ("embed",), dtype) if bias else None
        self.q_norm = head_norm() if head_norm else None
        self.k_norm = head_norm() if head_norm else None

    def __call__(self, x_BxLxD: Float[Array, "B L D"], table: Float[Array, "2 b L K2"], mix: Mix):
        """The attended [B, L, D], and what `mix` says of this layer. `mix` gets q scaled, k and v with G heads."""
        pairs = ((self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias))
        q, k, v = (linear(x_BxLxD, value(kernel), inputs=1, bias=value(bias)) for kernel, bias in pairs)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, extra = mix(apply_rope(q, table) * self.scale, apply_rope(k, table), v)
        return linear(out, value(self.o), inputs=2, bias=value(self.o_bias)), extra


class GatedMLP(nnx.Module):
    """`down(act(gate x) * up x)`: SwiGLU or GeGLU by the activation (Shazeer 2020, "GLU variants")."""

    def __init__(self, config, rngs: nnx.Rngs, dtype, *, activation: Callable, bias: bool = False):
        D, F = config.hidden_size, config.intermediate_size
        self.activation = activation
        self.gate = normal(rngs, (D, F), ("embed", "mlp"), D**-0.5, dtype)
        self.up = normal(rngs, (D, F), ("embed", "mlp"), D**-0.5, dtype)
        self.down = normal(rngs, (F, D), ("mlp", "embed"), (F * 2 * config.num_hidden_layers) ** -0.5, dtype)
        self.gate_bias = zeros((F,), ("mlp",), dtype) if bias else None
        self.up_bias = zeros((F,), ("mlp",), dtype) if bias else None
        self.down_bias = zeros((D,), ("embed",), dtype) if bias else None

    def __call__(self, x_BxLxD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        gate_BxLxF = linear(x_BxLxD, value(self.gate), inputs=1, bias=value(self.gate_bias))
        up_BxLxF = linear(x_BxLxD, value(self.up), inputs=1, bias=value(self.up_bias))
        gated_BxLxF = self.activation(gate_BxLxF) * up_BxLxF
        return linear(gated_BxLxF, value(self.down), inputs=1, bias=value(self.down_bias))

"""Frozen weights in 8 bits: half the memory of bfloat16, for a teacher that only reads and for serving.

Symmetric and weight-only, with one scale for each output of a kernel and each row of an embedding. Activations stay in
their dtype: a product is formed from the whole numbers and scaled afterwards. Norms and biases are not touched.
Source: Dettmers et al. 2022, "LLM.int8()", section 2.1 (vector-wise, without the outliers).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A kernel in place of its array: `values * scale`."""

    values: Array  # int8, the kernel's shape
    scale: Array  # float32, the shape of the kernel's outputs (after the layer axis of a stacked one)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def quantize(model: Any, params: Any, *, vocabulary: bool = True) -> Any:
    """The parameters with every kernel and embedding as `Int8`, on the devices where they are.

    vocabulary: embedding and head too. The loss head differentiates by its input only through a float matrix, so the
    base of a model that learns keeps them.
    """
    quantized = params
    for weight in model.weights:
        array = functools.reduce(lambda tree, key: tree[key], weight.path, params)
        if weight.path in (("embedding",), ("lm_head",)):
            if vocabulary:
                quantized = _with(quantized, weight.path, _quantize(array, (1,)))
        elif weight.inputs:
            quantized = _with(quantized, weight.path, _quantize(array, tuple(range(1, 1 + weight.inputs))))
    return quantized


def cast(params: Any, dtype) -> Any:
    """Every array in `dtype`; what is in 8 bits stays so, and takes the dtype of the activations it meets."""
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, Int8) else leaf.astype(dtype),
        params,
        is_leaf=lambda leaf: isinstance(leaf, Int8),
    )


def dequantize(kernel: Int8) -> Array:
    """The array that `kernel` stands for, float32. The axes without a scale are those after the first."""
    missing = kernel.values.ndim - kernel.scale.ndim
    return kernel.values.astype(jnp.float32) * jnp.expand_dims(kernel.scale, tuple(range(1, 1 + missing)))


@functools.partial(jax.jit, static_argnums=1)
def _quantize(array: Array, inputs: tuple[int, ...]) -> Int8:
    """`inputs`: the axes that a product sums over."""
    array = array.astype(jnp.float32)
    largest = jnp.max(jnp.abs(array), axis=inputs, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return Int8(jnp.round(array / scale).astype(jnp.int8), jnp.squeeze(scale, inputs))


def _with(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of a nested dict with one entry replaced."""
    return tree | {path[0]: value if len(path) == 1 else _with(tree[path[0]], path[1:], value)}

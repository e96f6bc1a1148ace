"""A frozen kernel with a low-rank update that learns: `W + scale a b`, never formed while training.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1. `layers.linear` computes
`x W + scale (x a) b`; an export spells the sum out (`dense`), one kernel at a time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distil_jax.models.int8 import Int8, dequantize


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kernel", "a", "b"), meta_fields=("scale",))
@dataclasses.dataclass(frozen=True)
class Lora:
    """A kernel [(N,) in..., out...] in place of its array; N is the layer axis of a stacked one."""

    kernel: Any  # an array or Int8
    a: Array  # [(N,) in..., r]
    b: Array  # [(N,) r, out...]
    scale: float  # alpha / r

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape


def dense(kernel: "Float[Array, '...'] | Int8 | Lora") -> Float[Array, "..."]:
    """The kernel as one array, float32 if it was adapted or in 8 bits; an array comes back as it is."""
    return _spelled_out(kernel) if isinstance(kernel, (Int8, Lora)) else kernel


@jax.jit
def _spelled_out(kernel: Int8 | Lora) -> Array:
    if isinstance(kernel, Int8):
        return dequantize(kernel)
    layers, rank = kernel.a.shape[0], kernel.a.shape[-1]
    a, b = kernel.a.reshape(layers, -1, rank), kernel.b.reshape(layers, rank, -1)
    update = jnp.einsum("nir,nro->nio", a, b, precision="highest", preferred_element_type=jnp.float32)
    return dense(kernel.kernel).astype(jnp.float32) + kernel.scale * update.reshape(kernel.shape)

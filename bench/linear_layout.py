"""A gated MLP with its tokens flat, [B L, D], against [B, L, D] kept apart: forward and backward.

    python bench/linear_layout.py

On CPU, XLA transposes activations for the kernels' gradients inside element-wise loops in the second form
(`copy_bitcast_fusion` in the compiled text). The table is in bench/RESULTS.md.
"""

import jax
import jax.numpy as jnp
from timing import side_by_side


def flat(x_BxLxD, gate, up, down):
    x = x_BxLxD.reshape(-1, x_BxLxD.shape[-1])
    return ((jax.nn.gelu(x @ gate) * (x @ up)) @ down).reshape(x_BxLxD.shape)


def apart(x_BxLxD, gate, up, down):
    hidden = jax.nn.gelu(jnp.einsum("bld,df->blf", x_BxLxD, gate)) * jnp.einsum("bld,df->blf", x_BxLxD, up)
    return jnp.einsum("blf,fd->bld", hidden, down)


def main(B: int = 16, L: int = 256, D: int = 192, F: int = 512) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    args = [jax.random.normal(k, s) for k, s in zip(keys, ((B, L, D), (D, F), (D, F), (F, D)), strict=True)]
    forms = {
        name: jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2, 3)))
        for name, f in (("flat", flat), ("apart", apart))
    }
    side_by_side({name: lambda f=f: f(*args) for name, f in forms.items()})


if __name__ == "__main__":
    main()

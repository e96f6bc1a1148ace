"""Sorted masses and their derivative, as uld, gold and xtoken_h need them: what sorting costs on this machine.

    python bench/sorting.py

One block of logits of the tiny recipe: 3,072 teacher tokens, 2,048 student tokens, 128 positions. `by sorting` is
jnp.sort and its derivative, which sorts a permutation along; `sorted_l1` (losses/rivals/uld.py) sorts integers and
looks places up.
"""

import functools

import jax
import jax.numpy as jnp
from timing import side_by_side

from distil_jax.losses.rivals.uld import sorted_l1


def by_sorting(a_UxN: jax.Array, b_VxN: jax.Array) -> jax.Array:
    a, b = (jnp.sort(x, axis=0, descending=True) for x in (a_UxN, b_VxN))
    return jnp.sum(jnp.abs(a[: len(b)] - b), axis=0) + jnp.sum(a[len(b) :], axis=0)


def main() -> None:
    keys = jax.random.split(jax.random.key(0))
    logits = (3 * jax.random.normal(k, (V, 128)) for k, V in zip(keys, (3072, 2048), strict=True))
    masses = [jax.nn.softmax(z, axis=0) for z in logits]
    forms = {}
    for name, f in (("by sorting", by_sorting), ("sorted_l1", sorted_l1)):
        backward = jax.jit(jax.value_and_grad(lambda a, b, f=f: jnp.sum(f(a, b)), argnums=1))
        forms[name] = functools.partial(backward, *masses)
    side_by_side(forms)


if __name__ == "__main__":
    main()

"""Attention in tiles against the scores of a quarter of the queries at a time: forward and backward, time and memory.

    python bench/attention.py [LENGTH ...]

One row, 4 query heads and 2 key heads of 64, float32, documents of about 300 positions, for layers that see all and
layers with a window of 1,024. Temporaries are the compiler's; seconds are medians of forms in turn. The same on a TPU,
where splash attention takes the place of the tiles, was not run. The table is in bench/RESULTS.md.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from timing import side_by_side

from distil_jax.models.attention import attention

HEADS, GROUPS, WIDTH, WINDOW = 4, 2, 64, 1024


def case(length: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """(q, k, v, segment ids) of one row."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, n, WIDTH)), jnp.float32) for n in (HEADS, GROUPS, GROUPS))
    return q * WIDTH**-0.5, k, v, jnp.asarray(1 + np.cumsum(rng.random((1, length)) < 1 / 300, axis=1), jnp.int32)


def gradient(q, k, v, segment_ids, *, window, form):
    """Of a loss that reads every output, with respect to q, k and v."""
    return jax.grad(lambda *a: jnp.sum(attention(*a, segment_ids, window, form) ** 2), argnums=(0, 1, 2))(q, k, v)


def main(*lengths: int) -> None:
    for length in lengths or (256, 512, 1024, 2048, 8192):
        for window in (None, WINDOW) if length > WINDOW else (None,):
            arguments = case(length)
            programs = {
                form: jax.jit(functools.partial(gradient, window=window, form=form)).lower(*arguments).compile()
                for form in ("explicit", "blocks")
            }
            print(f"\nrows of {length}, window {window or 'none'}")
            for name, program in programs.items():
                print(f"{name:40s} {program.memory_analysis().temp_size_in_bytes / 2**20:9.1f} MiB of temporaries")
            timed = {name: functools.partial(program, *arguments) for name, program in programs.items()}
            side_by_side(timed, rounds=max(3, min(20, 20_000 // length)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

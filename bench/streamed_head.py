"""The streamed head against whole logit matrices: time and temporary memory, forward and backward.

    python bench/streamed_head.py [tokens Vt Vs]

Dense is the same loss written plainly, with [T, Vt] and [T, Vs] in memory and the projection as a segment sum.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from timing import side_by_side

from distil_jax.losses.head import Teacher, distill
from distil_jax.losses.kd import ProjectionTable, project


def main(tokens: int = 4096, Vt: int = 16_384, Vs: int = 8192, Dt: int = 256, Ds: int = 128) -> None:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.float32)  # noqa: E731
    hidden, E = normal(1, tokens, Ds), normal(Vs, Ds)
    teacher_hidden, Et = normal(1, tokens, Dt), normal(Vt, Dt)
    labels = jnp.asarray(rng.integers(0, Vs, (1, tokens)), jnp.int32)
    students = np.sort(rng.integers(0, Vs, Vt))
    table = ProjectionTable(
        jnp.arange(Vt), jnp.asarray(students, jnp.int32), jnp.ones(Vt), jnp.ones(Vt, bool), jnp.arange(Vt)
    )
    weight = jnp.full((1, tokens), 0.5 / tokens)

    def streamed(hidden, E):
        teacher = Teacher(teacher_hidden, Et, table)
        return distill(hidden, E, labels, weight, teacher=teacher, kl_weights_BxL=weight)[0]

    def dense(hidden, E):
        log_s = jax.nn.log_softmax(hidden[0] @ E.T)
        p = project(jax.nn.softmax(teacher_hidden[0] @ Et.T).T, table, Vs).T
        kl = jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1.0)) - log_s), 0.0), axis=-1)
        ce = -jnp.take_along_axis(log_s, labels[0][:, None], axis=1)[:, 0]
        return jnp.sum(weight[0] * (ce + kl))

    compiled = {
        name: jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(hidden, E).compile()
        for name, f in (("dense", dense), ("streamed", streamed))
    }
    values = {name: f(hidden, E) for name, f in compiled.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), *values.values())
    for name, f in compiled.items():
        print(f"{name:40s} {f.memory_analysis().temp_size_in_bytes / 2**20:9.0f} MiB of temporaries")
    side_by_side({name: lambda f=f: f(hidden, E) for name, f in compiled.items()}, rounds=8)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

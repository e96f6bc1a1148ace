"""The projection in two layouts: rows of [V, N] as a sorted segment sum, against scalars of [N, V] as a scatter.

    python bench/head_layout.py

The table is in bench/RESULTS.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
from timing import side_by_side


def main(teacher_vocab: int = 4096, student_vocab: int = 3072, tokens: int = 512, entries: int = 5500) -> None:
    rng = np.random.default_rng(0)
    students = jnp.asarray(np.sort(rng.integers(0, student_vocab, entries)), jnp.int32)
    teachers = jnp.asarray(rng.integers(0, teacher_vocab, entries), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=entries), jnp.float32)
    q_VxN = jnp.asarray(rng.uniform(size=(teacher_vocab, tokens)), jnp.float32)

    def rows(q_VxN):
        mass = q_VxN[teachers] * weights[:, None]
        return jax.ops.segment_sum(mass, students, student_vocab, indices_are_sorted=True)

    def scalars(q_NxV):
        return jnp.zeros((tokens, student_vocab)).at[:, students].add(q_NxV[:, teachers] * weights[None])

    forms = {"[V, N] sorted segment sum": (jax.jit(rows), q_VxN), "[N, V] scatter": (jax.jit(scalars), q_VxN.T)}
    outputs = [np.asarray(f(x)) for f, x in forms.values()]
    np.testing.assert_allclose(outputs[0], outputs[1].T, rtol=1e-4, atol=1e-5)
    side_by_side({name: lambda f=f, x=x: f(x) for name, (f, x) in forms.items()})


if __name__ == "__main__":
    main()

"""Divergences between the projected teacher p and the student s, with their gradients in closed form.

Each is a sum over cells, `D = sum_v f(p_v, s_v)`. A cell is a student token, or the remainder: all tokens that a
teacher of K tokens does not reach, taken as one. So one pair of formulas serves both teachers.

    forward         KL(p || s)                                      Hinton, Vinyals, Dean 2015
    reverse         KL(s || p), p mixed with 0.1 % of uniform       Gu et al. 2024, "MiniLLM"
    skewed_forward  KL(p || skew p + (1 - skew) s)                  Ko et al. 2024, "DistiLLM", section 3.1
    skewed_reverse  KL(s || (1 - skew) p + skew s)                  the same
    jsd             skew KL(p || m) + (1 - skew) KL(s || m), m = skew p + (1 - skew) s
                                                                    Agarwal et al. 2024, "GKD", section 2
The reverse divergence would be infinite, since W reaches only a part of the student's vocabulary.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distil_jax.errors import UserError, nearest
from distil_jax.losses.vocabulary import LOWEST, Shards

KINDS = ("forward", "reverse", "skewed_forward", "skewed_reverse", "jsd")
UNIFORM = 1e-3  # share of the uniform distribution in the p of "reverse"


def checked(kind: str) -> str:
    """`kind`, if it is one of KINDS. Raises UserError otherwise."""
    if kind not in KINDS:
        raise UserError(f"objective.divergence is {kind!r}: use one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    return kind


def divergence(
    p_VxN: Float[Array, "V N"],
    z_VxN: Float[Array, "V N"],
    temperature: Float[Array, ""],
    *,
    kind: str = "forward",
    skew: float = 0.1,
    rest_N: Float[Array, " N"] | None = None,
    text_vocab: int | None = None,
    shards: Shards = Shards(),  # noqa: B008
) -> tuple[Float[Array, " N"], Float[Array, "V N"], Float[Array, "V N"]]:
    """`D(p, softmax(z / tau))` of each column in nats, and its gradients with respect to `z` and `p`.

    p: the projected teacher at the same temperature; it need not sum to exactly 1 in float32, the gradient allows for
      it. rest_N: the mass of p that is left outside its support, compared as one cell with what the student puts there.
      It is 1 less the others, and the gradient with respect to p counts that in.
    z: logits of this device's rows, `vocabulary.LOWEST` where a row is no token. text_vocab: how many rows are.

    Callers multiply by tau^2, so that the gradient keeps its size as tau changes (Hinton et al., section 2).
    """
    scaled = z_VxN / temperature
    log_s = jnp.maximum(scaled - shards.log_sum_exp(scaled)[None], LOWEST)
    s = jnp.exp(log_s)
    uniform = 1.0 / (text_vocab or p_VxN.shape[0] * shards.size)
    f, sg, d_p = _cells(kind, skew, p_VxN, s, log_s, uniform)
    if rest_N is None:
        value_N, inner_N = shards.sum(jnp.stack([jnp.sum(f, axis=0), jnp.sum(sg, axis=0)]))
        return value_N, (sg - s * inner_N[None]) / temperature, d_p
    reached = p_VxN > 0
    s_rest_N, value_N, inner_N, count_N = shards.sum(
        jnp.stack([jnp.sum(jnp.where(on, x, 0), axis=0) for on, x in _sums(reached, s, f, sg)])
    )
    s_rest_N = jnp.maximum(s_rest_N, jnp.finfo(jnp.float32).tiny)
    f_rest, sg_rest, d_rest = _cells(kind, skew, rest_N, s_rest_N, jnp.log(s_rest_N), 1 - count_N * uniform)
    # Inside the remainder the student is free: its tokens share the cell's gradient as they share its mass.
    sg = jnp.where(reached, sg, s * (sg_rest / s_rest_N)[None])
    return value_N + f_rest, (sg - s * (inner_N + sg_rest)[None]) / temperature, d_p - d_rest[None]


def _sums(reached: Bool[Array, "V N"], s: Array, f: Array, sg: Array):
    """Where and what is summed over the vocabulary: the student's remainder, value and inner product, cells reached."""
    return (~reached, s), (reached, f), (reached, sg), (reached, jnp.ones_like(s))


def _cells(kind: str, skew: float, p: Array, s: Array, log_s: Array, uniform: float | Array) -> tuple[Array, ...]:
    """`f(p, s)` of every cell, `s df/ds`, which is what a softmax passes on, and `df/dp`. The first two are 0 where p
    and s are."""
    if kind == "forward":
        f_per_p = _log(p) - log_s
        return p * f_per_p, -p, f_per_p + 1
    if kind == "reverse":
        mixed = (1 - UNIFORM) * p + UNIFORM * uniform
        f = s * (log_s - jnp.log(mixed))
        return f, f + s, -(1 - UNIFORM) * s / mixed
    if kind == "skewed_forward":
        m = skew * p + (1 - skew) * s
        f_per_p = _log(p) - _log(m)
        return p * f_per_p, -(1 - skew) * p * _ratio(s, m), f_per_p + 1 - skew * _ratio(p, m)
    if kind == "skewed_reverse":
        m = (1 - skew) * p + skew * s
        f = s * (log_s - _log(m))
        return f, f + s * (1 - skew * _ratio(s, m)), -(1 - skew) * _ratio(s, m)
    if kind == "jsd":
        m = skew * p + (1 - skew) * s
        from_teacher, from_student = skew * (_log(p) - _log(m)), (1 - skew) * s * (log_s - _log(m))
        return p * from_teacher + from_student, from_student, from_teacher
    raise ValueError(f"divergence {kind!r} is not one of {', '.join(KINDS)}")


def _log(x: Array) -> Array:
    """log x, and a finite number where x is 0, which the caller multiplies by 0."""
    return jnp.log(jnp.where(x > 0, x, 1.0))


def _ratio(a: Array, m: Array) -> Array:
    """a / m, and 0 where m is 0."""
    return jnp.where(m > 0, a / jnp.where(m > 0, m, 1.0), 0.0)

"""Maps of the teacher's distribution that know nothing of tokens and have to learn everything: an MLP, and low rank.

    mlp       p = softmax((W2 relu(W1 x + b1) + b2) / tau),  x the teacher's logits less their mean
    low_rank  p = B C q,  q the teacher's softmax at tau,  C [r, Vt] and B [Vs, r] with columns that are distributions
    D = KL(p || s)

mlp is the projection that DistilLLM-Med states (262,144 -> hidden -> 128,256), on logits; its notebooks leave it
random and frozen. low_rank is a W of rank r whose rows are distributions: p sums to 1 by construction, as ours does.

Both learn from text, as our W does (projection.py): `-log p(u*)` at temperature 1, u* the student token that follows.
D does not move them unless they are asked to learn `through` it, as the paper's equations would have it and as an
ablation: then the map may go wherever the student already is. Both start at the student's unigram distribution, so
that an untrained map says no more than that; random weights would teach noise.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from distil_jax.losses.rivals import positions, vocabularies
from distil_jax.losses.rivals.stream import Sides, Told, compare, forward_kl, log_softmax
from distil_jax.losses.vocabulary import LOWEST
from distil_jax.tokens.bytes import ByteTable


class Tables(NamedTuple):
    mapped: Bool[Array, " Vt"]


def tables(teacher: ByteTable, student: ByteTable) -> Tables:
    """From the bytes of both vocabularies."""
    return Tables(jnp.asarray(vocabularies.mapped(teacher, student)))


def taught(tables: Tables, batch: dict[str, Array]) -> Bool[Array, "B L"]:
    """Root positions."""
    return positions.roots(batch)


def start_mlp(
    key: Array, teacher_rows: int, unigram_Vs: Float[np.ndarray, " Vs"], size: int
) -> dict[str, Float[Array, "..."]]:
    """The MLP with `size` hidden units: W2 at 0 and b2 at the log of the student's unigram."""
    W1 = jax.random.normal(key, (size, teacher_rows)) / np.sqrt(teacher_rows)
    b2 = jnp.log(jnp.asarray(unigram_Vs, jnp.float32))
    return {"W1": W1, "b1": jnp.zeros(size), "W2": jnp.zeros((len(unigram_Vs), size)), "b2": b2}


def start_low_rank(
    key: Array, teacher_rows: int, unigram_Vs: Float[np.ndarray, " Vs"], size: int
) -> dict[str, Float[Array, "..."]]:
    """Logits of B and C, rank `size`: every column of B near the unigram, C near uniform; equal columns never part."""
    to_B, to_C = jax.random.split(key)
    B = jnp.log(jnp.asarray(unigram_Vs, jnp.float32))[:, None] + 0.1 * jax.random.normal(to_B, (len(unigram_Vs), size))
    return {"B": B, "C": 0.1 * jax.random.normal(to_C, (size, teacher_rows))}


def mlp(parameters: dict[str, Array], t_VtxN: Float[Array, "Vt N"], temperature: Array) -> Float[Array, "Vs N"]:
    """log p. Tokens that are not mapped have a logit of 0 after centring."""
    known = t_VtxN > LOWEST
    mean_N = jnp.sum(jnp.where(known, t_VtxN, 0), axis=0) / jnp.sum(known, axis=0)
    x_VtxN = jnp.where(known, t_VtxN - mean_N[None], 0)
    hidden = jax.nn.relu(parameters["W1"] @ x_VtxN + parameters["b1"][:, None])
    return log_softmax(parameters["W2"] @ hidden + parameters["b2"][:, None], temperature)


def low_rank(parameters: dict[str, Array], t_VtxN: Float[Array, "Vt N"], temperature: Array) -> Float[Array, "Vs N"]:
    """log p."""
    q_VtxN = jnp.exp(log_softmax(t_VtxN, temperature))
    B, C = (jax.nn.softmax(parameters[name], axis=0) for name in ("B", "C"))
    return jnp.log(jnp.maximum(B @ (C @ q_VtxN), jnp.finfo(jnp.float32).tiny))


def told(
    tables: Tables,
    learned: dict[str, Array],
    sides: Sides,
    batch: dict[str, Array],
    temperature: Array,
    *,
    of: Callable[..., Array],
    through: bool = False,
    **options: Any,
) -> Told:
    """D at each taught position, and the map's own loss there in nats; 0 where it learns through D."""

    def cells(z_VsxN, t_VtxN, labels_N, learned):
        fixed = learned if through else jax.lax.stop_gradient(learned)
        log_p_VsxN = of(fixed, t_VtxN, temperature)
        apart_N = forward_kl(jnp.exp(log_p_VsxN), log_softmax(z_VsxN, temperature))
        if not through:  # KL(p || s) with a p that learns has its log p in it
            log_p1_VsxN = of(learned, t_VtxN, jnp.float32(1))
            return apart_N, -jnp.take_along_axis(log_p1_VsxN, labels_N[None], axis=0)[0]
        return apart_N, jnp.zeros_like(apart_N)

    used = taught(tables, batch)
    out = compare(
        cells, tables.mapped, sides, batch, used, more=batch["student_targets"], shared=learned, **options
    )  # fmt: skip
    return Told(*out)


told_mlp, told_low_rank = (functools.partial(told, of=of) for of in (mlp, low_rank))

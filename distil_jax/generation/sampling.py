"""The next token from its logits: greedy, or drawn at a temperature from the top k or the top mass p.

Vocabulary first, `[V, B]`, as the heads are. Nothing is sorted: at 262,144 tokens a sort costs more than the model of a
small student, while the k-th largest logit is found exactly in 32 counts, one for each bit of a float.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distil_jax.errors import UserError
from distil_jax.losses.vocabulary import floor_of_largest


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: 0 takes the most likely token; above, logits are divided by it.
    top_k: only the k most likely tokens, 0 for all. top_p: then only the smallest set of most likely tokens that has
      this much of the mass (Holtzman et al. 2020, "The curious case of neural text degeneration"), 1 for all.
    seed: equal seeds give equal draws, whatever the prompts are batched with.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: give 0 (the most likely token) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: give a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: give a share of the probability above 0 and at most 1")


def choose(
    logits_VxB: Float[Array, "V B"], sampling: Sampling, keys_B: Array, step: Int[Array, ""]
) -> Int[Array, " B"]:
    """One token for each column. `keys_B`: a random key for each prompt; `step`: tokens drawn for it so far."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_VxB, axis=0).astype(jnp.int32)
    scaled = logits_VxB / sampling.temperature
    if sampling.top_k:
        scaled = jnp.where(top_k(scaled, sampling.top_k), scaled, -jnp.inf)
    if sampling.top_p < 1:
        scaled = jnp.where(top_p(scaled, sampling.top_p), scaled, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), scaled.shape[:1]), out_axes=1)(keys_B)
    return jnp.argmax(scaled + noise, axis=0).astype(jnp.int32)


def top_k(logits_VxB: Float[Array, "V B"], k: int) -> Bool[Array, "V B"]:
    """The k largest of each column, and what equals the k-th (as in transformers)."""
    ordered, floor_B = floor_of_largest(logits_VxB, jnp.ones_like(logits_VxB), min(k, logits_VxB.shape[0]))
    return ordered >= floor_B[None]


def top_p(logits_VxB: Float[Array, "V B"], p: float) -> Bool[Array, "V B"]:
    """The largest of each column whose probabilities reach p in sum, and what equals the last of them."""
    # Sums of float32 may stay below p by rounding; the whole set is then right, as the floor stays 0.
    ordered, floor_B = floor_of_largest(logits_VxB, jax.nn.softmax(logits_VxB, axis=0), p)
    return ordered >= floor_B[None]

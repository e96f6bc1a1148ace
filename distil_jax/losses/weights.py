"""The weight of each medical specialty in the loss (DistilLLM-Med, `w_s`), fixed or driven by the losses."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distil_jax.errors import UserError, nearest


def specialty_weights(
    kind: str, given: Mapping[str, float], names: Sequence[str], tokens_S: Sequence[int]
) -> Float[np.ndarray, " S"]:
    """One weight for each specialty of the corpus, with a mean of 1 over the training tokens.

    kind "given": the numbers of `given`, 1 for every specialty it leaves out. "inverse_frequency": proportional to
    (share of the training tokens)^-1/2, so that small specialties are heard without drowning the large ones. "dro":
    those of "given", from which `dro_update` goes on.

    names: the corpus' specialties, in the order of their ids; tokens_S: supervised training tokens of each.
    """
    counts = np.asarray(tokens_S, np.float64)
    if kind in ("given", "dro"):
        for name in given:
            if name not in names:
                raise UserError(
                    f"objective.specialty_weights names {name!r}, which the corpus does not have{nearest(name, names)}"
                )
        weights = np.array([float(given.get(name, 1.0)) for name in names])
    elif kind == "inverse_frequency":
        weights = np.where(counts > 0, np.maximum(counts, 1) ** -0.5, 0.0)
    else:
        raise UserError(f"objective.specialty_weighting is {kind!r}; use 'given', 'inverse_frequency' or 'dro'")
    if (weights < 0).any():
        raise UserError(f"specialty weights are not negative numbers, got {dict(zip(names, weights, strict=True))}")
    total = counts.sum()
    mean = (weights * counts).sum() / total if total else 1.0
    if mean <= 0:
        raise UserError("every specialty of the corpus has weight 0: there is nothing to learn")
    return (weights / mean).astype(np.float32)


def dro_update(
    log_weights_S: Float[Array, " S"],
    sums_S: Float[Array, " S"],
    counts_S: Float[Array, " S"],
    *,
    share_S: Float[np.ndarray, " S"],
    rate: float,
) -> Float[Array, " S"]:
    """Group DRO, online: `q_g *= exp(rate * loss_g)`, normalised (Sagawa et al. 2020, algorithm 1).

    log_weights_S: of one token of each specialty; q_g is that times the specialty's share of the tokens.
    sums_S, counts_S: unweighted cross-entropy of a batch and its tokens, by specialty. A specialty that the batch
      lacks counts as one of the batch's mean loss: left where it is, it would fall behind for being rare.
    share_S: of the training tokens. Returns log weights whose weights have a mean of 1 over the training tokens.
    """
    mean = jnp.sum(sums_S) / jnp.maximum(jnp.sum(counts_S), 1)
    loss_S = jnp.where(counts_S > 0, sums_S / jnp.maximum(counts_S, 1), mean)
    moved_S = log_weights_S + rate * loss_S
    return moved_S - jax.nn.logsumexp(moved_S, b=jnp.asarray(share_S, jnp.float32))

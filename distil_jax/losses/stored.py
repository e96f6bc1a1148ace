"""A teacher kept as its K likeliest tokens: what is stored of its logits, and its log-probabilities at any temperature.

    log q_tau(i) = b z_i - log(sum_k exp(b z_k) + R(b)),  R(b) = sum over all other tokens v of exp(b z_v),  b = 1 / tau

with logits z relative to the largest. The K logits are stored in fixed point. Which K tokens are the likeliest does not
depend on the temperature, so their sum is known at every temperature. Of the others, log R is stored at some
temperatures with its slope, the mean logit of the rest, and between them it is the cubic with these values and slopes
(Hermite) in b.

Why log R and not the whole normaliser log Z, from which R follows at the stored temperatures: both are convex in b, but
log Z bends sharply where the mass moves from a few named tokens to the many others, and log R does not. With the
temperatures 1, 2, 4, 8 the interpolation of log Z was wrong by up to 0.45 nats and that of log R by up to 0.001
(docs/scores.md).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from distil_jax.losses.vocabulary import LOWEST

STEP = 2.0**-10  # nats between two codes; a logit that is in range is wrong by at most half of it
LARGEST_CODE = 2**16 - 1  # logits more than 64 nats below the largest are clamped to this
NOTHING = -1e4  # log R where no token is left
_GROUP = 128


def largest(t_VxN: Float[Array, "V N"], k: int) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """The k largest entries of each column, descending, and their rows: what `lax.top_k` gives, ties included.

    Every one of them is in one of the k groups of rows with the largest maxima, so only these are ordered (on a CPU at
    262,144 rows in a fifth of the time of `lax.top_k` over all), in row order, so that the lowest row wins a tie.
    """
    V, N = t_VxN.shape
    groups = -(-V // _GROUP)
    t_GxRxN = jnp.pad(t_VxN, ((0, groups * _GROUP - V), (0, 0)), constant_values=LOWEST).reshape(groups, _GROUP, N)
    chosen_NxC = jnp.sort(jax.lax.top_k(jnp.max(t_GxRxN, axis=1).T, min(k, groups))[1], axis=1)
    inside_1x1xR, column_Nx1x1 = jnp.arange(_GROUP)[None, None], jnp.arange(N)[:, None, None]
    candidates_NxC = t_GxRxN[chosen_NxC[..., None], inside_1x1xR, column_Nx1x1].reshape(N, -1)
    values_Nxk, at_Nxk = jax.lax.top_k(candidates_NxC, k)
    return values_Nxk, jnp.take_along_axis(chosen_NxC, at_Nxk // _GROUP, axis=1) * _GROUP + at_Nxk % _GROUP


def codes_of(z_NxK: Float[Array, "N K"]) -> UInt16[Array, "N K"]:
    """Logits relative to the largest, so none above 0, as whole steps below it."""
    return jnp.clip(jnp.round(z_NxK / -STEP), 0, LARGEST_CODE).astype(jnp.uint16)


def logits_of(codes: UInt16[Array, "*n"]) -> Float[Array, "*n"]:
    """What `codes_of` kept."""
    return codes.astype(jnp.float32) * -STEP


def rest_of(z_VxN: Float[Array, "V N"], temperatures: tuple[float, ...]) -> Float[Array, "N T 2"]:
    """log R and its slope in 1 / tau at each temperature, the slope rounded to the float16 that is stored.

    z: logits relative to the largest, LOWEST at what does not count (the K tokens themselves, unmapped tokens).
    """
    largest_N = jnp.max(z_VxN, axis=0)
    parts = []
    for temperature in temperatures:
        e_VxN = jnp.exp((z_VxN - largest_N[None]) / temperature)
        sum_N = jnp.sum(e_VxN, axis=0)
        value_N = largest_N / temperature + jnp.log(sum_N)
        # With one temperature nothing is interpolated, and the slope is not stored.
        slope_N = jnp.sum(e_VxN * z_VxN, axis=0) / sum_N if len(temperatures) > 1 else jnp.zeros_like(sum_N)
        parts.append(jnp.stack([value_N, slope_N], axis=-1))
    rest_NxTx2 = jnp.stack(parts, axis=1)
    value, slope = rest_NxTx2[..., 0], rest_NxTx2[..., 1]
    slope = jnp.where(value > NOTHING, slope, 0).astype(jnp.float16).astype(jnp.float32)
    return jnp.stack([jnp.maximum(value, NOTHING), slope], axis=-1)


def log_probs(
    codes_NxK: UInt16[Array, "*n K"],
    rest_NxTx2: Float[Array, "*n T 2"],
    temperatures: tuple[float, ...],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "*n K"]:
    """log q of the K tokens at `temperature`, which lies between the least and the largest of the stored ones.

    temperatures: those of `rest_of`, ascending. Exact in log R at each of them.
    """
    beta = 1 / jnp.asarray(temperature, jnp.float32)
    scaled_NxK = logits_of(codes_NxK) * beta
    named_N = jax.nn.logsumexp(scaled_NxK, axis=-1)
    rest_N = _between(rest_NxTx2, temperatures, beta)
    return scaled_NxK - jnp.logaddexp(named_N, rest_N)[..., None]


def _between(rest_NxTx2: Array, temperatures: tuple[float, ...], beta: Array) -> Array:
    if len(temperatures) == 1:
        return rest_NxTx2[..., 0, 0]
    betas_T = 1 / jnp.asarray(temperatures, jnp.float32)  # descending
    i = jnp.clip(jnp.sum(betas_T > beta) - 1, 0, len(temperatures) - 2)
    left, right = (jnp.take(rest_NxTx2, i + d, axis=-2) for d in (0, 1))
    h = betas_T[i + 1] - betas_T[i]
    t = (beta - betas_T[i]) / h
    return (
        (1 + 2 * t) * (1 - t) ** 2 * left[..., 0]
        + t * (1 - t) ** 2 * h * left[..., 1]
        + t**2 * (3 - 2 * t) * right[..., 0]
        + t**2 * (t - 1) * h * right[..., 1]
    )

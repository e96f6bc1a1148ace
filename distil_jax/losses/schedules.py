"""Values that change over a run, as functions of the step: temperature, alpha, learning rate."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from distil_jax.errors import UserError

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]

KINDS = ("constant", "linear", "cosine", "exponential")


def schedule(kind: str, start: float, end: float, steps: int) -> Schedule:
    """From `start` at step 0 to `end` at step `steps`, and `end` from there on.

    "exponential" is the paper's temperature schedule, `tau(t) = max(end, start exp(-gamma t))` with the gamma that
    reaches `end` at `steps` (DistilLLM-Med: 8 -> 1 over 50,000 steps, gamma = ln 8 / 50,000).
    """
    if kind not in KINDS:
        raise UserError(f"schedule {kind!r} is not one of {', '.join(KINDS)}")
    if steps < 1:
        raise UserError(f"a schedule needs at least one step, got {steps}")
    if kind == "exponential" and not start >= end > 0:
        raise UserError(f"an exponential schedule falls from start to end above 0, got start {start} and end {end}")

    def value(step):
        done = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0, 1)
        if kind == "constant":
            return jnp.full((), start, jnp.float32)
        if kind == "linear":
            return start + (end - start) * done
        if kind == "cosine":
            return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.maximum(end, start * jnp.exp(-math.log(start / end) * done))

    return value


def learning_rate(peak: float, warmup: int, steps: int, end_fraction: float) -> Schedule:
    """Linear warm-up to `peak`, then a cosine down to `peak * end_fraction` at `steps`."""
    warmup = min(warmup, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, 1), peak * end_fraction)

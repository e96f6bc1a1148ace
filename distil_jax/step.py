"""One update of the learning model: gradient, guard, optimiser. Jitted once, run many times."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distil_jax.losses.schedules import Schedule
from distil_jax.objective import Frozen, reduce

State = dict[str, Any]  # params (by part, see objective.Loss), opt_state, step, skipped


def make_optimizer(
    learning_rate: Schedule,
    *,
    weight_decay: float,
    clip: float,
    projection_rate: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; vectors and norm scales (rank below 2, or "scale") are not decayed.

    A W that learns moves at `projection_rate` times the learning rate, and what holds it is |W - W0|^2 and no decay.
    """

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, p: p.ndim >= 2 and not re.search(r"scale|^\['projection'\]", jax.tree_util.keystr(path)),
            params,
        )

    def at_own_rate(updates, params):
        if "projection" not in updates:
            return updates
        return updates | {"projection": projection_rate * updates["projection"]}

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b1=b1, b2=b2, eps=1e-8),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(at_own_rate),
    )


def init_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state of a run at step 0. `skipped` counts updates that were not finite."""
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def make_step(
    loss: Callable[..., Any], optimizer: optax.GradientTransformation, learning_rate: Schedule
) -> Callable[[State, Frozen, Any], tuple[State, dict[str, jax.Array]]]:
    """`step(state, frozen, batch) -> (state, metrics)`, jitted, the old state donated.

    An update whose loss or gradient is not finite leaves parameters and optimiser as they were and is counted: one bad
    batch must not end a week of training, and many of them must be seen.
    """

    def step(state, frozen, batch):
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), gradient = value_and_grad(state["params"], frozen, batch, state["step"])
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "opt_state": opt_state}
        old = {"params": state["params"], "opt_state": state["opt_state"]}
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        skipped = state["skipped"] + jnp.where(finite, 0, 1).astype(jnp.int32)
        report = reduce(metrics) | {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(learning_rate(state["step"]), jnp.float32),
            "skipped": skipped,
        }
        return kept | {"step": state["step"] + 1, "skipped": skipped}, report

    return jax.jit(step, donate_argnums=0)

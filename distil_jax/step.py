"""One update of the learning model: gradient, guard, optimiser. Jitted once, run many times."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from distil_jax import sharding
from distil_jax.losses.schedules import Schedule
from distil_jax.objective import Batch, Frozen, Loss, reduce

# params (by part, see objective.Loss), opt_state, step, skipped; "ema" where the parameters are averaged,
# "specialty_log_weights" where the losses drive the weights
State = dict[str, Any]
# (log weights [S], sum of the losses [S], tokens [S]) -> log weights [S]
Reweigh = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
LOG_WEIGHTS = "specialty_log_weights"


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

    A W that learns, or a rival's map, moves at `projection_rate` times the learning rate, without decay; what holds W
    is |W - W0|^2.
    """

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, p: p.ndim >= 2 and not re.search(r"scale|^\['projection'\]", jax.tree_util.keystr(path)),
            params,
        )

    def clipped(updates, params):
        factor = jnp.minimum(1, clip / optax.tree.norm(updates))  # one number, and no second copy of the gradient
        return jax.tree.map(lambda u: factor * u, updates)

    def at_own_rate(updates, params):
        if "projection" not in updates:
            return updates
        return updates | {"projection": jax.tree.map(lambda u: projection_rate * u, updates["projection"])}

    return optax.chain(
        optax.stateless(clipped),
        optax.scale_by_adam(b1=b1, b2=b2, eps=1e-8),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(at_own_rate),
    )


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    ema: float = 0.0,
    weights_S: Float[Array, " S"] | None = None,
) -> State:
    """The state of a run at step 0. `skipped` counts updates that were not finite.

    ema: as in `make_step`; above 0, the average starts as a float32 copy of the parameters.
    weights_S: the specialty weights that `reweigh` of `make_step` starts from.
    """
    state = {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }
    if ema:
        state["ema"] = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    if weights_S is not None:
        state[LOG_WEIGHTS] = jnp.log(weights_S)
    return state


def to_use(state: State) -> Any:
    """The parameters to evaluate and to keep, by part: their average, if it is taken."""
    return state.get("ema", state["params"])


def gradient(
    loss: Loss, params: Any, frozen: Frozen, batch: Batch, step: Int[Array, ""], pieces: int = 1
) -> tuple[Float[Array, ""], dict[str, Any], Any]:
    """(value, metrics, float32 gradient) of a batch that is taken in `pieces`, one after the other.

    Piece p holds the rows p, p + pieces, p + 2 pieces, ...: a device that has a block of rows has the rows of each
    piece in it, so none moves. The pieces add up to the whole batch, because each is divided by the totals of all.
    """
    totals = loss.totals(frozen, batch)
    params, frozen = loss.cast(params, frozen)  # once for all pieces

    def one(piece):
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, frozen, piece, step, totals)
        return value, metrics, jax.tree.map(lambda g: g.astype(jnp.float32), gradient)

    if pieces == 1:
        return one(batch)
    split = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]), batch)
    piece_of = lambda n: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, n, 1, keepdims=False), split)  # noqa: E731
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: one(piece_of(0))))
    add = lambda sums, n: (jax.tree.map(jnp.add, sums, one(piece_of(n))), None)  # noqa: E731
    return jax.lax.scan(add, zeros, jnp.arange(pieces))[0]


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    learning_rate: Schedule,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
    reweigh: Reweigh | None = None,
) -> Callable[[State, Frozen, Any], tuple[State, dict[str, jax.Array]]]:
    """`step(state, frozen, batch) -> (state, metrics)`, jitted, the old state donated.

    accumulate: pieces in which the batch is taken; it divides the rows. ema: decay of the averaged parameters, 0 keeps
    none. reweigh: drives the specialty weights by the unweighted loss of each; a step uses the weights that the steps
    before it left, and they are in the state in place of `frozen.specialty_weights_S`.

    An update whose loss or gradient is not finite leaves all but the counters as it was and is counted: one bad batch
    must not end a week of training, and many of them must be seen.
    """

    def step(state, frozen, batch):
        if reweigh:
            frozen = frozen._replace(specialty_weights_S=jnp.exp(state[LOG_WEIGHTS]))
        value, metrics, slope = gradient(loss, state["params"], frozen, batch, state["step"], accumulate)
        norm = optax.tree.norm(slope)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        def update(slope, metrics, old):
            """A branch of its own, not a choice between new and old values: here the parameters are made from the new
            moments, which then take the place of the old. A choice needs both at once, and XLA's CPU backend then
            copies both moments in every step (bench/RESULTS.md)."""
            updates, opt_state = optimizer.update(slope, old["opt_state"], old["params"])
            params = optax.apply_updates(old["params"], updates)
            new = {"params": params, "opt_state": opt_state}
            if ema:
                new["ema"] = jax.tree.map(lambda mean, p: mean + (1 - ema) * (p - mean), old["ema"], params)
            if reweigh:
                new[LOG_WEIGHTS] = reweigh(old[LOG_WEIGHTS], *metrics["ce_by_specialty"])
            return new

        old = {name: state[name] for name in state.keys() - {"step", "skipped"}}
        kept = jax.lax.cond(finite, update, lambda slope, metrics, old: old, slope, metrics, old)
        skipped = state["skipped"] + jnp.where(finite, 0, 1).astype(jnp.int32)
        report = reduce(metrics) | {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(learning_rate(state["step"]), jnp.float32),
            "skipped": skipped,
            "tokens": jnp.sum(batch[f"{loss.objective.side}_segment_ids"] > 0),
        }
        if reweigh:
            report["weight_by_specialty"] = frozen.specialty_weights_S
        return kept | {"step": state["step"] + 1, "skipped": skipped}, report

    return jax.jit(step, donate_argnums=0, compiler_options=sharding.compiler_options(loss.objective.mesh))

"""The whole loss of a batch: from the models' parameters to one scalar.

    sum_n w_n (alpha_n CE_n + (1 - alpha_n) tau^2 D_n) / sum_n w_n + beta L_att + lambda |W - W0|^2

over the supervised tokens n of the batch. `w_n` is the weight of the token's specialty. `alpha_n` is per position:
where the teacher says nothing about the student's token (`positions`) cross-entropy carries the whole weight, and
inside and across the teacher's tokens it carries the share of the teacher's mass that has no name, because a token that
keeps only a share of its cross-entropy and gets no teacher in exchange is a token half forgotten.
Sums are global, so the value does not depend on the mesh or on how documents were packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from distil_jax import lora
from distil_jax.losses import attention, conditional, head, rivals, stored
from distil_jax.losses.kd import PlacedTable, ProjectionRows, ProjectionTable, row_softmax, with_weights
from distil_jax.losses.schedules import Schedule
from distil_jax.models.int8 import cast
from distil_jax.tokens.align import NONE, ROOT

# Which targets the teacher speaks about: those that are a part of one of its tokens, from its first byte on; all that
# begin where one of its tokens does; all of them (losses/conditional.py).
POSITIONS = ("roots", "boundaries", "all")

Batch = dict[str, jax.Array]  # the fields of tokens/pack.py, [B, Ls] and [B, Lt]


class Frozen(NamedTuple):
    """What the loss reads and does not learn."""

    specialty_weights_S: Float[Array, " S"]
    teacher: Any = None  # parameters of the teacher
    projection: ProjectionTable | PlacedTable | ProjectionRows | None = None  # rows where the scores are stored
    rows: ProjectionRows | None = None  # of W as it was before the run, where W learns
    inside: conditional.Tables | None = None  # where targets inside tokens are taught
    teacher_rows: Any = None  # kd.rows_of the teacher's head, where the vocabulary is spread; None: the head itself
    rival: Any = None  # tables of Objective.rival
    own: Any = None  # the frozen part of the learning model's parameters (freezing.py); None: all of it learns


@dataclass(frozen=True)
class Alignment:
    """What of the inside of the models is compared (losses/attention.py)."""

    pairs: tuple[attention.Pair, ...]
    beta: Schedule  # weight of the distance of attention maps
    hidden_weight: float = 0.0  # of the distance of hidden states


@dataclass(frozen=True)
class Objective:
    """The recipe of one run. Without a teacher model or stored scores of one it is cross-entropy training."""

    model: Any  # the model that learns
    side: str = "student"  # which tokens of the batch it reads: "student" or "teacher"
    teacher: Any = None  # the model that teaches
    scores: tuple[float, ...] = ()  # temperatures of the stored scores that the batch brings in place of a teacher
    alpha: Schedule | None = None
    temperature: Schedule | None = None
    divergence: str = "forward"  # of losses/divergence.py
    skew: float = 0.1
    top_k: int = 0  # of the teacher's tokens, with a remainder; 0: all of them
    positions: str = "roots"  # of POSITIONS
    rival: rivals.Rival | None = None  # compares the models in its own way, in place of the five above and W
    alignment: Alignment | None = None
    label_smoothing: float = 0.0
    keep: float = 0.0  # lambda of |W - W0|^2, where W learns
    block: int = 0
    compute_dtype: str = "float32"
    remat: str = "none"  # decoder.REMAT
    attention: str = "auto"  # models/attention.py
    adapter_scale: float = 1.0  # alpha / rank, where adapters learn (lora.py)
    mesh: Mesh | None = None


class Loss:
    """`loss(params, frozen, batch, step) -> (scalar, metrics)`; a metric is (sum, count) over the global batch.

    `params` is what learns, by part. "model": parameters of the learning model, or "adapter": low-rank updates of it
    (lora.py); with `frozen.own` they make the whole model. "projection", where W learns: the logits of its rows,
    [Vt, k], or what a rival learns. "alignment": attention.init.
    """

    def __init__(self, objective: Objective):
        self.objective = objective

    def cast(self, params: Any, frozen: Frozen) -> tuple[Any, Frozen]:
        """Both in the dtype of the computation, for a caller that differentiates several pieces of a batch: once for
        all of them, with gradients in that dtype to add up in float32."""
        dtype = jnp.dtype(self.objective.compute_dtype)
        models = {part: cast(params[part], dtype) for part in ("model", "adapter") if part in params}
        of_frozen = {name: cast(getattr(frozen, name), dtype) for name in ("teacher", "teacher_rows", "own")}
        return params | models, frozen._replace(**of_frozen)

    def totals(self, frozen: Frozen, batch: Batch) -> dict[str, Float[Array, ""]]:
        """What the sums of each term are divided by: global over the batch, so that a batch may be taken in pieces."""
        totals = {"weights": jnp.maximum(jnp.sum(self._weights(frozen, batch)), 1e-6)}
        if self.objective.alignment:
            groups = attention.group_count(attention.byte_groups(batch)[0])
            totals["groups"] = jnp.maximum(groups, 1)
        return totals

    def __call__(
        self, params: Any, frozen: Frozen, batch: Batch, step: Int[Array, ""], totals: dict[str, Any] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The loss of a batch, or of a piece of the batch whose `totals` are given: pieces add up to the whole."""
        o = self.objective
        totals = self.totals(frozen, batch) if totals is None else totals
        weights = self._weights(frozen, batch) / totals["weights"]
        pairs = o.alignment.pairs if o.alignment else ()
        own = lora.whole(params, frozen.own, o.adapter_scale)
        hidden, unembedding, seen = self._hidden(o.model, own, batch, o.side, [pair.student for pair in pairs])
        options = {
            "label_smoothing": o.label_smoothing,
            "text_vocab": o.model.config.text_vocab_size,
            "block": o.block,
            "mesh": o.mesh,
        }
        labels = batch[f"{o.side}_targets"]
        if o.teacher is None and not o.scores:
            value, out = head.distill(hidden, unembedding, labels, weights, **options)
            return value, _metrics(batch, o.side, out, None, frozen)

        if o.rival:
            return self._rival(params, frozen, batch, step, totals, weights, hidden, unembedding, seen, options)
        alpha, temperature = o.alpha(step), o.temperature(step)
        taught = (self._spoken_about(batch) & (batch["student_weights"] > 0)).astype(jnp.float32)
        alpha_BxL = 1 - (1 - alpha) * taught
        projection, drift = frozen.projection, None
        if "projection" in params:
            W = row_softmax(params["projection"], frozen.rows.ids)
            projection = projection._replace(weights=W) if o.scores else with_weights(projection, W)
            drift = jnp.sum((W - frozen.rows.weights) ** 2)
        if o.scores:
            teacher = self._stored(projection, batch, temperature)
        else:
            teacher, teacher_seen = self._online(
                frozen, projection, batch, temperature, [pair.teacher for pair in pairs]
            )
        value, out = head.distill(
            hidden, unembedding, labels, weights * alpha_BxL,
            teacher=teacher, kl_weights_BxL=weights * (1 - alpha_BxL), temperature=temperature,
            divergence=o.divergence, skew=o.skew, top_k=o.top_k, **options,
        )  # fmt: skip
        metrics = _metrics(batch, o.side, out, taught, frozen)
        one = jnp.float32(1)
        metrics |= {"alpha": (alpha, one), "temperature": (temperature, one)}
        if drift is not None:  # a piece of a batch adds its share, so that pieces add up
            value += o.keep * drift * jnp.sum(weights)
            metrics["projection_drift"] = (drift, one)
        if o.alignment:
            inside, more = self._alignment(params, batch, step, seen, teacher_seen)
            value, metrics = value + inside / totals["groups"], metrics | more
        return value, metrics

    def kl_at_1(self, params: Any, frozen: Frozen, batch: Batch) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
        """KL(p || s) in nats at temperature 1, p the projected teacher, at the supervised targets that the teacher says
        something about; and which these are. For evaluation. params: of the whole student."""
        o = self.objective
        hidden, unembedding, _ = self._hidden(o.model, params, batch, o.side)
        taught = self._spoken_about(batch) & (batch["student_weights"] > 0)
        teacher, _ = self._online(frozen, frozen.projection, batch, jnp.float32(1), ())
        _, out = head.distill(
            hidden, unembedding, batch["student_targets"], jnp.zeros(taught.shape, jnp.float32),
            teacher=teacher, kl_weights_BxL=taught.astype(jnp.float32),
            text_vocab=o.model.config.text_vocab_size, block=o.block, mesh=o.mesh,
        )  # fmt: skip
        return out.kl1_BxL, taught

    def _rival(
        self, params: Any, frozen: Frozen, batch: Batch, step: Array, totals: dict[str, Any], weights: Array,
        hidden: Array, unembedding: Array, seen: Any, options: dict[str, Any],
    ) -> tuple[Array, dict[str, Any]]:  # fmt: skip
        """The loss of a batch with a rival's divergence in place of KL to the projected teacher (losses/rivals)."""
        o = self.objective
        alpha, temperature = o.alpha(step), o.temperature(step)
        taught = o.rival.taught(frozen.rival, batch).astype(jnp.float32)
        kl_weights = weights * (1 - alpha) * taught
        observe = [pair.teacher for pair in o.alignment.pairs] if o.alignment else ()
        *theirs, teacher_seen = self._hidden(o.teacher, frozen.teacher, batch, "teacher", observe)
        # Where alpha is 0 the head scores a token for its metrics alone: kl_weights say which.
        value, out = head.distill(
            hidden, unembedding, batch["student_targets"], weights - kl_weights, kl_weights_BxL=kl_weights, **options
        )
        told = rivals.divergence(
            o.rival, frozen.rival, params.get("projection"), rivals.Sides(hidden, unembedding, *theirs), batch,
            temperature, text_vocab=options["text_vocab"], block=o.block, mesh=o.mesh,
        )  # fmt: skip
        factor = temperature**2 if o.rival.softened else 1.0
        value += jnp.sum(kl_weights * factor * told.divergence_BxL)
        one = jnp.float32(1)
        metrics = _metrics(batch, o.side, out, taught, frozen) | {
            "alpha": (alpha, one),
            "temperature": (temperature, one),
        }
        metrics["kl"] = (jnp.sum(told.divergence_BxL), metrics["taught"][0])
        del metrics["kl_at_1"]  # of the projected teacher, which is not here
        if told.own_BxL is not None:
            value += jnp.sum(weights * told.own_BxL)
            metrics["map_nats"] = (jnp.sum(told.own_BxL), metrics["taught"][0])
        if o.alignment:
            inside, more = self._alignment(params, batch, step, seen, teacher_seen)
            value, metrics = value + inside / totals["groups"], metrics | more
        return value, metrics

    def _alignment(self, params: Any, batch: Batch, step: Array, seen: Any, teacher_seen: Any) -> tuple[Array, Any]:
        """The weighted distances of what the chosen layers show, summed over query groups, and their metrics."""
        a, learned = self.objective.alignment, params.get("alignment", {})
        apart = attention.distances(
            tuple(seen[pair.student] for pair in a.pairs), tuple(teacher_seen[pair.teacher] for pair in a.pairs),
            batch, a.pairs, mixing=learned.get("mixing"), projections=learned.get("hidden"), mesh=self.objective.mesh,
        )  # fmt: skip
        beta, groups = a.beta(step), attention.group_count(attention.byte_groups(batch)[0])
        metrics = {"attention": (apart.attention, groups), "beta": (beta, jnp.float32(1))}
        if "hidden" in learned:
            metrics["hidden_states"] = (apart.hidden, groups)
        return beta * apart.attention + a.hidden_weight * apart.hidden, metrics

    def _spoken_about(self, batch: Batch) -> Bool[Array, "B L"]:
        """The targets that the teacher says something about."""
        if self.objective.positions == "roots":
            return batch["role"] == ROOT
        known = batch["role"] != NONE
        return known & (batch["offset"] == 0) if self.objective.positions == "boundaries" else known

    def _online(
        self, frozen: Frozen, projection: Any, batch: Batch, temperature: Float[Array, ""], observe: Sequence[int]
    ) -> tuple[head.Teacher, Any]:
        """The teacher in memory: its states at the student's positions, and what its layers `observe` show."""
        hidden, unembedding, seen = self._hidden(self.objective.teacher, frozen.teacher, batch, "teacher", observe)
        rows = unembedding if frozen.teacher_rows is None else cast(frozen.teacher_rows, hidden.dtype)
        reading = None
        if self.objective.positions == "all":
            reading = conditional.read(
                batch, frozen.inside.prefixes, hidden, temperature, self._likelihood(unembedding)
            )
        here = jnp.take_along_axis(hidden, batch["teacher_position"][..., None], axis=1)
        inside = frozen.inside if reading else None
        return head.Teacher(here, rows, projection, _following(batch), reading, inside), seen

    def _likelihood(self, unembedding: Any) -> conditional.Likelihood:
        """What the teacher's tokens have cost it."""
        o = self.objective
        options = {"text_vocab": o.teacher.config.text_vocab_size, "block": o.block, "mesh": o.mesh}
        return lambda hidden, tokens, mask: head.score(hidden, unembedding, tokens, mask, **options)[0]

    def _stored(self, projection: Any, batch: Batch, temperature: Float[Array, ""]) -> head.TopKTeacher:
        """What was stored of the teacher (data/scores.py), at the student's positions."""
        o, at = self.objective, batch["score_slot"][..., None]
        fewer = slice(o.top_k or None)  # the sum over all that are stored has been taken: the rest joins the remainder

        def here(x_BxPxK):
            return jnp.take_along_axis(x_BxPxK[..., fewer], at, axis=1)

        def log_probs(tau):
            return here(stored.log_probs(batch["score_codes"], batch["score_rest"], o.scores, tau))

        return head.TopKTeacher(
            here(batch["score_ids"]), log_probs(temperature), log_probs(1.0), projection, _following(batch)
        )

    def _weights(self, frozen: Frozen, batch: Batch) -> Float[Array, "B L"]:
        """The weight of each token, before it is divided by their sum."""
        weights = batch[f"{self.objective.side}_weights"].astype(jnp.float32)
        if self.objective.side == "student":
            weights = weights * frozen.specialty_weights_S[batch["specialty"]]
        return weights

    def _hidden(
        self, model: Any, params: Any, batch: Batch, side: str, observe: Sequence[int] = ()
    ) -> tuple[jax.Array, Any, Any]:
        """Hidden states and unembedding of a model on its side of the batch, and what its layers `observe` show."""
        params = cast(params, jnp.dtype(self.objective.compute_dtype))
        hidden = model.hidden(
            params,
            batch[f"{side}_tokens"],
            segment_ids=batch[f"{side}_segment_ids"],
            positions=batch[f"{side}_positions"],
            remat=self.objective.remat if side == self.objective.side else "none",
            observe=tuple(observe),
            attention=self.objective.attention,
            mesh=self.objective.mesh,
        )
        hidden, seen = hidden if observe else (hidden, None)
        return hidden, model.unembedding(params), seen


def _following(batch: Batch) -> Int[Array, "B L"]:
    """The teacher's token that begins where, or before, the student's target does."""
    return jnp.take_along_axis(batch["teacher_targets"], batch["teacher_position"], axis=1)


def _metrics(batch, side, out, taught, frozen) -> dict[str, Any]:
    """Unweighted means as (sum, count): every number that compares across runs, whatever weighted the loss."""
    mask = (batch[f"{side}_weights"] > 0).astype(jnp.float32)
    count = jnp.sum(mask)
    metrics = {
        "ce": (jnp.sum(out.ce_BxL * mask), count),
        "accuracy": (jnp.sum(mask * (out.prediction_BxL == batch[f"{side}_targets"])), count),
    }
    if side == "student":
        size = frozen.specialty_weights_S.shape[0]
        by_specialty = lambda x: jax.ops.segment_sum((x * mask).reshape(-1), batch["specialty"].reshape(-1), size)  # noqa: E731
        metrics["ce_by_specialty"] = (by_specialty(out.ce_BxL), by_specialty(mask))
    if taught is not None:
        taught_count = jnp.sum(taught)
        metrics |= {
            "kl": (jnp.sum(out.kl_BxL * taught), taught_count),
            "kl_at_1": (jnp.sum(out.kl1_BxL * taught), taught_count),
            "taught": (taught_count, count),
        }
    return metrics


def reduce(metrics: dict[str, Any]) -> dict[str, Any]:
    """(sum, count) pairs to means; 0 where nothing was counted."""
    return {name: total / jnp.maximum(count, 1e-6) for name, (total, count) in metrics.items()}

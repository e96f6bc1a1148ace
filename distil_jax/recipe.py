"""From a config to what a run optimises: its objective, what the loss reads, what learns beside the model."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from distil_jax import learners, sharding, variants
from distil_jax.config import numbers_by_name
from distil_jax.data import scores
from distil_jax.errors import UserError, nearest
from distil_jax.losses import attention, conditional
from distil_jax.losses.divergence import checked
from distil_jax.losses.kd import PlacedTable, place, rows_of
from distil_jax.losses.rivals import KINDS, RIVALS, Rival
from distil_jax.losses.schedules import schedule
from distil_jax.losses.vocabulary import Shards
from distil_jax.losses.weights import dro_update, specialty_weights
from distil_jax.models import attention as attending
from distil_jax.objective import POSITIONS, Alignment, Frozen, Objective
from distil_jax.projection import Projection
from distil_jax.step import Reweigh
from distil_jax.tokens.prefixes import PrefixTables
from distil_jax.workdir import Workdir


class Run(NamedTuple):
    """What distinguishes one training run from another."""

    name: str
    side: str  # whose tokens are learned
    training: ConfigDict


def run_of(config: ConfigDict, name: str) -> Run:
    """The run of that name."""
    if name == "teacher":
        return Run(name, "teacher", config.teacher.training)
    return Run(name, "student", config.student.training)


def make(
    config: ConfigDict,
    work: Workdir,
    run: Run,
    model: Any,
    mesh: Mesh,
    corpus: dict[str, Any],
    tables: dict[str, Any],
) -> tuple[Objective, Frozen]:
    """What is optimised, and what it reads without learning it."""
    o, t = config.objective, run.training
    common = {"block": o.block, "compute_dtype": t.compute_dtype, "remat": t.remat, "mesh": mesh}
    common["attention"] = config.attention
    common["adapter_scale"] = learners.adapter_scale(config, run.side)
    everywhere = sharding.replicated(mesh)  # else each step would send it out from the first device
    if run.side == "teacher":
        return Objective(model, "teacher", **common), Frozen(jax.device_put(jnp.ones(1), everywhere))
    weights = jax.device_put(weights_of(o, corpus), everywhere)
    if run.name in variants.UNTAUGHT:
        smoothing = o.label_smoothing if run.name == "smoothing" else 0.0
        return Objective(model, label_smoothing=smoothing, **common), Frozen(weights)
    work.require("projection")
    projection = projection_of(work, tables)
    learned = None
    if o.learn_projection and o.kind == "projected":
        learned = jax.device_put(projection.rows(), everywhere)
    common |= teaching(o, t.steps)
    if work.scores_are_stored():
        temperatures = tuple(work.require("scores")["temperatures"])
        W = jax.device_put(projection.rows(), everywhere)
        return Objective(model, scores=temperatures, **common), Frozen(weights, projection=W, rows=learned)
    teacher, teacher_params = learners.teacher(work, mesh, config.teacher.dtype)
    alignment = alignment_of(o, model, teacher, t.steps)
    if rival := common["rival"]:
        known = jax.device_put(rival.tables(tables["teacher"], tables["student"]), everywhere)
        objective = Objective(model, teacher=teacher, alignment=alignment, **common)
        return objective, Frozen(weights, teacher_params, rival=known)
    objective = Objective(model, teacher=teacher, alignment=alignment, **common)
    frozen = projected(projection, teacher, teacher_params, mesh)._replace(specialty_weights_S=weights, rows=learned)
    if objective.positions == "all":
        prefixes = jax.tree.map(jnp.asarray, PrefixTables.build(tables["teacher"], tables["student"]))
        inside = jax.device_put(conditional.Tables(prefixes, projection.rows()), everywhere)
        frozen = frozen._replace(inside=inside)
    return objective, frozen


def projected(projection: Projection, teacher: Any, teacher_params: Any, mesh: Mesh) -> Frozen:
    """A teacher in memory and the way from its tokens to the student's, where the heads want them on the mesh."""
    everywhere, shards = sharding.replicated(mesh), Shards.of(mesh)
    table, rows = place(projection.table(), shards), None
    if shards.size == 1:
        table = jax.device_put(table, everywhere)
    else:
        specs = PlacedTable.specs(shards, rest=table.rest is not None)
        lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        table = jax.device_put(table, lies)
        rows = jax.jit(rows_of, out_shardings=lies.weights)(teacher.unembedding(teacher_params), table)
    weights = jax.device_put(jnp.ones(1), everywhere)
    return Frozen(weights, teacher_params, table, teacher_rows=rows)


def teaching(o: ConfigDict, steps: int) -> dict[str, Any]:
    """What the objective of a taught run says of its teacher's words."""
    if o.positions not in POSITIONS:
        known = ", ".join(POSITIONS)
        raise UserError(f"objective.positions is {o.positions!r}: use one of {known}{nearest(o.positions, POSITIONS)}")
    return {
        "positions": o.positions,
        "alpha": schedule(o.alpha.kind, o.alpha.start, o.alpha.end, steps),
        "temperature": schedule(o.temperature.kind, o.temperature.start, o.temperature.end, steps),
        "divergence": checked(o.divergence),
        "skew": o.skew,
        "top_k": o.top_k,
        "keep": o.projection_keep,
        "rival": rival_of(o),
    }


def rival_of(o: ConfigDict) -> Rival | None:
    """What objective.kind names (losses/rivals); None for the projected teacher. Raises UserError for another name, and
    for settings that it would not heed."""
    if o.kind not in KINDS:
        raise UserError(f"objective.kind is {o.kind!r}: use one of {', '.join(KINDS)}{nearest(o.kind, KINDS)}")
    if o.map_size < 1:
        raise UserError(f"objective.map_size={o.map_size} must be at least 1")
    if o.kind == "projected":
        return None
    for key, neutral in (("divergence", "forward"), ("top_k", 0)):
        if o[key] != neutral:
            raise UserError(
                f"objective.{key} is {o[key]!r}, which only objective.kind=projected heeds: {o.kind} compares in its "
                f"own way; set it to {neutral!r}"
            )
    rival = RIVALS[o.kind]
    if not o.learn_projection:
        return rival
    if rival.start is None:
        raise UserError(
            f"objective.learn_projection: {o.kind} has nothing that learns; set it to False, or objective.kind to "
            "projected, mlp or low_rank"
        )
    return dataclasses.replace(rival, told=functools.partial(rival.told, through=True))


def check_rival(o: ConfigDict, scores_mode: str, mesh: Mesh) -> None:
    """Raises UserError where a rival cannot have what it needs."""
    if o.kind == "projected":
        return
    if scores_mode != "online":
        raise UserError(
            f"objective.kind={o.kind} compares with the whole teacher, and teacher.scores={scores_mode} keeps its "
            "likeliest tokens at the student's positions: set teacher.scores=online, or objective.kind=projected"
        )
    if Shards.of(mesh).size > 1:
        raise UserError(
            f"objective.kind={o.kind} has both vocabularies whole on each device, and fsdp and tensor of config.mesh "
            "spread them: leave both out of it, or set objective.kind=projected"
        )


def alignment_of(o: ConfigDict, student: Any, teacher: Any, steps: int) -> Alignment | None:
    """What of the inside of the models is aligned; None, at no cost, where both weights are 0 throughout."""
    if o.attention.heads not in ("mean", "mixed"):
        raise UserError(f"objective.attention.heads is {o.attention.heads!r}; use 'mean' or 'mixed'")
    pairs = attention.choose(
        student, teacher, count=o.attention.pairs,
        student_layers=o.attention.student_layers, teacher_layers=o.attention.teacher_layers,
    )  # fmt: skip
    if min(o.beta.start, o.beta.end, o.hidden_states) < 0:
        raise UserError("objective.beta and objective.hidden_states are weights: give numbers of at least 0")
    beta = schedule(o.beta.kind, o.beta.start, o.beta.end, steps)
    if o.beta.start == o.beta.end == o.hidden_states == 0:
        return None
    return Alignment(pairs, beta, o.hidden_states)


def weights_of(o: ConfigDict, corpus: dict[str, Any]) -> np.ndarray:
    """The weight of each specialty of the corpus, [S]."""
    given = numbers_by_name("objective.specialty_weights", o.specialty_weights)
    return specialty_weights(o.specialty_weighting, given, corpus["specialties"], corpus["supervised_tokens"])


def reweighing(config: ConfigDict, run: Run, corpus: dict[str, Any]) -> Reweigh | None:
    """What drives the specialty weights of a run, if anything does."""
    if run.side == "teacher":
        return None
    kind, rate = config.objective.specialty_weighting, config.objective.dro_rate
    tokens = np.asarray(corpus["supervised_tokens"], np.float64)
    return functools.partial(dro_update, share_S=tokens / tokens.sum(), rate=rate) if kind == "dro" else None


def projection_of(work: Workdir, tables: dict[str, Any]) -> Projection:
    """W as it was built and fitted."""
    return Projection.load(work / "projection", teacher=tables["teacher"], student=tables["student"])


def projection_rate(config: ConfigDict, objective: Objective) -> float:
    """The learning rate of a W, or of a rival's map, that learns, in that of the student."""
    if objective.teacher is None and not objective.scores:
        return 1.0
    return config.objective.projection_learning_rate / config.student.training.learning_rate


def beside_the_model(
    config: ConfigDict, work: Workdir, model: Any, objective: Objective, frozen: Frozen, tables: dict[str, Any]
) -> dict[str, Any]:
    """What learns beside the model, by part (objective.Loss), at the start of a run."""
    parts: dict[str, Any] = {}
    if frozen.rows is not None:
        parts["projection"] = jnp.asarray(projection_of(work, tables).logits)
    if objective.rival and objective.rival.start:
        key = jax.random.fold_in(jax.random.key(config.seed), learners.SEED_OF["map"])
        unigram, rows = np.load(work / "corpus" / "student_unigram.npy"), objective.teacher.config.vocab_size
        parts["projection"] = objective.rival.start(key, rows, unigram, config.objective.map_size)
    if objective.alignment:
        a, key = objective.alignment, jax.random.fold_in(jax.random.key(config.seed), learners.SEED_OF["alignment"])
        mixed = config.objective.attention.heads == "mixed"
        learned = attention.init(key, a.pairs, model, objective.teacher, mixed=mixed, hidden=a.hidden_weight > 0)
        parts |= {"alignment": learned} if learned else {}
    return parts


def check(work: Workdir, corpus: dict[str, Any], mesh: Mesh) -> None:
    """Raises UserError now for settings that the last run of a recipe would stumble over."""
    work = Workdir(ConfigDict(work.config.to_dict()))  # to check a key is not to read it
    attending.check(work.config.attention, mesh)
    for side in (("teacher",) if work.teacher_is_trained() else ()) + ("student",):
        learners.check_learning(work, side, mesh)
    student, teacher = (learners.description(work, side) for side in ("student", "teacher"))
    for name in work.config.runs:
        config = variants.applied(work.config, name)
        o, steps = config.objective, config.student.training.steps
        try:
            weights_of(o, corpus)
            if o.dro_rate <= 0:
                raise UserError(f"objective.dro_rate={o.dro_rate} is a number above 0, such as 0.01")
            if name not in variants.UNTAUGHT:
                scores.check(config)
                check_rival(o, config.teacher.scores, mesh)
                teaching(o, steps), alignment_of(o, student, teacher, steps)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

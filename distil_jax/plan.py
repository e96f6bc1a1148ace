"""The training step of a config from shapes alone: what `distil-jax compile` lowers, and nothing is read or made.

It is the step that train.py runs, of the same parts (recipe.teaching, objective.Loss, step.make_step, sharding), with
descriptions in place of arrays. Two things depend on text that is not here and are estimated from what Gemma 3 and
Llama 3 were measured to have: how many entries W has, and how large the tables are behind targets inside tokens.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from distil_jax import freezing, learners, lora, recipe, sharding, variants
from distil_jax.errors import UserError
from distil_jax.losses import attention, conditional
from distil_jax.losses.kd import PlacedTable, ProjectionRows, ProjectionTable
from distil_jax.losses.schedules import learning_rate
from distil_jax.losses.vocabulary import Shards
from distil_jax.models import attention as attending
from distil_jax.models import hub, published
from distil_jax.models.int8 import Int8, quantize
from distil_jax.objective import Frozen, Loss, Objective
from distil_jax.step import init_state, make_optimizer, make_step
from distil_jax.tokens.pack import STUDENT_FIELDS, TEACHER_FIELDS
from distil_jax.tokens.prefixes import PrefixTables

ENTRIES = 1.12  # of W for each teacher token
HEAVY = 64  # student tokens whose entries lie on all devices
TOKEN_BYTES = {"teacher": 7.5, "student": 6.5}  # mean of a vocabulary
SPLITS = 3.5  # student tokens that end with a whole teacher token, for each student token
SPECIALTIES = 36


class Plan(NamedTuple):
    """A step and the descriptions of its arguments, each with its place on the mesh."""

    step: Any  # jitted: step(state, frozen, batch)
    state: Any
    frozen: Frozen
    batch: dict[str, jax.ShapeDtypeStruct]
    objective: Objective
    training: ConfigDict

    def lower(self) -> Any:
        """The step, lowered for the devices of the mesh."""
        with jax.set_mesh(self.objective.mesh):
            return self.step.lower(self.state, self.frozen, self.batch)


def plan(config: ConfigDict, run: str, mesh: Mesh, batch_size: int = 0) -> Plan:
    """The step of `run` on a mesh whose devices need not exist.

    batch_size: rows of a global batch; 0: as the config has it. Raises UserError for what the config gets wrong, and
    for what cannot be told without the corpus: stored scores, and rivals that need tables of both vocabularies.
    """
    config = variants.applied(config, run)
    side = "teacher" if run == "teacher" else "student"
    o, training = config.objective, config[side].training
    rows = batch_size or training.batch_size
    attending.check(config.attention, mesh)
    models = {name: described(config, name) for name in ("teacher", "student")}
    model, whole = models[side], sharding.replicated(mesh)
    sharding.places(mesh, rows // training.accumulate)
    params, where, own = learning(config, side, model, mesh)

    common = {"block": o.block, "compute_dtype": training.compute_dtype, "remat": training.remat, "mesh": mesh}
    common["attention"] = config.attention
    common["adapter_scale"] = learners.adapter_scale(config, side)
    frozen = Frozen(placed(jax.ShapeDtypeStruct((SPECIALTIES,), jnp.float32), whole), own=own)
    if side == "student" and run not in variants.UNTAUGHT:
        if config.teacher.scores != "online" or o.kind != "projected":
            raise UserError(
                "compile plans steps with the teacher in memory and objective.kind=projected; set teacher.scores="
                "online, or ask for --run=control, whose step is that of stored scores but for the loss"
            )
        teacher = models["teacher"]
        common |= recipe.teaching(o, training.steps) | {"teacher": teacher}
        common["alignment"] = recipe.alignment_of(o, model, teacher, training.steps)
        frozen = frozen._replace(**teaching(config, teacher, model, mesh))
        more = beside(o, common["alignment"], model, teacher)
        params |= more
        where |= jax.tree.map(lambda _: whole, more)
    objective = Objective(model, side, **common)
    rate = learning_rate(training.learning_rate, training.warmup, training.steps, training.end_fraction)
    optimizer = make_optimizer(rate, weight_decay=training.weight_decay, clip=training.clip)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer, ema=training.ema), params)
    state = placed(state, sharding.of_state(state, optimizer, where, mesh))
    step = make_step(Loss(objective), optimizer, rate, accumulate=training.accumulate, ema=training.ema)
    return Plan(step, state, frozen, batch_of(config, rows, mesh), objective, training)


def described(config: ConfigDict, side: str) -> Any:
    """The model of a side, from its directory, its published shape, the hub's config.json, or the config's shape."""
    part = config[side]
    if not part.path:
        fields = dict(part.shape.items()) | {"vocab_size": part.vocab_size, "tie_word_embeddings": True}
        return hub.model_from_config(fields).with_tokenizer(part.vocab_size)
    if Path(part.path).expanduser().is_dir():
        return hub.load_model(part.path)
    fields = published.SHAPES.get(part.path.partition("@")[0]) or hub.published_config(part.path)
    size = published.TOKENIZER_SIZES.get(fields["model_type"], fields["vocab_size"])
    return hub.model_from_config(fields).with_tokenizer(min(size, fields["vocab_size"]))


def placed(tree: Any, shardings: Any) -> Any:
    """Descriptions of arrays with their places; `shardings` is a tree like it, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def held(model: Any, mesh: Mesh, dtype: str, rules: sharding.Rules, *, vocabulary: bool = True) -> Any:
    """Frozen parameters as `learners` holds them in that dtype ("int8" too)."""
    where = sharding.param_shardings(model, mesh, rules)
    if dtype != "int8":
        return placed(model.abstract_params(dtype), where)
    params = jax.eval_shape(
        functools.partial(quantize, model, vocabulary=vocabulary), model.abstract_params("bfloat16")
    )

    def place(leaf: Any, s: NamedSharding) -> Any:
        if not isinstance(leaf, Int8):
            return placed(leaf, s)
        missing = len(leaf.values.shape) - len(leaf.scale.shape)  # the axes that a product sums over, after the first
        spec = (*s.spec[:1], *s.spec[1 + missing :])
        return Int8(placed(leaf.values, s), placed(leaf.scale, NamedSharding(mesh, PartitionSpec(*spec))))

    return jax.tree.map(place, params, where, is_leaf=lambda leaf: isinstance(leaf, Int8))


def learning(config: ConfigDict, side: str, model: Any, mesh: Mesh) -> tuple[dict, dict, Any]:
    """(what learns by part, where it lies, what is frozen of the model), as learners.learning makes them."""
    part = config[side]
    rank = part.lora.rank if side == "student" else 0
    if not rank:
        learns, own = freezing.split(model.abstract_params(), part.training.freeze)
        where, rest = freezing.split(sharding.param_shardings(model, mesh), part.training.freeze)
        return {"model": learns}, {"model": where}, placed(own, rest)
    s = part.lora
    adapter = jax.eval_shape(lambda: lora.init(model, jax.random.key(0), s.targets, rank))
    own = held(model, mesh, s.dtype, sharding.Rules(), vocabulary=False)
    return {"adapter": adapter}, {"adapter": lora.shardings(model, mesh, s.targets, rank)}, own


def beside(o: ConfigDict, alignment: Any, student: Any, teacher: Any) -> dict[str, Any]:
    """What learns beside the model, as recipe.beside_the_model makes it."""
    parts: dict[str, Any] = {}
    if o.learn_projection:
        raise UserError("compile does not plan objective.learn_projection; leave it off (docs/projection.md says why)")
    if alignment:
        mixed, hidden = o.attention.heads == "mixed", alignment.hidden_weight > 0
        init = functools.partial(attention.init, pairs=alignment.pairs, student=student, teacher=teacher)
        learned = jax.eval_shape(lambda: init(jax.random.key(0), mixed=mixed, hidden=hidden))
        parts |= {"alignment": learned} if learned else {}
    return parts


def teaching(config: ConfigDict, teacher: Any, student: Any, mesh: Mesh) -> dict[str, Any]:
    """The fields of Frozen of a taught run: teacher, W, and the tables inside tokens."""
    Vt, Vs, whole = teacher.config.text_vocab_size, student.config.text_vocab_size, sharding.replicated(mesh)
    params = held(teacher, mesh, config.teacher.dtype, sharding.Rules.of(config.teacher.spread))
    fields: dict[str, Any] = {"teacher": params}
    shards = Shards.of(mesh)

    def array(length, dtype=jnp.int32, s=whole):
        return jax.ShapeDtypeStruct((int(length),), dtype, sharding=s)

    if shards.size == 1:
        n = ENTRIES * Vt
        fields["projection"] = ProjectionTable(
            array(n), array(n), array(n, jnp.float32), array(Vt, jnp.bool_), array(n), array(Vt, jnp.float32)
        )
    else:
        cut = NamedSharding(mesh, PartitionSpec(shards.axes))
        n = shards.size * -(-int(ENTRIES * Vt) // (shards.size * 128)) * 128
        ints, floats = array(n, s=cut), array(n, jnp.float32, cut)
        fields["projection"] = PlacedTable(ints, ints, floats, array(n, jnp.bool_, cut), ints, array(HEAVY), floats)
        head = teacher.unembedding(params)
        rows = lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype, sharding=cut)  # noqa: E731
        fields["teacher_rows"] = jax.tree.map(rows, head)
    if config.objective.positions == "all":
        bytes_of = {"teacher": TOKEN_BYTES["teacher"] * Vt, "student": TOKEN_BYTES["student"] * Vs}
        teachers, students = array(bytes_of["teacher"]), array(bytes_of["student"])
        prefixes = PrefixTables(
            array(Vt), array(Vt), array(Vt), teachers, teachers, teachers,
            array(Vs), array(Vs), students, students, array(SPLITS * Vs), array(SPLITS * Vs),
        )  # fmt: skip
        k = config.projection.size + 1
        ids, weights = (jax.ShapeDtypeStruct((Vt, k), dtype, sharding=whole) for dtype in (jnp.int32, jnp.float32))
        fields["inside"] = conditional.Tables(prefixes, ProjectionRows(ids, weights))
    return fields


def batch_of(config: ConfigDict, rows: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A packed batch of `rows` rows over the mesh."""
    lengths = dict.fromkeys(STUDENT_FIELDS, config.data.student_length)
    lengths |= dict.fromkeys(TEACHER_FIELDS, config.data.teacher_length)
    where = sharding.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((rows, n), jnp.int32, sharding=where) for name, n in lengths.items()}

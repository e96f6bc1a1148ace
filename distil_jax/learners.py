"""The models of a run: made from a shape or read from a path, before and after training."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distil_jax import freezing, hosts, lora, sharding
from distil_jax.errors import UserError
from distil_jax.models import hub
from distil_jax.models.decoder import REMAT
from distil_jax.models.int8 import quantize
from distil_jax.tokens import chat
from distil_jax.tokens.bytes import ByteTable
from distil_jax.workdir import Workdir

LORA_DTYPES = ("float32", "bfloat16", "int8")
SEED_OF = {"teacher": 1, "student": 2, "adapter": 3, "alignment": 4, "map": 5}


def mesh_of(config: ConfigDict, devices: list[Any] | None = None) -> Mesh:
    """The mesh that config.mesh asks for, of all devices or of these."""
    return sharding.mesh_of(config.mesh, devices)


def mesh_of_this_process(config: ConfigDict) -> Mesh:
    """A mesh of this process's devices, for work that processes share out among them: what config.mesh asks for if it
    is alone, else with parameters over all of its devices if config.mesh cuts them at all."""
    if hosts.count() == 1:
        return mesh_of(config)
    cut = any(axis in config.mesh for axis in ("fsdp", "tensor"))
    return sharding.mesh_of("fsdp:-1" if cut else "data:-1", jax.local_devices())


def tokenizer_directory(work: Workdir, side: str) -> Path:
    """Where a side's tokenizer lies: with the model that was brought, else with the corpus it was trained for."""
    path = work.config[side].path
    if not path and "shape" not in work.config[side]:
        raise UserError(f"config.{side}.path is empty, and this config has no config.{side}.shape to make a model from")
    return hub.resolve(path) if path else work / "tokenizers" / side


def table_of(work: Workdir, side: str) -> ByteTable:
    """The byte table of a side's tokenizer. Raises UserError if the corpus was made with another one: its ids would
    mean other texts, and nothing would show it but poor numbers."""
    directory = tokenizer_directory(work, side)
    table = ByteTable.from_tokenizer(directory)
    made = (work.done("corpus") or {}).get("tokenizers")
    if made and made[side]["hash"] != table.hash:
        other = "student" if side == "teacher" else "teacher"
        what = f"is not the one that {work / 'corpus'} was made with ({table.hash[:12]}, not {made[side]['hash'][:12]})"
        if made[other]["hash"] == table.hash:
            what = f"is the one that {work / 'corpus'} was made with for the {other}: the two are exchanged"
        raise UserError(
            f"the {side}'s tokenizer in {directory} {what}. Put the tokenizer back, or delete {work / 'corpus'} and "
            "run `distil-jax prepare` again"
        )
    return table


def tables_of(work: Workdir) -> dict[str, ByteTable]:
    """The byte tables of both tokenizers. Raises UserError as `table_of`."""
    return {side: table_of(work, side) for side in ("teacher", "student")}


def has_conversations(work: Workdir) -> bool:
    """Whether the corpus holds conversations, so that models trained on it answer in turns."""
    return any(split["rows"] for split in work.require("corpus")["chat"].values())


def hf_tokenizer(work: Workdir, side: str) -> Any:
    """The side's tokenizer as transformers loads it, to be saved beside a model that was trained here. If the corpus
    has conversations, its chat template is the one that they were written with."""
    from transformers import AutoTokenizer  # slow to import, and only the end of a stage needs it

    tokenizer, table = AutoTokenizer.from_pretrained(tokenizer_directory(work, side)), table_of(work, side)
    if has_conversations(work):
        tokenizer.chat_template = chat.jinja(chat.family_of(table, side))
    return tokenizer


def untrained(
    work: Workdir, side: str, mesh: Mesh, dtype: str = "float32", rules: sharding.Rules | None = None
) -> tuple[Any, Any]:
    """(model, params) before any training of ours: the checkpoint at `path`, or random weights of `shape`."""
    part = work.config[side]
    if part.path:
        table = table_of(work, side)
        model, params = hub.load_pretrained(part.path, dtype=dtype, mesh=mesh, rules=rules)
        largest = max(int(np.flatnonzero(table.is_text).max()), *table.roles.values())
        if largest >= model.config.vocab_size:
            raise UserError(
                f"the tokenizer at {part.path} has tokens up to id {largest} but the model has "
                f"{model.config.vocab_size} rows: they do not belong together"
            )
        return model.with_tokenizer(table.vocab_size), params
    model = description(work, side)
    key = jax.random.fold_in(jax.random.key(work.config.seed), SEED_OF[side])
    init = jax.jit(model.init, static_argnums=1, out_shardings=sharding.param_shardings(model, mesh, rules))
    return model, init(key, dtype)


def learning(work: Workdir, side: str, mesh: Mesh) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """(model, what of it learns by part, what is frozen of it, where the first lies) at the start of a run.

    Without student.lora the parameters learn, but for those that training.freeze names. With it, adapters learn, and
    all parameters are frozen, in student.lora.dtype ("int8": their kernels; the rest is bfloat16).
    """
    part = work.config[side]
    s = part.lora if side == "student" else ConfigDict({"targets": "", "rank": 0, "dtype": ""})
    targets, rank, dtype = s.targets, s.rank, s.dtype
    if not rank:
        model, params = untrained(work, side, mesh)
        learns, own = freezing.split(params, part.training.freeze)
        where = freezing.split(sharding.param_shardings(model, mesh), part.training.freeze)[0]
        return model, {"model": learns}, own, {"model": where}
    model, params = untrained(work, side, mesh, "bfloat16" if dtype == "int8" else dtype)
    if dtype == "int8":
        params = quantize(model, params, vocabulary=False)
    where = lora.shardings(model, mesh, targets, rank)
    key = jax.random.fold_in(jax.random.key(work.config.seed), SEED_OF["adapter"])
    adapter = jax.jit(lora.init, static_argnums=(0, 2, 3), out_shardings=where)(model, key, targets, rank)
    return model, {"adapter": adapter}, params, {"adapter": where}


def adapter_scale(config: ConfigDict, side: str) -> float:
    """alpha / rank; without adapters a number that nothing uses."""
    if side != "student":
        return 1.0
    return config.student.lora.alpha / max(config.student.lora.rank, 1)


def check_learning(work: Workdir, side: str, mesh: Mesh) -> None:
    """Raises UserError for settings of a side's training that could not be met, before anything is read or trained."""
    model, config = description(work, side), work.config
    t, parts = config[side].training, mesh.shape["data"] * mesh.shape["fsdp"]
    freezing.split(model.abstract_params(), t.freeze)
    if t.remat not in REMAT:
        raise UserError(f"{side}.training.remat is {t.remat!r}; use one of {', '.join(map(repr, REMAT))}")
    if not 0 <= t.ema < 1:
        raise UserError(f"{side}.training.ema={t.ema}: a decay from 0 (no average) to below 1, such as 0.999")
    if t.accumulate < 1 or t.batch_size % t.accumulate or t.batch_size // t.accumulate % parts:
        raise UserError(
            f"{side}.training: batch_size={t.batch_size} rows do not divide into accumulate={t.accumulate} pieces, "
            f"each a multiple of data x fsdp = {parts}: set batch_size to a multiple of {max(t.accumulate, 1) * parts}"
        )
    if side == "student":
        _check_lora(model, config.student.lora, t.freeze)


def _check_lora(model: Any, s: ConfigDict, freeze: str) -> None:
    lora.kernels(model, s.targets)
    if s.rank < 0 or s.alpha <= 0:
        raise UserError(f"student.lora: rank={s.rank} is 0 (none) or above and alpha={s.alpha} above 0")
    if s.dtype not in LORA_DTYPES:
        raise UserError(f"student.lora.dtype is {s.dtype!r}; use one of {', '.join(LORA_DTYPES)}")
    if s.rank and freeze:
        raise UserError(
            f"student.training.freeze={freeze!r} with student.lora.rank={s.rank}: with adapters every parameter is "
            "frozen already; empty the one or set the other to 0"
        )


def description(work: Workdir, side: str) -> Any:
    """The model of `untrained` without its parameters."""
    part = work.config[side]
    table = table_of(work, side)
    if part.path:
        return hub.load_model(part.path).with_tokenizer(table.vocab_size)
    fields = dict(part.shape.items()) | {
        "vocab_size": table.vocab_size,
        "tie_word_embeddings": True,
        "bos_token_id": table.roles.get("bos"),
        "eos_token_id": table.roles.get("eos"),
        "pad_token_id": table.roles.get("pad"),
    }
    return hub.model_from_config(fields).with_tokenizer(table.vocab_size)


def count(params: Any) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def teacher(work: Workdir, mesh: Mesh, dtype: str = "float32") -> tuple[Any, Any]:
    """The teacher that teaches: trained or adapted here, or as it came, spread as config.teacher.spread says. dtype
    "int8" holds its kernels in 8 bits and the rest, norms and biases, in bfloat16."""
    stored = "bfloat16" if dtype == "int8" else dtype
    rules = sharding.Rules.of(work.config.teacher.spread)
    if work.teacher_is_trained():
        model, params = trained(work, "teacher", mesh, stored, rules)
    else:
        model, params = untrained(work, "teacher", mesh, stored, rules)
    return model, quantize(model, params) if dtype == "int8" else params


def trained(
    work: Workdir, run: str, mesh: Mesh, dtype: str = "float32", rules: sharding.Rules | None = None
) -> tuple[Any, Any]:
    """The model that a training run left."""
    work.require(run)
    model, params = hub.load_pretrained(work / run / "model", dtype=dtype, mesh=mesh, rules=rules)
    side = "teacher" if run == "teacher" else "student"
    table = table_of(work, side)
    return model.with_tokenizer(table.vocab_size), params

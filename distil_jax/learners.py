"""The models of a run: made from a shape or read from a path, before and after training."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distil_jax import sharding
from distil_jax.errors import UserError
from distil_jax.models import hub
from distil_jax.models.int8 import quantize
from distil_jax.tokens.bytes import ByteTable
from distil_jax.workdir import Workdir

SEED_OF = {"teacher": 1, "student": 2}


def mesh_of(config: ConfigDict, devices: list[Any] | None = None) -> Mesh:
    """The mesh that config.mesh asks for, of all devices or of these."""
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)


def tokenizer_directory(work: Workdir, side: str) -> Path:
    """Where a side's tokenizer lies: with the model that was brought, else with the corpus it was trained for."""
    path = work.config[side].path
    if not path and "shape" not in work.config[side]:
        raise UserError(f"config.{side}.path is empty, and this config has no config.{side}.shape to make a model from")
    return hub.resolve(path) if path else work / "tokenizers" / side


def tables_of(work: Workdir) -> dict[str, ByteTable]:
    """The byte tables of both tokenizers."""
    return {side: ByteTable.from_tokenizer(tokenizer_directory(work, side)) for side in ("teacher", "student")}


def hf_tokenizer(work: Workdir, side: str) -> Any:
    """The side's tokenizer as transformers loads it, to be saved beside a model."""
    from transformers import AutoTokenizer  # slow to import, and only the end of a stage needs it

    return AutoTokenizer.from_pretrained(tokenizer_directory(work, side))


def untrained(work: Workdir, side: str, mesh: Mesh, dtype: str = "float32") -> tuple[Any, Any]:
    """(model, params) before any training of ours: the checkpoint at `path`, or random weights of `shape`."""
    part = work.config[side]
    if part.path:
        table = ByteTable.from_tokenizer(tokenizer_directory(work, side))
        model, params = hub.load_pretrained(part.path, dtype=dtype, mesh=mesh)
        largest = max(int(np.flatnonzero(table.is_text).max()), *table.roles.values())
        if largest >= model.config.vocab_size:
            raise UserError(
                f"the tokenizer at {part.path} has tokens up to id {largest} but the model has "
                f"{model.config.vocab_size} rows: they do not belong together"
            )
        return model.with_tokenizer(table.vocab_size), params
    model = description(work, side)
    key = jax.random.fold_in(jax.random.key(work.config.seed), SEED_OF[side])
    init = jax.jit(model.init, static_argnums=1, out_shardings=sharding.param_shardings(model, mesh))
    return model, init(key, dtype)


def description(work: Workdir, side: str) -> Any:
    """The model of `untrained` without its parameters."""
    part = work.config[side]
    table = ByteTable.from_tokenizer(tokenizer_directory(work, side))
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
    """The teacher that teaches: trained or adapted here, or as it came. dtype "int8" holds its kernels in 8 bits and
    the rest, norms and biases, in bfloat16."""
    stored = "bfloat16" if dtype == "int8" else dtype
    if work.teacher_is_trained():
        model, params = trained(work, "teacher", mesh, stored)
    else:
        model, params = untrained(work, "teacher", mesh, stored)
    return model, quantize(model, params) if dtype == "int8" else params


def trained(work: Workdir, run: str, mesh: Mesh, dtype: str = "float32") -> tuple[Any, Any]:
    """The model that a training run left."""
    work.require(run)
    model, params = hub.load_pretrained(work / run / "model", dtype=dtype, mesh=mesh)
    side = "teacher" if run == "teacher" else "student"
    table = ByteTable.from_tokenizer(tokenizer_directory(work, side))
    return model.with_tokenizer(table.vocab_size), params

"""The model of a training run as one of its checkpoints has it, while the run goes on or after it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distil_jax import checkpoint, learners, lora, variants
from distil_jax.errors import UserError, nearest
from distil_jax.workdir import Workdir


def load(
    work: Workdir, run: str, mesh: Mesh, *, step: int | None = None, dtype: str = "float32"
) -> tuple[int, Any, Any]:
    """(step, model, params) of a run, "teacher" or one of config.runs, from the newest whole checkpoint or that of
    `step`; the running average where the run keeps one. A model with adapters stays in the types that it learns in.

    Raises UserError if there is no such run or checkpoint, or the folder belongs to another config.
    """
    known = (*(("teacher",) if work.teacher_is_trained() else ()), *work.config.runs)
    if run not in known:
        raise UserError(f"no training run {run!r} in this config{nearest(run, known)}; it has {', '.join(known)}")
    if not work.begun(run):
        raise UserError(f"{work / run} is missing or belongs to another config: run `distil-jax train` with this one")
    side = "teacher" if run == "teacher" else "student"
    at_start = Workdir(variants.applied(work.config, run))
    model, learns, own, shardings = learners.learning(at_start, side, mesh)
    part = "ema" if work.config[side].training.ema else "params"
    types = {name: jnp.float32 if part == "ema" else None for name in learns}
    abstract = {
        part: {
            name: jax.tree.map(
                lambda x, where, name=name: jax.ShapeDtypeStruct(x.shape, types[name] or x.dtype, sharding=where),
                learns[name],
                shardings[name],
            )
            for name in learns
        }
    }
    found, state = checkpoint.read_part(work / run / "checkpoints", abstract, step)
    params = lora.whole(state[part], own, learners.adapter_scale(work.config, side))
    if "adapter" not in learns:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    return found, model.with_tokenizer(learners.table_of(work, side).vocab_size), params

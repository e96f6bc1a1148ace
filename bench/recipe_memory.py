"""Whether configs/medgemma4b_llama1b_24gb.py fits 24 GB: its real steps, lowered and compiled for one chip, not run.

    python bench/recipe_memory.py [VARIANT ...] [--config.KEY=VALUE ...]

VARIANT: of VARIANTS below; all by default, minutes each. Needs libtpu and no TPU: the compiler of a chip
with more memory than 24 GB says what arguments, outputs and temporaries of the whole step take. A GPU's compiler lays
arrays out and fuses differently, so this stands in for it and measures none. The table is in docs/recipes.md.
"""

import os

# Both are read when libtpu is loaded.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}

import functools
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distil_jax import freezing, lora, sharding
from distil_jax.config import load_config
from distil_jax.data.loader import Batch
from distil_jax.losses.kd import ProjectionTable
from distil_jax.losses.schedules import learning_rate, schedule
from distil_jax.models import hub
from distil_jax.models.int8 import quantize
from distil_jax.objective import Frozen, Loss, Objective
from distil_jax.step import init_state, make_optimizer, make_step
from distil_jax.tokens.pack import STUDENT_FIELDS, TEACHER_FIELDS

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "medgemma4b_llama1b_24gb.py"
CHIP = "v5p:2x2x1"  # 95 GB a chip, of which one is used
LIMIT = 24e9
# As published in each model's config.json.
TEACHER = {
    "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "sliding_window": 1024, "sliding_window_pattern": 6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}  # fmt: skip
STUDENT = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": True, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
ENTRIES = 300_000  # of W: 262,144 rows with a mean support of 1.1
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "remat dots": {"student.training.remat": "dots"},
    "teacher in bfloat16": {"teacher.dtype": "bfloat16"},
    "control": {"runs": "control"},
    "all parameters": {"student.lora.rank": 0},
    "all but the embedding": {"student.lora.rank": 0, "student.training.freeze": "embedding"},
}


def one_chip() -> Mesh:
    """A mesh of one chip that is not there."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIP)
    return sharding.make_mesh(1, 1, 1, devices=list(topology.devices)[:1])


def shapes(tree: Any, mesh: Mesh) -> Any:
    """Every array of a tree as a description of it on the one chip."""
    whole = sharding.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)


def held(model: Any, dtype: str, *, vocabulary: bool = True) -> Any:
    """Parameters as `learners` holds them in that dtype."""
    params = model.abstract_params("bfloat16" if dtype == "int8" else dtype)
    if dtype != "int8":
        return params
    return jax.eval_shape(functools.partial(quantize, model, vocabulary=vocabulary), params)


def batch_of(c: ConfigDict, rows: int) -> Batch:
    """A packed batch of `rows` rows."""
    student = dict.fromkeys(STUDENT_FIELDS, c.data.student_length)
    teacher = dict.fromkeys(TEACHER_FIELDS, c.data.teacher_length)
    return {k: jax.ShapeDtypeStruct((rows, n), jnp.int32) for k, n in (student | teacher).items()}


def lowered(c: ConfigDict, mesh: Mesh) -> Any:
    """The step of the config's distilled run (of its control where it trains nothing else)."""
    student, teacher = hub.model_from_config(STUDENT), hub.model_from_config(TEACHER)
    t, s, o = c.student.training, c.student.lora, c.objective
    if s.rank:
        own = held(student, s.dtype, vocabulary=False)
        params = {"adapter": jax.eval_shape(lambda: lora.init(student, jax.random.key(0), s.targets, s.rank))}
    else:
        learns, own = freezing.split(student.abstract_params(), t.freeze)
        params = {"model": learns}
    common = {
        "block": o.block,
        "compute_dtype": t.compute_dtype,
        "remat": t.remat,
        "mesh": mesh,
        "adapter_scale": s.alpha / s.rank if s.rank else 1.0,
    }
    frozen = Frozen(jax.ShapeDtypeStruct((30,), jnp.float32), own=own)
    if "distilled" in c.runs:
        common |= {
            "teacher": teacher,
            "alpha": schedule(o.alpha.kind, o.alpha.start, o.alpha.end, t.steps),
            "temperature": schedule(o.temperature.kind, o.temperature.start, o.temperature.end, t.steps),
        }
        ids, weights = (jax.ShapeDtypeStruct((ENTRIES,), dtype) for dtype in (jnp.int32, jnp.float32))
        table = ProjectionTable(ids, ids, weights, jax.ShapeDtypeStruct((teacher.config.vocab_size,), bool), ids)
        frozen = frozen._replace(teacher=held(teacher, c.teacher.dtype), projection=table)
    rate = learning_rate(t.learning_rate, t.warmup, t.steps, t.end_fraction)
    optimizer = make_optimizer(rate, weight_decay=t.weight_decay, clip=t.clip)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer, ema=t.ema), params)
    step = make_step(Loss(Objective(student, **common)), optimizer, rate, accumulate=t.accumulate, ema=t.ema)
    arguments = (shapes(x, mesh) for x in (state, frozen))
    rows = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh))
        for k, x in batch_of(c, t.batch_size).items()
    }
    return step.lower(*arguments, rows)


def report(name: str, program: Any) -> None:
    """One line: bytes of the compiled program against the limit, and its largest array of decompressed teacher."""
    start = time.perf_counter()
    compiled = program.compile()
    m = compiled.memory_analysis()
    new = m.output_size_in_bytes - m.alias_size_in_bytes
    peak = m.argument_size_in_bytes + new + m.temp_size_in_bytes
    # A whole stack of the teacher's layers in bfloat16 or float32 would be an 8-bit kernel spelled out.
    stacked = set(re.findall(rf"(?:bf16|f32)\[{TEACHER['num_hidden_layers']},([\d,]+)\]", compiled.as_text()))
    large = sorted(s for s in stacked if math.prod(map(int, s.split(","))) > 1e6)
    numbers = (m.argument_size_in_bytes, new, m.temp_size_in_bytes, peak)
    cells = " | ".join(f"{n / 1e9:.2f}" for n in numbers)
    verdict = "fits" if peak < LIMIT else "does not fit"
    print(f"| {name} | {cells} | {verdict} |  <!-- {time.perf_counter() - start:.0f} s; stacks {large} -->", flush=True)


def main(arguments: list[str]) -> None:
    flags = [a for a in arguments if a.startswith("--")]
    wanted = [a for a in arguments if not a.startswith("--")] or [*VARIANTS]
    mesh = one_chip()
    print("| variant | arguments | new outputs | temporaries | together, GB | of 24 GB |\n|---|---|---|---|---|---|")
    for name in wanted:
        overrides = [f"--config.{k}={v}" for k, v in VARIANTS[name].items()]
        c = load_config(["--config", str(RECIPE), *overrides, *flags])[0]
        with jax.set_mesh(mesh):
            report(name, lowered(c, mesh))


if __name__ == "__main__":
    main(sys.argv[1:])

"""What attention alignment adds to a distillation step at the real shapes: MedGemma 4B teaches Llama 3.2 1B.

    pip install 'libtpu==0.0.42.*'
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python bench/attention_cost.py [PAIRS_OF_LAYERS ...]

No TPU is needed, but patience: minutes for each number of pairs. For each number of pairs (0 and 2 by
default) the loss and its gradient are compiled for a v5e:2x2 from shapes alone: 8 rows of 1,024 tokens, taught and
computed in bfloat16, student in float32, all cut four ways. Printed are the arithmetic of the matrix products,
counted from the shapes because the compiler sees the body of a loop once, its own count, and the memory of a chip. No
times: the compiler has no estimate for scatters, which pool a map.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from distil_jax import sharding
from distil_jax.losses.kd import PlacedTable
from distil_jax.losses.schedules import schedule
from distil_jax.models import model_from_config
from distil_jax.objective import Frozen, Loss, Objective
from distil_jax.recipe import alignment_of
from distil_jax.tokens.pack import STUDENT_FIELDS, TEACHER_FIELDS

ROWS, LENGTH = 8, 1024
SUPPORT = 1.12  # entries of W for each teacher token
MEDGEMMA_4B = {
    "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 2560, "intermediate_size": 10_240,
    "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}  # fmt: skip
LLAMA_1B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": True, "rope_theta": 500_000.0,
}  # fmt: skip


def main(*counts: str) -> None:
    teacher, student = model_from_config(MEDGEMMA_4B), model_from_config(LLAMA_1B)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices).reshape(1, 4, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    for pairs in map(int, counts or ("0", "2")):
        compared = alignment_of(config(pairs), student, teacher, 100)
        chosen = [(pair.student, pair.teacher) for pair in compared.pairs] if compared else []
        print(f"\n{pairs} pairs of layers {chosen}")
        step, term = step_flops(student, teacher), pairs * term_flops(student, teacher)
        print(
            f"   matrix products of the step {step / 1e12:.1f} TFLOP, of the term {term / 1e12:.2f}: {term / step:.1%}"
        )
        compiled = compile_step(student, teacher, compared, mesh)
        m = compiled.memory_analysis()
        held, temporary = (size / 2**30 for size in (m.argument_size_in_bytes, m.temp_size_in_bytes))
        print(f"   a chip: arguments {held:.2f} GiB, temporaries {temporary:.2f} GiB")
        once = compiled.cost_analysis()
        print(f"   cost_analysis, loops once: {once['flops'] / 1e12:.2f} TFLOP, {once['bytes accessed'] / 1e9:.1f} GB")


def config(pairs: int) -> ConfigDict:
    """The default objective with that many pairs."""
    return ConfigDict(
        {
            "beta": dict.fromkeys(("start", "end"), 0.2 if pairs else 0.0) | {"kind": "constant"},
            "attention": {"pairs": pairs or 1, "student_layers": "", "teacher_layers": "", "heads": "mean"},
            "hidden_states": 0.0,
        }
    )


def step_flops(student, teacher) -> float:
    """Matrix products of a step: 2 a parameter and token forward, 6 forward and backward, and attention's own."""

    def parameters(model):
        c = model.config
        attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
        return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    def scores(model):  # of queries with keys, and of maps with values, the whole square
        c = model.config
        return c.num_hidden_layers * 4 * LENGTH * c.num_attention_heads * c.head_dim

    def head(model):
        return model.config.vocab_size * model.config.hidden_size

    each = 2 * (parameters(teacher) + head(teacher)) + scores(teacher)
    each += 6 * (parameters(student) + head(student)) + 3 * scores(student)
    return ROWS * LENGTH * each


def term_flops(student, teacher) -> float:
    """One pair: a map is 2 L^2 K H a row. The teacher's is formed once; the student's twice, and its gradient is two
    such products more. Averaging and pooling are sums, and no products."""
    one = lambda model: 2 * LENGTH**2 * model.config.num_attention_heads * model.config.head_dim  # noqa: E731
    return ROWS * (one(teacher) + 4 * one(student))


def compile_step(student, teacher, compared, mesh):
    """The gradient of the loss, from shapes."""

    def shape(dims, dtype, *spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def placed(model, dtype):
        lies = sharding.param_shardings(model, mesh)
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, dtype, sharding=s), model.abstract_params(), lies
        )

    per_shard = -(-int(teacher.config.vocab_size * SUPPORT) // mesh.size // 128) * 128
    rows = per_shard * mesh.size
    cut = lambda dtype: shape((rows,), dtype, ("fsdp",))  # noqa: E731
    table = PlacedTable(
        cut(jnp.int32), cut(jnp.int32), cut(jnp.float32), cut(jnp.bool_), cut(jnp.int32), shape((256,), jnp.int32)
    )
    frozen = Frozen(
        shape((1,), jnp.float32), placed(teacher, jnp.bfloat16), table,
        teacher_rows=shape((rows, teacher.config.hidden_size), jnp.bfloat16, ("fsdp",)),
    )  # fmt: skip
    batch = {name: shape((ROWS, LENGTH), jnp.int32, sharding.BATCH_AXES) for name in (*STUDENT_FIELDS, *TEACHER_FIELDS)}
    constant = schedule("constant", 0.5, 0.5, 100)
    loss = Loss(
        Objective(
            student, teacher=teacher, alpha=constant, temperature=schedule("constant", 1.0, 1.0, 100),
            alignment=compared, compute_dtype="bfloat16", remat="full", mesh=mesh,
        )
    )  # fmt: skip
    params = {"model": placed(student, jnp.float32)}
    gradient = jax.value_and_grad(loss, has_aux=True)
    lies = jax.tree.map(lambda leaf: leaf.sharding, params)
    with jax.set_mesh(mesh):
        step = jax.jit(gradient, out_shardings=(None, lies))
        return step.lower(params, frozen, batch, jax.ShapeDtypeStruct((), jnp.int32)).compile()


if __name__ == "__main__":
    main(*sys.argv[1:])

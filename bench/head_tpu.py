"""What the TPU compiler makes of the loss head at the vocabularies of MedGemma-4B and Llama-3.2-1B.

    pip install 'libtpu==0.0.42.*'
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python bench/head_tpu.py [TOPOLOGY ...]

No TPU is needed: the head is compiled for each topology from shapes alone, forward and backward, bfloat16 matrices. On
one chip the streamed head stands beside whole logit matrices; on all chips, with the vocabularies over them, it prints
the collectives. Bytes are of the compiler's buffer assignment; FLOPs are counted from the shapes, because the
compiler's own count sees the body of a loop once.
"""

import collections
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distil_jax.losses.head import Teacher, block_size, distill
from distil_jax.losses.kd import PlacedTable, ProjectionTable, project
from distil_jax.losses.vocabulary import Shards

VT, VS, DT, DS = 262_144, 128_256, 2560, 2048
SUPPORT = 1.12  # entries of W for each teacher token
ROW = 1024  # tokens
PEAK = {"v5e": (197e12, 819e9), "v5p": (459e12, 2765e9), "v6e": (918e12, 1640e9)}  # bfloat16 FLOP/s, bytes/s

COLLECTIVE = re.compile(
    r"= \(?(\w+\[[\d,]*\]).*? (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def main(*names: str) -> None:
    for name in names or ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        chip = name.split(":")[0]
        report(f"{chip}, one chip, {ROW} tokens, whole logits", dense, one_chip(devices), ROW, chip)
        report(f"{chip}, one chip, {ROW} tokens, streamed", streamed, one_chip(devices), ROW, chip)
        everywhere = mesh(devices, len(devices))
        rows = 8 * len(devices)
        report(f"{name}, {rows} rows of {ROW}, streamed", streamed, everywhere, rows * ROW, chip)


def mesh(devices, fsdp: int) -> Mesh:
    shape = (1, fsdp, 1)
    return Mesh(np.array(devices[:fsdp]).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def one_chip(devices) -> Mesh:
    return mesh(devices, 1)


def streamed(mesh, hidden, E, teacher_hidden, Et, labels, weights, table):
    teacher = Teacher(teacher_hidden, Et, table)
    return distill(hidden, E, labels, weights, teacher=teacher, kl_weights_BxL=weights, temperature=2.0, mesh=mesh)[0]


def dense(mesh, hidden, E, teacher_hidden, Et, labels, weights, table):
    """The loss as one would write it: both logit matrices whole."""
    logits = lambda E, h: jnp.einsum("vd,bld->vbl", E, h, preferred_element_type=jnp.float32).reshape(E.shape[0], -1)  # noqa: E731
    z, w = logits(E, hidden), weights.reshape(-1)
    ce = -jnp.take_along_axis(jax.nn.log_softmax(z, axis=0), labels.reshape(1, -1), axis=0)[0]
    p = project(jax.nn.softmax(logits(Et, teacher_hidden) / 2, axis=0), table, VS)
    kl = jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - jax.nn.log_softmax(z / 2, axis=0)), 0), axis=0)
    return jnp.sum(w * ce + w * 4 * kl)


def report(title: str, form, on: Mesh, tokens: int, chip: str) -> None:
    rows = max(1, tokens // ROW)
    shards = Shards.of(on)
    entries = int(VT * SUPPORT)
    per_shard = -(-entries // shards.size // 128) * 128

    def shape(dims, dtype, *spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(on, PartitionSpec(*spec)))

    batch, cut = ("data", "fsdp"), shards.axes or None
    if shards.size == 1:
        head_rows = VT
        ints = (shape((entries,), jnp.int32), shape((entries,), jnp.int32))
        table = ProjectionTable(*ints, shape((entries,), jnp.float32), shape((VT,), jnp.bool_), ints[0])
    else:
        head_rows = per_shard * shards.size
        one = lambda dtype: shape((head_rows,), dtype, cut)  # noqa: E731
        table = PlacedTable(
            one(jnp.int32), one(jnp.int32), one(jnp.float32), one(jnp.bool_), one(jnp.int32), shape((256,), jnp.int32)
        )
    arguments = (
        shape((rows, ROW, DS), jnp.bfloat16, batch),
        shape((VS, DS), jnp.bfloat16, "tensor", "fsdp"),
        shape((rows, ROW, DT), jnp.bfloat16, batch),
        shape((head_rows, DT), jnp.bfloat16, cut),
        shape((rows, ROW), jnp.int32, batch),
        shape((rows, ROW), jnp.float32, batch),
        table,
    )
    gradient_shardings = (arguments[0].sharding, arguments[1].sharding)
    f = jax.jit(jax.value_and_grad(lambda *a: form(on, *a), argnums=(0, 1)), out_shardings=(None, gradient_shardings))
    with jax.set_mesh(on):
        lowered = f.lower(*arguments)
    print(f"\n{title}")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        print("   does not fit:", re.sub(r"\s+", " ", str(error))[:240])
        return
    m = compiled.memory_analysis()
    temporaries, held = m.temp_size_in_bytes / 2**20, m.argument_size_in_bytes / 2**20
    print(f"   temporaries {temporaries:,.0f} MiB, arguments {held:,.0f} MiB")
    flops = tokens * 2 * (head_rows / on.size * DT + 3 * VS / on.size * DS)
    print(f"   matrix products {flops / 1e12:.2f} TFLOP a chip: {1e3 * flops / PEAK[chip][0]:.1f} ms at its peak")
    if form is streamed:
        print(
            f"   block {block_size(VS, Teacher(None, jax.ShapeDtypeStruct((head_rows, DT), jnp.bfloat16), None), on)}"
        )
    for (kind, dims), count in sorted(collectives(compiled.as_text()).items()):
        print(f"   {count} x {kind} {dims}")


def collectives(hlo: str) -> dict[tuple[str, str], int]:
    """Kind and shape of every collective in the program, of a thousand numbers and more."""
    found: collections.Counter = collections.Counter()
    for dims, kind in COLLECTIVE.findall(hlo):
        if np.prod([int(n) for n in re.findall(r"\d+", dims.split("[")[1])] or [1]) >= 1000:
            found[kind, dims] += 1
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The mesh and where arrays lie on it.

Three axes: `data` (whole copies of the model, different rows), `fsdp` (rows differ, parameters are cut), `tensor`
(the same rows, parameters are cut). A parameter states its logical axes; `Rules` says which mesh axis cuts each.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distil_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # rows of a batch are spread over both


@dataclass(frozen=True)
class Rules:
    """Mesh axis for each logical axis of a parameter."""

    layers: str | None = None
    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    mlp: str | None = "tensor"


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices. One axis may be -1: it takes what the others leave.

    Raises UserError if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(
            f"mesh axes {dict(zip(AXES, sizes, strict=True))}: give sizes of at least 1, and at most one -1"
        )
    known = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh axes {dict(zip(AXES, (data, fsdp, tensor), strict=True))} do not fit {len(devices)} devices: "
            "set config.mesh so that data x fsdp x tensor is the number of devices"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_shardings(model: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """A NamedSharding for each parameter of `model`, in the tree of its parameters."""
    return jax.tree.map(
        lambda axes, leaf: place(mesh, axes, leaf.shape, rules),
        model.logical_axes(),
        model.abstract_params(),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def place(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules | None = None
) -> NamedSharding:
    """Where a parameter with these logical axes lies.

    An axis that a mesh axis does not divide stays whole (a head count smaller than the tensor axis, say).
    """
    rules = rules or Rules()
    used = []
    for name, size in zip(axes, shape, strict=True):
        axis = getattr(rules, name) if name else None
        fits = axis is not None and size % mesh.shape[axis] == 0 and axis not in used
        used.append(axis if fits else None)
    return NamedSharding(mesh, PartitionSpec(*used))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process' rows of a batch, as global arrays over the mesh.

    Raises UserError if the mesh cannot share out the rows.
    """
    sharding = batch_sharding(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = len(next(iter(batch.values()))) * jax.process_count()
    if rows % parts:
        raise UserError(
            f"a batch of {rows} rows does not divide among data x fsdp = {parts}: set the batch_size (training or "
            f"evaluation) to a multiple of {parts}, or config.mesh to fewer devices"
        )
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def compiler_options(mesh: Mesh | None) -> dict[str, str]:
    """Options of `jax.jit` for a training step on the devices of the mesh.

    XLA's CPU backend orders a program for concurrency, and then fills the gradient's stacks with zeros before the loss
    is known: they lie beside the head's blocks. Ordered for memory a step takes a third less beside its arguments
    (bench/RESULTS.md). Other backends have no such option.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if platform == "cpu" else {}

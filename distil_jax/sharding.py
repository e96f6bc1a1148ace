"""The mesh and where arrays lie on it.

Three axes: `data` (whole copies of the model, different rows), `fsdp` (rows differ, parameters are cut), `tensor`
(the same rows, parameters are cut). Slices of a TPU pod that only a data-centre network joins are the outermost part of
`data`, so that no parameter is cut across it. A parameter states its logical axes; `Rules` says which mesh axis cuts
each.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distil_jax.errors import UserError, nearest

AXES = ("data", "fsdp", "tensor")
SPREADS = ("fsdp", "tensor", "replicated")
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

    @classmethod
    def of(cls, spread: str) -> "Rules":
        """The rules of a frozen model: "fsdp", cut as one that learns; "tensor", cut over that axis alone;
        "replicated", whole on every device. Raises UserError for another word."""
        if spread not in SPREADS:
            raise UserError(f"teacher.spread is {spread!r}: use one of {', '.join(SPREADS)}{nearest(spread, SPREADS)}")
        if spread == "replicated":
            return cls(vocab=None, embed=None, heads=None, kv_heads=None, mlp=None)
        return cls(embed=None) if spread == "tensor" else cls()


def mesh_of(text: str, devices: list[Any] | None = None) -> Mesh:
    """The mesh that config.mesh describes, as "data:2,fsdp:4" or "slices:2,fsdp:16", over all devices or these.

    An axis that is not named has one device, but for data: it takes what the others leave.
    Raises UserError for anything else, and for a mesh that does not fit the devices.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = part.partition(":")
        if name not in ("slices", *AXES) or name in sizes or not size.lstrip("-").isdigit():
            raise UserError(
                f"config.mesh={text!r}: {part!r} is not one of slices, data, fsdp and tensor with a size, each once, "
                'as in "data:2,fsdp:4,tensor:2"'
            )
        sizes[name] = int(size)
    slices = sizes.pop("slices", 1)
    if -1 not in sizes.values():
        sizes.setdefault("data", -1)
    return make_mesh(**{"data": 1} | sizes, slices=slices, devices=devices)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, slices: int = 1, devices: list[Any] | None = None
) -> Mesh:
    """A mesh over all devices, `slices` x data x fsdp x tensor. One axis may be -1: it takes what the others leave.

    Raises UserError if the axes do not multiply to the number of devices, or the devices are not of as many slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if slices < 1 or len(devices) % slices:
        raise UserError(f"config.mesh: slices:{slices} does not divide {len(devices)} devices")
    if slices > 1:
        of_slice = [[d for d in devices if getattr(d, "slice_index", None) == i] for i in range(slices)]
        if any(len(one) != len(devices) // slices for one in of_slice):
            raise UserError(
                f"config.mesh: slices:{slices}, but the devices do not say that they are of {slices} slices of one size"
            )
        meshes = [make_mesh(data, fsdp, tensor, devices=one).devices for one in of_slice]
        return Mesh(np.concatenate(meshes), AXES, axis_types=(AxisType.Auto,) * 3)
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


def of_state(state: Any, optimizer: optax.GradientTransformation, shardings: Any, mesh: Mesh) -> Any:
    """Where each array of a training state lies: moments and averages as their parameters do, the rest whole."""
    whole = replicated(mesh)
    moments = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, state["opt_state"], shardings, transform_non_params=lambda _: whole
    )
    like_params = {k: shardings for k in ("params", "ema") if k in state}
    others = {k: whole for k in state.keys() - like_params.keys() - {"opt_state"}}
    return like_params | others | {"opt_state": moments}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def places(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of `rows` rows of a batch lie on devices of this process, ascending.

    Raises UserError if the mesh cannot share out the rows.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"a batch of {rows} rows does not divide among data x fsdp = {parts}: set the batch_size (training or "
            f"evaluation) to a multiple of {parts}, or config.mesh to fewer devices"
        )
    held = {index[0].indices(rows) for index in batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()}
    return np.unique(np.concatenate([np.arange(*bounds) for bounds in held]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, rows: int = 0) -> dict[str, jax.Array]:
    """A batch as global arrays over the mesh. It has all of its rows, or of `rows` those at `places(mesh, rows)`.

    Raises UserError as `places`.
    """
    rows = rows or len(next(iter(batch.values())))
    here, sharding = places(mesh, rows), batch_sharding(mesh)
    whole = len(next(iter(batch.values()))) == rows

    def put(values: np.ndarray) -> jax.Array:
        def shard(index):
            wanted = np.arange(rows)[index[0]]
            return values[wanted if whole else np.searchsorted(here, wanted)]

        return jax.make_array_from_callback((rows, *values.shape[1:]), sharding, shard)

    return {name: put(values) for name, values in batch.items()}


def to_host(array: Array) -> np.ndarray:
    """The whole of a global array, on every process; all of them must ask for it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def compiler_options(mesh: Mesh | None) -> dict[str, str]:
    """Options of `jax.jit` for a training step on the devices of the mesh.

    XLA's CPU backend orders a program for concurrency, and then fills the gradient's stacks with zeros before the loss
    is known: they lie beside the head's blocks. Ordered for memory a step takes a third less beside its arguments
    (bench/RESULTS.md). Other backends have no such option.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if platform == "cpu" else {}

"""Hugging Face tensors straight into the shards of stacked parameters.

Every parameter is allocated where it will lie. Then the files are read in their own order, a block of rows at a time,
and of each row only what the devices of this process need; a jitted, donated update writes the block into its place.
Neither a whole tensor nor a whole parameter is ever in host memory.
"""

import functools
import math
from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from distil_jax.errors import UserError
from distil_jax.models.decoder import Model, Params, Weight
from distil_jax.models.tensors import TensorFiles

# Numbers read at once, over the devices of this process: 8 MB in bfloat16. The C library reuses memory of this size;
# larger pieces are mapped anew each time, and clearing their pages made reading several times slower.
BLOCK = 4 << 20


def leaves(model: Model) -> list[tuple[Weight, jax.ShapeDtypeStruct]]:
    """Each row of the name table with the parameter that it fills."""
    abstract = model.abstract_params()
    return [(weight, get(abstract, weight.path)) for weight in model.weights]


def names(weight: Weight, shape: tuple[int, ...]) -> list[str]:
    """The tensors of a parameter of `shape`, in layer order."""
    return [weight.name.format(layer) for layer in range(shape[0])] if weight.stacked else [weight.name]


def layer_shape(weight: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without the layer axis, if it has one."""
    return shape[weight.stacked :]


def get(tree: Params, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree


def rectangle(weight: Weight, shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The part of each Hugging Face tensor that fills shard `index` of a parameter of `shape`.

    A tensor axis is one or several axes of ours, flat. Raises ValueError if the part is not contiguous along it or the
    layer axis is cut: no rule of `distil_jax.sharding` does that.
    """
    bounds = [range(size)[part] for size, part in zip(shape, index, strict=True)]
    if weight.stacked and len(bounds.pop(0)) < shape[0]:
        raise ValueError(f"{weight.name}: the layer axis cannot be cut")
    sizes = layer_shape(weight, shape)
    if weight.inputs is None:
        groups = [[axis] for axis in range(len(sizes))]
    else:
        ours = range(len(sizes))
        groups = [list(ours[weight.inputs :]), list(ours[: weight.inputs])][: len(weight.hf_shape(sizes))]
    return tuple(_flat([bounds[axis] for axis in group], [sizes[axis] for axis in group]) for group in groups)


def _flat(bounds: list[range], sizes: list[int]) -> slice:
    start = 0
    for bound, size in zip(bounds, sizes, strict=True):
        start = start * size + bound.start
    length = math.prod(len(bound) for bound in bounds)
    last = 0
    for bound, size in zip(bounds, sizes, strict=True):
        last = last * size + bound[-1]
    if last - start + 1 != length:
        raise ValueError(f"a shard of {bounds} in {sizes} is not contiguous in the file")
    return slice(start, start + length)


def read_params(model: Model, files: TensorFiles, dtype: np.dtype, shardings: Params | None) -> Params:
    """The parameters of `model` in `dtype`, each on its NamedSharding (None: whole, on the default device).

    files: checked against the model. Raises UserError, naming file and tensor, if a number is not finite in `dtype`.
    """
    # XLA's CPU backend computes bfloat16 in float32 and would take the whole parameter through it at each update.
    devices = jax.devices() if shardings is None else jax.tree.leaves(shardings)[0].mesh.devices.flat
    held = np.dtype(np.uint16) if dtype == jnp.bfloat16 and devices[0].platform == "cpu" else dtype
    params: Params = {}
    fill, destination = {}, {}
    for weight, leaf in leaves(model):
        sharding = None if shardings is None else get(shardings, weight.path)
        tree = params
        for key in weight.path[:-1]:
            tree = tree.setdefault(key, {})
        tree[weight.path[-1]] = jnp.zeros(leaf.shape, held, device=sharding)
        fill[weight] = _filler(weight, leaf.shape, dtype, sharding)
        destination |= {name: (weight, layer, tree) for layer, name in enumerate(names(weight, leaf.shape))}

    def check(name, finite):
        if not all(np.asarray(shard.data).all() for shard in finite.addressable_shards):
            raise UserError(f"{files.where(name)} holds a number that is not finite in {dtype.name}; fetch it again")

    pending = deque()  # a look at the block before the last keeps the host one block ahead of the devices, no more
    for name in files:
        weight, layer, tree = destination[name]
        key = weight.path[-1]
        for written, finite in fill[weight](tree[key], functools.partial(files.read, name), layer):
            tree[key] = written
            pending.append((name, finite))
            if len(pending) > 1:
                check(*pending.popleft())
    for entry in pending:
        check(*entry)
    return params if held == dtype else jax.tree.map(functools.partial(_reinterpret, dtype=dtype), params)


def _reinterpret(array: jax.Array, dtype: np.dtype) -> jax.Array:
    """The same memory under another dtype; CPU only, where an array on the host and one on the device can share it."""
    if isinstance(array.sharding, SingleDeviceSharding):
        return jax.device_put(np.asarray(array).view(dtype))
    pieces = [jax.device_put(np.asarray(shard.data).view(dtype), shard.device) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


def _filler(weight: Weight, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> Callable:
    """fill(parameter, read, layer) writes one tensor into the parameter block by block, giving (parameter, whether the
    block was finite) after each; the parameter handed in is donated.

    A block runs along the first output axis of our array, so that it is a range of rows in the file.
    """
    if sharding is None:
        parts = {None: rectangle(weight, shape, (slice(None),) * len(shape))}
        local = layer_shape(weight, shape)
    else:
        indices = sharding.addressable_devices_indices_map(shape)
        parts = {device: rectangle(weight, shape, index) for device, index in indices.items()}
        local = layer_shape(weight, sharding.shard_shape(shape))
    axis = weight.inputs or 0
    count = local[axis]
    rows_each = 1 if weight.inputs is None else math.prod(local[axis + 1 :])
    step = math.ceil(count / math.ceil(math.prod(local) * len(parts) / BLOCK))
    outputs_first = (*range(len(local) - axis, len(local)), *range(len(local) - axis))
    write = _writer(sharding, dtype, weight.stacked, axis)

    def fill(parameter, read, layer):
        for start in range(0, count, step):
            start = min(start, count - step)  # the last block overlaps the one before: only one shape is compiled
            wanted = {}
            for device, (rows, *rest) in parts.items():
                first = rows.start + start * rows_each
                wanted[device] = (slice(first, first + step * rows_each), *rest)
            once = {str(part): part for part in wanted.values()}  # slices do not hash before Python 3.12
            blocks = {}
            for key, block in zip(once, read(once.values()), strict=True):
                # Only a view: the copy to the device transposes, four times faster than XLA's CPU backend would.
                blocks[key] = block.reshape(step, *local[axis + 1 :], *local[:axis]).transpose(outputs_first)[None]
            pieces = [jax.device_put(blocks[str(part)], device) for device, part in wanted.items()]
            if sharding is None:
                (whole,) = pieces
            else:
                over_devices = NamedSharding(sharding.mesh, PartitionSpec(sharding.mesh.axis_names))
                stacked = (sharding.mesh.size, *pieces[0].shape[1:])
                whole = jax.make_array_from_single_device_arrays(stacked, over_devices, pieces)
            parameter, finite = write(parameter, whole, np.int32(layer), np.int32(start))
            yield parameter, finite

    return fill


@functools.lru_cache(maxsize=64)
def _writer(sharding: NamedSharding | None, dtype: np.dtype, stacked: bool, axis: int) -> Callable:
    """write(parameter, blocks, layer, start) -> (parameter, finite [devices]); parameter in `dtype` or its bits.

    blocks: [devices, ...], each written to the device's own shard of the layer, from `start` along `axis`.
    """

    def write(parameter, block, layer, start):
        block = (block if stacked else block[0]).astype(dtype)
        where = [jnp.int32(0)] * block.ndim
        where[0] = layer if stacked else where[0]
        where[axis + stacked] = start
        bits = block if parameter.dtype == dtype else jax.lax.bitcast_convert_type(block, parameter.dtype)
        return jax.lax.dynamic_update_slice(parameter, bits, where), jnp.isfinite(block).all()[None]

    if sharding is None:
        return jax.jit(write, donate_argnums=0)
    devices, everywhere = PartitionSpec(sharding.mesh.axis_names), PartitionSpec()
    mapped = jax.shard_map(
        write,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, devices, everywhere, everywhere),
        out_specs=(sharding.spec, devices),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0, out_shardings=(sharding, NamedSharding(sharding.mesh, devices)))

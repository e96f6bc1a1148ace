"""What chips can do, from their makers' data sheets: memory, arithmetic, bandwidth.

Sources: Google Cloud's pages of TPU v4, v5e, v5p, v6e and TPU7x; NVIDIA's data sheets (dense bfloat16, no sparsity).
A `Chip` is one JAX device: half a chip for TPU7x, whose two cores are devices of their own.
"""

from typing import Any, NamedTuple

from distil_jax.errors import UserError, nearest


class Chip(NamedTuple):
    """One device. links is the bandwidth to its neighbours in the slice, all links together."""

    name: str  # as topologies are named: "v5e" in "v5e:4x4"
    kind: str  # device_kind, as JAX reports it
    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    links: float  # bytes/s, one direction


CHIPS = (
    Chip("v4", "TPU v4", 275e12 / 2, 32 * 2**30 / 2, 1228e9 / 2, 300e9 / 2 / 2),
    Chip("v5e", "TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9 / 2),
    Chip("v5p", "TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9 / 2),
    Chip("v6e", "TPU v6 lite", 918e12, 32 * 2**30, 1640e9, 448e9 / 2),
    Chip("tpu7x", "TPU7x", 2307e12 / 2, 192 * 2**30 / 2, 7380e9 / 2, 1200e9 / 2 / 2),
    Chip("a100", "NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9),
    Chip("h100", "NVIDIA H100 80GB HBM3", 989e12, 80e9, 3350e9, 450e9),
    Chip("l4", "NVIDIA L4", 121e12, 24e9, 300e9, 32e9),
    Chip("4090", "NVIDIA GeForce RTX 4090", 165e12, 24e9, 1008e9, 32e9),
)


def named(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4". Raises UserError for one that is not listed."""
    name = topology.partition(":")[0]
    found = [chip for chip in CHIPS if chip.name == name]
    if not found or ":" not in topology:
        names = [chip.name for chip in CHIPS if chip.kind.startswith("TPU")]
        raise UserError(
            f"no topology {topology!r}{nearest(name, names)}: it is one of {', '.join(names)} with its shape in chips, "
            "as v5e:4x4, v5p:2x2x1 or v6e:2x4"
        )
    return found[0]


def of(device: Any) -> Chip | None:
    """The chip that a device is; None for one that is not listed, a CPU for instance."""
    return next((chip for chip in CHIPS if chip.kind == device.device_kind), None)

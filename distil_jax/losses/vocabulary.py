"""Softmaxes over a vocabulary that may be spread over devices, vocabulary first: `[V, N]`.

Inside `jax.shard_map` a device holds some rows of each column. What a column needs of the other devices is a maximum
and a sum, so nothing of the size of the logits ever moves (Shoeybi et al. 2019, "Megatron-LM", section 3, for the
cross-entropy; here for every reduction that the heads make).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

LOWEST = float(np.finfo(np.float32).min)  # the logit of what is no token; finite, so that differences stay numbers


@dataclass(frozen=True)
class Shards:
    """The rows of a vocabulary dealt out over mesh axes: shard r of S holds ids r, r + S, r + 2 S, ...

    Dealt and not cut: tokens with neighbouring ids are alike, and the short, frequent ones that many teacher tokens
    become would all lie on one device. With no axes it is the whole vocabulary on one device.
    """

    axes: tuple[str, ...] = ()
    size: int = 1

    @classmethod
    def of(cls, mesh: Mesh | None) -> "Shards":
        """Over every axis of the mesh that cuts parameters."""
        axes = tuple(a for a in ("fsdp", "tensor") if mesh is not None and mesh.shape.get(a, 1) > 1)
        return cls(axes, int(np.prod([mesh.shape[a] for a in axes])) if axes else 1)

    def index(self) -> Int[Array, ""] | int:
        """Which shard this device has."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    @property
    def stored(self) -> PartitionSpec:
        """How a padded matrix [V, D] lies between steps: rows over tensor, columns over fsdp (sharding.Rules)."""
        return PartitionSpec(*(axis if axis in self.axes else None for axis in ("tensor", "fsdp")))

    def padded(self, matrix_VxD: Float[Array, "V D"], mesh: Mesh | None) -> Float[Array, "Vp Dp"]:
        """The matrix with rows and columns of zeros that make it divide."""
        if not self.axes:
            return matrix_VxD
        V, D = matrix_VxD.shape
        rows = self.size * mesh.shape.get("tensor", 1)
        return jnp.pad(matrix_VxD, ((0, -V % rows), (0, -D % mesh.shape.get("fsdp", 1))))

    def deal(self, part: Float[Array, "Vt Df"]) -> Float[Array, "Vs D"]:
        """From a device's part of a stored matrix to its whole rows. An exchange of one part's size over each axis."""
        if "tensor" in self.axes:  # rows t V/T + j to rows j T + t
            part = _exchange(part, "tensor", back=False, columns=False)
        return _exchange(part, "fsdp", back=False, columns=True) if "fsdp" in self.axes else part

    def collect(self, rows: Float[Array, "Vs D"]) -> Float[Array, "Vt Df"]:
        """The way back."""
        if "fsdp" in self.axes:
            rows = _exchange(rows, "fsdp", back=True, columns=True)
        return _exchange(rows, "tensor", back=True, columns=False) if "tensor" in self.axes else rows

    def sum(self, x: Array) -> Array:
        """The sum over all shards."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: Array) -> Array:
        """The maximum over all shards; carries no gradient."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def ids(self, rows: int) -> Int[Array, " V"]:
        """The token ids of this device's rows."""
        return jnp.arange(rows, dtype=jnp.int32) * self.size + self.index()

    def log_sum_exp(self, z_VxN: Float[Array, "V N"]) -> Float[Array, " N"]:
        """`log sum_v exp z_v` of each column, over all shards."""
        largest_N = self.max(jnp.max(z_VxN, axis=0))
        return largest_N + jnp.log(self.sum(jnp.sum(jnp.exp(z_VxN - largest_N[None]), axis=0)))

    def take(self, z_VxN: Float[Array, "V N"], ids_N: Int[Array, " N"]) -> Float[Array, " N"]:
        """The entry of each column that belongs to a token id."""
        found_N = jnp.take_along_axis(z_VxN, ids_N[None] // self.size, axis=0)[0]
        return found_N if self.size == 1 else self.sum(jnp.where(ids_N % self.size == self.index(), found_N, 0))

    def argmax(self, z_VxN: Float[Array, "V N"]) -> Int[Array, " N"]:
        """The token id of the largest entry of each column, the smallest id where several are largest."""
        local_N = jnp.argmax(z_VxN, axis=0).astype(jnp.int32)
        if self.size == 1:
            return local_N
        value_N = jnp.take_along_axis(z_VxN, local_N[None], axis=0)[0]
        id_N = local_N * self.size + self.index()
        none = jnp.iinfo(jnp.int32).max
        return -self.max(-jnp.where(value_N == self.max(value_N), id_N, none))

    def top_k(self, z_VxN: Float[Array, "V N"], k: int) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
        """The k largest entries of each column, descending, and their token ids: of each shard first, then of those."""
        values_Nxk, rows_Nxk = jax.lax.top_k(z_VxN.T, min(k, z_VxN.shape[0]))
        if self.size == 1:
            return values_Nxk, rows_Nxk
        ids_Nxk = rows_Nxk * self.size + self.index()
        values, ids = (jax.lax.all_gather(x, self.axes, axis=1, tiled=True) for x in (values_Nxk, ids_Nxk))
        values_Nxk, best = jax.lax.top_k(values, min(k, values.shape[1]))
        return values_Nxk, jnp.take_along_axis(ids, best, axis=1)


def _exchange(x: Float[Array, "R C"], axis: str, *, back: bool, columns: bool) -> Array:
    """Each device of an axis of n gives every n-th row to one of them, and joins what it gets by columns, or one below
    the other; or `back` again."""
    n = jax.lax.axis_size(axis)
    R, C = x.shape
    if not back:
        given = x.reshape(R // n, n, C)  # group of rows i goes to device i
        if columns:
            return jax.lax.all_to_all(given, axis, 1, 2, tiled=True).reshape(R // n, n * C)
        return jax.lax.all_to_all(given, axis, 1, 0, tiled=True).reshape(R, C)
    if columns:
        return jax.lax.all_to_all(x.reshape(R, 1, C), axis, 2, 1, tiled=True).reshape(R * n, C // n)
    return jax.lax.all_to_all(x.reshape(R, 1, C), axis, 0, 1, tiled=True).reshape(R, C)


def text_rows(z_VxN: Float[Array, "V N"], text_vocab: int, shards: Shards = Shards()) -> Float[Array, "V N"]:  # noqa: B008
    """Removes the rows of a head that are no tokens (padding, image tokens) from every softmax."""
    if z_VxN.shape[0] * shards.size == text_vocab:
        return z_VxN
    return jnp.where((shards.ids(z_VxN.shape[0]) < text_vocab)[:, None], z_VxN, LOWEST)


def floor_of_largest(
    x_VxN: Float[Array, "V N"],
    weights_VxN: Float[Array, "V #N"],
    enough: float,
    total: Callable[[Array], Array] = lambda x: x,
) -> tuple[UInt32[Array, "V N"], UInt32[Array, " N"]]:
    """(x as whole numbers of the same order, the largest of them such that it and what is above have `enough` weight).

    Weights of 1 find the `enough`-th largest of each column, probabilities the smallest set with that mass. Nothing is
    sorted: 32 counts, one for each bit of a float, and with `total` a sum over shards nothing is gathered either.
    """
    ordered = _ordered(x_VxN)

    def bit(i, floor_N):
        higher_N = floor_N | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached_N = total(jnp.sum(jnp.where(ordered >= higher_N[None], weights_VxN, 0), axis=0)) >= enough
        return jnp.where(reached_N, higher_N, floor_N)

    return ordered, jax.lax.fori_loop(0, 32, bit, jnp.zeros(x_VxN.shape[1], jnp.uint32))


def _ordered(x: Float[Array, "V N"]) -> UInt32[Array, "V N"]:
    """Floats as whole numbers of the same order: the sign bit flipped, negative numbers reversed."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

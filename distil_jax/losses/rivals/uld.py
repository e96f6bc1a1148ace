"""Universal logit distillation: both distributions sorted, whatever the tokens are.

    D = sum_i |q_(i) - s_(i)|

q_(1) >= q_(2) >= ... over all tokens, the shorter vocabulary filled up with zeros. Source: Boizard et al. 2024,
"Towards Cross-Tokenizer Distillation", arXiv 2402.12030, equation 4 (the closed form of an optimal transport with a
uniform cost). The paper compares position i with position i, after cutting both answers to one length; that compares
different contexts as soon as one tokenization is finer, so here it is at root positions, where both contexts are the
same bytes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from distil_jax.losses.rivals import positions, vocabularies
from distil_jax.losses.rivals.stream import Sides, Told, compare, log_softmax
from distil_jax.tokens.bytes import ByteTable


class Tables(NamedTuple):
    mapped: Bool[Array, " Vt"]


def tables(teacher: ByteTable, student: ByteTable) -> Tables:
    """From the bytes of both vocabularies."""
    return Tables(jnp.asarray(vocabularies.mapped(teacher, student)))


def taught(tables: Tables, batch: dict[str, Array]) -> Bool[Array, "B L"]:
    """Root positions."""
    return positions.roots(batch)


def told(tables: Tables, learned: None, sides: Sides, batch: dict[str, Array], temperature: Array, **options) -> Told:
    """D at each taught position."""

    def cells(z_VsxN, t_VtxN, more, shared):
        q_VtxN, s_VsxN = jnp.exp(log_softmax(t_VtxN, temperature)), jnp.exp(log_softmax(z_VsxN, temperature))
        return sorted_l1(q_VtxN, s_VsxN)

    return Told(compare(cells, tables.mapped, sides, batch, taught(tables, batch), **options))


@jax.custom_jvp
def sorted_l1(a_UxN: Float[Array, "U N"], b_VxN: Float[Array, "V N"]) -> Float[Array, " N"]:
    """L1 distance of two sets of masses (none below 0) in descending order, the smaller one filled up with zeros."""
    return jnp.sum(jnp.abs(_apart(_in_order(a_UxN), _in_order(b_VxN))), axis=1)


@sorted_l1.defjvp
def _sorted_l1_jvp(primals, tangents):
    """A mass moves its distance by the sign at the place that it has in the order. Sorting a permutation along, as the
    derivative of jnp.sort does, takes four times as long as looking the places up (bench/sorting.py)."""
    masses = [_in_order(x) for x in primals]
    apart_NxM = _apart(*masses)
    sign_NxM, moved_N = jnp.sign(apart_NxM), jnp.zeros(len(apart_NxM), apart_NxM.dtype)
    for of, x_VxN, ordered_NxV, t_VxN in zip((1, -1), primals, masses, tangents, strict=True):
        place_NxV = jax.vmap(functools.partial(jnp.searchsorted, method="scan_unrolled"))(ordered_NxV, _bits(x_VxN))
        sign_NxV = of * jnp.take_along_axis(sign_NxM[:, -len(x_VxN) :], place_NxV, axis=1)
        moved_N += jnp.sum(sign_NxV * t_VxN.T, axis=1)
    return jnp.sum(jnp.abs(apart_NxM), axis=1), moved_N


def _bits(x_VxN: Float[Array, "V N"]) -> Int[Array, "N V"]:
    """Masses as integers of the same order, which XLA's CPU backend sorts ten times as fast as floats."""
    return jax.lax.bitcast_convert_type(x_VxN.T, jnp.int64 if x_VxN.dtype == jnp.float64 else jnp.int32)


def _in_order(x_VxN: Float[Array, "V N"]) -> Int[Array, "N V"]:
    return jax.lax.sort(_bits(x_VxN), dimension=1, is_stable=False)


def _apart(a_NxU: Int[Array, "N U"], b_NxV: Int[Array, "N V"]) -> Float[Array, "N M"]:
    """The differences of two sets in ascending order, the largest against the largest."""
    size = max(a_NxU.shape[1], b_NxV.shape[1])
    dtype = jnp.float64 if a_NxU.dtype == jnp.int64 else jnp.float32
    a, b = (jax.lax.bitcast_convert_type(jnp.pad(x, ((0, 0), (size - x.shape[1], 0))), dtype) for x in (a_NxU, b_NxV))
    return a - b

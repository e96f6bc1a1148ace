"""Universal logit distillation: both distributions sorted, whatever the tokens are.

    D = sum_i |q_(i) - s_(i)|

q_(1) >= q_(2) >= ... over all tokens, the shorter vocabulary filled up with zeros. Source: Boizard et al. 2024,
"Towards Cross-Tokenizer Distillation", arXiv 2402.12030, equation 4 (the closed form of an optimal transport with a
uniform cost). The paper compares position i with position i, after cutting both answers to one length; that compares
different contexts as soon as one tokenization is finer, so here it is at root positions, where both contexts are the
same bytes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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


def sorted_l1(a_UxN: Float[Array, "U N"], b_VxN: Float[Array, "V N"]) -> Float[Array, " N"]:
    """L1 distance of two sets of masses in descending order, the smaller one filled up with zeros."""
    both = sorted((a_UxN, b_VxN), key=len)
    fewer, rest = (jnp.sort(x, axis=0, descending=True) for x in both)
    many = len(fewer)
    return jnp.sum(jnp.abs(fewer - rest[:many]), axis=0) + jnp.sum(rest[many:], axis=0)

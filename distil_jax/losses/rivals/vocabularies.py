"""What the rivals know of two vocabularies beforehand, from the exact bytes of their tokens. All of it is for the host.

Control tokens correspond by role, as everywhere in the project (tokens/bytes.first_pieces).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from distil_jax.tokens.bytes import ByteTable, RoundTripError


class Lengths(NamedTuple):
    """Bytes of each token; 0 for control tokens."""

    student_Vs: Int[Array, " Vs"]
    teacher_Vt: Int[Array, " Vt"]


def lengths(teacher: ByteTable, student: ByteTable) -> Lengths:
    """Bytes of each token of both vocabularies."""
    return Lengths(jnp.asarray(student.lengths), jnp.asarray(teacher.lengths))


def by_role(teacher: ByteTable, student: ByteTable) -> dict[int, int]:
    """Teacher id -> student id of control tokens with one role. A token that is eos among others counts as eos."""
    roles = sorted(set(teacher.roles) & set(student.roles), key=lambda role: role == "eos")
    return {teacher.roles[role]: student.roles[role] for role in roles}


def mapped(teacher: ByteTable, student: ByteTable) -> Bool[np.ndarray, " Vt"]:
    """The teacher tokens that stand for text or have a counterpart of their role: those in its softmax."""
    known = teacher.is_text.copy()
    known[[teacher.roles[role] for role in set(teacher.roles) & set(student.roles)]] = True
    return known


def matched(teacher: ByteTable, student: ByteTable) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """(teacher ids, student ids) of the tokens with the same bytes or the same role, one to one, by teacher id.

    Where two ids share the bytes (110 byte strings of Gemma 3), the one that the encoder emits counts; where two
    control tokens have one counterpart, eos does.
    """
    eos = teacher.roles.get("eos")
    one_each = {s: t for t, s in sorted(by_role(teacher, student).items(), key=lambda pair: pair[0] == eos)}
    pairs = {t: s for s, t in one_each.items()}
    for t in np.flatnonzero(teacher.is_text).tolist():
        piece = teacher.token_bytes(t)
        s = student.id_of(piece)
        if s is not None and teacher.id_of(piece) == t:
            pairs[t] = s
    teacher_ids = sorted(pairs)
    return np.array(teacher_ids, np.int32), np.array([pairs[t] for t in teacher_ids], np.int32)


def longest_prefixes(teacher: ByteTable, student: ByteTable) -> Int[np.ndarray, " Vt"]:
    """For each teacher token the longest student token that its bytes begin with, -1 where there is none."""
    ids = np.full(teacher.vocab_size, -1, np.int32)
    for t, s in by_role(teacher, student).items():
        ids[t] = s
    for t in np.flatnonzero(teacher.is_text).tolist():
        found = student.longest_prefix(teacher.token_bytes(t))
        ids[t] = -1 if found is None else found
    return ids


def pieces(of: ByteTable, by: ByteTable) -> list[list[int]]:
    """For each token `of` one vocabulary, its bytes as tokens `by` the other; a control token is that of its role.

    As the other tokenizer encodes them; bytes that are not text alone are cut into longest prefixes. Empty where the
    other vocabulary has nothing.
    """
    out: list[list[int]] = [[] for _ in range(of.vocab_size)]
    for i, j in by_role(of, by).items():
        out[i] = [j]
    text = np.flatnonzero(of.is_text).tolist()
    split = []
    for i in text:
        same = by.id_of(of.token_bytes(i))
        if same is None:
            split.append(i)
        else:
            out[i] = [same]
    texts = [of.token_bytes(i).decode(errors="surrogateescape") for i in split]
    for i, encoded in zip(split, by.try_encode_batch(texts), strict=True):
        out[i] = _greedy(of.token_bytes(i), by) if isinstance(encoded, RoundTripError) else encoded.tolist()
    return out


def _greedy(piece: bytes, table: ByteTable) -> list[int]:
    ids: list[int] = []
    while piece:
        first = table.longest_prefix(piece)
        if first is None:
            return []
        ids.append(first)
        piece = piece[len(table.token_bytes(first)) :]
    return ids

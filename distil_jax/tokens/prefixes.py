"""What the bytes of tokens say inside tokens: the tables behind targets at positions that are no shared boundary.

All tables are flat over (token, bytes before), one entry for each byte of each token: `start[v] + o` is where token v
stands with o of its bytes already written.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from distil_jax.tokens.bytes import ByteTable, first_piece_of

PerTeacher = Int32[np.ndarray, " Vt"]
PerStudent = Int32[np.ndarray, " Vs"]
PerTeacherByte = Int32[np.ndarray, " St"]
PerStudentByte = Int32[np.ndarray, " Ss"]
Splits = Int32[np.ndarray, " P"]


class PrefixTables(NamedTuple):
    """Of a teacher's and a student's vocabulary; 20 to 40 MB for Gemma 3 and Llama 3."""

    start: PerTeacher
    length: PerTeacher  # bytes; 0 for control tokens
    rank: PerTeacher  # in the order of the bytes; tokens that begin with the same bytes are neighbours
    low: PerTeacherByte  # ranks [low, high) of the teacher tokens that begin with the o bytes already written
    high: PerTeacherByte
    piece: PerTeacherByte  # first student token of the bytes after them; -1: none
    student_start: PerStudent
    student_length: PerStudent
    split_low: PerStudentByte  # [low, high) in `split_*`: the student tokens that begin with the same o bytes and go on
    split_high: PerStudentByte  # with exactly one teacher token
    split_teacher: Splits  # that teacher token, ascending in a range
    split_student: Splits

    @classmethod
    def build(cls, teacher: ByteTable, student: ByteTable) -> "PrefixTables":
        """Seconds for vocabularies of 10^5 tokens."""
        tokens = [teacher.token_bytes(v) for v in range(teacher.vocab_size)]
        low, high, rank = _prefix_ranges(tokens)
        suffixes = [whole[o:] for whole in tokens for o in range(1, len(whole))]
        distinct = sorted(set(suffixes))
        first = dict(zip(distinct, first_piece_of(distinct, student).tolist(), strict=True))
        start = _starts(teacher.lengths)
        piece = np.full(len(low), -1, np.int32)
        inside = np.ones(len(low), bool)
        inside[start[teacher.lengths > 0]] = False
        piece[inside] = [first[suffix] for suffix in suffixes]
        return cls(
            start, teacher.lengths, rank, low, high, piece,
            _starts(student.lengths), student.lengths, *_splits(teacher, student),
        )  # fmt: skip


def _starts(lengths: np.ndarray) -> np.ndarray:
    return (np.cumsum(lengths, dtype=np.int64) - lengths).astype(np.int32)


def _prefix_ranges(tokens: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high, rank): for each token and each number of its bytes, the ranks of the tokens that begin with these."""
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    rank = np.empty(len(tokens), np.int32)
    rank[order] = np.arange(len(tokens), dtype=np.int32)
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    start, in_order = _starts(lengths), lengths[order]
    shared = np.zeros(len(tokens), np.int64)  # bytes that a token shares with the one before it
    for r in range(1, len(tokens)):
        a, b = tokens[order[r - 1]], tokens[order[r]]
        n = min(len(a), len(b))
        while a[:n] != b[:n]:
            n -= 1
        shared[r] = n
    low, high = (np.zeros(int(lengths.sum()), np.int32) for _ in range(2))
    places, ranks = start[order], np.arange(len(tokens))
    for o in range(int(lengths.max(initial=0))):
        has = in_order > o
        begins = np.maximum.accumulate(np.where(shared < o, ranks, 0))
        ends = np.where(np.append(shared[1:] < o, True), ranks + 1, len(tokens))
        ends = np.minimum.accumulate(ends[::-1])[::-1]
        low[places[has] + o], high[places[has] + o] = begins[has], ends[has]
    return low, high, rank


def _splits(teacher: ByteTable, student: ByteTable) -> tuple[np.ndarray, ...]:
    """Student tokens cut in two, where the second part is one teacher token: grouped by the first part."""
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for u in np.flatnonzero(student.is_text).tolist():
        whole = student.token_bytes(u)
        for n in range(1, len(whole)):
            v = teacher.id_of(whole[n:])
            if v is not None:
                groups.setdefault(whole[:n], []).append((v, u))
    low, pairs = {}, []
    for part, of_part in groups.items():
        low[part] = len(pairs)
        pairs += sorted(of_part)
    start = _starts(student.lengths)
    split_low, split_high = (np.zeros(int(student.lengths.sum()), np.int32) for _ in range(2))
    for u in np.flatnonzero(student.is_text).tolist():
        whole = student.token_bytes(u)
        for n in range(1, len(whole)):
            if whole[:n] in groups:
                split_low[start[u] + n] = low[whole[:n]]
                split_high[start[u] + n] = low[whole[:n]] + len(groups[whole[:n]])
    teacher_of, student_of = np.array(pairs or [(0, 0)], np.int32).T
    return split_low, split_high, teacher_of, student_of

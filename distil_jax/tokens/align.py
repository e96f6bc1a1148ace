"""The boundary walker: where each student token stands in the teacher's tokenization of the same bytes.

Seen from a student token with bytes [s, e), let i be the teacher token that contains byte s:

  ROOT      s is the first byte of i and e does not pass the end of i: both tokenizations have a boundary at s.
  INTERIOR  s lies inside i and e does not pass the end of i.
  CROSSING  e passes the end of i, wherever s lies.
  NONE      the token has no bytes (control tokens), or nothing on the other side contains it.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int8, Int32

from distil_jax.tokens.bytes import ByteTable, Ids, RoundTripError

NONE, ROOT, INTERIOR, CROSSING = 0, 1, 2, 3
ROLES = ("none", "root", "interior", "crossing")  # name of each code
CLASSES = ("word", "digit", "whitespace", "punctuation", "byte")

StudentIds = Int32[np.ndarray, "Ts"]
TeacherIds = Int32[np.ndarray, "Tt"]
StudentRoles = Int8[np.ndarray, "Ts"]
StudentInts = Int32[np.ndarray, "Ts"]
IdClasses = Int8[np.ndarray, "V"]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Both tokenizations of one text, and for each student token its place in the teacher's.

    role: int8[Ts], NONE, ROOT, INTERIOR or CROSSING.
    teacher_index: int32[Ts], index of the teacher token that contains the token's first byte; -1 where role is NONE.
    offset: int32[Ts], bytes of that teacher token before the student token; 0 where the role is NONE.
    student_ids: int32[Ts].  teacher_ids: int32[Tt].
    """

    role: StudentRoles
    teacher_index: StudentInts
    offset: StudentInts
    student_ids: StudentIds
    teacher_ids: TeacherIds


def align(text: str, *, student: ByteTable, teacher: ByteTable) -> Alignment:
    """Encode `text` with both tokenizers and align. RoundTripError if either cannot give the text back."""
    return align_ids(student.encode(text), teacher.encode(text), student, teacher)


def align_ids(student_ids: StudentIds, teacher_ids: TeacherIds, student: ByteTable, teacher: ByteTable) -> Alignment:
    """Align two tokenizations of the same bytes. Control tokens may stand anywhere: they have no bytes.

    Raises RoundTripError if the bytes differ.
    """
    student_ids = np.asarray(student_ids, np.int32)
    teacher_ids = np.asarray(teacher_ids, np.int32)
    if not np.array_equal(student.gather_bytes(student_ids), teacher.gather_bytes(teacher_ids)):
        raise RoundTripError(
            f"the {len(student_ids)} student tokens and {len(teacher_ids)} teacher tokens are not the same bytes: "
            "encode the same text with both tables"
        )
    length = student.lengths[student_ids]
    has_bytes = length > 0
    if not has_bytes.any():
        zeros = np.zeros(len(student_ids), np.int32)
        return Alignment(zeros.astype(np.int8), zeros - 1, zeros, student_ids, teacher_ids)
    end = np.cumsum(length, dtype=np.int32)
    start = end - length
    teacher_end = np.cumsum(teacher.lengths[teacher_ids], dtype=np.int32)
    # First teacher token that ends after byte s. Those without bytes end where their predecessor does: never chosen.
    index = np.searchsorted(teacher_end, np.where(has_bytes, start, 0), side="right").astype(np.int32)
    offset = start - (teacher_end - teacher.lengths[teacher_ids])[index]
    role = np.where(end > teacher_end[index], CROSSING, np.where(offset == 0, ROOT, INTERIOR))
    return Alignment(
        role=np.where(has_bytes, role, NONE).astype(np.int8),
        teacher_index=np.where(has_bytes, index, -1).astype(np.int32),
        offset=np.where(has_bytes, offset, 0).astype(np.int32),
        student_ids=student_ids,
        teacher_ids=teacher_ids,
    )


def coverage(alignments: Iterable[Alignment], student: ByteTable) -> dict[str, dict[str, int]]:
    """Student tokens counted by role, for all text tokens and by class of token.

    Returns {"all" | a name of CLASSES: {"tokens", "root", "interior", "crossing", "crossing_at_boundary",
    "one_to_one": n}}. The first is the sum of the next three; "crossing_at_boundary" are the crossings that begin where
    a teacher token does, "one_to_one" the roots that are exactly one teacher token. Tokens without bytes do not count.
    """
    names = ("all", *CLASSES)
    counts = np.zeros((len(names), len(ROLES) + 2), np.int64)
    alignments = list(alignments)
    present = np.unique(np.concatenate([a.student_ids for a in alignments] or [np.zeros(0, np.int32)]))
    classes = token_classes(student, present)
    for a in alignments:
        text = a.role != NONE
        role, kind, index = a.role[text].astype(np.int64), classes[a.student_ids[text]], a.teacher_index[text]
        # The next text token starts another teacher token at offset 0, and so did this one: a whole teacher token.
        next_offset = np.append(a.offset[text][1:], 0)
        next_index = np.append(index[1:], -1)
        single = (role == ROOT) & (next_offset == 0) & (next_index != index)
        at_boundary = (role == CROSSING) & (a.offset[text] == 0)
        for row, chosen in enumerate([np.ones_like(role, bool), *(kind == k for k in range(len(CLASSES)))]):
            counts[row, : len(ROLES)] += np.bincount(role[chosen], minlength=len(ROLES))
            counts[row, -2:] += int(at_boundary[chosen].sum()), int(single[chosen].sum())
    return {
        name: {"tokens": int(row[:-2].sum())}
        | {ROLES[role]: int(row[role]) for role in (ROOT, INTERIOR, CROSSING)}
        | {"crossing_at_boundary": int(row[-2]), "one_to_one": int(row[-1])}
        for name, row in zip(names, counts, strict=True)
    }


def token_classes(table: ByteTable, ids: Ids | None = None) -> IdClasses:
    """Index into CLASSES of every id, or of these; ids that are not text, and all others, count as "byte".

    The first class that holds, in this order: not valid UTF-8 by itself: byte; with a digit: digit; with a letter or
    mark: word; nothing but space and control or invisible characters: whitespace; else: punctuation (and symbols).
    """
    codes = np.full(table.vocab_size, CLASSES.index("byte"), np.int8)
    ids = np.flatnonzero(table.is_text) if ids is None else ids[table.is_text[ids]]
    for i in ids.tolist():
        try:
            text = table.token_bytes(i).decode()
        except UnicodeDecodeError:
            continue
        codes[i] = CLASSES.index(_class_of(text))
    return codes


def _class_of(text: str) -> str:
    if any(c.isdigit() for c in text):
        return "digit"
    if any(c.isalpha() for c in text):
        return "word"
    categories = {unicodedata.category(c)[0] for c in text}  # M mark, Z separator, C control or format
    if "M" in categories:
        return "word"
    return "whitespace" if categories <= {"Z", "C"} else "punctuation"

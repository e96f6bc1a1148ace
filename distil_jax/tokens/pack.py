"""Documents as aligned examples, and examples packed into rows of fixed shape.

An example keeps plain token order. A packed row is shifted once, here, into prediction coordinates: position p holds an
input token, and targets, weights, role and offset at p speak about the next token of the same segment.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Int8, Int32

from distil_jax.errors import UserError
from distil_jax.tokens.align import NONE, ROOT, align_ids
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.chat import NOTHING, Template

StudentTokens = Int32[np.ndarray, "ns"]
StudentFlags = Bool[np.ndarray, "ns"]
StudentRoles = Int8[np.ndarray, "ns"]
TeacherTokens = Int32[np.ndarray, "nt"]
TeacherFlags = Bool[np.ndarray, "nt"]
_ALIGN_ROWS = 1024  # documents aligned in one pass; bounds the memory of a large batch
Rows = dict[str, np.ndarray]  # field -> int32[R, Ls] or int32[R, Lt]

STUDENT_FIELDS = (
    "student_tokens",
    "student_segment_ids",
    "student_positions",
    "student_targets",
    "student_weights",
    "role",
    "teacher_position",
    "offset",
    "specialty",
    "document",
)
TEACHER_FIELDS = (
    "teacher_tokens",
    "teacher_segment_ids",
    "teacher_positions",
    "teacher_targets",
    "teacher_weights",
)


class Example(TypedDict):
    """One document in both tokenizations.

    *_supervised marks the tokens to learn (completion and eos; in a conversation what the assistant says and the ends
    of its turns), in their own place. teacher_index is the index in teacher_tokens of the token that contains the
    student token's first byte (-1 for bos and wherever role is NONE); offset counts the bytes before it in that token.
    """

    student_tokens: StudentTokens
    student_supervised: StudentFlags
    teacher_tokens: TeacherTokens
    teacher_supervised: TeacherFlags
    role: StudentRoles
    teacher_index: StudentTokens
    offset: StudentTokens
    specialty: int
    document: int


Outcome = tuple[dict[int, Example], dict[int, UserError]]  # by the row's index: its example, or why it has none


@dataclass(frozen=True)
class Part:
    """A stretch of a document: ids on both sides and what ties them.

    tie: "bytes" (the same text), "role" (one control token on each side with the same role: a root), or "none" (bos,
    template text that only one model has).
    """

    student_ids: np.ndarray
    teacher_ids: np.ndarray
    tie: str = "bytes"
    supervised: bool = False


@dataclass(frozen=True)
class Packed:
    """rows: field -> int32[R, L]. over_long: indices of the examples that fit in no row, in order, for the caller to
    report. student_fill, teacher_fill: fraction of all positions that hold a token."""

    rows: Rows
    over_long: list[int]
    student_fill: float
    teacher_fill: float


def make_example(
    prompt: str,
    completion: str,
    student: ByteTable,
    teacher: ByteTable,
    *,
    specialty: int = 0,
    document: int = 0,
    append_eos: bool = True,
) -> Example:
    """bos, prompt, completion and eos in both tokenizations, aligned.

    Prompt and completion are encoded apart, so their border is exact on both sides. bos and eos are added where the
    vocabulary has the role. Raises RoundTripError, or UserError if no token is left to learn.
    """
    texts = [prompt, completion]
    student_ids, teacher_ids = student.encode_batch(texts), teacher.encode_batch(texts)
    parts = _document_parts(student_ids, teacher_ids, student, teacher, append_eos)
    return join_parts(parts, student, teacher, specialty=specialty, document=document)


def make_examples(
    rows: Sequence[Mapping[str, Any]], student: ByteTable, teacher: ByteTable
) -> tuple[list[Example], list[tuple[int, UserError]]]:
    """`make_example` for many rows, and the examples of conversations.

    rows: mappings with prompt and completion (str), or with messages (as conversation.checked returns them), and
      optionally specialty (int, 0), document (int, the row's index) and append_eos (bool, True; False: the completion,
      or the last message, is cut short and its end is not learned).

    Returns the examples of the rows that can be used, in order, and (row index, error) for each of the others. Raises
    UserError for messages where a vocabulary lacks the control tokens of a conversation.
    """
    chats = [n for n, row in enumerate(rows) if row.get("messages")]
    plain = [n for n, row in enumerate(rows) if not row.get("messages")]
    examples, rejected = _documents(plain, rows, student, teacher)
    if chats:
        conversations, unusable = _conversations(chats, rows, student, teacher)
        examples, rejected = examples | conversations, rejected | unusable
    return [examples[n] for n in sorted(examples)], sorted(rejected.items())


def _documents(chosen: list[int], rows: Sequence[Mapping[str, Any]], student: ByteTable, teacher: ByteTable) -> Outcome:
    """`make_example` for the rows `chosen`, encoded as a batch."""
    texts = [rows[n][key] for n in chosen for key in ("prompt", "completion")]
    sides = [table.try_encode_batch(texts) for table in (student, teacher)]
    pairs = [{n: ids[2 * i : 2 * i + 2] for i, n in enumerate(chosen)} for ids in sides]
    usable: list[int] = []
    rejected: dict[int, UserError] = {}
    for n in chosen:
        pieces = [*pairs[0][n], *pairs[1][n]]
        failed = [ids for ids in pieces if isinstance(ids, UserError)]
        if not failed and not len(pieces[1]):
            failed = [UserError("no token to learn: its completion is empty; remove the row")]
        if failed:
            rejected[n] = failed[0]
        else:
            usable.append(n)
    examples: dict[int, Example] = {}
    for start in range(0, len(usable), _ALIGN_ROWS):
        members = usable[start : start + _ALIGN_ROWS]
        examples |= zip(members, _align_rows(members, rows, pairs, student, teacher), strict=True)
    return examples, rejected


def _conversations(
    chosen: list[int], rows: Sequence[Mapping[str, Any]], student: ByteTable, teacher: ByteTable
) -> Outcome:
    """Examples of the rows `chosen`, which have messages: what the assistant says and the ends of its turns are
    supervised."""
    templates = Template(student, "student"), Template(teacher, "teacher")
    texts = [message["content"] for n in chosen for message in rows[n]["messages"]]
    encoded = list(zip(student.try_encode_batch(texts), teacher.try_encode_batch(texts), strict=True))
    examples: dict[int, Example] = {}
    rejected: dict[int, UserError] = {}
    start = 0
    for n in chosen:
        row, roles = rows[n], [message["role"] for message in rows[n]["messages"]]
        contents, start = encoded[start : start + len(roles)], start + len(roles)
        failed = [ids for pair in contents for ids in pair if isinstance(ids, UserError)]
        if not failed and "assistant" not in roles:
            failed = [UserError("no token to learn: no message is the assistant's; remove the row")]
        if failed:
            rejected[n] = failed[0]
            continue
        parts = conversation_parts(roles, contents, *templates, ended=row.get("append_eos", True))
        facts = {"specialty": row.get("specialty", 0), "document": row.get("document", n)}
        examples[n] = join_parts(parts, student, teacher, **facts)
    return examples, rejected


def conversation_parts(
    roles: Sequence[str],
    contents: Sequence[tuple[np.ndarray, np.ndarray]],
    student: Template,
    teacher: Template,
    *,
    ended: bool = True,
) -> list[Part]:
    """A conversation as both models write it.

    roles, contents: of its messages; the content's ids on both sides. ended: as for `Template.frames`.

    Contents are tied by bytes and ends of turns by their role. What the templates put between them is tied to nothing:
    the families do not say it in the same words, and no model learns it.
    """
    *frames, last = zip(student.frames(roles, ended=ended), teacher.frames(roles, ended=ended), strict=True)
    parts = []
    for role, (mine, its), content in zip(roles, frames, contents, strict=True):
        taught = role == "assistant"
        parts.append(Part(mine.before, its.before, tie="none"))
        parts.append(Part(*content, supervised=taught))
        parts.append(Part(mine.end, its.end, tie="role", supervised=taught))
    return [*parts, Part(last[0].before, last[1].before, tie="none")]


def _align_rows(
    chosen: list[int],
    rows: Sequence[Mapping[str, Any]],
    encoded: Sequence[Mapping[int, Sequence[np.ndarray]]],
    student: ByteTable,
    teacher: ByteTable,
) -> list[Example]:
    """`make_example` for the rows `chosen`, all in one pass. encoded: of each side, by row, the ids of prompt and
    completion.

    The documents are laid end to end on both sides. Their borders, and those of their parts, then fall on the same
    byte, so one alignment of the whole is the alignment of each.
    """
    sides = {}
    for name, table, ids in (("student", student, encoded[0]), ("teacher", teacher, encoded[1])):
        bos, eos = role_ids(table, "bos"), role_ids(table, "eos")
        parts = [part for n in chosen for part in (bos, *ids[n], eos if rows[n].get("append_eos", True) else NOTHING)]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts)).reshape(-1, 4)
        supervised = np.repeat(np.tile([False, False, True, True], len(chosen)), lengths.ravel())
        ends = np.cumsum(lengths.sum(1))
        sides[name] = (np.concatenate(parts), supervised, ends, lengths[:, 3] > 0)
    (tokens, supervised, ends, has_eos), (teacher_tokens, teacher_supervised, teacher_ends, teacher_has_eos) = (
        sides["student"],
        sides["teacher"],
    )
    a = align_ids(tokens, teacher_tokens, student, teacher)
    starts, teacher_starts = (e - np.diff(e, prepend=0) for e in (ends, teacher_ends))
    document = np.repeat(np.arange(len(chosen)), np.diff(ends, prepend=0))
    role = a.role.copy()
    index = np.where(a.role != NONE, a.teacher_index - teacher_starts[document], -1).astype(np.int32)
    both = has_eos & teacher_has_eos  # the last token on both sides, one role: a root
    role[ends[both] - 1] = ROOT
    index[ends[both] - 1] = (teacher_ends - teacher_starts)[both] - 1
    return [
        Example(
            student_tokens=tokens[s:e],
            student_supervised=supervised[s:e],
            teacher_tokens=teacher_tokens[ts:te],
            teacher_supervised=teacher_supervised[ts:te],
            role=role[s:e],
            teacher_index=index[s:e],
            offset=a.offset[s:e],
            specialty=rows[n].get("specialty", 0),
            document=rows[n].get("document", n),
        )
        for n, s, e, ts, te in zip(chosen, starts, ends, teacher_starts, teacher_ends, strict=True)
    ]


def _document_parts(student_ids, teacher_ids, student: ByteTable, teacher: ByteTable, append_eos: bool) -> list[Part]:
    """bos, prompt, completion, eos. `*_ids`: ids of the prompt and of the completion."""
    (student_prompt, student_completion), (teacher_prompt, teacher_completion) = student_ids, teacher_ids
    parts = [
        Part(role_ids(student, "bos"), role_ids(teacher, "bos"), tie="none"),
        Part(student_prompt, teacher_prompt),
        Part(student_completion, teacher_completion, supervised=True),
    ]
    if append_eos:
        parts.append(Part(role_ids(student, "eos"), role_ids(teacher, "eos"), tie="role", supervised=True))
    return parts


def role_ids(table: ByteTable, role: str) -> np.ndarray:
    """int32[1] with the id of a role, or int32[0] if the vocabulary has none."""
    return np.array([table.roles[role]] if role in table.roles else [], np.int32)


def join_parts(
    parts: Iterable[Part], student: ByteTable, teacher: ByteTable, *, specialty: int = 0, document: int = 0
) -> Example:
    """An example from parts in order: the way for conversations, whose control tokens differ between the models."""
    columns: list[tuple[np.ndarray, ...]] = []
    teacher_columns: list[tuple[np.ndarray, np.ndarray]] = []
    teacher_start = 0
    for part in parts:
        ns, nt = len(part.student_ids), len(part.teacher_ids)
        role, index, offset = np.zeros(ns, np.int8), np.full(ns, -1, np.int32), np.zeros(ns, np.int32)
        if part.tie == "bytes":
            a = align_ids(part.student_ids, part.teacher_ids, student, teacher)
            role, offset = a.role, a.offset
            index = np.where(a.role != NONE, a.teacher_index + np.int32(teacher_start), np.int32(-1))
        elif part.tie == "role" and ns == nt == 1:
            role[0], index[0] = ROOT, teacher_start
        columns.append((part.student_ids, np.full(ns, part.supervised), role, index, offset))
        teacher_columns.append((part.teacher_ids, np.full(nt, part.supervised)))
        teacher_start += nt
    tokens, supervised, role, index, offset = map(np.concatenate, zip(*columns, strict=True))
    teacher_tokens, teacher_supervised = map(np.concatenate, zip(*teacher_columns, strict=True))
    if not supervised[1:].any():  # the first token of a document is never a target
        raise UserError(f"document {document} has no token to learn: its completion is empty; remove the row")
    return Example(
        student_tokens=tokens,
        student_supervised=supervised,
        teacher_tokens=teacher_tokens,
        teacher_supervised=teacher_supervised,
        role=role,
        teacher_index=index,
        offset=offset,
        specialty=specialty,
        document=document,
    )


def pack(examples: Sequence[Example], student_length: int, teacher_length: int) -> Packed:
    """Pack whole examples into rows of `student_length` and `teacher_length` positions, best fit decreasing.

    Deterministic; an example is never cut and a row never holds two pieces of one. Rows come in the order in which they
    were opened (longest example first): shuffle when reading.
    """
    need = [(len(e["student_tokens"]), len(e["teacher_tokens"])) for e in examples]
    over_long = [n for n, (ns, nt) in enumerate(need) if ns > student_length or nt > teacher_length]
    bins = _best_fit(need, set(over_long), student_length, teacher_length)
    shape = (len(bins), student_length), (len(bins), teacher_length)
    rows = {name: np.zeros(shape[0], np.int32) for name in STUDENT_FIELDS}
    rows |= {name: np.zeros(shape[1], np.int32) for name in TEACHER_FIELDS}
    for r, members in enumerate(bins):
        at = teacher_at = 0
        for segment, n in enumerate(members, start=1):
            _place(rows, r, at, teacher_at, segment, examples[n])
            at, teacher_at = at + need[n][0], teacher_at + need[n][1]
    placed = np.array([need[n] for members in bins for n in members], np.int64).reshape(-1, 2).sum(0)
    fill = placed / np.maximum(1, len(bins) * np.array([student_length, teacher_length]))
    return Packed(rows, over_long, float(fill[0]), float(fill[1]))


def _place(rows: Rows, r: int, at: int, teacher_at: int, segment: int, example: Example) -> None:
    """Write one example into row r, from positions `at` and `teacher_at` on, shifted by one."""
    for side, start in (("student", at), ("teacher", teacher_at)):
        tokens, supervised = example[f"{side}_tokens"], example[f"{side}_supervised"]
        n = len(tokens)
        inputs, predicting = slice(start, start + n), slice(start, start + max(n - 1, 0))
        rows[f"{side}_tokens"][r, inputs] = tokens
        rows[f"{side}_segment_ids"][r, inputs] = segment
        rows[f"{side}_positions"][r, inputs] = np.arange(n)
        rows[f"{side}_targets"][r, predicting] = tokens[1:]
        rows[f"{side}_weights"][r, predicting] = supervised[1:]
    n = len(example["student_tokens"])
    inputs, predicting = slice(at, at + n), slice(at, at + max(n - 1, 0))
    rows["specialty"][r, inputs] = example["specialty"]
    rows["document"][r, inputs] = example["document"]
    # The teacher predicts its token i from position i - 1, so nothing predicts its first token.
    index = example["teacher_index"][1:]
    known = index > 0
    rows["role"][r, predicting] = np.where(known, example["role"][1:], NONE)
    rows["teacher_position"][r, predicting] = np.where(known, teacher_at + index - 1, 0)
    rows["offset"][r, predicting] = np.where(known, example["offset"][1:], 0)


def _best_fit(
    need: list[tuple[int, int]], excluded: set[int], student_length: int, teacher_length: int
) -> list[list[int]]:
    """Indices of the examples of each row. Largest first; each goes where it leaves the least student room.

    Open rows lie in buckets by free student positions, a bucket sorted by free teacher positions; `widest` holds the
    largest of each bucket, so one search finds the tightest row that has room on both sides.
    """
    size = [max(ns * teacher_length, nt * student_length) for ns, nt in need]
    order = sorted((n for n in range(len(need)) if n not in excluded), key=lambda n: (-size[n], n))
    buckets: list[list[tuple[int, int]]] = [[] for _ in range(student_length + 1)]  # (free teacher positions, row)
    widest = np.full(student_length + 1, -1, np.int64)
    bins: list[list[int]] = []
    for n in order:
        ns, nt = need[n]
        fits = widest[ns:] >= nt
        free = ns + int(fits.argmax())
        if fits.any():
            bucket = buckets[free]
            free_teacher, row = bucket.pop(bisect_left(bucket, (nt, -1)))
            widest[free] = bucket[-1][0] if bucket else -1
            bins[row].append(n)
        else:
            free, free_teacher, row = student_length, teacher_length, len(bins)
            bins.append([n])
        free, free_teacher = free - ns, free_teacher - nt
        insort(buckets[free], (free_teacher, row))
        widest[free] = buckets[free][-1][0]
    return bins


def unpack(rows: Rows) -> list[dict[str, np.ndarray]]:
    """The segments of packed rows in order, back in token coordinates, for tests, reports and debugging.

    Fields as in `Example`. The first token of a document is no target, so its supervision, role and place are not in a
    row and come back as False, NONE, -1 and 0.
    """
    documents = []
    for r in range(len(rows["student_tokens"])):
        for segment in range(1, int(rows["student_segment_ids"][r].max(initial=0)) + 1):
            at = np.flatnonzero(rows["student_segment_ids"][r] == segment)
            teacher_at = np.flatnonzero(rows["teacher_segment_ids"][r] == segment)
            field = {name: rows[name][r, at] for name in STUDENT_FIELDS}
            field |= {name: rows[name][r, teacher_at] for name in TEACHER_FIELDS}
            role = np.append(NONE, field["role"][:-1])
            index = np.append(0, field["teacher_position"][:-1]) - teacher_at[0] + 1
            documents.append(
                {
                    "student_tokens": field["student_tokens"],
                    "student_supervised": np.append(False, field["student_weights"][:-1] > 0),
                    "teacher_tokens": field["teacher_tokens"],
                    "teacher_supervised": np.append(False, field["teacher_weights"][:-1] > 0),
                    "role": role.astype(np.int8),
                    "teacher_index": np.where(role != NONE, index, -1).astype(np.int32),
                    "offset": np.append(0, field["offset"][:-1]).astype(np.int32),
                    "specialty": int(field["specialty"][0]),
                    "document": int(field["document"][0]),
                }
            )
    return documents

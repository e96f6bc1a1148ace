"""Texts in both tokenizations, laid over the same bytes."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from distil_jax.data.loader import Loader
from distil_jax.errors import UserError
from distil_jax.tokens.align import NONE, ROLES
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.pack import Example, make_example, unpack
from distil_jax.workdir import Workdir

MARKS = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"}  # how white space is shown


class Placed(NamedTuple):
    """A token of a group: its index in the example and the columns [start, end) that it covers."""

    index: int
    start: int
    end: int


class Group(NamedTuple):
    """The fewest tokens of both sides that cover the same bytes; a column is a byte. Tokens that are tied to nothing
    have groups of their own, in which a column is a token."""

    student: tuple[Placed, ...]
    teacher: tuple[Placed, ...]

    @property
    def columns(self) -> int:
        return max(token.end for token in (*self.student, *self.teacher))


@dataclass(frozen=True)
class Sample:
    """A text as the models read it. groups: those that are shown, from the beginning; shown and characters count the
    characters of the student's text, shown and in all."""

    name: str
    example: Example
    groups: tuple[Group, ...]
    shown: int
    characters: int

    def shares(self) -> dict[str, float]:
        """Of the student's tokens: supervised, and by role; of the characters: rendered."""
        role, total = self.example["role"], len(self.example["role"])
        shares = {"supervised": float(self.example["student_supervised"].mean())}
        shares |= {name: float((role == code).sum()) / total for code, name in enumerate(ROLES)}
        return shares | {"rendered": self.shown / self.characters if self.characters else 1.0}


def of_text(text: str, tables: dict[str, ByteTable], characters: int) -> Sample:
    """A text as a document that is learned whole. Raises UserError for one that is empty or does not round-trip."""
    if not text:
        raise UserError("--text is empty: give it some text to look at")
    return _sample("text", make_example("", text, tables["student"], tables["teacher"]), tables, characters)


def of_corpus(work: Workdir, split: str, rows: int, tables: dict[str, ByteTable], characters: int) -> list[Sample]:
    """The first document of each of `rows` packed rows, spread over a split of the prepared corpus.

    Raises UserError if the corpus is not there or has no such split.
    """
    shards = work.require("corpus")["shards"]
    if split not in shards:
        raise UserError(f"--split {split}: the corpus has {', '.join(shards)}")
    loader = Loader(work / "corpus", shards[split], batch_size=1, seed=0, verify=False)
    found = [unpack(batch)[0] for batch in loader.sweep(rows=rows)]
    return [_sample(f"{split}, document {e['document']}", e, tables, characters) for e in found]


def _sample(name: str, example: Example, tables: dict[str, ByteTable], characters: int) -> Sample:
    student = tables["student"]
    groups = grouped(example, student, tables["teacher"])
    tokens = example["student_tokens"]
    # Characters are counted by their first bytes, which is exact where a character is spread over tokens.
    begins = [_beginnings(student.token_bytes(i)) for i in tokens.tolist()]
    kept, shown = [], 0
    for group in groups:
        kept.append(group)
        shown += sum(begins[token.index] for token in group.student)
        if shown >= characters:
            break
    return Sample(name, example, tuple(kept), shown, sum(begins))


def _beginnings(piece: bytes) -> int:
    """The characters that begin in these bytes of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)


def described(
    sample: Sample, tables: Mapping[str, ByteTable], more: Callable[[str, int], str] | None = None
) -> list[dict[str, Any]]:
    """The groups of a sample as JSON values: `{"columns", "tokens": [{"side", "start", "end", "text", "classes"}]}`.

    more: what is told of a token besides, by side and index; it shows on hover and focus.
    """
    groups = []
    for group in sample.groups:
        tokens = []
        for side in ("student", "teacher"):
            ids, learned = sample.example[f"{side}_tokens"], sample.example[f"{side}_supervised"]
            for token in getattr(group, side):
                classes = [side, "learned" if learned[token.index] else "masked"]
                if side == "student":
                    classes.append(ROLES[sample.example["role"][token.index]])
                text = label(tables[side], int(ids[token.index]))
                told = {
                    "side": side,
                    "start": int(token.start),
                    "end": int(token.end),
                    "text": text,
                    "classes": classes,
                }
                tokens.append(told | ({"more": more(side, token.index)} if more else {}))
        groups.append({"columns": int(group.columns), "tokens": tokens})
    return groups


def grouped(example: Example, student: ByteTable, teacher: ByteTable) -> list[Group]:
    """All tokens of an example, in order, each in one group."""
    role, index, offset = (example[name].tolist() for name in ("role", "teacher_index", "offset"))
    length = student.lengths[example["student_tokens"]].tolist()
    its_length = teacher.lengths[example["teacher_tokens"]].tolist()
    its_end = np.cumsum(its_length).tolist()
    groups: list[Group] = []
    i = j = 0  # the next token of the student, of the teacher
    while i < len(role) or j < len(its_length):
        first = i
        while i < len(role) and role[i] == NONE:
            i += 1
        at = index[i] if i < len(role) else len(its_length)
        if first < i or j < at:
            groups.append(Group(_in_order(range(first, i)), _in_order(range(j, at))))
            j = max(j, at)
        if i == len(role):
            break
        base = its_end[at] - its_length[at]
        if not length[i]:  # control tokens of one role
            groups.append(Group((Placed(i, 0, 1),), (Placed(at, 0, 1),)))
            i, j = i + 1, at + 1
            continue
        mine, its = [Placed(i, offset[i], offset[i] + length[i])], []
        i += 1
        if j == at:
            its.append(Placed(at, 0, its_length[at]))
            j += 1
        while mine[-1].end != its_end[j - 1] - base:
            if mine[-1].end < its_end[j - 1] - base:
                if i == len(role) or role[i] == NONE or not length[i]:
                    break
                mine.append(Placed(i, mine[-1].end, mine[-1].end + length[i]))
                i += 1
            else:
                its.append(Placed(j, its_end[j] - its_length[j] - base, its_end[j] - base))
                j += 1
        groups.append(Group(tuple(mine), tuple(its)))
    return groups


def _in_order(indices: Sequence[int]) -> tuple[Placed, ...]:
    return tuple(Placed(index, n, n + 1) for n, index in enumerate(indices))


def label(table: ByteTable, token: int) -> str:
    """A token as it is shown: its text, made visible, or the role of a control token, or its id."""
    if piece := table.token_bytes(token):
        return visible(piece)
    roles = sorted((role for role, i in table.roles.items() if i == token), key=lambda role: role == "pad")
    return f"[{roles[0] if roles else f'id {token}'}]"


def visible(piece: bytes) -> str:
    """Bytes as text without anything invisible: what is no UTF-8 as <0xNN>, white space as signs, control, format and
    other invisible characters by their number, a combining mark at the beginning on a circle."""
    shown = []
    for c in piece.decode("utf-8", errors="surrogateescape"):
        if "\udc80" <= c <= "\udcff":
            shown.append(f"<0x{ord(c) - 0xDC00:02X}>")
        elif c in MARKS:
            shown.append(MARKS[c])
        elif unicodedata.category(c)[0] in "CZ" or unicodedata.name(c, "").startswith("VARIATION SELECTOR"):
            shown.append(f"<0x{ord(c):02X}>" if c < "\x80" else f"<U+{ord(c):04X}>")
        else:
            shown.append(c)
    text = "".join(shown)
    return f"\u25cc{text}" if unicodedata.category(text[0])[0] == "M" else text

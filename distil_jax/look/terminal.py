"""Samples in the terminal: the tokens of both models over the same bytes, one above the other."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distil_jax.look.expected import Expected, Top
from distil_jax.look.samples import Group, Sample, label
from distil_jax.tokens.align import ROLES
from distil_jax.tokens.bytes import ByteTable

STYLES = {"none": "cyan", "root": "green", "interior": "yellow", "crossing": "magenta"}
TRAINED, MASKED = "bold underline", "dim"
GUTTER = ("student ", "teacher ", "role    ")
BORDER, INNER = "\u2503", "\u2502"  # where both tokenizations have a boundary, and where one has


class Band(NamedTuple):
    """A group as it is drawn: student, teacher and role, of one width."""

    lines: tuple[Text, Text, Text]
    width: int


def legend() -> Text:
    """What the colours and letters mean."""
    text = Text("role: ")
    for name in ("root", "interior", "crossing", "none"):
        text.append(f"{name[0]} {name}", STYLES[name]).append("  ")
    text.append("   learned: ").append("capital letter, bold", TRAINED).append("  masked: ").append("dim", MASKED)
    return text.append(f"   {BORDER} boundary of both, {INNER} of one")


def show(sample: Sample, tables: dict[str, ByteTable], console: Console) -> None:
    """Draws a sample, as many groups to a line as it is wide; a group that is wider than the console has its own."""
    console.print(Text(sample.name, "bold"))
    room = console.width - len(GUTTER[0])
    line: list[Band] = []
    for group in sample.groups:
        band = _band(group, sample, tables)
        if line and sum(b.width for b in line) + band.width > room:
            _print(line, console)
            line = []
        line.append(band)
    _print(line, console)
    console.print(Text(in_words(sample)), soft_wrap=True)
    console.print()


def in_words(sample: Sample) -> str:
    """The shares of a sample in one line."""
    shares = sample.shares()
    supervised, rendered = shares.pop("supervised"), shares.pop("rendered")
    roles = ", ".join(f"{name} {shares[name]:.1%}" for name in ("root", "interior", "crossing", "none"))
    e = sample.example
    return (
        f"{len(e['student_tokens'])} student and {len(e['teacher_tokens'])} teacher tokens; supervised "
        f"{supervised:.1%}; aligned: {roles}; rendered {rendered:.1%} of {sample.characters} characters"
    )


def predictions(sample: Sample, expected: Expected, tables: dict[str, ByteTable]) -> Table:
    """What was expected in place of each student token that is shown."""
    table = Table(title=Text(f"{sample.name}: what was expected in place of each token"))
    for column in ("token", "role", "the student", "the teacher through W"):
        table.add_column(column, overflow="fold")
    example, student = sample.example, tables["student"]
    for group in sample.groups:
        for token in group.student:
            role = ROLES[example["role"][token.index]]
            name = Text(label(student, int(example["student_tokens"][token.index])), STYLES[role])
            tops = [_top(top, token.index, student) for top in (expected.student, expected.projected)]
            table.add_row(name, Text(role, STYLES[role]), *tops)
    return table


def _top(top: Top, index: int, table: ByteTable) -> Text:
    return Text("  ".join(f"{label(table, token)} {probability:.3f}" for token, probability in top.get(index, [])))


def _print(bands: Sequence[Band], console: Console) -> None:
    for gutter, *parts in zip(GUTTER, *(band.lines for band in bands), strict=True):
        console.print(Text.assemble(Text(gutter, "dim"), *parts), soft_wrap=True)


def _band(group: Group, sample: Sample, tables: dict[str, ByteTable]) -> Band:
    """Each token is as wide as its label asks for, and starts and ends where its bytes do."""
    example = sample.example
    texts = [
        [label(tables[side], int(example[f"{side}_tokens"][token.index])) for token in getattr(group, side)]
        for side in ("student", "teacher")
    ]
    placed = [*zip(group.student, texts[0], strict=True), *zip(group.teacher, texts[1], strict=True)]
    at = {0: 0}  # column -> where it is drawn
    for column in sorted({token.end for token, _ in placed} | {token.start for token, _ in placed} - {0}):
        needed = [at[token.start] + cell_len(text) + 1 for token, text in placed if token.end == column]
        at[column] = max([*needed, max(at.values())])
    width = max(at.values())
    lines = Text(), Text(), Text()
    for n, side in enumerate(("student", "teacher")):
        for token, text in zip(getattr(group, side), texts[n], strict=True):
            style = TRAINED if example[f"{side}_supervised"][token.index] else MASKED
            start, end = at[token.start], at[token.end]
            if n == 0:
                role = ROLES[example["role"][token.index]]
                style = f"{style} {STYLES[role]}"
                letter = role[0].upper() if example["student_supervised"][token.index] else role[0]
                _put(lines[2], letter, style, start, end, width)
            _put(lines[n], text, style, start, end, width)
    for line in lines:
        if cell_len(line.plain) < width:  # no token of this side at the end of the group, or none at all
            line.append(" " * (width - cell_len(line.plain) - 1)).append(BORDER, "dim")
    return Band(lines, width)


def _put(line: Text, text: str, style: str, start: int, end: int, width: int) -> None:
    """Writes a text from cell `start` on, up to a boundary at the last cell before `end`."""
    line.append(" " * (start - cell_len(line.plain)))
    line.append(text, style).append(" " * (end - start - cell_len(text) - 1))
    line.append(BORDER if end == width else INNER, "dim")

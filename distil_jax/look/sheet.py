"""Samples as one self-contained HTML file: tokens over the same bytes; what was expected shows on hover and focus."""

import html
from collections.abc import Sequence

from distil_jax.look.expected import Expected, Top
from distil_jax.look.samples import Group, Sample, label
from distil_jax.page import table
from distil_jax.tokens.align import ROLES
from distil_jax.tokens.bytes import ByteTable

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 14px } td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd }
td:not(:first-child) { text-align: right }
.strip { display: flex; flex-wrap: wrap; gap: .5rem .25rem; font: 14px/1.4 ui-monospace, monospace }
.group { display: inline-grid; grid-template-rows: auto auto; gap: 2px }
.token { position: relative; padding: 0 .25rem; border: 1px solid #888; border-radius: 3px; white-space: pre;
  text-align: center; color: #222; cursor: default }
.student { grid-row: 1 } .teacher { grid-row: 2; background: #f4f4f4 }
.root { background: #c9ecc9 } .interior { background: #fbe9a6; border-style: dashed }
.crossing { background: #f6c9ee; border-style: double; border-width: 3px }
.none { background: #d5ebf5; border-style: dotted }
.masked { opacity: .55 } .learned { font-weight: 700; text-decoration: underline }
.more { display: none; position: absolute; z-index: 2; left: 0; top: 100%; padding: .5rem; background: #fff;
  border: 1px solid #888; box-shadow: 0 2px 8px #0004; text-align: left; font-weight: 400; font-size: 12px }
.token:hover, .token:focus { opacity: 1; z-index: 3 }
.token:hover > .more, .token:focus > .more { display: block }
"""


def sheet(
    title: str,
    samples: Sequence[Sample],
    expected: Sequence[Expected],
    notes: Sequence[str],
    tables: dict[str, ByteTable],
) -> str:
    """The page. expected: of each sample. notes: sentences on the models that were asked."""
    e = html.escape
    parts = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{e(title)}</title>\n<style>{STYLE}</style>',
        f"<h1>{e(title)}</h1>",
        table(_rows(samples)),
        _legend(),
        "<ul>" + "".join(f"<li>{e(note)}</li>" for note in notes) + "</ul>" if notes else "",
    ]
    for sample, of_sample in zip(samples, expected, strict=True):
        strip = "".join(_group(group, sample, of_sample, tables) for group in sample.groups)
        parts.append(f'<h2>{e(sample.name)}</h2>\n<div class="strip">{strip}</div>')
    return "\n".join([*parts, "</html>\n"])


def _rows(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """The shares of each sample, header first."""
    names = list(samples[0].shares())
    rows = [("", "student tokens", "teacher tokens", "characters", *names)]
    for sample in samples:
        counts = len(sample.example["student_tokens"]), len(sample.example["teacher_tokens"]), sample.characters
        rows.append((sample.name, *(f"{n:,}" for n in counts), *(f"{share:.1%}" for share in sample.shares().values())))
    return rows


def _legend() -> str:
    roles = " ".join(f'<span class="token {name}">{name}</span>' for name in ("root", "interior", "crossing", "none"))
    return (
        f"<p>The student's tokens above, by their role; the teacher's below, over the same bytes: {roles} "
        '<span class="token learned">learned</span> <span class="token masked">masked</span></p>'
    )


def _group(group: Group, sample: Sample, expected: Expected, tables: dict[str, ByteTable]) -> str:
    tokens = []
    for side in ("student", "teacher"):
        ids, learned = sample.example[f"{side}_tokens"], sample.example[f"{side}_supervised"]
        for token in getattr(group, side):
            number = int(ids[token.index])
            classes = [side, "learned" if learned[token.index] else "masked"]
            if side == "student":
                classes.append(ROLES[sample.example["role"][token.index]])
            more = "\n".join(_more(side, token.index, sample, expected, tables))
            tokens.append(
                f'<span class="token {" ".join(classes)}" style="grid-column:{token.start + 1}/{token.end + 1}" '
                f'tabindex="0">{html.escape(label(tables[side], number))}'
                f'<span class="more">{html.escape(more)}</span></span>'
            )
    columns = f"grid-template-columns:repeat({group.columns},auto)"
    return f'<span class="group" style="{columns}">{"".join(tokens)}</span>'


def _more(side: str, index: int, sample: Sample, expected: Expected, tables: dict[str, ByteTable]) -> list[str]:
    """What is told of a token: its id and bytes, its place, and what was expected there."""
    example, own = sample.example, tables[side]
    number = int(example[f"{side}_tokens"][index])
    lines = [f"{label(own, number)}  id {number}  bytes {own.token_bytes(number).hex(' ') or 'none'}"]
    if side == "teacher":
        return [*lines, *_listed("the teacher expected", expected.teacher, index, own)]
    role = ROLES[example["role"][index]]
    if role != "none":
        at, offset = int(example["teacher_index"][index]), int(example["offset"][index])
        it = label(tables["teacher"], int(example["teacher_tokens"][at]))
        lines.append(f"{role}: begins {offset} bytes into {it}" if offset else f"{role}: begins with {it}")
    lines.append("learned" if example["student_supervised"][index] else "masked")
    lines += _listed("the student expected", expected.student, index, own)
    return lines + _listed("the teacher through W expected", expected.projected, index, own)


def _listed(title: str, top: Top, index: int, table: ByteTable) -> list[str]:
    if index not in top:
        return []
    listed = [f"  {probability:.3f}  {label(table, token)}  id {token}" for token, probability in top[index]]
    return [f"{title}:", *listed]

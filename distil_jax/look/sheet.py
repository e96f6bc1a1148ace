"""Samples as one self-contained HTML file: tokens over the same bytes; what was expected shows on hover and focus."""

import html
from collections.abc import Sequence

from distil_jax.look.expected import Expected, Top
from distil_jax.look.samples import Sample, described, label
from distil_jax.page import strip
from distil_jax.page.elements import table
from distil_jax.page.style import BASE
from distil_jax.tokens.align import ROLES
from distil_jax.tokens.bytes import ByteTable

STYLE = f"""
{BASE}
body {{ max-width: 80rem }}
td:not(:first-child) {{ text-align: right }}
{strip.STYLE}
.token {{ white-space: pre }}
.more {{ display: none; position: absolute; z-index: 2; left: 0; top: 100%; padding: .5rem; background: var(--paper);
  border: 1px solid var(--line); box-shadow: 0 2px 8px #0004; text-align: left; font-weight: 400; font-size: 12px }}
.token:hover, .token:focus {{ opacity: 1; z-index: 3 }}
.token:hover > .more, .token:focus > .more {{ display: block }}
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
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{e(title)}</title>\n<style>{STYLE}</style>',
        f"<h1>{e(title)}</h1>",
        table(_rows(samples)),
        strip.LEGEND,
        "<ul>" + "".join(f"<li>{e(note)}</li>" for note in notes) + "</ul>" if notes else "",
    ]
    for sample, of_sample in zip(samples, expected, strict=True):

        def more(side, index, sample=sample, of_sample=of_sample):
            return "\n".join(_more(side, index, sample, of_sample, tables))

        parts.append(f"<h2>{e(sample.name)}</h2>\n{strip.drawn(described(sample, tables, more))}")
    return "\n".join([*parts, "</html>\n"])


def _rows(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """The shares of each sample, header first."""
    names = list(samples[0].shares())
    rows = [("", "student tokens", "teacher tokens", "characters", *names)]
    for sample in samples:
        counts = len(sample.example["student_tokens"]), len(sample.example["teacher_tokens"]), sample.characters
        rows.append((sample.name, *(f"{n:,}" for n in counts), *(f"{share:.1%}" for share in sample.shares().values())))
    return rows


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

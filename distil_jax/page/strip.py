"""The tokens of two models over the same bytes, drawn. What is drawn is data: look/samples.py, `described`."""

from collections.abc import Mapping, Sequence
from typing import Any

from distil_jax.page.elements import text

STYLE = """
.strip { display: flex; flex-wrap: wrap; gap: .5rem .25rem; font: 14px/1.4 ui-monospace, monospace }
.group { display: inline-grid; grid-template-rows: auto auto; gap: 2px; max-width: 100% }
.token { position: relative; padding: 0 .25rem; border: 1px solid var(--line); border-radius: 3px;
  white-space: pre-wrap; overflow-wrap: anywhere; text-align: center; cursor: default }
.student { grid-row: 1 } .teacher { grid-row: 2; background: var(--shade) }
.root { background: var(--root) } .interior { background: var(--interior); border-style: dashed }
.crossing { background: var(--crossing); border-style: double; border-width: 3px }
.none { background: var(--none); border-style: dotted }
.masked { opacity: .55 } .learned { font-weight: 700; text-decoration: underline }
"""

LEGEND = (
    "<p>The student's tokens above, by their role; the teacher's below, over the same bytes: "
    + " ".join(f'<span class="token {name}">{name}</span>' for name in ("root", "interior", "crossing", "none"))
    + ' <span class="token learned">learned</span> <span class="token masked">masked</span></p>'
)


def drawn(groups: Sequence[Mapping[str, Any]]) -> str:
    """The groups in HTML."""
    return '<div class="strip">' + "".join(map(_group, groups)) + "</div>"


def _group(group: Mapping[str, Any]) -> str:
    tokens = []
    for token in group["tokens"]:
        classes = text(" ".join(token["classes"]))
        columns = f"grid-column:{int(token['start']) + 1}/{int(token['end']) + 1}"
        focus, more = "", ""
        if "more" in token:
            focus, more = ' tabindex="0"', f'<span class="more">{text(token["more"])}</span>'
        tokens.append(f'<span class="token {classes}" style="{columns}"{focus}>{text(token["text"])}{more}</span>')
    style = f"grid-template-columns:repeat({int(group['columns'])},auto)"
    return f'<span class="group" style="{style}">{"".join(tokens)}</span>'

"""The words of a page: every text that is not ours goes through `text`, and nothing else makes HTML of a value."""

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHOWN = 20_000  # characters of one text


def plain(value: Any, most: int = SHOWN) -> str:
    """A value as text that shows what it holds: control, format and other invisible characters but line ends and tabs
    by their number, so that none turns a line around or ends a document; halves of surrogate pairs too. At most `most`
    characters, with a sign that there are more."""
    whole = str(value)
    cut = whole[:most] + ("…" if len(whole) > most else "")
    return "".join(c if _visible(c) else f"<U+{ord(c):04X}>" for c in cut)


def _visible(c: str) -> bool:
    # Joiners belong to the writing of emoji and of several scripts.
    return c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def text(value: Any, most: int = SHOWN) -> str:
    """The value as escaped HTML, for content and for attributes in double quotes."""
    return html.escape(plain(value, most))


def table(rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """Text cells, header first, as HTML; wide ones scroll in a box of their own. kind: a class of ours."""
    cells = lambda row, tag: "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in row)  # noqa: E731
    lines = [cells(rows[0], "th"), *(cells(row, "td") for row in rows[1:])]
    named = f' class="{kind}"' if kind else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table{named}>{body}</table></div>'


def pairs(facts: Mapping[str, Any], header: tuple[str, str] = ("", "")) -> str:
    """Names and values, one under the other."""
    return table([header, *facts.items()], "words")


def paragraph(value: Any) -> str:
    return f"<p>{text(value)}</p>"


def bullets(values: Iterable[Any]) -> str:
    items = "".join(f"<li>{text(value)}</li>" for value in values)
    return f"<ul>{items}</ul>" if items else ""


def folded(summary: Any, inside: str) -> str:
    """What shows when its line is opened; inside: HTML."""
    return f"<details><summary>{text(summary)}</summary>{inside}</details>"


def section(anchor: str, title: str, parts: Iterable[str]) -> str:
    """A part of the page, or nothing if it holds nothing. parts: HTML."""
    inside = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}"><h2>{text(title)}</h2>\n{inside}\n</section>' if inside else ""


def heading(value: Any) -> str:
    return f"<h3>{text(value)}</h3>"

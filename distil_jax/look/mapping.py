"""`distil-jax project inspect TEXT`: where W takes the mass of a teacher token, and where a student token's comes from.

distil-jax project inspect "hypertension 120" --config configs/tiny.py

For each token of the text, on both sides. W as it was fitted, if the work folder has one; else as the two vocabularies
alone give it.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from distil_jax import arguments, learners
from distil_jax.config import load_config
from distil_jax.look.samples import label
from distil_jax.losses.kd import REST
from distil_jax.projection import FILE, Projection
from distil_jax.tokens.bytes import ByteTable
from distil_jax.workdir import Workdir

Entries = list[tuple[str, float]]  # of W: a token as it is shown, and the weight


def parser() -> arguments.Parser:
    """The arguments of the command."""
    p = arguments.Parser(
        prog="distil-jax project inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("text", metavar="TEXT", help="its tokens are looked up")
    p.add_argument("--config", metavar="FILE", help="the config whose tokenizers and projection are looked at")
    p.add_argument("--most", type=int, default=8, metavar="N", help="entries shown of a student token (default: 8)")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status. Raises UserError for what the user can mend."""
    ours, of_config = arguments.split(argv)
    args = parser().parse_args(ours)
    work = Workdir(load_config(of_config)[0])
    if not (work.config.teacher.path and work.config.student.path):
        work.require("corpus")  # the tokenizers were made for it
    tables = learners.tables_of(work)
    fitted = (work / "projection" / FILE).is_file()
    W = Projection.load(work / "projection", **tables) if fitted else Projection.build(**tables)
    _print(W, tables, args.text, args.most, "as fitted" if fitted else "from bytes alone: `distil-jax project` fits it")
    return 0


def goes_to(W: Projection, tables: dict[str, ByteTable], token: int) -> Entries:
    """The student tokens that a teacher token may become, the likeliest first, and what its row leaves."""
    weights = np.asarray(W.weights()[token])
    named = [
        (label(tables["student"], int(W.ids[token, n])), float(weights[n])) for n in np.flatnonzero(W.ids[token] >= 0)
    ]
    left = [("(others)", float(weights[-1]))] if W.ids[token, -1] == REST else []
    return sorted(named, key=lambda entry: -entry[1]) + left


def comes_from(W: Projection, tables: dict[str, ByteTable], token: int) -> Entries:
    """The teacher tokens that may become a student token: those that do so most, the smallest ids among equals."""
    rows, places = np.nonzero(W.ids == token)
    weights = W.weights()[rows, places]
    order = np.lexsort((rows, -weights))
    return [(label(tables["teacher"], int(rows[n])), float(weights[n])) for n in order]


def _print(W: Projection, tables: dict[str, ByteTable], text: str, most: int, what: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(f"W {what}", markup=False)
    for side, other, entries in (("teacher", "becomes", goes_to), ("student", "comes from", comes_from)):
        table = Table()
        for column in (f"{side} token", "id", other):
            table.add_column(column)
        for token in dict.fromkeys(tables[side].encode(text).tolist()):
            found = entries(W, tables, token)
            shown = ", ".join(f"{name} {weight:.3f}" for name, weight in found[:most]) or "nothing"
            more = f", and {len(found) - most} more" if len(found) > most else ""
            table.add_row(Text(label(tables[side], token)), str(token), Text(shown + more))
        console.print(table)

"""`distil-jax data`: the sources of the medical corpus.

distil-jax data list                     the 18 sources: licence, rows, read by default or not, and why
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distil_jax import arguments
from distil_jax.data.catalogue import SOURCES


def parser() -> arguments.Parser:
    """The arguments of the command."""
    p = arguments.Parser(
        prog="distil-jax data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("list",), help="list: the table of the sources")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status. Raises UserError for what the user can mend."""
    parser().parse_args(list(argv))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table())
    console.print(Text("What is off is read when it is named: mimic, or for a part pubmedqa:pqa_labeled/train."))
    return 0


def table() -> Table:
    """The catalogue, with a line for each part that is left out of a source that is on."""
    made = Table(title="The sources of the medical corpus")
    for name in ("source", "hub id", "licence"):
        made.add_column(name, overflow="fold")
    made.add_column("rows", justify="right")
    for name in ("on", "why"):
        made.add_column(name, overflow="fold")
    for source in SOURCES:
        rows = f"{source.rows:,}" if source.rows else "?"
        on = Text("on", "green") if source.on else Text("off", "yellow")
        made.add_row(source.name, source.hub_id, source.licence, rows, on, source.why)
        for part in source.parts:
            if part.off:
                made.add_row(f"{source.name}:{part.name}", "", "", "", Text("off", "yellow"), part.off)
    return made

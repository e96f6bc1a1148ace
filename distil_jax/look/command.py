"""`distil-jax inspect`: what both models read of a text, token by token, what of it is learned, what they expect next.

distil-jax inspect --config configs/tiny.py                       samples of the prepared corpus
distil-jax inspect --config configs/tiny.py --text "12.5 mg/kg"   a text; both tokenizers are enough

Shown in the terminal and written as a page to inspect/index.html in the work folder, or to --out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distil_jax import arguments, learners
from distil_jax.config import load_config
from distil_jax.errors import UserError
from distil_jax.look import samples, terminal
from distil_jax.look.expected import Expected, expected
from distil_jax.look.sheet import sheet
from distil_jax.tokens.bytes import ByteTable
from distil_jax.workdir import Workdir

SPLITS = ("train", "validation", "test")


def parser() -> arguments.Parser:
    """The arguments of the command."""
    p = arguments.Parser(
        prog="distil-jax inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--config", metavar="FILE", help="the config whose corpus, models and tokenizers are looked at")
    p.add_argument("--text", help="look at this text, as a document that is learned whole, and not at the corpus")
    p.add_argument("--rows", type=int, default=3, metavar="N", help="samples of the corpus (default: 3)")
    p.add_argument("--split", default="train", choices=SPLITS, help="of the corpus (default: train)")
    p.add_argument(
        "--characters", type=int, default=2000, metavar="N", help="shown of each sample, about (default: 2000)"
    )
    p.add_argument(
        "--predict", action="store_true", help="what the models expect in the terminal, not in the page alone"
    )
    p.add_argument(
        "--no-models", action="store_true", help="leave the models alone: tokens, roles and masks are enough"
    )
    p.add_argument("--out", metavar="FILE", help="where the page goes")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status. Raises UserError for what the user can mend."""
    ours, of_config = arguments.split(argv)
    args = parser().parse_args(ours)
    if args.rows < 1 or args.characters < 1:
        raise UserError(f"--rows {args.rows} and --characters {args.characters}: give at least 1 of each")
    if args.predict and args.no_models:
        raise UserError("--predict asks the models, which --no-models leaves alone; give one of the two")
    work = Workdir(load_config(of_config)[0])
    if args.text is None or not (work.config.teacher.path and work.config.student.path):
        work.require("corpus")  # which has what is looked at, or the tokenizers that were made for it
    tables = learners.tables_of(work)
    if args.text is None:
        found = samples.of_corpus(work, args.split, args.rows, tables, args.characters)
    else:
        found = [samples.of_text(args.text, tables, args.characters)]
    asked, notes = [Expected({}, {}, {})] * len(found), []
    if not args.no_models:
        asked, notes = expected(work, tables, [sample.example for sample in found])
    _print(found, asked, notes, tables, args.predict)
    out = Path(args.out) if args.out else work / "inspect" / "index.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(sheet(f"{work.root}: what the models read", found, asked, notes, tables), encoding="utf-8")
    print(f"the same as a page: {out}")
    return 0


def _print(
    found: Sequence[samples.Sample],
    asked: Sequence[Expected],
    notes: Sequence[str],
    tables: dict[str, ByteTable],
    predict: bool,
) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(terminal.legend())
    console.print()
    for sample, of_sample in zip(found, asked, strict=True):
        terminal.show(sample, tables, console)
        if predict:
            console.print(terminal.predictions(sample, of_sample, tables))
    for note in notes:
        console.print(Text(note), soft_wrap=True)

"""`distil-jax report`: the page of finished work folders.

distil-jax report DIR                         DIR/report/index.html again, and its plots
distil-jax report DIR DIR ... --out FILE      several runs beside each other on one page
distil-jax report --config configs/tiny.py    the stage: asks the models, writes summary.json and the page

A page needs the folder alone, no config file and no model. Its plots are written as PNG to plots/ beside it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distil_jax import arguments
from distil_jax.errors import UserError
from distil_jax.page.figures import Plots
from distil_jax.page.record import Record, named
from distil_jax.page.whole import page

PAGE = "index.html"
PLOTS = "plots"


def parser() -> arguments.Parser:
    """The arguments of the command without a config."""
    p = arguments.Parser(
        prog="distil-jax report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folders", nargs="+", metavar="DIR", help="work folders (config.workdir) of finished runs")
    p.add_argument("--out", metavar="FILE", help="where the page goes; of one folder, default: its report/index.html")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status. Raises UserError for what the user can mend."""
    args = parser().parse_args(list(argv))
    if len(args.folders) > 1 and not args.out:
        raise UserError("distil-jax report: several folders need --out FILE, for the page that compares them")
    repeated = {folder for folder in args.folders if args.folders.count(folder) > 1}
    if repeated:
        raise UserError(f"distil-jax report: {sorted(repeated)[0]} is given twice; give each folder once")
    out = Path(args.out) if args.out else Path(args.folders[0]) / "report" / PAGE
    write(args.folders, out)
    print(f"report: {out}")
    return 0


def write(folders: Sequence[str | Path], out: Path) -> None:
    """Writes the page of the folders to `out`, and its plots to plots/ beside it. Raises UserError for a folder without
    a finished run, and where the page cannot be written."""
    records = [Record.read(folder, name) for folder, name in zip(folders, named(folders), strict=True)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(records, Plots(out.parent / PLOTS)), encoding="utf-8")
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another --out FILE") from error

"""`distil-jax data list`: the sources of the medical corpus, with licence and size, whether they are on, and why."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from distil_jax.data.catalogue import SOURCES
from distil_jax.errors import UserError, nearest

COMMANDS = ("list",)


def main(argv: Sequence[str]) -> int:
    """Prints the table."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: distil-jax data list\n\n" + (__doc__ or ""))
        return 0 if argv else 2
    if list(argv) != ["list"]:
        said = " ".join(argv)
        raise UserError(
            f"distil-jax data takes no {said!r}{nearest(argv[0], COMMANDS)}; there is `distil-jax data list`"
        )
    Console().print(table())
    return 0


def table() -> Table:
    """A row for each source."""
    shown = Table(box=box.SIMPLE_HEAD)
    for title, options in (
        ("source", {"no_wrap": True}), ("rows", {"justify": "right"}), ("licence", {}), ("on", {}),
        ("why, and where it is", {"ratio": 1, "overflow": "fold"}),
    ):  # fmt: skip
        shown.add_column(title, **options)
    for s in SOURCES:
        rows = f"{s.rows:,}" if s.rows else "?"
        shown.add_row(s.name, rows, s.licence, "on" if s.on else "off", f"{s.why}\n[dim]{s.hub}[/]")
    return shown

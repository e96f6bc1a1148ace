"""`distil-jax speed`: how fast models write, side by side, under one protocol (eval/speed.py).

distil-jax speed TEACHER STUDENT --prompt-tokens 128 --new-tokens 64 --batch 1 --turns 5

Each is a Hugging Face directory or a hub id; speeds are compared with the first. The report of a config measures its
teacher and its exported student in the same way.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from distil_jax import arguments, hosts, sharding
from distil_jax.errors import UserError
from distil_jax.eval import speed
from distil_jax.manifest import write_json_atomic
from distil_jax.models import hub
from distil_jax.models.int8 import quantize
from distil_jax.tables import speed_in_words, speed_rows


def parser() -> arguments.Parser:
    """The arguments of the command."""
    p = arguments.Parser(
        prog="distil-jax speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("models", nargs="+", metavar="PATH", help="a Hugging Face directory or hub id; the first is 1")
    default = speed.Protocol()
    p.add_argument("--prompt-tokens", type=int, default=default.prompt_tokens, metavar="N", help="of each prompt (128)")
    p.add_argument("--new-tokens", type=int, default=default.new_tokens, metavar="N", help="of each prompt (64)")
    p.add_argument("--batch", type=int, default=default.batch, metavar="N", help="prompts at a time (1)")
    p.add_argument("--turns", type=int, default=default.turns, metavar="N", help="measured, of each model (5)")
    p.add_argument("--warm-up", type=int, default=default.warm_up, metavar="N", help="turns before them (1)")
    p.add_argument("--dtype", choices=hub.DTYPES, help="of the weights; default: bfloat16, float32 on CPU")
    p.add_argument("--int8", action="store_true", help="hold the weights in 8 bits")
    p.add_argument("--mesh", default="", metavar="AXES", help='as config.mesh, "tensor:4"; default: one device')
    p.add_argument("--out", metavar="FILE", help="every turn and the result as JSON")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status. Raises UserError for what the user can mend."""
    args = parser().parse_args(list(argv))
    protocol = speed.Protocol(args.prompt_tokens, args.new_tokens, args.batch, args.turns, args.warm_up)
    protocol.check()  # before the models, which take a while to read
    mesh = sharding.mesh_of(args.mesh) if args.mesh else None
    dtype = args.dtype or default_dtype()
    models = {}
    for path, name in zip(args.models, names(args.models), strict=True):
        model, params = hub.load_pretrained(path, dtype=dtype, mesh=mesh)
        models[name] = model, quantize(model, params) if args.int8 else params
    found = speed.measure(models, protocol)
    if args.out and hosts.is_first_process():
        write_json_atomic(args.out, found)
    if hosts.is_first_process():
        print_table(found)
    return 0


def default_dtype() -> str:
    """What models are served in on this machine."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, or the whole paths where two would be the same. Raises UserError for one path given
    twice."""
    if len(set(paths)) < len(paths):
        raise UserError("distil-jax speed: a model is given twice; give each once")
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def print_table(found: dict[str, Any]) -> None:
    """The result in the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    header, *rows = speed_rows(found)
    table = Table()
    for column in header:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(Text(speed_in_words(found)), soft_wrap=True)

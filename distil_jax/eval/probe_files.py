"""`distil-jax probes`: the probes of a file of questions (eval/probes.py), as files that `evaluate --tasks` takes.

distil-jax probes exam.jsonl     exam_none_of_the_above.jsonl, exam_false_question.jsonl and their controls
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from distil_jax import arguments
from distil_jax.errors import UserError
from distil_jax.eval import own, probes, records

SEEDED = ("none_of_the_above_control", "false_question")  # the probes that draw


def parser() -> arguments.Parser:
    """The arguments of the command."""
    p = arguments.Parser(
        prog="distil-jax probes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("file", metavar="FILE", help="a task's file, as `distil-jax evaluate --tasks FILE` takes it")
    p.add_argument("--out", metavar="DIR", help="where they go; default: beside the file")
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which choices are replaced, which items are paired"
    )
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status. Raises UserError for what the user can mend."""
    args = parser().parse_args(list(argv))
    for file in write(args.file, Path(args.out) if args.out else Path(args.file).parent, args.seed):
        print(file)
    return 0


def write(file: str | Path, folder: Path, seed: int = 0) -> list[Path]:
    """FILE_PROBE.jsonl for each probe, in `folder`. Raises UserError for a file that is no task with choices."""
    task = own.task_of(str(file))
    rows, _ = records.read(task, None)
    items = []
    for n, row in enumerate(rows):
        try:
            choices = json.loads(row["choices"]) if isinstance(row["choices"], str) else row["choices"]
            items.append(dict(row) | {"id": str(dict(row).get("id", n)), "choices": choices, "gold": task.gold(row)})
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"{row.where}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, probe in probes.PROBES.items():
        seeded = {"seed": seed} if name in SEEDED else {}
        lines = []
        for item in probe(items, **seeded):
            gold = item.pop("gold")
            lines.append(json.dumps(item | {"answer": gold}, ensure_ascii=False) + "\n")
        written.append(folder / f"{task.name}_{name}.jsonl")
        written[-1].write_text("".join(lines), encoding="utf-8")
    return written

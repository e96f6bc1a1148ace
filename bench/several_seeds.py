"""A config over several seeds: what bench/ablation.py and bench/objectives.py have in common.

Each seed is a whole run in WORKDIR/seedN, one after the other, corpus and teacher included, in a process of its own.
What is done is skipped, as always; so the table of finished runs costs seconds.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from distil_jax.config import load_config

TINY = str(Path(__file__).resolve().parent.parent / "configs" / "tiny.py")


def run_all(
    arguments: Sequence[str], config: str, workdir: str, overrides: Sequence[str] = ()
) -> tuple[ConfigDict, Path, dict[int, dict[str, Any]]]:
    """(the config, the folder of all seeds, the results by seed) after running what is not done.

    arguments: of the command line, --config=FILE, --seeds=0,1,2, --workdir=DIR and --config.KEY=VALUE. config and
    workdir are the defaults of two of them; overrides come before those of the command line.
    """
    options = {"--config": config, "--seeds": "0,1,2", "--workdir": workdir}
    named = [a for a in arguments if a.split("=", 1)[0] in options]
    options |= dict(a.split("=", 1) for a in named)
    given = [*overrides, *(a for a in arguments if a not in named)]
    loaded = load_config(["--config", options["--config"], *given])[0]  # a wrong key ends it here
    folder = Path(options["--workdir"])
    results = {}
    for seed in map(int, options["--seeds"].split(",")):
        place = folder / f"seed{seed}"
        own = [*given, f"--config.seed={seed}", f"--config.workdir={place}"]
        command = [sys.executable, "-m", "distil_jax", "run", "--config", options["--config"], *own]
        subprocess.run(command, check=True, stdout=sys.stderr)
        results[seed] = read(place)
    return loaded, folder, results


def read(place: Path) -> dict[str, Any]:
    """The summary of a finished run, with its differences by specialty and by class of token."""
    evaluated = json.loads((place / "evaluate" / "manifest.json").read_text(encoding="utf-8"))
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    return summary | {key: evaluated[key] for key in ("differences_by_specialty", "differences_by_class")}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def spread(values: Iterable[float | None], form: str) -> str:
    """The mean of some numbers and, in brackets, the least and the largest; nothing for none."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return ""
    mean, low, high = sum(numbers) / len(numbers), min(numbers), max(numbers)
    return f"{form.format(mean)} [{form.format(low)}, {form.format(high)}]"


def shown(value: float | None, form: str) -> str:
    """A number in this form; nothing for none."""
    return "" if value is None else form.format(value)

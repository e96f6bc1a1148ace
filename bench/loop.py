"""What the training loop adds to its jitted step: reading rows, sending them, logging, the progress line, the watchdog.

    python bench/loop.py [--workdir work/tiny] [--steps 100] [--turns 5]

Needs a prepared corpus of configs/tiny.py (`distil-jax prepare --config configs/tiny.py`). In turns: `train` of the
control, its own seconds per step from timing.jsonl; and the same step alone, on one batch that lies on the device, each
report read a step later as the loop does. Ratios of medians over turns; the table is in bench/RESULTS.md.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from distil_jax import train
from distil_jax.config import load_config

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="work/tiny")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    loops, bares = [], []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        for part in ("corpus", "tokenizers"):
            shutil.copytree(Path(args.workdir) / part, work / part)
        for _ in range(args.turns):
            shutil.rmtree(work / "control", ignore_errors=True)
            caught: dict[str, Any] = {}
            whole(config_of(work, args.steps), caught)
            lines = [json.loads(line) for line in (work / "control" / "timing.jsonl").read_text().splitlines()]
            loops.append(np.median([line["seconds_per_step"] for line in lines]))
            bares.append(bare(caught, args.steps))
            print(f"loop {1e3 * loops[-1]:.2f} ms a step, step alone {1e3 * bares[-1]:.2f} ms", flush=True)
    ratio = np.median(loops) / np.median(bares)
    print(f"medians: {1e3 * np.median(loops):.2f} and {1e3 * np.median(bares):.2f} ms, ratio {ratio:.4f}")


def config_of(work: Path, steps: int) -> Any:
    """The tiny recipe for so many steps of the control, without evaluations and saves between."""
    changes = {"workdir": work, "student.training.steps": steps, "student.training.log_every": 10}
    changes |= {"student.training.evaluate_every": steps, "student.training.checkpoint_every": steps}
    return load_config(["--config", str(TINY), *(f"--config.{k}={v}" for k, v in changes.items())])[0]


def whole(config: Any, caught: dict[str, Any]) -> None:
    """Trains the control; keeps its step and the arguments of the last call."""
    make = train.make_step

    def keeping(*args, **kwargs):
        update = make(*args, **kwargs)

        def step(state, frozen, batch):
            caught.update(update=update, frozen=frozen, batch=batch)
            caught["state"], report = update(state, frozen, batch)
            return caught["state"], report

        return step

    train.make_step = keeping
    try:
        train.train(config, "control")
    finally:
        train.make_step = make


def bare(caught: dict[str, Any], steps: int) -> float:
    """Seconds of a step: the median over stretches of ten, as the loop's own clock has it."""
    state, pending, stretches = caught["state"], None, []
    since = time.monotonic()
    for n in range(steps):
        state, report = caught["update"](state, caught["frozen"], caught["batch"])
        if pending is not None:
            float(pending["loss"])
        pending = report
        if n % 10 == 9:
            stretches.append((time.monotonic() - since) / 10)
            since = time.monotonic()
    return float(np.median(stretches))


if __name__ == "__main__":
    main()

"""Whether a training step of the tiny recipe waits for its batch.

    distil-jax prepare --config configs/tiny.py --config.workdir=WORK
    python bench/loader_wait.py WORK [--run control --steps 400 --prefetch 2]

Trains a run of configs/tiny.py by the loop of train.py on the corpus in WORK, in a folder that is thrown away, and
times each call for the next batch. The control is the run with the shortest step, so the one that would wait first.
--prefetch 0 reads each batch when it is asked for: what reading ahead saves. The first 20 steps, in which the step is
compiled, do not count; nothing is evaluated or saved in between.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distil_jax import train
from distil_jax.config import load_config
from distil_jax.data.loader import Batch, Loader

TINY = str(Path(__file__).resolve().parent.parent / "configs" / "tiny.py")
WARM = 20


def timed(prefetch: int, waits: list[float], steps: list[float]) -> type[Loader]:
    """The loader, that notes how long each batch is waited for, and when it is asked for."""

    class Timed(Loader):
        def iterate(self, start_step: int = 0) -> Iterator[Batch]:
            batches = super().iterate(start_step, prefetch) if prefetch else map(self.batch, range(start_step, 10**9))
            while True:
                start = time.perf_counter()
                batch = next(batches)
                waits.append(time.perf_counter() - start)
                steps.append(start)
                yield batch

    return Timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--run", default="control")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prefetch", type=int, default=2)
    asked = parser.parse_args()
    side = "teacher" if asked.run == "teacher" else "student"
    waits, starts = [], []
    train.Loader = timed(asked.prefetch, waits, starts)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("corpus", "tokenizers", "teacher", "projection"):
            if (asked.work / name).exists() and name != asked.run:
                (Path(folder) / name).symlink_to((asked.work / name).resolve())
        values = {"workdir": folder}
        values |= {f"{side}.training.{key}": asked.steps for key in ("steps", "evaluate_every", "checkpoint_every")}
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        train.train(load_config(["--config", TINY, *flags])[0], asked.run)
    # From one call to the next: the wait, and the step that follows it.
    wait_ms, step_ms = 1e3 * np.array(waits[WARM:-1]), 1e3 * np.diff(starts[WARM:])
    for name, values in (("waiting for a batch", wait_ms), ("a step with it", step_ms)):
        print(f"{name:20s} median {np.median(values):8.3f} ms   99th percentile {np.percentile(values, 99):8.3f} ms")
    share = wait_ms.sum() / step_ms.sum()
    print(f"{asked.run}, prefetch {asked.prefetch}: {share:.3%} of {len(step_ms)} steps is waiting")


if __name__ == "__main__":
    main()

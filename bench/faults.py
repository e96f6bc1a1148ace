"""A training run, killed a hundred times: what each process lost, and whether every run ended as if nothing had been.

    python bench/faults.py [--kills 100] [--seed 0]

The long form of tests/test_faults.py, which explains itself: TERM, INT and KILL at random moments (start-up, steps,
evaluations, every phase of a save), then a small disk that fills up (a tmpfs, which needs root). Prints the table of
bench/RESULTS.md. Exit status 1 if one run ended otherwise.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "tests"))

import faults  # noqa: E402
from test_run import SMALL  # noqa: E402

from distil_jax import prepare  # noqa: E402
from distil_jax.config import load_config  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        arguments = corpus(work)
        faults.attempt(arguments, work, None, 0)  # fills the compilation cache
        shutil.rmtree(work / faults.RUN)
        started = time.monotonic()
        faults.attempt(arguments, work, None, 0)
        seconds, wanted = time.monotonic() - started, faults.result(work / faults.RUN)
        kills, wrong, seed = [], 0, args.seed
        while len(kills) < args.kills:
            ends = faults.disturbed(arguments, work, seed, seconds)
            same = faults.result(work / faults.RUN) == wanted
            wrong += not same
            for end in ends:
                faults.check_loss(end, faults.SAVE_EVERY)
            kills += [end for end in ends if end.status != 0]
            seed += 1
            print(f"run {seed}: {len(kills)} kills, {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
        table(kills)
        print(f"\n{seed - args.seed} runs, {wrong} of which ended otherwise than the undisturbed one")
        full = full_disk(work, arguments, wanted)
    return int(wrong > 0 or not full)


def corpus(work: Path) -> list[str]:
    """The arguments of a small run with its corpus made."""
    settings = SMALL | {"workdir": work, "student.training.steps": faults.STEPS, "student.training.log_every": 1}
    settings |= {"student.training.evaluate_every": 8, "student.training.checkpoint_every": faults.SAVE_EVERY}
    arguments = ["--config", str(PROJECT / "configs" / "tiny.py"), *(f"--config.{k}={v}" for k, v in settings.items())]
    prepare.main(load_config(arguments)[0])
    return arguments


def table(kills: list[faults.Kill]) -> None:
    by = defaultdict(list)
    for end in kills:
        by[end.how, end.where].append(end)
    header = ("signal", "in", "kills", "exit statuses", "steps lost, median", "most")
    print(f"\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for (how, where), ends in sorted(by.items()):
        lost = [end.lost for end in ends]
        statuses = ", ".join(f"{status}: {n}" for status, n in sorted(Counter(end.status for end in ends).items()))
        print(f"| {how} | {where} | {len(ends)} | {statuses} | {np.median(lost):.0f} | {max(lost)} |")


def full_disk(work: Path, arguments: list[str], wanted: faults.Result) -> bool:
    """A run whose folder lies on a disk of 200 kilobytes, then on one that has grown."""
    disk = work / faults.RUN
    shutil.rmtree(disk)
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        print(f"full disk: not tried, no tmpfs ({mounted.stderr.strip()})")
        return True
    try:
        end = faults.attempt(arguments, work, None, 0)
        said = next((line for line in end.message.splitlines() if "the disk is full" in line), "")
        print(f"full disk: status {end.status}, at step {end.reported}, checkpoint {end.saved}: {said[:100]}")
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        last = faults.attempt(arguments, work, None, 0)
        same = last.status == 0 and faults.result(disk) == wanted
        print(f"with room again: status {last.status}, {'the same bytes' if same else 'OTHER BYTES'}")
        return same and end.status == 2
    finally:
        subprocess.run(["umount", disk], check=True)


if __name__ == "__main__":
    sys.exit(main())

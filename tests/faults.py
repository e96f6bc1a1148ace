"""Training runs that are killed and started again, for tests/test_faults.py and bench/faults.py.

A run is a real process; what it left is compared byte for byte with what an undisturbed one left. Processes are forked
from one that has imported everything, so that a hundred of them take minutes.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distil_jax.errors import INTERRUPTED, STOPPED

RUN = "control"
STEPS = 24
SAVE_EVERY = 3


def context() -> Any:
    """Processes that start warm. JAX's devices are made in each of them."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["distil_jax.train", "distil_jax.cli", "transformers.models.auto.tokenization_auto"])
    return found


def train_once(arguments: list[str], log: str, broken: str = "", environment: dict[str, str] | None = None) -> None:
    """The whole of a process: trains RUN as the command would, and exits with its status."""
    os.environ |= environment or {"XLA_FLAGS": ""}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it without
    from distil_jax import cli, hosts, train
    from distil_jax.config import load_config

    def action() -> int:
        hosts.start()
        if broken:
            BROKEN[broken]()
        config = load_config(arguments)[0]
        train.train(config, RUN)
        return 0

    try:
        status = cli._guarded(action)
    except SystemExit as end:
        status = int(end.code or 0)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


class Result(NamedTuple):
    """What a run left: its metrics without the clock, and hashes of its weights and of its last checkpoint's arrays."""

    metrics: str
    weights: str
    state: str


def result(folder: Path) -> Result:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = json.dumps([{k: v for k, v in line.items() if k != "time"} for line in lines])
    weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    return Result(metrics, weights, state_of(folder / "checkpoints"))


def state_of(checkpoints: Path) -> str:
    """A hash of every number in the newest checkpoint: parameters, moments, counters."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    step = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    with ocp.training.Checkpointer(checkpoints) as found:
        state = found.load(step)
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return f"{step} {digest.hexdigest()}"


class Kill(NamedTuple):
    """One process of a run: what ended it and when, and where the next one went on."""

    how: str  # the signal, or "none"
    after: float  # seconds
    status: int
    reported: int  # last step in metrics.jsonl when it ended
    saved: int  # newest whole checkpoint then
    where: str  # "start", "steps" or "save", a checkpoint being under way; "end" when all steps were reported
    message: str

    @property
    def lost(self) -> int:
        """Steps that it reported and that are in no whole checkpoint."""
        return 0 if self.where == "start" else max(0, self.reported - self.saved)


def attempt(
    config: list[str], work: Path, how: int | None, after: float, broken: str = "", from_step: int = 0
) -> Kill:
    """Runs one process; sends it the signal `how` so many seconds after it reported `from_step` (0: after it was
    started), unless it has ended by then."""
    log, folder = work / "log.txt", work / RUN
    log.unlink(missing_ok=True)
    before, where = (lines(folder), unfinished(folder)), "none"
    process = context().Process(target=train_once, args=(config, str(log), broken))
    process.start()
    while how is not None and process.is_alive() and reported(folder) < from_step:
        time.sleep(0.002)
    process.join(after if how is not None else 300)
    if process.is_alive():
        where = place(folder, *before)
        os.kill(process.pid, how if how is not None else signal.SIGKILL)
        process.join(120)
    return Kill(
        "none" if how is None else signal.Signals(how).name, after, process.exitcode, reported(folder), saved(folder),
        where, log.read_text() if log.exists() else "",
    )  # fmt: skip


def place(folder: Path, lines_before: list[str], unfinished_before: set) -> str:
    """Where the process is that works in the folder, and found there what is given."""
    if unfinished(folder) - unfinished_before:
        return "save"
    if lines(folder) in ([], lines_before):  # a line has its time in it
        return "start"
    return "end" if reported(folder) == STEPS else "steps"


def unfinished(folder: Path) -> set[tuple[str, int]]:
    """The checkpoints that are not whole, under way or left by a process that was killed; by name and inode."""
    checkpoints = folder / "checkpoints"
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return {(p.name, os.stat(p).st_ino) for p in found if "tmp" in p.name and p.exists()}


def reported(folder: Path) -> int:
    return max((json.loads(line)["step"] for line in lines(folder)), default=0)


def lines(folder: Path) -> list[str]:
    """Of metrics.jsonl, those that are whole."""
    file = folder / "metrics.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def saved(folder: Path) -> int:
    checkpoints = folder / "checkpoints"
    names = [p.name for p in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(n) for n in names if n.isdigit()), default=0)


def disturbed(config: list[str], work: Path, seed: int, seconds: float, kills: int = 3) -> list[Kill]:
    """Kills a run of so many `seconds` up to `kills` times at random moments, and then lets it end.

    One kill in four comes at any time after the start, which with a small run is most often before its first step; the
    others soon after a random step, as long as a save takes and more.
    """
    rng, ends = random.Random(seed), []
    shutil.rmtree(work / RUN, ignore_errors=True)
    for _ in range(kills):
        how = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
        done = reported(work / RUN)
        if done == STEPS or rng.random() < 0.25:
            ends.append(attempt(config, work, how, rng.uniform(0.05, 0.8 * seconds)))
        else:
            step = rng.randint(done + 1, STEPS)
            ends.append(attempt(config, work, how, rng.uniform(0, 0.05 * seconds), from_step=step))
        if ends[-1].status == 0:
            break
    if ends[-1].status != 0:  # also one that a signal ended when its work was done
        ends.append(attempt(config, work, None, 0))
    return ends


def check_loss(end: Kill, save_every: int) -> None:
    """Raises AssertionError if a process ended otherwise than it may, or more was lost than it may."""
    # Before the program takes signals itself, and after, they end it as the system does.
    allowed = (0, STOPPED, INTERRUPTED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
    assert end.status in allowed, end.message
    if end.status == STOPPED:
        assert f"stopped at step {end.saved}" in end.message, end
    if end.how == "SIGTERM":  # every step that was reported is in the checkpoint
        assert end.lost == 0, end
    else:  # the steps since the last save; while one is under way, since the one before
        assert end.lost <= 2 * save_every, end


# ---- restores that are wrong on purpose: the comparison has to find each of them ------------------------------------


def _patched(change: Callable[[Any], Any]) -> Callable[[], None]:
    def patch() -> None:
        from distil_jax.checkpoint import Checkpoints

        restore = Checkpoints.restore_latest

        def wrong(self, abstract):
            found = restore(self, abstract)
            return found and (found[0], change(found[1]))

        Checkpoints.restore_latest = wrong

    return patch


def _zero_moments(state: Any) -> Any:
    import jax

    return state | {"opt_state": jax.tree.map(lambda x: 0 * x, state["opt_state"])}


def _one_step_early(state: Any) -> Any:
    return state | {"step": state["step"] - 1}


def _nudged(state: Any) -> Any:
    params = state["params"]
    model = params["model"] | {"embedding": params["model"]["embedding"] * (1 + 2**-22)}
    return state | {"params": params | {"model": model}}


def _one_more_skipped(state: Any) -> Any:
    return state | {"skipped": state["skipped"] + 1}


def _other_data() -> None:
    from distil_jax.data.loader import Loader

    iterate = Loader.iterate
    Loader.iterate = lambda self, start=0, prefetch=2: iterate(self, start + 1 if start else 0, prefetch)


def _full_disk() -> None:
    """The system refuses every file above 60 kB, so every checkpoint: what a full disk does, without filling one."""
    import logging
    import resource

    logging.disable()  # the log is a file as well, and Orbax's traces are longer than that
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


WRONG: dict[str, Callable[[], None]] = {
    "skipped optimiser": _patched(_zero_moments),
    "wrong step": _patched(_one_step_early),
    "weights of another rounding": _patched(_nudged),
    "wrong counter": _patched(_one_more_skipped),
    "shuffled data": _other_data,
}
BROKEN = WRONG | {"full disk": _full_disk}

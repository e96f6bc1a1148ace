"""A training run survives what machines do: killed at any moment, its files damaged, it ends as if nothing was."""

import shutil
import signal
import time
from pathlib import Path

import faults
import pytest
from faults import RUN, SAVE_EVERY
from test_run import SMALL, definitions  # noqa: F401

from distil_jax import prepare
from distil_jax.config import load_config
from distil_jax.errors import INTERRUPTED, STOPPED

PROJECT = Path(__file__).resolve().parent.parent
STEPS = 24
# Before the program takes signals itself they end it as the system does.
STATUSES = (0, STOPPED, INTERRUPTED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, definitions):  # noqa: F811
    """(arguments of the config, work folder) with a corpus, and a run to kill."""
    work = tmp_path_factory.mktemp("faults") / "work"
    settings = SMALL | {
        "workdir": work,
        "data.files": definitions,
        "data.processes": 1,
        "student.training.steps": STEPS,
        "student.training.log_every": 1,
        "student.training.evaluate_every": 8,
        "student.training.checkpoint_every": SAVE_EVERY,
    }
    tiny = str(PROJECT / "configs" / "tiny.py")
    arguments = ["--config", tiny, *(f"--config.{key}={value}" for key, value in settings.items())]
    prepare.main(load_config(arguments)[0])
    return arguments, work


@pytest.fixture(scope="module")
def undisturbed(corpus):
    """(what a run leaves that nothing disturbs, its seconds)."""
    arguments, work = corpus
    faults.attempt(arguments, work, None, 0)  # fills the compilation cache
    shutil.rmtree(work / RUN)
    started = time.monotonic()
    end = faults.attempt(arguments, work, None, 0)
    assert end.status == 0, end.message
    return faults.result(work / RUN), time.monotonic() - started


def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(corpus, undisturbed):
    arguments, work = corpus
    wanted, seconds = undisturbed
    kills = []
    for seed in range(10):
        ends = faults.disturbed(arguments, work, seed, seconds)
        assert ends[-1].status == 0, ends[-1].message
        assert faults.result(work / RUN) == wanted, f"seed {seed}: {ends}"
        kills += [end for end in ends if end.how != "none" and end.status != 0]
        for end in ends:
            assert end.status in (0, STOPPED, INTERRUPTED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT), (
                end.message
            )
            if end.status == STOPPED:  # nothing is lost: every step that was reported is in the checkpoint
                assert f"stopped at step {end.saved}" in end.message and end.saved >= end.reported
            elif end.how == "SIGKILL":
                assert end.reported - end.saved <= 2 * SAVE_EVERY  # the save under way, and the interval since
    assert len(kills) >= 20 and {end.how for end in kills} == {"SIGTERM", "SIGINT", "SIGKILL"}


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_checkpoint_costs_one_interval_and_changes_nothing(corpus, undisturbed, harm):
    arguments, work = corpus
    shutil.rmtree(work / RUN, ignore_errors=True)
    end = None
    for after in (0.5, 0.6, 0.7, 0.8):  # until it is in the middle of its steps, with two checkpoints
        shutil.rmtree(work / RUN, ignore_errors=True)
        end = faults.attempt(arguments, work, signal.SIGTERM, after * undisturbed[1])
        if end.status == STOPPED and end.saved > SAVE_EVERY:
            break
    assert end.status == STOPPED and end.saved > SAVE_EVERY
    newest = work / RUN / "checkpoints" / str(end.saved)
    file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    if harm == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)
    end = faults.attempt(arguments, work, None, 0)
    assert end.status == 0 and "is damaged" in end.message
    assert faults.result(work / RUN) == undisturbed[0]


@pytest.mark.parametrize("broken", faults.BROKEN)
def test_the_comparison_finds_a_restore_that_is_wrong(corpus, undisturbed, broken):
    arguments, work = corpus
    for after in (0.5, 0.6, 0.7, 0.8):
        shutil.rmtree(work / RUN, ignore_errors=True)
        end = faults.attempt(arguments, work, signal.SIGTERM, after * undisturbed[1])
        if end.status == STOPPED and end.saved < STEPS - 2:
            break
    assert end.status == STOPPED
    end = faults.attempt(arguments, work, None, 0, broken)
    assert end.status == 0, end.message
    assert faults.result(work / RUN) != undisturbed[0]

"""A training run survives what machines do: killed at any moment, its files damaged, it ends as if nothing was."""

import shutil
import signal
import time
from pathlib import Path

import faults
import pytest
from faults import RUN, SAVE_EVERY, STEPS
from test_run import SMALL, definitions  # noqa: F401

from distil_jax import prepare
from distil_jax.config import load_config
from distil_jax.errors import INPUT, STOPPED

PROJECT = Path(__file__).resolve().parent.parent
KILLS = 30


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
    kills, seed = [], 0
    while len(kills) < KILLS:
        ends, seed = faults.disturbed(arguments, work, seed, seconds), seed + 1
        assert ends[-1].status == 0, ends[-1].message
        assert faults.result(work / RUN) == wanted, f"seed {seed}: {ends}"
        kills += [end for end in ends if end.status != 0]
        for end in ends:
            faults.check_loss(end, SAVE_EVERY)
    assert {end.how for end in kills} == {"SIGTERM", "SIGINT", "SIGKILL"}
    assert {end.where for end in kills} >= {"start", "save"}  # between two saves there is little time


def test_sigterm_after_the_last_step_waits_for_its_checkpoint(corpus, undisturbed):
    arguments, work = corpus
    for _ in range(5):  # the moment may be missed
        shutil.rmtree(work / RUN, ignore_errors=True)
        end = faults.attempt(arguments, work, signal.SIGTERM, 0, from_step=STEPS)
        if end.status == STOPPED:
            break
    assert end.status == STOPPED and end.saved == STEPS and f"stopped at step {STEPS}" in end.message, end
    assert faults.attempt(arguments, work, None, 0).status == 0
    assert faults.result(work / RUN) == undisturbed[0]


@pytest.fixture(scope="module")
def stopped(corpus, undisturbed, tmp_path_factory):
    """A copy of a run that was stopped in the middle, with two checkpoints and more."""
    arguments, work = corpus
    for after in (0.4, 0.5, 0.6, 0.7, 0.8):
        shutil.rmtree(work / RUN, ignore_errors=True)
        end = faults.attempt(arguments, work, signal.SIGTERM, after * undisturbed[1])
        if end.status == STOPPED and SAVE_EVERY < end.saved < STEPS - 2:
            break
    assert end.status == STOPPED and end.saved > SAVE_EVERY, end
    return shutil.copytree(work / RUN, tmp_path_factory.mktemp("stopped") / RUN)


def again(corpus, stopped) -> Path:
    """The folder of the run as it was when it stopped."""
    shutil.rmtree(corpus[1] / RUN, ignore_errors=True)
    return shutil.copytree(stopped, corpus[1] / RUN)


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_checkpoint_costs_one_interval_and_changes_nothing(corpus, undisturbed, stopped, harm):
    arguments, work = corpus
    folder = again(corpus, stopped)
    newest = folder / "checkpoints" / str(faults.saved(folder))
    file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    if harm == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)
    end = faults.attempt(arguments, work, None, 0)
    assert end.status == 0 and "is damaged" in end.message, end.message
    assert faults.result(folder) == undisturbed[0]


@pytest.mark.parametrize("broken", faults.WRONG)
def test_the_comparison_finds_a_restore_that_is_wrong(corpus, undisturbed, stopped, broken):
    folder = again(corpus, stopped)
    end = faults.attempt(*corpus, None, 0, broken)
    assert end.status == 0, end.message
    assert faults.result(folder) != undisturbed[0]


def test_a_run_on_a_full_disk_ends_with_a_word_and_goes_on_when_there_is_room(corpus, undisturbed, stopped):
    folder = again(corpus, stopped)
    end = faults.attempt(*corpus, None, 0, "full disk")
    assert end.status == INPUT and "the disk is full" in end.message, end.message
    end = faults.attempt(*corpus, None, 0)
    assert end.status == 0, end.message
    assert faults.result(folder) == undisturbed[0]

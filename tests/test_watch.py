"""A run that hangs is ended and says where; clock, profile and sinks tell what happened and change nothing."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from distil_jax import chips, watch
from distil_jax.errors import HUNG, UserError
from distil_jax.metrics import MetricsWriter
from distil_jax.watchdog import Watchdog


def settings(**changes):
    return ConfigDict({"hang_seconds": 0, "profile": "", "tensorboard": False, "wandb": ""} | changes)


HANG = """
import threading, time
from distil_jax.watchdog import Watchdog

def where_it_hangs():
    time.sleep(60)

with Watchdog(0.3, "control") as dog:
    time.sleep(0.8)  # before the first step programs compile
    dog.beat(7)
    dog.pause()
    time.sleep(0.8)  # an evaluation
    dog.beat(8)
    where_it_hangs()
"""


def test_a_run_that_hangs_ends_with_its_own_status_and_says_where():
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=50)
    assert done.returncode == HUNG
    assert "error: control: no step for 0 s after step 8" in done.stderr and "where_it_hangs" in done.stderr


def test_a_watchdog_that_is_off_or_fed_does_nothing():
    with Watchdog(0) as dog:
        dog.beat(1)
    with Watchdog(0.5) as dog:
        for step in range(10):
            dog.beat(step)
            time.sleep(0.1)


def test_the_clock_leaves_out_the_first_step_and_what_is_no_step(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(watch, "time", clock)

    def batches():
        for n in range(6):
            clock.now += 1  # the loop waits for it
            yield n

    with watch.Watch(settings(), tmp_path, "control", start=0, model_flops=1e6) as watching:
        for step in watching.waiting(batches()):
            watching.before(step)
            clock.now += 50 if step == 0 else 3  # the first step's program compiles
            watching.after(step, 10)
            if step == 3:
                watching.write(step)
                with watching.paused():
                    clock.now += 70
        watching.write(5)
    first, second = (json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines())
    assert first["step"] == 3 and second["step"] == 5
    for line in (first, second):
        assert line["seconds_per_step"] == pytest.approx(4) and line["tokens_per_second"] == pytest.approx(2.5)
        assert line["waited_for_data"] == pytest.approx(0.25)
        assert line["peak_memory_bytes"] > 1e6 and "mfu" not in line  # a CPU has no stated peak


def test_the_profile_holds_the_steps_that_were_asked_for(tmp_path):
    with watch.Watch(settings(profile="2:4"), tmp_path, "control", start=0) as watching:
        for step in range(1, 6):
            watching.before(step)
            assert watching._tracing == (step in (2, 3))
            watching.after(step, 1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["10", "10:", "13:10", "0:4", "a:b", "-1:3"])
def test_a_profile_that_names_no_steps_is_refused(text):
    with pytest.raises(UserError, match="watch.profile="):
        watch.profile_steps(text)


def scalars(folder):
    """(tag, step, value) of every event in a folder; an event file is records of length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in folder.iterdir():
        content = file.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            content = content[16 + size :]
    return found


def test_tensorboard_and_wandb_get_the_numbers_of_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    also = watch.sinks(settings(tensorboard=True, wandb="distil"), tmp_path, "control", 0)
    with MetricsWriter(tmp_path / "metrics.jsonl", also=also) as metrics:
        metrics.write(1, loss=2.5, name="no number", many=[1, 2])
        metrics.write(2, loss=1.5)
    assert scalars(tmp_path / "tensorboard") == [("loss", 1, 2.5), ("loss", 2, 1.5)]
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_chips_are_known_by_topology_and_by_device():
    assert chips.named("v5e:4x4").kind == "TPU v5 lite"
    for text in ("v5e", "v9:2x2", "h100"):
        with pytest.raises(UserError, match="no topology"):
            chips.named(text)
    assert chips.named("v5p:2x2x1").memory == 95 * 2**30

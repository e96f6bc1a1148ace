"""Notices a training run that stands still, says where, and ends it so that a scheduler can start it again."""

import faulthandler
import os
import sys
import threading
import time
from typing import Any

from distil_jax import hosts
from distil_jax.errors import HUNG


class Watchdog:
    """`with Watchdog(seconds) as watchdog:` and `watchdog.beat(step)` after every step.

    When no beat came for `seconds`, the stacks of all threads and the step of every host go to standard error and the
    process ends with status 72. Before the first beat, while programs compile, and in `pause` nothing is timed. 0: off.
    """

    def __init__(self, seconds: float, label: str = "training"):
        self._seconds, self._label = seconds, label
        self._step, self._beaten = 0, 0.0  # 0: nothing is timed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """Step `step` is done."""
        self._step, self._beaten = step, time.monotonic()
        hosts.report_step(step)

    def pause(self) -> None:
        """Until the next beat nothing is timed: an evaluation or a save is under way."""
        self._beaten = 0.0

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            beaten = self._beaten
            if beaten and time.monotonic() - beaten > self._seconds:
                self._end()

    def _end(self) -> None:
        steps = hosts.steps()
        behind = min(steps, key=steps.get) if steps else None
        where = "" if behind is None else f"; host {behind} is furthest behind, at step {steps[behind]}"
        print(
            f"error: {self._label}: no step for {self._seconds:.0f} s after step {self._step}{where}. The stacks "
            "follow; started again, the run goes on from the newest whole checkpoint (watch.hang_seconds)",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(HUNG)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._over.set()

"""How a training run is watched, without a say in its result: is it alive, where does its time go, who is told.

`timing.jsonl` has what depends on the machine (docs/training.md); what a run computed stands in metrics.jsonl alone.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from ml_collections import ConfigDict

from distil_jax import chips, hosts
from distil_jax.errors import UserError
from distil_jax.metrics import MetricsWriter, peak_memory_bytes
from distil_jax.watchdog import Watchdog

T = TypeVar("T")


class Sink(NamedTuple):
    """Someone who is told the numbers of a run beside metrics.jsonl."""

    write: Callable[[int, dict[str, Any]], None]
    close: Callable[[], None]


class Watch:
    """The watchdog, the clock and the profiler of one run of training, told of every step.

    model_flops: of a step, over all devices (flops.Flops.model); 0 where it is not known.
    """

    def __init__(self, config: ConfigDict, folder: Path, name: str, *, start: int, model_flops: float = 0.0):
        self._profile = profile_steps(config.profile)
        self._folder, self._tracing = folder, False
        self._stack = contextlib.ExitStack()
        self._dog = self._stack.enter_context(Watchdog(config.hang_seconds, name))
        self._timing = self._stack.enter_context(
            MetricsWriter(folder / "timing.jsonl", resume_step=start + 1 if start else 0)
        )
        chip = chips.of(jax.devices()[0])
        self._peak = chip.flops * jax.device_count() if chip else 0.0
        self._flops = model_flops
        self._compiled = False
        self._restart()

    def _restart(self) -> None:
        """A new stretch of steps begins now."""
        self._since, self._steps, self._waited, self._tokens = time.monotonic(), 0, 0.0, 0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time that the loop waits for each."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.monotonic() - asked
            yield batch

    def before(self, step: int) -> None:
        """Step `step` is about to be asked for."""
        if self._profile and step == self._profile.start:
            jax.profiler.start_trace(str(self._folder / "profile"))
            self._tracing = True

    def after(self, step: int, tokens: int) -> None:
        """Step `step`, on `tokens` tokens, has reported."""
        self._dog.beat(step)
        if self._compiled:
            self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        else:  # the first step was compiled meanwhile
            self._compiled = True
            self._restart()
        if self._tracing and step >= self._profile.stop - 1:
            jax.profiler.stop_trace()
            self._tracing = False

    def write(self, step: int) -> None:
        """A line about the stretch that ends with `step`; the next begins."""
        seconds = time.monotonic() - self._since
        if self._steps:
            each = seconds / self._steps
            values = {"seconds_per_step": each, "tokens_per_second": self._tokens / seconds}
            values |= {"waited_for_data": self._waited / seconds, "peak_memory_bytes": peak_memory_bytes()}
            if self._peak and self._flops:
                values["mfu"] = self._flops / (each * self._peak)
            self._timing.write(step, **values)
        self._restart()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For something else than steps: no clock runs, nothing counts as hanging."""
        self._dog.pause()
        yield
        self._restart()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
        self._stack.close()


def profile_steps(text: str) -> range | None:
    """The steps of watch.profile, "10:13" for 10, 11 and 12. Raises UserError for anything else."""
    if not text:
        return None
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and 0 < int(first) < int(end)):
        raise UserError(f'config.watch.profile={text!r}: give the first step and the one after the last, as "10:13"')
    return range(int(first), int(end))


def sinks(config: ConfigDict, folder: Path, name: str, start: int) -> list[Sink]:
    """Who else is told the numbers of metrics.jsonl, as config.watch asks; the first process alone tells them.

    Raises UserError if the package of one is not installed.
    """
    wanted = {"tensorboard": bool(config.tensorboard), "wandb": bool(config.wandb)}
    if not hosts.is_first_process():
        return []
    told: list[Sink] = []
    if wanted["tensorboard"]:
        tensorboard = _import("tensorboardX", "watch.tensorboard")
        writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1, flush_secs=10)

        def to_tensorboard(step: int, values: dict[str, Any]) -> None:
            for key, value in numbers(values).items():
                writer.add_scalar(key, value, step)

        told.append(Sink(to_tensorboard, writer.close))
    if wanted["wandb"]:
        wandb = _import("wandb", "watch.wandb")
        # The folder is the run: a run that was stopped goes on under its id.
        identity = "".join(c if c.isalnum() else "-" for c in str(folder.resolve()))[-96:]
        run = wandb.init(project=config.wandb, id=identity, name=name, dir=str(folder), resume="allow")
        told.append(Sink(lambda step, values: run.log(numbers(values), step=step), run.finish))
    return told


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """What of a line of metrics is one number."""
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _import(package: str, key: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"config.{key} needs {package}: pip install 'distil-jax[watch]', or switch it off") from error

"""What a run measures: `metrics.jsonl` is the truth, the progress line is for the person who waits.

Only the first process of a run writes or prints.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from distil_jax.errors import UserError
from distil_jax.hosts import is_first_process

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter:
    """Appends `{"step": ..., "time": ..., **values}` to a file, one JSON object a line, each line flushed.

    Args:
      path: the file; its folder is made.
      resume_step: the first step that this run will write again. Lines at it and after it are dropped, and a last line
        that a killed run left torn; 0 starts the file anew. `time` is seconds since 1970.
      also: whose `write(step, values)` is called after each line, and `close()` at the end (watch.Sink).

    Raises:
      UserError: the file at `path` holds a line (not the last) that is no metrics line.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int = 0, also: Sequence[Any] = ()):
        self._file: TextIO | None = None
        self._also = also
        if not is_first_process():
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for step, line in _lines(path) if step < resume_step] if path.exists() else []
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Values are numbers (Python, numpy or JAX scalars; NaN and infinities too), texts, or lists of them."""
        if self._file is not None:
            row = {"step": int(step), "time": round(time.time(), 3), **{k: _to_json(v) for k, v in values.items()}}
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            for sink in self._also:
                sink.write(int(step), values)

    def sync(self) -> None:
        """Returns when all lines are on the disk: before a checkpoint that counts on them is begun."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for sink in self._also:
            sink.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics file in their order; a torn last line (a run killed as it wrote) is left out.

    Raises `UserError` for a missing file and for any other line that is no metrics line.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no metrics at {path}: has the training run yet?")
    return [{k: _from_json(v) for k, v in json.loads(line).items()} for _, line in _lines(path)]


def _lines(path: Path) -> list[tuple[int, str]]:
    """`(step, line)` of each whole line, newline included."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append((json.loads(line)["step"], line if line.endswith("\n") else line + "\n"))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: no metrics line; mend it or delete the file") from error
    return found


def _to_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as the texts "nan", "inf", "-inf"."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


class Progress:
    """A progress line: losses, tokens/s, time left, memory. A live bar on a terminal, else a plain line now and then.

    Args:
      total: steps of the whole run; 0 if that is not known.
      label: what is running, for example "teacher".
      start: steps already done by an earlier run that this one continues.
      every_seconds: between two plain lines.
      file: where to; standard error by default.
      terminal: whether `file` is a terminal; asked of it by default.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        start: int = 0,
        every_seconds: float = 5.0,
        file: TextIO | None = None,
        terminal: bool | None = None,
    ):
        self._total, self._label, self._step = total, label, start
        self._every_seconds = every_seconds
        self._file = sys.stderr if file is None else file
        self._active = is_first_process()
        self._tokens = 0
        # (time, step, tokens so far) of late updates. The first stands after the compilation, so rates do not count it.
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=100)
        self._values: dict[str, float] = {}
        self._printed_at = -math.inf
        self._printed_step: int | None = None
        self._bar = None
        if self._active and (self._file.isatty() if terminal is None else terminal):
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[facts]}"))
            console = Console(file=self._file, force_terminal=True)
            self._bar = Bar(*columns, console=console, refresh_per_second=4)
            self._task = self._bar.add_task(label, total=total or None, completed=start, facts="")
            self._bar.start()

    @property
    def step(self) -> int:
        """Steps done by now."""
        return self._step

    def update(self, step: int, *, tokens: int = 0, **values: Any) -> None:
        """`step` steps are done now, the last of them on `tokens` tokens; `values` (losses) are shown by name."""
        if not self._active:
            return
        now = time.monotonic()
        self._step = step
        self._tokens += tokens
        self._recent.append((now, step, self._tokens))
        self._values.update({name: float(value) for name, value in values.items()})
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=self._facts())
        elif now - self._printed_at >= self._every_seconds:
            self._print_line(now)

    def _print_line(self, now: float) -> None:
        print(f"{self._label}: {self._facts()}", file=self._file, flush=True)
        self._printed_at, self._printed_step = now, self._step

    def _facts(self) -> str:
        of = f"/{self._total}" if self._total else ""
        parts = [f"{self._step}{of}", *(f"{name} {value:.4g}" for name, value in self._values.items())]
        (t0, step0, tokens0), (t1, step1, tokens1) = self._recent[0], self._recent[-1]
        if step1 > step0 and t1 > t0:
            if tokens1 > tokens0:
                parts.append(f"{_short((tokens1 - tokens0) / (t1 - t0))} tokens/s")
            if self._total:
                parts.append(f"ETA {_clock(max(0, self._total - step1) * (t1 - t0) / (step1 - step0))}")
        parts.append(f"{peak_memory_bytes() / 2**30:.1f} GiB")
        return "  ".join(parts)

    def close(self) -> None:
        """Shows the last state once more and ends the line."""
        if self._bar is not None:
            self._bar.stop()
        elif self._active and self._recent and self._printed_step != self._step:
            self._print_line(time.monotonic())
        self._active, self._bar = False, None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def peak_memory_bytes() -> int:
    """The most memory that this run has held: of its fullest device where devices say so, else of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _peak_device_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_device_bytes() -> int:
    """0 on CPU, whose devices keep no count, and without JAX; where JAX is imported, this starts its devices."""
    if "jax" not in sys.modules:
        return 0
    import jax

    peaks = [0]
    with contextlib.suppress(RuntimeError):  # no backend can be started: the caller still knows the process's own peak
        peaks += [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return max(peaks)


def _short(number: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

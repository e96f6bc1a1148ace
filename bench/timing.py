"""Several forms of one computation timed side by side in one process, since the machine is never quite idle."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def side_by_side(forms: dict[str, Callable[[], Any]], rounds: int = 20) -> dict[str, float]:
    """Median seconds of each form over `rounds` turns, A B A B ..., after one call that compiles; prints them and the
    ratios to the first."""
    for form in forms.values():
        jax.block_until_ready(form())
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form())
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:40s} {1e3 * median:9.2f} ms   {median / first:6.2f}")
    return medians

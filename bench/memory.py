"""Resident memory of this process, on Linux with glibc."""

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import jax


def resident(line: str = "VmRSS") -> int:
    """Bytes: VmRSS is now, VmHWM the peak."""
    with open("/proc/self/status") as lines:
        return next(int(text.split()[1]) for text in lines if text.startswith(line)) * 1024


def give_back() -> None:
    """Hands what was freed back to the system, so that it does not count as resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_of(form: Callable[[], Any], calls: int = 2) -> tuple[int, int]:
    """Resident bytes at their peak over `calls` of `form` after a first one, and after the last of them."""
    jax.block_until_ready(form())
    give_back()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is resident now: loading and compiling are not measured
    for _ in range(calls):
        jax.block_until_ready(form())
    return resident("VmHWM"), resident()

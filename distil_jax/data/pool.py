"""A function over a stream of items, in processes: results in the order of the items, with few of them in memory."""

import contextlib
import ctypes
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from distil_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 2  # items under way for each process, so that none waits for the reader

_context: Any = None  # of a worker process, set once by `_start`


def processes_of(asked: int) -> int:
    """How many processes `config.data.processes` means: 0 is as many as this process may use cores."""
    if asked < 0:
        raise UserError(f"config.data.processes is {asked}: 0 means as many as cores, 1 this process alone")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or cores


def ordered(
    function: Callable[[Any, Item], Result], context: Any, items: Iterable[Item], processes: int = 1
) -> Iterator[Result]:
    """`function(context, item)` for each item, in order; at most twice as many items as processes are under way.

    processes: 1 is this process, more are so many others, which get `context` once. A script that asks for others must
      guard its main module, as Python's spawn needs.

    Raises what the function raises, and UserError if a process dies, for example for want of memory.
    """
    if processes <= 1:
        yield from (function(context, item) for item in items)
        return
    # Not fork: JAX has threads, and their locks would stay shut in a copy.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_start, initargs=(context,)) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_call, function, item))
                if len(waiting) >= _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {processes} processes that prepare the text died, perhaps for want of memory: give "
                "config.data.processes=1, or fewer of them"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def release_memory() -> None:
    """Gives what this process has freed back to the machine. glibc keeps it for itself, and several processes do so at
    the same time; other C libraries have no such call, and do without."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _start(context: Any) -> None:
    global _context
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes have the cores already
    _context = context


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_context, item)

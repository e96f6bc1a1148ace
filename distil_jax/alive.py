"""Hosts that share a folder: each shows that it is alive, and none waits for one that is not.

A host that works on a stage touches its file in `alive/` of the work folder from a thread. Who waits for it looks
whether the file's time changes, by its own clock: the clocks of two hosts need not agree. A process that is killed
stops touching; one that ends removes its file. A process that hangs alive goes on touching and is not found.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from distil_jax.errors import UserError

SILENCE = 120.0  # seconds without a sign of life; above the minute for which NFS may show an old time
POLL = 1.0  # seconds between two looks at what another host has done


def file_of(root: Path, host: int) -> Path:
    """What shows that a host is alive; it holds the machine's name and the process's number."""
    return root / "alive" / f"host-{host}"


class Alive:
    """A context in which this host shows that it is alive, ten times in `silence` seconds."""

    def __init__(self, root: Path, host: int, silence: float = SILENCE):
        self._file, self._every = file_of(root, host), silence / 10
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="alive", daemon=True)

    def __enter__(self) -> "Alive":
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(f"{socket.gethostname()}, process {os.getpid()}\n", encoding="utf-8")
        self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._ended.wait(self._every):
            # A shared folder may fail for a moment; the others tell if it fails for long.
            try:
                os.utime(self._file)
            except OSError:
                continue

    def __exit__(self, *exc_info) -> None:
        self._ended.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)


def wait(
    until: Callable[[], Any],
    what: str,
    root: Path,
    hosts: Callable[[], Collection[int]],
    silence: float = SILENCE,
) -> Any:
    """What `until` returns once it is true; says once what is waited for.

    hosts: those whose work is still missing. Raises UserError if one of them shows no sign of life for `silence`
    seconds.
    """
    heard: dict[int, tuple[int, float]] = {}  # host -> (the time of its file, when it was new here)
    said = False
    while not (found := until()):
        if not said:
            print(f"prepare: waiting for {what}", flush=True)
            said = True
        for host in hosts():
            now, beat = time.monotonic(), _time_of(file_of(root, host))
            if host not in heard or heard[host][0] != beat:
                heard[host] = (beat, now)
            elif now - heard[host][1] > silence:
                raise UserError(_told(file_of(root, host), host, what, silence))
        time.sleep(POLL)
    return found


def _time_of(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _told(file: Path, host: int, what: str, silence: float) -> str:
    try:
        name, there = file.read_text(encoding="utf-8").strip(), f"has not been touched for {silence:g} seconds"
    except FileNotFoundError:
        name, there = "it has ended or did not start", f"is not there since {silence:g} seconds or more"
    return (
        f"waiting for {what}: host {host} ({name}) shows no sign of life, {file} {there}. See why it ended, and start "
        "this command again on all hosts: what is whole is kept"
    )

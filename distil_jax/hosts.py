"""Several processes as one run: how they find each other, wait for each other, and notice that one is gone.

The launch scripts say who takes part, in `DISTIL_JAX_HOSTS`:

    (unset)             this process alone
    auto                a TPU pod, GKE or SLURM, as `jax.distributed.initialize` finds it
    HOST:PORT,N,I       process I of N, the first of which listens at HOST:PORT

JAX's own runtime does the work: its coordination service in the first process, collectives between devices. What is
added is that a loss ends a run soon and says why. Every process tells the others that it lives and where it is; one
that has been silent for `LOST_SECONDS`, or has failed, ends all of them with one message and its exit status
(docs/scale.md).
"""

import atexit
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from distil_jax.errors import HOST_LOST, INPUT, HostLost, UserError

VARIABLE = "DISTIL_JAX_HOSTS"
LOST_SECONDS = 40.0  # without a sign of life
BEAT_SECONDS = 2.0
_KEY = "distil_jax/hosts"
_NEVER = 30 * 24 * 3600 * 1000  # milliseconds: a barrier waits as long as the slowest process works
_barriers = itertools.count()
_monitor: "Monitor | None" = None


def start() -> None:
    """Joins the other processes of the run, if `DISTIL_JAX_HOSTS` names any. Before any other use of JAX.

    Raises UserError for a value that names none, HostLost if the first host has no address within five minutes. If the
    others do not come in that time, JAX aborts the process (134).
    """
    global _monitor
    value = os.environ.get(VARIABLE, "")
    if not value or _monitor is not None:
        return
    given = _given(value)
    import jax

    # It would take SIGTERM for itself; the training loop has its own way to agree on a last step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # JAX's own sign of life comes after ours: it ends a process by SIGABRT, with a stack trace.
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=round(3 * LOST_SECONDS))
    except (RuntimeError, ValueError) as error:
        # A value that is wrong stays so; a host that has no address yet may have one when the run is started again.
        kind = UserError if isinstance(error, ValueError) else HostLost
        first = str(error).splitlines()[0]
        raise kind(f"{VARIABLE}={value}: the processes of this run did not find each other ({first})") from error
    if jax.process_count() > 1:
        _monitor = Monitor(_client(), jax.process_index(), jax.process_count())
        _monitor.start()
        # Where `leave` is not reached. Before Python tears itself down: a thread that it ends inside the client's C++
        # aborts the process.
        atexit.register(_monitor.stop)


def _given(value: str) -> dict[str, Any]:
    if value == "auto":
        return {}
    address, *numbers = value.split(",")
    if len(numbers) != 2 or not all(n.strip().isdigit() for n in numbers) or ":" not in address:
        raise UserError(f"{VARIABLE}={value!r}: it is 'auto' or HOST:PORT,COUNT,INDEX, as 10.0.0.1:8476,4,0")
    count, index = map(int, numbers)
    if index >= count:
        raise UserError(f"{VARIABLE}={value!r}: there is no process {index} of {count}, they count from 0")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def count() -> int:
    """Processes in this run. Starts no device in a run of one."""
    if "jax" not in sys.modules:
        return 1
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Of this process, from 0. Starts no device in a run of one."""
    if count() == 1:
        return 0
    import jax

    return jax.process_index()


def is_first_process() -> bool:
    """True in a run of one process and in the first of several."""
    return index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here; they must come by the same barriers in the same order."""
    if count() > 1:
        _client().wait_at_barrier(f"{_KEY}/{next(_barriers)}/{name}", _NEVER)


def leave() -> None:
    """Called by a process that has done all that it had to do: waits for the others, and ends the run with them.

    A barrier alone would not do. The first process holds the coordination service, and one that has not yet read the
    barrier's answer when the first exits would take that for a loss.
    """
    global _monitor
    if count() > 1:
        import jax

        barrier("done")
        if _monitor is not None:
            _monitor.stop()
            _monitor = None
        with contextlib.suppress(Exception):  # nothing is left to be done, whatever became of the others
            jax.distributed.shutdown()


class AnyOf:
    """Whether any process raised its flag, known to all of them at the same step.

    `told(flag)` sends this process's flag and returns at once; the number that it returns is read a step later, and is
    above 0 if any flag was raised. In a run of one process it is the flag itself.
    """

    def __init__(self, mesh: Any):
        self.told: Callable[[bool], Any] = bool
        if count() == 1:
            return
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        lies = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

        def told(flag: bool) -> Any:
            mine = np.full(1, flag, np.int32)
            return largest(jax.make_array_from_callback((mesh.size,), lies, lambda _: mine))

        self.told = told


def report_step(step: int) -> None:
    """Notes where this process is, for the message about one that hangs or is lost."""
    if _monitor is not None:
        _monitor.step = step


def steps() -> dict[int, int]:
    """The last step that each process was seen at; empty in a run of one."""
    return dict(_monitor.steps) if _monitor is not None else {}


def failed(status: int, message: str) -> None:
    """Called by a process that is about to end with an exit status other than 0: tells the others, which end with the
    same, and then ends this one without waiting for them. Returns in a run of one process."""
    if _monitor is not None and status:
        _monitor.fail(status, message)


class Monitor(threading.Thread):
    """Tells the other processes that this one lives, and ends it when one of them does not."""

    def __init__(self, client: Any, index: int, processes: int, lost_after: float = LOST_SECONDS):
        super().__init__(name="hosts", daemon=True)
        self._client, self._index, self._processes, self._lost_after = client, index, processes, lost_after
        self.step = 0
        self.steps: dict[int, int] = {}
        self._heard: dict[int, tuple[str, float]] = {}
        self._over = threading.Event()

    def stop(self) -> None:
        """Ends the thread; returns when it has ended, or cannot for want of an answer."""
        self._over.set()
        self.join(LOST_SECONDS)

    def run(self) -> None:
        for beat in itertools.count():
            if self._over.is_set():
                return
            try:
                self._client.key_value_set(f"{_KEY}/alive/{self._index}", f"{beat} {self.step}", True)
                told = dict(self._client.key_value_dir_get(f"{_KEY}/failed/"))
                alive = dict(self._client.key_value_dir_get(f"{_KEY}/alive/"))
            except Exception as error:
                if _leaving() or self._over.is_set():
                    return
                _end(HOST_LOST, f"the first host is lost ({str(error).splitlines()[0][:120]})")
            self._obey(told)
            self._look(alive)
            self._over.wait(BEAT_SECONDS)

    def _obey(self, told: dict[str, str]) -> None:
        for key, text in told.items():
            status, _, message = text.partition(" ")
            if (whose := int(key.rsplit("/", 1)[1])) != self._index:
                self._client.key_value_set(f"{_KEY}/heard/{self._index}", "", True)
                _end(int(status), f"host {whose} failed: {message}")

    def _look(self, alive: dict[str, str]) -> None:
        now = time.monotonic()
        for key, text in alive.items():
            whose = int(key.rsplit("/", 1)[1])
            self.steps[whose] = int(text.split()[1])
            if self._heard.get(whose, ("", 0.0))[0] != text:
                self._heard[whose] = (text, now)
            elif whose != self._index and now - self._heard[whose][1] > self._lost_after and not _leaving():
                silent = f"for {self._lost_after:.0f} s, last at step {self.steps[whose]}"
                _end(HOST_LOST, f"host {whose} of {self._processes} has been silent {silent}")

    def fail(self, status: int, message: str) -> None:
        self._over.set()
        sys.stdout.flush(), sys.stderr.flush()
        with contextlib.suppress(Exception):  # the service may be what failed
            line = " ".join(message.split())[:500]
            self._client.key_value_set(f"{_KEY}/failed/{self._index}", f"{status} {line}", True)
            if self._index == 0:  # the service ends with this process: let the others read why first
                until = time.monotonic() + 5 * BEAT_SECONDS
                while time.monotonic() < until:
                    if len(self._client.key_value_dir_get(f"{_KEY}/heard/")) == self._processes - 1:
                        break
                    time.sleep(0.1)
        os._exit(status)


def _end(status: int, message: str) -> NoReturn:
    again = "" if status == INPUT else "; started again, the run goes on from the newest whole checkpoint"
    print(f"error: {message}{again}", file=sys.stderr, flush=True)
    os._exit(status)


def _leaving() -> bool:
    return not threading.main_thread().is_alive()


def _client() -> Any:
    from jax._src import distributed  # the store of the coordination service has no public name

    return distributed.global_state.client

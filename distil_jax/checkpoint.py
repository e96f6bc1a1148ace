"""Checkpoints on Orbax: saved in the background, few kept, and the newest whole one wins.

Orbax writes a step into a folder with a temporary name and renames it when everything is there, so a killed process or
a full disk leaves the steps before it as they were. What can still go wrong afterwards (a copy that was cut short, a
disk that lost a block) is found with a seal: `whole.json` in the step's folder, the size of each of its files and the
checksum of the small ones. A checkpoint also carries a description of its leaves, so that a state of another model is
refused by the name of the leaf and is not mistaken for damage.
"""

import contextlib
import json
import signal
import sys
import threading
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from distil_jax import hosts
from distil_jax.errors import UserError

_SEAL = "whole.json"
_UNFINISHED = ".orbax-checkpoint-tmp"
# Larger files are known by their size alone: reading a shard of gigabytes twice costs more than it finds.
_CHECKSUM_BYTES = 1 << 20


class Checkpoints:
    """The checkpoints of one run, one folder per step.

    Args:
      directory: made if it does not exist.
      keep: how many of the newest stay.
      save_every: `save` does something at multiples of this step only.

    All processes of a run construct it, save and restore together.
    """

    def __init__(self, directory: Any, *, keep: int = 2, save_every: int = 1):
        self.directory = epath.Path(directory).absolute()
        self.save_every = save_every
        self._unfinished = []
        if self.directory.exists():
            self._unfinished = [p.name.split(".")[0] for p in self.directory.iterdir() if _UNFINISHED in p.name]
        self._unsealed: int | None = None
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """The finished steps that are there, ascending."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, step: int, state: Any, force: bool = False) -> bool:
        """Saves `state` (a pytree of arrays) in the background, if `step` is due or `force`; says whether it does.

        The state is copied before this returns, so its buffers may be donated to the next update. A save that is still
        under way is waited for. A step that is there already is not saved again.

        Raises OSError or ValueError for the failure of an earlier save, as the disk reported it.
        """
        if not (force or step % self.save_every == 0):
            return False
        self.wait()
        if step in self.steps:
            return False
        leaves = {name: _describe(leaf) for name, leaf in _named_leaves(state)}
        self._orbax.save_async(step, state, force=True, custom_metadata={"leaves": leaves})
        self._unsealed = step
        return True

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any] | None:
        """`(step, state)` of the newest whole checkpoint, or None where nothing was ever saved.

        Args:
          abstract_state: the tree to restore; leaves are `jax.ShapeDtypeStruct` with the sharding to restore onto
            (which may differ from the one it was saved from), or arrays that stand for their own shape and sharding.

        A damaged checkpoint is reported on standard error, moved aside to `damaged-STEP` and the one before it is used.

        Raises:
          UserError: the checkpoint holds another tree, shape or dtype; or there are checkpoints, and none is whole.
        """
        self.wait()
        abstract_state = jax.tree.map(_abstract, abstract_state)
        found = self.steps
        for step in self._unfinished:
            _warn(f"{self.directory}: the save of step {step} was cut off; it is left out")
        for step in reversed(found):
            fault, state = self._try_restore(step, abstract_state)
            if fault is None:
                return step, state
            _warn(f"checkpoint {self.directory / str(step)} is damaged ({fault}); trying the one before it")
            self._move_aside(step)
        if found:
            raise UserError(
                f"no whole checkpoint in {self.directory}: steps {', '.join(map(str, found))} are damaged. "
                "Delete this folder to start the run anew"
            )
        return None

    def _try_restore(self, step: int, abstract_state: Any) -> tuple[str | None, Any]:
        """`(None, state)`, or `(what is damaged, None)`. Raises UserError for a state of another model."""
        if fault := _broken_seal(self.directory / str(step)):
            return fault, None
        try:
            leaves = (self._orbax.metadata(step).custom_metadata or {}).get("leaves")
            if not leaves:
                return "its description is missing", None
            _check_same(leaves, abstract_state, self.directory / str(step))
            state = self._orbax.load(step, abstract_state)
        except UserError:
            raise
        except Exception as error:
            causes = list(_causes(error))
            # The checkpoint is not to blame for a machine that is too small for it.
            if any(isinstance(c, MemoryError) or "RESOURCE_EXHAUSTED" in str(c) for c in causes):
                raise
            return f"{type(causes[-1]).__name__}: {str(causes[-1]).splitlines()[0][:200]}", None
        wrong = [name for name, leaf in _named_leaves(state) if _describe(leaf) != leaves[name]]
        return (f"leaf {wrong[0]} does not come back as it was", None) if wrong else (None, state)

    def _move_aside(self, step: int) -> None:
        """Keeps a damaged checkpoint for a look at it, out of the way of the steps that will be saved again."""
        if hosts.is_first_process():
            aside = self.directory / f"damaged-{step}"
            if aside.exists():
                aside.rmtree()
            (self.directory / str(step)).rename(aside)
        hosts.barrier(f"damaged checkpoint {step}")
        self._orbax.reload()

    def wait(self) -> None:
        """Until the save under way is on disk. Raises what went wrong with it."""
        step, self._unsealed = self._unsealed, None
        self._orbax.wait()
        if step is not None and hosts.is_first_process():
            _seal(self.directory / str(step))

    def close(self) -> None:
        """Waits, as `wait`, and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def read_part(directory: Any, abstract_part: Any, step: int | None = None) -> tuple[int, Any]:
    """`(step, part)` of a checkpoint: the leaves that `abstract_part` names, as for `restore_latest`; nothing else is
    read, and nothing in the folder changes, so a run that goes on meanwhile is not disturbed.

    step: that one; None: the newest whole one. Raises UserError if there is none, or it holds other leaves.
    """
    directory = epath.Path(directory).absolute()
    found = sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit()) if directory.exists() else []
    if step is not None and step not in found:
        raise UserError(f"{directory} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}")
    abstract_part = jax.tree.map(_abstract, abstract_part)
    for one in reversed(found) if step is None else (step,):
        if fault := _broken_seal(directory / str(one)):
            if step is not None:
                raise UserError(f"checkpoint {directory / str(one)} is damaged ({fault}); choose another step")
            _warn(f"checkpoint {directory / str(one)} is damaged ({fault}); trying the one before it")
            continue
        leaves = (ocp.metadata(directory / str(one)).custom_metadata or {}).get("leaves") or {}
        wanted = {name for name, _ in _named_leaves(abstract_part)}
        _check_same({k: v for k, v in leaves.items() if k in wanted}, abstract_part, directory / str(one))
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return one, ocp.load(directory / str(one), abstract_part)
    raise UserError(f"{directory} has no whole checkpoint: train this run first")


@contextlib.contextmanager
def on_sigterm() -> Iterator[SimpleNamespace]:
    """`with on_sigterm() as stop:` a SIGTERM sets `stop.requested`, for the loop to save and leave.

    A second SIGTERM ends the process as ever. Outside the main thread, where Python takes no signals, nothing is set.
    """
    stop = SimpleNamespace(requested=False)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum, frame):
        stop.requested = True
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, handle) or signal.SIG_DFL
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`(dotted name, leaf)` of each leaf, for example `params.layers.q`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]


def _describe(leaf: Any) -> str:
    """For example `bfloat16[16,2048]`."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _abstract(leaf: Any) -> Any:
    """The leaf as Orbax wants it; one without a sharding goes to the first device, numpy arrays stay numpy's."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return leaf


def _check_same(stored: dict[str, str], abstract_state: Any, where: epath.Path) -> None:
    """Raises UserError that names the first leaf that differs."""
    wanted = {name: _describe(leaf) for name, leaf in _named_leaves(abstract_state)}
    differ = [name for name in (*wanted, *stored) if wanted.get(name) != stored.get(name)]
    if differ:
        name = differ[0]
        there, here = stored.get(name, "absent"), wanted.get(name, "absent")
        more = f" (and {len(set(differ)) - 1} more leaves)" if len(set(differ)) > 1 else ""
        raise UserError(
            f"checkpoint {where} was saved by another config: {name} is {there} there and {here} here{more}. "
            f"Restore that config, or delete {where.parent} to start anew"
        )


def _seal(folder: epath.Path) -> None:
    """Notes what a whole checkpoint consists of. Without the note the checkpoint is still good, and is only tried."""
    files = {}
    for file in _files(folder):
        size = file.stat().length
        checksum = zlib.crc32(file.read_bytes()) if size <= _CHECKSUM_BYTES else None
        files[str(file.relative_to(folder))] = [size, checksum]
    part = folder / f"{_SEAL}.part"
    part.write_text(json.dumps({"files": files}))
    part.rename(folder / _SEAL)


def _broken_seal(folder: epath.Path) -> str | None:
    """What is not as it was sealed, or None: all is, or the process was killed before it could seal."""
    if not (folder / _SEAL).exists():
        return None
    try:
        sealed = json.loads((folder / _SEAL).read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return f"{_SEAL} cannot be read"
    for name, (size, checksum) in sealed.items():
        file = folder / name
        if not file.exists():
            return f"{name} is missing"
        if (now := file.stat().length) != size:
            return f"{name} has {now} of {size} bytes"
        if checksum is not None and zlib.crc32(file.read_bytes()) != checksum:
            return f"{name} has changed"
    return None


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _warn(message: str) -> None:
    if hosts.is_first_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)

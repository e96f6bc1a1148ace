"""The student of the best point of a run's validation curve, kept beside its newest checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import jax

from distil_jax import hosts
from distil_jax.checkpoint import Checkpoints
from distil_jax.errors import UserError
from distil_jax.metrics import read_metrics

CURVE = "validation_bits_per_byte"


class Best:
    """`offer` every point of the curve; `take` the parameters of the best one at the end.

    Args:
      folder: of the run; they lie in best/ of it, one checkpoint.
      wanted: False: `offer` does nothing, and `take` gives back what it is given.
      start: the step that the run goes on from. Later points are forgotten: they come again, with the same values.
    """

    def __init__(self, folder: Path, wanted: bool, start: int):
        self._wanted = wanted
        self.step, self._value = 0, float("inf")
        if not wanted:
            return
        if start:
            points = [(line[CURVE], line["step"]) for line in read_metrics(folder / "metrics.jsonl") if CURVE in line]
            self._value, self.step = min((p for p in points if p[1] <= start), default=(float("inf"), 0))
        place = folder / "best"
        there = [int(p.name) for p in place.iterdir() if p.name.isdigit()] if place.is_dir() else []
        if there and max(there) != self.step:
            # Of a point that the run has not reached again. Should the best before it be gone with it: it was worse.
            if hosts.is_first_process():
                shutil.rmtree(place)
            hosts.barrier("the best point")
        self._checkpoints = Checkpoints(place, keep=1)

    def offer(self, step: int, value: float, params: Any) -> None:
        """The point of the curve at `step`; `params` are kept if no earlier one was as good."""
        if self._wanted and value < self._value:
            self.step, self._value = step, value
            self._checkpoints.save(step, params, force=True)

    def take(self, params: Any) -> Any:
        """The best parameters, placed as `params`, those of the last step. Raises UserError if they are lost."""
        if not self._wanted:
            return params
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        found = self._checkpoints.restore_latest(abstract)
        self._checkpoints.close()
        if found is None:
            raise UserError(
                f"{self._checkpoints.directory} held the best point, of step {self.step}, and is gone: set "
                "training.keep_best=False to take the last step, or delete the run's folder to train it again"
            )
        return found[1]

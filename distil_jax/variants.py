"""The students of a run: two that no teacher teaches, the distilled one, and variants of it.

A variant is a name and what it changes in the objective:

    c.variants = ConfigDict({"hot": {"temperature": {"kind": "exponential", "start": 8.0}}})
    c.runs = ("control", "distilled", "hot")

It is trained as the distilled student is, with those values in place of the config's. Taught runs are the rungs of a
ladder in the order of `config.runs`: each is compared with the control and with the rung before it (evaluate.py).
"""

import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from distil_jax.config import flatten, overlaid
from distil_jax.errors import UserError, nearest

UNTAUGHT = ("control", "smoothing")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
# What stands beside the folder of a run, or beside its name in what the stages write.
_TAKEN = ("corpus", "tokenizers", "teacher", "projection", *UNTAUGHT, "distilled", "evaluate", "export", "report")
_TAKEN += ("scores", "student_before", "prompt", "reference")


def applied(config: ConfigDict, run: str) -> ConfigDict:
    """The config as a run sees it: that of a variant has its values in the objective, any other is as it was."""
    return overlaid(config, "objective", f"variants.{run}") if run in config.variants else config


def taught(runs: Sequence[str]) -> list[str]:
    """The rungs of the ladder: the runs that learn from the teacher, in their order."""
    return [run for run in runs if run not in UNTAUGHT]


def below(runs: Sequence[str], run: str) -> str | None:
    """The rung below a taught run: the taught run before it, else the control, else None."""
    rungs = [*(["control"] if "control" in runs else []), *taught(runs)]
    return ([None, *rungs])[rungs.index(run)]


def check(config: ConfigDict) -> None:
    """Raises UserError for a name, a run or an override that cannot be."""
    for name in config.variants:
        if not _NAME.fullmatch(name) or name in _TAKEN:
            raise UserError(
                f"config.variants.{name}: a variant's name is made of a-z, 0-9, _ and -, and is none of "
                f"{', '.join(_TAKEN)}"
            )
        if not isinstance(config.variants[name], ConfigDict):
            raise UserError(f"config.variants.{name} is a section of the objective's keys that the variant changes")
        if "label_smoothing" in flatten(config.variants[name]):
            raise UserError(f"config.variants.{name}.label_smoothing: only the smoothing run reads it, no variant does")
        applied(config, name)
    known = [*UNTAUGHT, "distilled", *config.variants]
    runs = tuple(config.runs)
    for run in runs:
        if run not in known:
            raise UserError(f"config.runs names {run!r}: it is any of {', '.join(known)}{nearest(run, known)}")
        if runs.count(run) > 1:
            raise UserError(f"config.runs names {run!r} twice")
    if config.export.run not in taught(runs):
        raise UserError(
            f"config.export.run is {config.export.run!r}, which config.runs {runs} does not train with the teacher: "
            f"the run that is exported is one of {', '.join(known[2:])}, and stands in config.runs"
        )

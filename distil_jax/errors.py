"""The one error that is meant for the person at the keyboard, the word that they may have meant, and exit statuses."""

import difflib
from collections.abc import Iterable

# What a scheduler can tell apart (docs/scale.md). Worth starting again: 72, 73, 143 and 137, and 1 a few times.
FAILED = 1  # of a fault of the program
INPUT = 2  # something for the user to mend
OUT_OF_MEMORY = 70
DIVERGED = 71  # too many updates were not finite
HUNG = 72  # no step for too long
HOST_LOST = 73  # another process of the run is gone
INTERRUPTED = 130
STOPPED = 143  # told to stop by SIGTERM; the state is saved


class UserError(ValueError):
    """Something the user can mend: a bad config key, a bad row, a missing file, a checkpoint of another model.

    The message says what was wrong, where (file, row, key), and what to do. The command line prints it as one line on
    standard error and exits with status 2, without a traceback; set ``DISTIL_JAX_DEBUG=1`` to see the traceback too.
    """

    status = INPUT


class HostLost(UserError):
    """Another process of the run is gone, or has not come."""

    status = HOST_LOST


class Diverged(UserError):
    """Too many updates of a training run were not finite."""

    status = DIVERGED


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.5) -> str:
    """`" (did you mean 'x'?)"` for the choice most like `name`, or an empty string if none reaches `cutoff` (0 to 1).

    For dotted keys the last part alone may decide: `learning_rate` finds `train.learning_rate`.
    """

    def likeness(choice: str) -> float:
        whole = difflib.SequenceMatcher(None, name, choice).ratio()
        ends = difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], choice.rsplit(".", 1)[-1]).ratio()
        return max(whole, 0.95 * ends + 0.05 * whole)

    best = max(sorted(choices), key=likeness, default=None)
    return f" (did you mean {best!r}?)" if best is not None and likeness(best) >= cutoff else ""

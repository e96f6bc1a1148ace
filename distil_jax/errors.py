"""The one error that is meant for the person at the keyboard, and the word that they may have meant."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: a bad config key, a bad row, a missing file, a checkpoint of another model.

    The message says what was wrong, where (file, row, key), and what to do. The command line prints it as one line on
    standard error and exits with status 2, without a traceback; set ``DISTIL_JAX_DEBUG=1`` to see the traceback too.
    """


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

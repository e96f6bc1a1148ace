"""What a student keeps of its teacher: accuracy over the teacher's, agreement, and KL, whole, by specialty and by class
of token.

token_accuracy_retained: at root positions, how often the student's most likely token is the true one, over how often
    the teacher's is.
agreement_with_teacher: at root positions, how often it is the first piece of the teacher's most likely token.
kl_to_teacher: nats, KL(p || s) at temperature 1 where both tokenizations have a boundary, p the projected teacher
    (docs/projection.md) and s the student. It is what `kl_at_1` of metrics.jsonl is, on held-out text and for every
    student, taught or not.

Intervals redraw documents (bootstrap.py).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from distil_jax.eval import bootstrap


class Kept(NamedTuple):
    """One student beside its teacher, at the student's positions of the packed rows."""

    roots_RxL: Bool[np.ndarray, "R L"]  # supervised text tokens at root positions
    right_RxL: Bool[np.ndarray, "R L"]  # the student's most likely token is the true one
    teacher_right_RxL: Bool[np.ndarray, "R L"]  # the teacher's is, at the position that speaks about it
    agree_RxL: Bool[np.ndarray, "R L"]
    kl_RxL: Float[np.ndarray, "R L"]
    spoken_RxL: Bool[np.ndarray, "R L"]  # where kl is measured


def measures(
    kept: Kept, document_RxL: Int[np.ndarray, "R L"], parts: Mapping[str, Bool[np.ndarray, "R L"]], samples: int
) -> dict[str, dict[str, Any]]:
    """The measures of each part of the positions that has any, with their intervals.

    document: 0..D-1 of each position. parts: name -> which positions count.
    """
    documents = int(document_RxL.max()) + 1

    def total(values: np.ndarray, where: np.ndarray) -> Float[np.ndarray, " D"]:
        return np.bincount(document_RxL[where], values[where].astype(np.float64), minlength=documents)

    found = {}
    for name, where in parts.items():
        roots, spoken = kept.roots_RxL & where, kept.spoken_RxL & where
        if not roots.any():
            continue
        right, agree = total(kept.right_RxL, roots), total(kept.agree_RxL, roots)
        sums = {
            "token_accuracy_retained": (right, total(kept.teacher_right_RxL, roots)),
            "agreement_with_teacher": (agree, total(roots, roots)),
            "kl_to_teacher": (total(kept.kl_RxL, spoken), total(spoken, spoken)),
        }
        one: dict[str, Any] = {"positions": int(roots.sum())}
        for key, (top, bottom) in sums.items():
            if bottom.sum():  # a teacher that is never right about a class leaves nothing to retain
                one[key], one[f"{key}_interval"] = bootstrap.ratio(top, bottom, samples=samples)
        found[name] = one
    return found

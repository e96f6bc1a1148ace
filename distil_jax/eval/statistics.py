"""What follows from the answers of one model, or of two to the same items: accuracy, paired tests, calibration.

Pure functions of numpy arrays. `right_I` is whether each item was answered rightly, `confidence_I` the probability that
the model gave to what it chose: `answers.right()` and `confidence(answers)` for a task with choices. Intervals are 95 %
percentile bootstraps over items.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from distil_jax.eval import bootstrap
from distil_jax.eval.answers import Answers, paired

BINS = 15  # of a reliability curve, as is usual (Guo et al. 2017)
EXACT = 25  # discordant pairs, below which McNemar's test is the exact binomial one
Z = 1.959964  # of the normal distribution, for 95 %


class Bin(NamedTuple):
    """A point of a reliability curve: items, their mean confidence, the share that is right, its Wilson interval."""

    count: int
    confidence: float
    accuracy: float
    low: float
    high: float


# ---- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(answers: Answers, *, normalised: bool = False, samples: int = bootstrap.SAMPLES) -> dict[str, Any]:
    """Share of items answered rightly: `{"accuracy", "interval", "items"}`."""
    right_I = answers.right(normalised=normalised)
    value, interval = bootstrap.ratio(right_I, np.ones(len(right_I)), samples=samples)
    return {"accuracy": value, "interval": interval, "items": len(right_I)}


def chance(answers: Answers) -> float:
    """What drawing a choice at random scores, in expectation."""
    return float(np.mean(1 / np.maximum((answers.bytes_IxC > 0).sum(axis=1), 1)))


def means(answers: Sequence[Answers], *, normalised: bool = False, samples: int = bootstrap.SAMPLES) -> dict[str, Any]:
    """The mean accuracy over tasks: `{"unweighted", "unweighted_interval", "weighted", "weighted_interval"}`.

    unweighted: each task counts the same. weighted: by its items. Items are redrawn within each task, as the tasks are
    given and the items are what was sampled.
    """
    rights = [a.right(normalised=normalised) for a in answers]
    rng = np.random.default_rng(0)
    # How many of a task's items are right in a resample of as many items is binomial in the share that is right.
    drawn_TxS = np.stack([rng.binomial(len(r), r.mean(), samples) / len(r) for r in rights])
    each_T = np.array([r.mean() for r in rights])
    size_T = np.array([len(r) for r in rights], np.float64)
    found: dict[str, Any] = {}
    for name, weight_T in (("unweighted", np.ones(len(rights))), ("weighted", size_T)):
        share_T = weight_T / weight_T.sum()
        found[name] = float(share_T @ each_T)
        found[f"{name}_interval"] = np.quantile(share_T @ drawn_TxS, [0.025, 0.975]).tolist()
    return found


# ---- two models on the same items ------------------------------------------------------------------------------------


def mcnemar(only_one: int, only_other: int) -> tuple[float, str]:
    """(two-sided p, test) of equal accuracies, from the items that one model alone and the other alone had right.

    Below 25 such items the exact binomial test, else chi-squared with the continuity correction (McNemar 1947; Edwards
    1948): `(|b - c| - 1)^2 / (b + c)`, one degree of freedom.
    """
    discordant = only_one + only_other
    if discordant < EXACT:
        tail = sum(math.comb(discordant, k) for k in range(min(only_one, only_other) + 1))
        return min(1.0, 2 * tail / 2**discordant), "exact"
    statistic = max(0, abs(only_one - only_other) - 1) ** 2 / discordant
    return math.erfc(math.sqrt(statistic / 2)), "chi-squared"


def compare(
    one: Answers, other: Answers, *, normalised: bool = False, samples: int = bootstrap.SAMPLES
) -> dict[str, Any]:
    """One model's accuracy less another's, paired by item, with interval and McNemar's test.

    Raises UserError if they did not answer the same items.
    """
    paired(one, other)
    mine, its = one.right(normalised=normalised), other.right(normalised=normalised)
    value, interval = bootstrap.ratio(mine, np.ones(len(mine)), minus=its, samples=samples)
    only_one, only_other = int((mine & ~its).sum()), int((its & ~mine).sum())
    p, test = mcnemar(only_one, only_other)
    found = {"difference": value, "interval": interval, "p": p, "test": test}
    return found | {"only_one": only_one, "only_other": only_other}


# ---- calibration -----------------------------------------------------------------------------------------------------


def confidence(answers: Answers) -> Float[np.ndarray, " I"]:
    """The probability of the chosen one among the choices."""
    return answers.probabilities().max(axis=1)


def reliability(
    confidence_I: Float[np.ndarray, " I"], right_I: Bool[np.ndarray, " I"], *, by: str = "width", bins: int = BINS
) -> list[Bin]:
    """The bins that hold items, by rising confidence.

    by: "width", bins of equal width, `((b - 1) / bins, b / bins]` (0 falls to the first); "mass", items in the order of
    their confidence cut into parts that differ by one item at most, but that equal confidences stay together: their
    order is that of the file and would be taken for a miscalibration.
    """
    confidence_I, right_I = np.asarray(confidence_I, np.float64), np.asarray(right_I, np.float64)
    order = np.argsort(confidence_I, kind="stable")
    if by == "mass":
        ordered = confidence_I[order]
        cuts = np.cumsum([len(part) for part in np.array_split(order, bins)])[:-1]
        cuts = np.searchsorted(ordered, ordered[cuts[cuts > 0] - 1], "right")
        parts = [part for part in np.split(order, np.unique(cuts)) if len(part)]
    else:
        which = np.clip(np.ceil(confidence_I * bins).astype(np.int64) - 1, 0, bins - 1)
        parts = [np.flatnonzero(which == b) for b in np.unique(which)]
    return [
        Bin(len(part), float(confidence_I[part].mean()), float(right_I[part].mean()), *wilson(right_I[part]))
        for part in parts
    ]


def wilson(right_I: np.ndarray) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), which stays within 0 and 1 for few items too."""
    n, share = len(right_I), float(np.mean(right_I))
    middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + Z**2 / n)), min(1.0, (middle + half) / (1 + Z**2 / n))


def ece(curve: Sequence[Bin]) -> float:
    """Expected calibration error: `sum_b n_b / n |accuracy_b - confidence_b|` over the bins of a curve (Naeini et al.
    2015). Equal mass has no empty bins, and so less noise where confidences crowd."""
    return sum(b.count * abs(b.accuracy - b.confidence) for b in curve) / max(sum(b.count for b in curve), 1)


def brier(answers: Answers) -> float:
    """Mean over items of `sum_c (p_c - [c is right])^2` (Brier 1950): 0 for certainty in what is right, 2 for certainty
    in what is wrong, `1 - 1 / C` for C equal probabilities."""
    p_IxC = answers.probabilities()
    right_IxC = np.arange(p_IxC.shape[1])[None] == answers.gold_I[:, None]
    return float(np.mean(np.sum((p_IxC - right_IxC) ** 2, axis=1)))


class Abstention(NamedTuple):
    """Answering only what a model is surest of. coverage_I: the share answered, 1/I to 1. risk_I: the share of that
    which is wrong. area: mean of risk_I, 0 is best; random: what it is if confidence says nothing; best: if whatever is
    right is surer than whatever is wrong."""

    coverage_I: Float[np.ndarray, " I"]
    risk_I: Float[np.ndarray, " I"]
    area: float
    random: float
    best: float


def abstention(confidence_I: Float[np.ndarray, " I"], right_I: Bool[np.ndarray, " I"]) -> Abstention:
    """The risk-coverage curve and its area (El-Yaniv and Wiener 2010; Geifman et al. 2019). Items of equal confidence
    count as their mean, as if they were taken in random order."""
    wrong_I = 1.0 - np.asarray(right_I, np.float64)
    answered_I = np.arange(1, len(wrong_I) + 1)
    _, which, size = np.unique(-np.asarray(confidence_I, np.float64), return_inverse=True, return_counts=True)
    mean = np.bincount(which, wrong_I) / size
    risk_I = np.cumsum(np.repeat(mean, size)) / answered_I
    best_I = np.cumsum(np.sort(wrong_I)) / answered_I
    return Abstention(
        answered_I / len(wrong_I), risk_I, float(risk_I.mean()), float(wrong_I.mean()), float(best_I.mean())
    )


def calibration(answers: Answers) -> dict[str, float]:
    """ECE with bins of equal width and of equal mass, Brier score, area of the abstention curve."""
    confidence_I, right_I = confidence(answers), answers.right()
    return {
        "ece": ece(reliability(confidence_I, right_I)),
        "ece_equal_mass": ece(reliability(confidence_I, right_I, by="mass")),
        "brier": brier(answers),
        "abstention_area": abstention(confidence_I, right_I).area,
    }

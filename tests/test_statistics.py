"""Accuracy, paired tests, calibration and abstention against cases worked by hand and against slow definitions."""

import itertools
import math

import numpy as np
import pytest

from distil_jax.errors import UserError
from distil_jax.eval import statistics
from distil_jax.eval.answers import Answers


def answered(probabilities, gold, task="anatomy", ids=None, size=1):
    """Answers with these probabilities of the choices; 0 for a choice that the item does not have."""
    p = np.array(probabilities, np.float64)
    with np.errstate(divide="ignore"):
        nats = np.log(p) - 3.0  # log-likelihoods need not add up to one
    ids = ids or tuple(f"q{n}" for n in range(len(p)))
    return Answers(task, 0, ids, np.array(gold), nats, np.where(p > 0, size, 0))


def of_rights(right, task="anatomy"):
    return answered([[0.6, 0.4] if r else [0.4, 0.6] for r in right], [0] * len(right), task)


# ---- accuracy --------------------------------------------------------------------------------------------------------


def test_accuracy_and_chance_where_items_have_different_numbers_of_choices():
    answers = answered([[0.5, 0.3, 0.2], [0.2, 0.8, 0.0], [0.1, 0.7, 0.2]], [0, 0, 1])
    found = statistics.accuracy(answers)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["items"] == 3
    assert 0 <= found["interval"][0] <= 2 / 3 <= found["interval"][1] <= 1
    assert statistics.chance(answers) == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)


def test_the_interval_of_an_accuracy_is_that_of_a_binomial():
    right = np.arange(400) < 100
    low, high = statistics.accuracy(of_rights(right))["interval"]
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.006) and high == pytest.approx(0.25 + half, abs=0.006)


def test_unweighted_and_weighted_means_and_their_intervals():
    small, large = of_rights([1] * 18 + [0] * 2, "virology"), of_rights([1] * 30 + [0] * 270, "nutrition")
    found = statistics.means([small, large], samples=20000)
    assert found["unweighted"] == pytest.approx((0.9 + 0.1) / 2)
    assert found["weighted"] == pytest.approx(48 / 320)
    # Variances of shares: p (1 - p) / n, each by the square of its task's weight.
    v = np.array([0.9 * 0.1 / 20, 0.1 * 0.9 / 300])
    for name, weight in (("unweighted", np.array([0.5, 0.5])), ("weighted", np.array([20, 300]) / 320)):
        low, high = found[f"{name}_interval"]
        assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(weight**2 @ v), rel=0.06), name


# ---- McNemar ---------------------------------------------------------------------------------------------------------


def by_enumeration(b, c):
    """The exact two-sided p: of all ways that b + c fair coins fall, the share at least as uneven as this one."""
    n = b + c
    uneven = sum(abs(2 * sum(coins) - n) >= abs(b - c) for coins in itertools.product((0, 1), repeat=n))
    return uneven / 2**n


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 3), (8, 2), (0, 6), (5, 9), (1, 12)])
def test_mcnemar_with_few_discordant_pairs_is_the_exact_binomial_test(b, c):
    p, test = statistics.mcnemar(b, c)
    assert test == "exact" and p == pytest.approx(by_enumeration(b, c))
    assert statistics.mcnemar(c, b)[0] == p


def test_mcnemar_with_many_is_chi_squared_with_continuity():
    # Edwards' example form: (|121 - 59| - 1)^2 / 180 = 20.672; the 5 % point of chi-squared(1) is 3.841.
    p, test = statistics.mcnemar(121, 59)
    assert test == "chi-squared" and p == pytest.approx(5.45e-6, rel=0.01)
    b = 60
    c = next(c for c in range(60, 200) if statistics.mcnemar(b, c)[0] < 0.05)
    assert (c - b - 1) ** 2 / (b + c) > 3.841 >= (c - b - 2) ** 2 / (b + c - 1)
    assert statistics.mcnemar(13, 12)[0] == 1.0


def test_two_models_are_compared_item_by_item():
    one, other = of_rights([1, 1, 1, 0, 1, 0, 1, 1]), of_rights([1, 0, 0, 0, 1, 1, 0, 1])
    found = statistics.compare(one, other)
    assert found["difference"] == pytest.approx(2 / 8)
    assert (found["only_one"], found["only_other"], found["test"]) == (3, 1, "exact")
    assert found["p"] == pytest.approx(2 * (1 + 4) / 16)
    assert found["interval"][0] <= 0.25 <= found["interval"][1]
    # Two models that err on the same items differ by nothing, with certainty, however poor both are.
    assert statistics.compare(one, one)["interval"] == [0, 0]


def test_answers_to_other_items_are_not_compared():
    one, other = of_rights([1, 0]), answered([[0.9, 0.1]] * 2, [0, 0], ids=("q1", "q0"))
    with pytest.raises(UserError, match="the same files"):
        statistics.compare(one, other)


# ---- calibration -----------------------------------------------------------------------------------------------------

CONFIDENCE = np.array([0.05, 0.2, 0.55, 0.6, 0.65, 0.95])
RIGHT = np.array([False, False, True, False, True, True])


def test_bins_of_equal_width():
    curve = statistics.reliability(CONFIDENCE, RIGHT, bins=5)
    assert [(b.count, round(b.confidence, 6), round(b.accuracy, 6)) for b in curve] == [
        (2, 0.125, 0.0),  # 0.2 belongs to (0, 0.2]
        (2, 0.575, 0.5),  # 0.6 to (0.4, 0.6]
        (1, 0.65, 1.0),
        (1, 0.95, 1.0),
    ]
    by_hand = 2 / 6 * 0.125 + 2 / 6 * 0.075 + 1 / 6 * 0.35 + 1 / 6 * 0.05
    assert statistics.ece(curve) == pytest.approx(by_hand)
    assert [b.count for b in statistics.reliability(np.array([0.0, 1.0]), np.array([True, True]), bins=5)] == [1, 1]


def test_bins_of_equal_mass():
    curve = statistics.reliability(CONFIDENCE, RIGHT, by="mass", bins=3)
    assert [b.count for b in curve] == [2, 2, 2]
    assert statistics.ece(curve) == pytest.approx((0.125 + abs(0.575 - 0.5) + abs(0.8 - 1.0)) / 3)
    assert [b.count for b in statistics.reliability(CONFIDENCE, RIGHT, by="mass", bins=4)] == [2, 2, 1, 1]
    assert len(statistics.reliability(CONFIDENCE[:2], RIGHT[:2], by="mass", bins=4)) == 2


def test_a_calibrated_model_has_no_calibration_error():
    confidence = np.repeat([0.25, 0.75], 400)
    right = np.concatenate([np.arange(400) < 100, np.arange(400) < 300])
    for by in ("width", "mass"):
        assert statistics.ece(statistics.reliability(confidence, right, by=by)) == pytest.approx(0)
        assert statistics.ece(statistics.reliability(confidence + 0.1, right, by=by)) == pytest.approx(0.1)


def test_wilson_intervals():
    # Known values: 0 of 10 is [0, 0.2775]; 7 of 10 is [0.3968, 0.8922].
    assert statistics.wilson(np.zeros(10)) == pytest.approx((0, 0.27754), abs=1e-4)
    assert statistics.wilson(np.arange(10) < 7) == pytest.approx((0.39678, 0.89221), abs=1e-4)


def test_brier_of_certainty_ignorance_and_a_case_by_hand():
    sure = [[1 - 2e-12, 1e-12, 1e-12]]
    assert statistics.brier(answered(sure, [0])) == pytest.approx(0)
    assert statistics.brier(answered(sure, [1])) == pytest.approx(2)
    assert statistics.brier(answered([[0.25] * 4], [2])) == pytest.approx(3 / 4)
    two = answered([[0.7, 0.2, 0.1], [0.6, 0.4, 0.0]], [0, 1])
    assert statistics.brier(two) == pytest.approx((0.3**2 + 0.2**2 + 0.1**2 + 0.6**2 + 0.6**2) / 2)


def test_abstention_by_hand():
    found = statistics.abstention(CONFIDENCE, RIGHT)  # surest first: right, right, wrong, right, wrong, wrong
    risk = [0, 0, 1 / 3, 1 / 4, 2 / 5, 3 / 6]
    assert found.risk_I == pytest.approx(risk) and found.coverage_I == pytest.approx(np.arange(1, 7) / 6)
    assert found.area == pytest.approx(np.mean(risk)) and found.random == 0.5
    assert found.best == pytest.approx(np.mean([0, 0, 0, 1 / 4, 2 / 5, 3 / 6]))


def test_equal_confidences_count_as_their_mean_over_all_orders():
    confidence, right = np.array([0.9, 0.5, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0, 1], bool)
    areas = []
    for order in itertools.permutations(range(1, 4)):
        wrong = ~right[[0, *order, 4]]
        areas.append(np.mean(np.cumsum(wrong) / np.arange(1, 6)))
    assert statistics.abstention(confidence, right).area == pytest.approx(np.mean(areas))
    flat = statistics.abstention(np.full(5, 0.3), right)
    assert flat.area == pytest.approx(flat.random) == pytest.approx(0.4)


def test_the_calibration_of_a_task():
    answers = answered([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55]], [0, 1, 1])
    found = statistics.calibration(answers)
    assert statistics.confidence(answers) == pytest.approx([0.9, 0.8, 0.55])
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.45) / 3) == found["ece_equal_mass"]
    assert found["brier"] == pytest.approx((2 * 0.1**2 + 2 * 0.8**2 + 2 * 0.45**2) / 3)
    assert found["abstention_area"] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)

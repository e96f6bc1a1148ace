"""Bootstrap intervals over documents. Tokens of one document are not independent, so documents are what is redrawn."""

import numpy as np
from jaxtyping import Float

SAMPLES = 2000
LEVEL = 0.95


class Resampled:
    """Documents drawn anew with replacement, `samples` times: the same draws for every measure of them."""

    def __init__(self, documents: int, *, seed: int = 0, samples: int = SAMPLES):
        rng = np.random.default_rng(seed)
        draws = [np.bincount(rng.integers(0, documents, documents), minlength=documents) for _ in range(samples)]
        self.counts_SxD = np.stack(draws).astype(np.float64) if documents else np.zeros((samples, 0))

    def ratio(
        self,
        numerator_D: Float[np.ndarray, " D"],
        denominator_D: Float[np.ndarray, " D"],
        minus: Float[np.ndarray, " D"] | None = None,
    ) -> tuple[float, list[float]]:
        """`sum(numerator) / sum(denominator)` over documents with its 95 % percentile interval (Efron 1979); NaN where
        the denominator is 0.

        minus: a second numerator, subtracted document by document: a paired difference of two models over one
        denominator.
        """
        numerator_D = np.asarray(numerator_D, np.float64)
        denominator_D = np.asarray(denominator_D, np.float64)
        if minus is not None:
            numerator_D = numerator_D - np.asarray(minus, np.float64)
        total = denominator_D.sum()
        if len(numerator_D) == 0 or total == 0:
            return float("nan"), [float("nan"), float("nan")]
        tops, bottoms = self.counts_SxD @ numerator_D, self.counts_SxD @ denominator_D
        values = tops[bottoms != 0] / bottoms[bottoms != 0]
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(numerator_D.sum() / total), [float(low), float(high)]


def ratio(
    numerator_D: Float[np.ndarray, " D"],
    denominator_D: Float[np.ndarray, " D"],
    *,
    minus: Float[np.ndarray, " D"] | None = None,
    seed: int = 0,
    samples: int = SAMPLES,
) -> tuple[float, list[float]]:
    """`Resampled.ratio` for one measure."""
    return Resampled(len(numerator_D), seed=seed, samples=samples).ratio(numerator_D, denominator_D, minus)

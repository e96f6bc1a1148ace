"""Bootstrap intervals over documents. Tokens of one document are not independent, so documents are what is redrawn."""

import functools

import numpy as np
from jaxtyping import Float, Int

SAMPLES = 2000
LEVEL = 0.95


def ratio(
    numerator_D: Float[np.ndarray, " D"],
    denominator_D: Float[np.ndarray, " D"],
    *,
    minus: Float[np.ndarray, " D"] | None = None,
    seed: int = 0,
    samples: int = SAMPLES,
) -> tuple[float, list[float]]:
    """`sum(numerator) / sum(denominator)` over documents with its 95 % percentile interval (Efron 1979).

    minus: a second numerator, subtracted document by document: a paired difference of two models over one denominator.
    """
    numerator_D = np.asarray(numerator_D, np.float64)
    denominator_D = np.asarray(denominator_D, np.float64)
    if minus is not None:
        numerator_D = numerator_D - np.asarray(minus, np.float64)
    total = denominator_D.sum()
    if len(numerator_D) == 0 or total == 0:
        return float("nan"), [float("nan"), float("nan")]
    drawn = _drawn(len(numerator_D), seed, samples).astype(np.float64)
    tops, bottoms = drawn @ numerator_D, drawn @ denominator_D
    values = tops[bottoms != 0] / bottoms[bottoms != 0]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(numerator_D.sum() / total), [float(low), float(high)]


@functools.lru_cache(maxsize=1)  # one evaluation asks for the same resamples hundreds of times
def _drawn(documents: int, seed: int, samples: int) -> Int[np.ndarray, "S D"]:
    """How often each resample holds each document."""
    rng = np.random.default_rng(seed)
    counts = [np.bincount(rng.integers(0, documents, documents), minlength=documents) for _ in range(samples)]
    drawn_SxD = np.stack(counts).astype(np.int16)
    drawn_SxD.flags.writeable = False
    return drawn_SxD

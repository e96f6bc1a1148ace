"""Log-likelihoods and most likely tokens over packed rows, for any model on either side of a batch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distil_jax import sharding
from distil_jax.losses import head


def make_scorer(
    model: Any, side: str, *, block: int = 0, attention: str = "auto", mesh: Mesh | None = None
) -> Callable[..., Any]:
    """`score(params, batch) -> (nats [B, L], prediction [B, L])` at the supervised positions of a side, jitted."""

    @jax.jit
    def score(params, batch):
        hidden = model.hidden(
            params,
            batch[f"{side}_tokens"],
            segment_ids=batch[f"{side}_segment_ids"],
            positions=batch[f"{side}_positions"],
            attention=attention,
            mesh=mesh,
        )
        return head.score(
            hidden,
            model.unembedding(params),
            batch[f"{side}_targets"],
            batch[f"{side}_weights"].astype("float32"),
            text_vocab=model.config.text_vocab_size,
            block=block,
            mesh=mesh,
        )

    return score


def sweep(
    scorer: Callable[..., Any],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    names: Sequence[str] = ("nats", "prediction"),
) -> dict[str, np.ndarray]:
    """Scores every batch. Returns what the scorer does, by these names, as [R, L] on the host, rows in order."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in batches:
        for name, values in zip(names, scorer(params, sharding.put_batch(batch, mesh)), strict=True):
            found[name].append(sharding.to_host(values))
    return {name: np.concatenate(values) for name, values in found.items()}


def bits_per_byte(nats: np.ndarray, rows: dict[str, np.ndarray], side: str, lengths_V: np.ndarray) -> float:
    """Bits per byte of the supervised text; tokens without bytes (end of sequence) are left out of both sums.

    nats: [R, L] of the side; lengths_V: bytes of each token id.
    """
    size = lengths_V[rows[f"{side}_targets"]] * (rows[f"{side}_weights"] > 0)
    return float((nats * (size > 0)).sum(dtype=np.float64) / np.log(2) / max(int(size.sum()), 1))

"""Is a model as sure of the next token as it is right? Confidence and rightness over held-out text, without logits."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from distil_jax import sharding
from distil_jax.eval import statistics
from distil_jax.models.layers import unembed

AT_ONCE = 64  # positions of a device whose distributions exist at one time: 64 MiB at 262,144 tokens


def make_surest(model: Any, side: str, mesh: Mesh | None = None) -> Callable[..., Any]:
    """`surest(params, batch) -> (probability of the most likely token [B, L], that token [B, L])`, jitted, at every
    position of a side of a batch; rows of the vocabulary that are no token count for nothing."""

    @jax.jit
    def surest(params, batch):
        fields = {name: batch[f"{side}_{name}"] for name in ("segment_ids", "positions")}
        hidden_BxLxD = model.hidden(params, batch[f"{side}_tokens"], **fields)
        B, L, D = hidden_BxLxD.shape
        parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        columns = max(1, min(L, AT_ONCE * parts // B))
        padded = jnp.pad(hidden_BxLxD, ((0, 0), (0, -L % columns), (0, 0)))
        pieces = jnp.swapaxes(padded.reshape(B, -1, columns, D), 0, 1)

        def one(piece_BxCxD):
            logits_VxN = unembed(model.unembedding(params), piece_BxCxD.reshape(-1, D))
            is_text = jnp.arange(logits_VxN.shape[0]) < model.config.text_vocab_size
            logits_VxN = jnp.where(is_text[:, None], logits_VxN, -jnp.inf)
            best_N = jnp.argmax(logits_VxN, axis=0)
            sure_N = jnp.exp(jnp.max(logits_VxN, axis=0) - jax.nn.logsumexp(logits_VxN, axis=0))
            return sure_N.reshape(B, columns), best_N.astype(jnp.int32).reshape(B, columns)

        sure, best = (jnp.swapaxes(x, 0, 1).reshape(B, -1)[:, :L] for x in jax.lax.map(one, pieces))
        return sure, best

    return surest


def gathered(
    surest: Callable[..., Any], params: Any, batches: Iterable[dict[str, np.ndarray]], side: str, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Of every supervised token of a side: {"confidence", "right", "document"}, [N]."""
    found: dict[str, list[np.ndarray]] = {"confidence": [], "right": [], "document": []}
    for batch in batches:
        sure, best = map(sharding.to_host, surest(params, sharding.put_batch(batch, mesh)))
        at = batch[f"{side}_weights"] > 0
        found["confidence"].append(sure[at])
        found["right"].append((best == batch[f"{side}_targets"])[at])
        # A row's documents are its segments, which have the same numbers on both sides.
        rows = np.broadcast_to(np.arange(len(at))[:, None], at.shape)
        found["document"].append(_document(batch, rows[at], batch[f"{side}_segment_ids"][at]))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _document(batch: dict[str, np.ndarray], row_N: np.ndarray, segment_N: np.ndarray) -> np.ndarray:
    lookup = np.zeros((len(batch["document"]), int(batch["student_segment_ids"].max()) + 1), np.int64)
    r, c = np.nonzero(batch["student_segment_ids"] > 0)
    lookup[r, batch["student_segment_ids"][r, c]] = batch["document"][r, c]
    return lookup[row_N, segment_N]


def measure(
    confidence_N: Float[np.ndarray, " N"],
    right_N: Bool[np.ndarray, " N"],
    document_N: Int[np.ndarray, " N"],
    samples: int,
) -> dict[str, Any]:
    """`{"tokens", "accuracy", "confidence", "ece", "ece_interval", "curve": [[count, confidence, accuracy, low,
    high]]}` with bins of equal width. Intervals are 95 % bootstraps over documents, as tokens of one are not
    independent."""
    _, document_N = np.unique(document_N, return_inverse=True)
    bin_N = np.clip(np.ceil(confidence_N * statistics.BINS).astype(np.int64) - 1, 0, statistics.BINS - 1)
    shape = int(document_N.max()) + 1, statistics.BINS
    summed = lambda values: np.bincount(  # noqa: E731
        document_N * shape[1] + bin_N, values, minlength=shape[0] * shape[1]
    ).reshape(shape)
    count_DxB, sure_DxB, right_DxB = map(summed, (np.ones(len(bin_N)), confidence_N.astype(np.float64), right_N * 1.0))
    drawn_SxD = np.random.default_rng(0).multinomial(shape[0], np.full(shape[0], 1 / shape[0]), samples)
    n_SxB, s_SxB, r_SxB = (drawn_SxD @ sums for sums in (count_DxB, sure_DxB, right_DxB))
    ece_S = np.abs(r_SxB - s_SxB).sum(axis=1) / n_SxB.sum(axis=1)
    n_B, s_B, r_B = (sums.sum(axis=0) for sums in (count_DxB, sure_DxB, right_DxB))
    curve = []
    for b in np.flatnonzero(n_B):
        shares_S = r_SxB[n_SxB[:, b] > 0, b] / n_SxB[n_SxB[:, b] > 0, b]
        low, high = np.quantile(shares_S, [0.025, 0.975])
        curve.append([int(n_B[b]), *(round(float(x), 5) for x in (s_B[b] / n_B[b], r_B[b] / n_B[b], low, high))])
    return {
        "tokens": len(confidence_N),
        "accuracy": float(right_N.mean()),
        "confidence": float(confidence_N.mean()),
        "ece": float(np.abs(r_B - s_B).sum() / n_B.sum()),
        "ece_interval": np.quantile(ece_S, [0.025, 0.975]).tolist(),
        "curve": curve,
    }

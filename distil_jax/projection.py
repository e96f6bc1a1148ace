"""The learnable vocabulary projection W: for each teacher token, a short distribution over student tokens.

`W` maps the teacher's next-token distribution to the student's vocabulary, `p = W^T q`. Each row has at most `k`
entries (ELL: ids and logits `[Vt, k]`, a softmax over the row), so it costs megabytes where a matrix would cost 130
GB. Support comes from the bytes: the student token with the same bytes, else the first token of the student's own BPE
encoding of them, and then whatever student tokens a corpus shows at the places where that teacher token begins. The
logits start as smoothed counts and are then fitted on text.

W is learned from text and not through the distillation loss: through the loss, the teacher's mass drifts to whatever
the student predicts already (docs/projection.md).
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.numpy import save_file

from distil_jax.errors import UserError
from distil_jax.eval import bootstrap
from distil_jax.losses.kd import (
    EMPTY,
    ProjectionRows,
    ProjectionTable,
    project,
    row_log_softmax,
    row_softmax,
    teacher_logits,
)
from distil_jax.tokens.align import ROOT, align
from distil_jax.tokens.bytes import ByteTable, first_pieces

FILE = "projection.safetensors"


@dataclass(frozen=True)
class Projection:
    """`ids[v]` are the student tokens that teacher token v may become, `logits[v]` their log-weights before the
    softmax.

    Empty places hold the id -1. A teacher token that stands for no text and has no counterpart of its role has an empty
    row; `mapped` says which have one, and the teacher's softmax leaves the others out.
    """

    ids: Int[np.ndarray, "Vt k"]
    logits: Float[np.ndarray, "Vt k"]
    start_logits: Float[np.ndarray, "Vt k"]  # as built, before any fit
    student_vocab: int
    teacher_hash: str
    student_hash: str

    @classmethod
    def build(
        cls,
        *,
        teacher: ByteTable,
        student: ByteTable,
        corpus: Iterable[str] = (),
        counts: tuple[np.ndarray, np.ndarray] | None = None,
        k: int = 8,
        prior: float = 1.0,
    ) -> "Projection":
        """W from bytes, the student's true BPE first pieces, and co-occurrence at shared boundaries.

        corpus: texts to align and count; counts: instead, pairs already aligned, `(teacher_ids, student_ids)`, one
        entry for each root position. prior: how many observations the first piece is worth. A row keeps its k
        likeliest ids.
        """
        if counts is None:
            counts = _count_corpus(corpus, teacher, student)
        first = first_pieces(teacher, student).ids
        pairs, n = np.unique(np.asarray(counts[0], np.int64) * student.vocab_size + counts[1], return_counts=True)
        rows = np.concatenate([np.flatnonzero(first >= 0), pairs // student.vocab_size])
        columns = np.concatenate([first[first >= 0], pairs % student.vocab_size])
        weights = np.concatenate([np.full((first >= 0).sum(), prior), n]).astype(np.float64)
        # The first piece and its own count are one entry: add them up, then rank within each row.
        keys, where = np.unique(rows.astype(np.int64) * student.vocab_size + columns, return_inverse=True)
        weights = np.bincount(where, weights)
        rows, columns = keys // student.vocab_size, keys % student.vocab_size
        order = np.lexsort((columns, -weights, rows))
        rows, columns, weights = rows[order], columns[order], weights[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        keep = (rank < k) & (first[rows] >= 0)
        ids = np.full((teacher.vocab_size, k), EMPTY, np.int32)
        logits = np.zeros((teacher.vocab_size, k), np.float32)
        ids[rows[keep], rank[keep]] = columns[keep]
        logits[rows[keep], rank[keep]] = np.log(weights[keep])
        return cls(ids, logits, logits, student.vocab_size, teacher.hash, student.hash)

    @property
    def mapped(self) -> np.ndarray:
        """bool [Vt]: teacher tokens that have a row."""
        return (self.ids != EMPTY).any(axis=1)

    def weights(self) -> Float[np.ndarray, "Vt k"]:
        """The rows as probabilities; 0 at empty places."""
        return np.asarray(row_softmax(jnp.asarray(self.logits), jnp.asarray(self.ids)))

    def table(self) -> ProjectionTable:
        """W as the sorted entry list that the loss heads stream."""
        rows, slots = np.nonzero(self.ids != EMPTY)
        students = self.ids[rows, slots]
        order = np.argsort(students, kind="stable")
        weights = self.weights()[rows, slots]
        return ProjectionTable(
            jnp.asarray(rows[order], jnp.int32),
            jnp.asarray(students[order]),
            jnp.asarray(weights[order], jnp.float32),
            jnp.asarray(self.mapped),
            jnp.asarray((rows * self.ids.shape[1] + slots)[order], jnp.int32),
        )

    def rows(self) -> ProjectionRows:
        """W as its rows, for a teacher that names its tokens."""
        return ProjectionRows(jnp.asarray(self.ids), jnp.asarray(self.weights()))

    def best(self) -> Int[np.ndarray, " Vt"]:
        """The likeliest student token of each teacher token as built from bytes and counts; -1 without one."""
        scores = np.where(self.ids == EMPTY, -np.inf, self.start_logits)
        return np.take_along_axis(self.ids, scores.argmax(1)[:, None], axis=1)[:, 0]

    def fit(
        self,
        top_ids_NxK: Int[np.ndarray, "N K"],
        top_probs_NxK: Float[np.ndarray, "N K"],
        targets_N: Int[np.ndarray, " N"],
        *,
        steps: int = 100,
        learning_rate: float = 0.05,
        keep: float = 0.1,
        batch_size: int = 4096,
        seed: int = 0,
    ) -> tuple["Projection", dict[str, float]]:
        """Raises the projected teacher's likelihood of the student token that really follows.

        Minimises `-log sum_v q(v) W[v, u*] + keep * sum_v q(v) KL(W[v] || W_built[v])`, averaged over positions, with
        Adam. The teacher is given by its K likeliest tokens at each position; what it says of the others does not
        count as predicting u*, so the likelihood is a lower bound.

        top_ids, top_probs: the teacher's K likeliest tokens at N root positions; targets: the student's next token
        there. Returns the fitted projection and `{"nats_before", "nats_after", "positions"}`.
        """
        N = len(targets_N)
        if N == 0 or steps == 0:
            return self, {"positions": N, "nats_before": float("nan"), "nats_after": float("nan")}
        ids = jnp.asarray(self.ids)
        start = jnp.asarray(self.start_logits)
        data = (jnp.asarray(top_ids_NxK), jnp.asarray(top_probs_NxK), jnp.asarray(targets_N))
        optimizer = optax.adam(learning_rate)
        batch_size = min(batch_size, N)

        def nats(logits, top_ids, top_probs, targets):
            rows = row_softmax(logits[top_ids], ids[top_ids])
            hit = ids[top_ids] == targets[:, None, None]
            mass = jnp.sum(top_probs[..., None] * rows * hit, axis=(1, 2))
            return -jnp.mean(jnp.log(jnp.maximum(mass, 1e-6)))

        def loss(logits, top_ids, top_probs, targets):
            rows, built = (
                row_log_softmax(logits[top_ids], ids[top_ids]),
                row_log_softmax(start[top_ids], ids[top_ids]),
            )
            kl = jnp.sum(jnp.exp(rows) * (rows - built) * (ids[top_ids] != EMPTY), axis=-1)
            drift = jnp.mean(jnp.sum(top_probs * kl, axis=-1))
            return nats(logits, top_ids, top_probs, targets) + keep * drift

        @jax.jit
        def run(logits, key):
            def body(carry, key):
                logits, opt_state = carry
                chosen = jax.random.randint(key, (batch_size,), 0, N)
                gradient = jax.grad(loss)(logits, *(a[chosen] for a in data))
                updates, opt_state = optimizer.update(gradient, opt_state)
                return (optax.apply_updates(logits, updates), opt_state), None

            (fitted, _), _ = jax.lax.scan(body, (logits, optimizer.init(logits)), jax.random.split(key, steps))
            return fitted

        fitted = run(jnp.asarray(self.logits), jax.random.key(seed))
        measured = jax.jit(nats)
        facts = {"nats_before": float(measured(jnp.asarray(self.logits), *data)), "positions": N}
        facts["nats_after"] = float(measured(fitted, *data))
        return replace(self, logits=np.asarray(fitted)), facts

    def measure(
        self,
        hidden_NxDt: Float[np.ndarray, "N Dt"],
        unembedding_VtxDt: Any,
        teacher_targets_N: Int[np.ndarray, " N"],
        student_targets_N: Int[np.ndarray, " N"],
        documents_N: Int[np.ndarray, " N"],
        bytes_N: Int[np.ndarray, " N"],
        one_to_one_N: np.ndarray,
        unigram_Vs: Float[np.ndarray, " Vs"],
        *,
        block: int = 256,
        samples: int = bootstrap.SAMPLES,
        seed: int = 0,
    ) -> dict[str, Any]:
        """How much of what the teacher says about the next token survives W, at N root positions, tau = 1.

        `IP_KL = E[KL(W'q || W'pi)] / E[KL(q || pi)]`, pi the mean of q. At most 1 for any W (data processing).
        `IP_bpb = (BPB_unigram - BPB_projected) / (BPB_unigram - BPB_teacher)` over the positions where one student
        token and one teacher token cover the same bytes, so that all three score the same text.

        hidden: the teacher's state that predicts each position; bytes_N: bytes of the student's token; unigram: the
        student tokens' probabilities in training text. Logits exist for `block` positions at a time. Intervals are
        bootstrapped over documents.
        """
        table, Vs = self.table(), self.student_vocab

        N = len(teacher_targets_N)
        if N == 0:
            raise UserError("no root position to measure the projection on: is the held-out split empty?")

        def blocks(*arrays):
            for at in range(0, N, block):
                short = max(0, at + block - N)
                yield [np.concatenate([a[at : at + block], np.repeat(a[-1:], short, axis=0)]) for a in arrays]

        pi = 0.0
        valid = np.ones(N, np.float32)
        for at, (hidden,) in zip(range(0, N, block), blocks(hidden_NxDt), strict=True):
            ones = np.zeros(block, np.float32)
            ones[: min(block, N - at)] = valid[at : at + block]
            pi = pi + np.asarray(_sum_of_q(hidden, ones, unembedding_VtxDt, table.mapped), np.float64)
        pi = jnp.asarray(pi / N, jnp.float32)
        projected_pi = project(pi[:, None], table, Vs)[:, 0]
        parts = [
            _measures(Vs, h, t, s, unembedding_VtxDt, table, pi, projected_pi)
            for h, t, s in blocks(hidden_NxDt, teacher_targets_N, student_targets_N)
        ]
        v = {name: np.concatenate([np.asarray(p[name], np.float64) for p in parts])[:N] for name in parts[0]}
        unigram = -np.log(unigram_Vs[student_targets_N])

        documents, index = np.unique(documents_N, return_inverse=True)
        per_document = lambda x: np.bincount(index, x, minlength=len(documents))  # noqa: E731
        only = one_to_one_N.astype(np.float64)
        ip_kl, ip_kl_interval = bootstrap.ratio(
            per_document(v["kl_projected"]), per_document(v["kl"]), samples=samples, seed=seed
        )
        gain = {name: per_document(only * (unigram - v[name])) for name in ("projected", "teacher")}
        ip_bpb, ip_bpb_interval = bootstrap.ratio(gain["projected"], gain["teacher"], samples=samples, seed=seed)
        bits = float((only * bytes_N).sum()) * np.log(2)
        return {
            "ip_kl": ip_kl,
            "ip_kl_interval": ip_kl_interval,
            "ip_bpb": ip_bpb,
            "ip_bpb_interval": ip_bpb_interval,
            "bits_per_byte": {
                "unigram": float((only * unigram).sum() / bits),
                "projected": float((only * v["projected"]).sum() / bits),
                "teacher": float((only * v["teacher"]).sum() / bits),
            },
            "nats_next_token": float(v["projected"].mean()),
            "positions": N,
            "one_to_one_positions": int(only.sum()),
            "documents": len(documents),
        }

    def save(self, folder: str | Path, **facts: Any) -> None:
        """Writes `projection.safetensors`, tied to the hashes of both byte tables."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = {"student_vocab": self.student_vocab, "teacher": self.teacher_hash, "student": self.student_hash}
        arrays = {"ids": self.ids, "logits": self.logits, "start_logits": self.start_logits}
        save_file(arrays, folder / FILE, metadata={"distil_jax": json.dumps(header | facts)})

    @classmethod
    def load(cls, folder: str | Path, *, teacher: ByteTable, student: ByteTable) -> "Projection":
        """Reads what `save` wrote. Raises UserError if it belongs to other tokenizers."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise UserError(f"no projection at {file}: run `distil-jax project` first")
        with safe_open(file, framework="numpy") as opened:
            header = json.loads(opened.metadata()["distil_jax"])
            arrays = {name: opened.get_tensor(name) for name in ("ids", "logits", "start_logits")}
        for side, table in (("teacher", teacher), ("student", student)):
            if header[side] != table.hash:
                raise UserError(
                    f"{file} was built for another {side} tokenizer ({header[side][:12]}, not {table.hash[:12]}): "
                    "delete its folder and run `distil-jax project` again"
                )
        return cls(
            **arrays, student_vocab=header["student_vocab"], teacher_hash=teacher.hash, student_hash=student.hash
        )


def _count_corpus(corpus: Iterable[str], teacher: ByteTable, student: ByteTable) -> tuple[np.ndarray, np.ndarray]:
    teacher_ids: list[np.ndarray] = []
    student_ids: list[np.ndarray] = []
    for text in corpus:
        a = align(text, student=student, teacher=teacher)
        root = a.role == ROOT
        teacher_ids.append(a.teacher_ids[a.teacher_index[root]])
        student_ids.append(a.student_ids[root])
    empty: Sequence[np.ndarray] = [np.zeros(0, np.int32)]
    return np.concatenate(teacher_ids or empty), np.concatenate(student_ids or empty)


# The head and W are arguments: as a constant of the function a head of 262,144 rows takes minutes to compile, and every
# W would compile anew.


@jax.jit
def _sum_of_q(hidden_NxDt, valid_N, unembedding, mapped):
    """The teacher's distributions at some positions, added up, [Vt]."""
    return jnp.sum(jax.nn.softmax(teacher_logits(hidden_NxDt, unembedding, mapped), axis=0) * valid_N[None], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _measures(student_vocab, hidden_NxDt, teacher_targets, student_targets, unembedding, table, pi, projected_pi):
    """What `Projection.measure` averages, in nats at each position."""
    q = jax.nn.softmax(teacher_logits(hidden_NxDt, unembedding, table.mapped), axis=0)
    p = project(q, table, student_vocab)
    xlogy = lambda a, b: jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, b, 1.0)), 0.0)  # noqa: E731

    def nats_of(distribution, targets):
        # The floor keeps one impossible token from making the whole measure infinite; it costs 69 nats.
        return -jnp.log(jnp.maximum(jnp.take_along_axis(distribution, targets[None], axis=0)[0], 1e-30))

    return {
        "kl": jnp.sum(xlogy(q, q) - xlogy(q, pi[:, None]), axis=0),
        "kl_projected": jnp.sum(xlogy(p, p) - xlogy(p, projected_pi[:, None]), axis=0),
        "teacher": nats_of(q, teacher_targets),
        "projected": nats_of(p, student_targets),
    }

"""The learnable vocabulary projection W: for each teacher token, a short distribution over student tokens.

`W` maps the teacher's next-token distribution to the student's vocabulary, `p = W^T q`. Each row has at most `k`
entries and a remainder (ELL: ids and logits `[Vt, k + 1]`, a softmax over the row), so it costs megabytes where a
matrix would cost 130 GB. Support comes from the bytes: the student token with the same bytes, else the first token of
the student's own BPE encoding of them, and then whatever student tokens a corpus shows at the places where that teacher
token begins. What the corpus shows besides is the remainder: where the teacher writes a digit and the student groups of
three, eight ids do not say what follows. The logits start as smoothed counts and are then fitted on text.

W is learned from text and not through the distillation loss: through the loss, the teacher's mass drifts to whatever
the student predicts already (docs/projection.md).
"""

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

from distil_jax import information
from distil_jax.errors import UserError
from distil_jax.losses.kd import EMPTY, REST, ProjectionRows, ProjectionTable, row_log_softmax, row_softmax
from distil_jax.tokens.align import NONE, align
from distil_jax.tokens.bytes import ByteTable, first_pieces

FILE = "projection.safetensors"


@dataclass(frozen=True)
class Projection:
    """`ids[v]` are the student tokens that teacher token v may become, `logits[v]` their log-weights before the
    softmax.

    Empty places hold the id EMPTY. The last place holds REST where the row leaves something to tokens that it does not
    name. A teacher token that stands for no text and has no counterpart of its role has an empty row; `mapped` says
    which have one, and the teacher's softmax leaves the others out.
    """

    ids: Int[np.ndarray, "Vt k1"]
    logits: Float[np.ndarray, "Vt k1"]
    start_logits: Float[np.ndarray, "Vt k1"]  # as built, before any fit
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
        entry for each position where both tokenizations have a boundary. prior: how many observations the first piece
        is worth. A row names its k likeliest ids; what was counted of others is its remainder.
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
        known = first[rows] >= 0
        keep, left = (rank < k) & known, (rank >= k) & known
        ids = np.full((teacher.vocab_size, k + 1), EMPTY, np.int32)
        logits = np.zeros((teacher.vocab_size, k + 1), np.float32)
        ids[rows[keep], rank[keep]] = columns[keep]
        logits[rows[keep], rank[keep]] = np.log(weights[keep])
        others = np.bincount(rows[left], weights[left], minlength=teacher.vocab_size)
        ids[others > 0, k] = REST
        logits[others > 0, k] = np.log(others[others > 0])
        return cls(ids, logits, logits, student.vocab_size, teacher.hash, student.hash)

    @property
    def mapped(self) -> np.ndarray:
        """bool [Vt]: teacher tokens that have a row."""
        return (self.ids >= 0).any(axis=1)

    def weights(self) -> Float[np.ndarray, "Vt k1"]:
        """The rows as probabilities; 0 at empty places."""
        return np.asarray(row_softmax(jnp.asarray(self.logits), jnp.asarray(self.ids)))

    def table(self) -> ProjectionTable:
        """W as the sorted entry list that the loss heads stream."""
        rows, slots = np.nonzero(self.ids >= 0)
        students = self.ids[rows, slots]
        order = np.argsort(students, kind="stable")
        all_weights = self.weights()
        weights, leaves = all_weights[rows, slots], self.ids[:, -1] == REST
        return ProjectionTable(
            jnp.asarray(rows[order], jnp.int32),
            jnp.asarray(students[order]),
            jnp.asarray(weights[order], jnp.float32),
            jnp.asarray(self.mapped),
            jnp.asarray((rows * self.ids.shape[1] + slots)[order], jnp.int32),
            jnp.asarray(np.where(leaves, all_weights[:, -1], 0)) if leaves.any() else None,
        )

    def rows(self) -> ProjectionRows:
        """W as its rows, for a teacher that names its tokens."""
        return ProjectionRows(jnp.asarray(self.ids), jnp.asarray(self.weights()))

    def best(self) -> Int[np.ndarray, " Vt"]:
        """The likeliest student token of each teacher token as built from bytes and counts; -1 without one."""
        scores = np.where(self.ids < 0, -np.inf, self.start_logits)
        return np.take_along_axis(self.ids, scores.argmax(1)[:, None], axis=1)[:, 0]

    def shuffled(self, seed: int = 0) -> "Projection":
        """The control: each row that maps text given to another teacher token, so that what W says is wrong."""
        rows = np.flatnonzero(self.mapped)
        order = np.random.default_rng(seed).permutation(rows)
        arrays = {name: getattr(self, name).copy() for name in ("ids", "logits", "start_logits")}
        for name, array in arrays.items():
            array[rows] = getattr(self, name)[order]
        return replace(self, **arrays)

    def fit(
        self,
        top_ids_NxK: Int[np.ndarray, "N K"],
        top_probs_NxK: Float[np.ndarray, "N K"],
        targets_N: Int[np.ndarray, " N"],
        *,
        unigram_Vs: Float[np.ndarray, " Vs"] | None = None,
        steps: int = 100,
        learning_rate: float = 0.05,
        keep: float = 0.1,
        batch_size: int = 4096,
        seed: int = 0,
    ) -> tuple["Projection", dict[str, float]]:
        """Raises the projected teacher's likelihood of the student token that really follows.

        Minimises `-log sum_v q(v) W[v, u*] + keep * sum_v q(v) KL(W[v] || W_built[v])`, averaged over positions, with
        Adam. The teacher is given by its K likeliest tokens at each position. The mass of the others, as what a row
        leaves, is spread over `unigram`, the student tokens' probabilities in training text (uniform without it);
        without that a row would learn to leave much, in place of the tokens beyond the K.

        top_ids, top_probs: the teacher's K likeliest tokens at N positions where both tokenizations have a boundary;
        targets: the student's next token there. Returns the fitted projection and
        `{"nats_before", "nats_after", "positions"}`.
        """
        N = len(targets_N)
        if N == 0 or steps == 0:
            return self, {"positions": N, "nats_before": float("nan"), "nats_after": float("nan")}
        ids = jnp.asarray(self.ids)
        start = jnp.asarray(self.start_logits)
        if unigram_Vs is None:
            unigram_Vs = np.full(self.student_vocab, 1 / self.student_vocab)
        unigram_N = jnp.asarray(unigram_Vs[targets_N], jnp.float32)
        data = (jnp.asarray(top_ids_NxK), jnp.asarray(top_probs_NxK), jnp.asarray(targets_N), unigram_N)
        optimizer = optax.adam(learning_rate)
        batch_size = min(batch_size, N)

        def nats(logits, top_ids, top_probs, targets, unigram):
            rows = row_softmax(logits[top_ids], ids[top_ids])
            hit = jnp.where(ids[top_ids] == REST, unigram[:, None, None], ids[top_ids] == targets[:, None, None])
            others = (1 - jnp.sum(top_probs, axis=1)) * unigram
            mass = jnp.sum(top_probs[..., None] * rows * hit, axis=(1, 2)) + others
            return -jnp.mean(jnp.log(jnp.maximum(mass, 1e-6)))

        def loss(logits, top_ids, top_probs, targets, unigram):
            rows, built = (
                row_log_softmax(logits[top_ids], ids[top_ids]),
                row_log_softmax(start[top_ids], ids[top_ids]),
            )
            kl = jnp.sum(jnp.exp(rows) * (rows - built) * (ids[top_ids] != EMPTY), axis=-1)
            drift = jnp.mean(jnp.sum(top_probs * kl, axis=-1))
            return nats(logits, top_ids, top_probs, targets, unigram) + keep * drift

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

    def measure(self, positions: "information.Positions", unembedding_VtxDt: Any, **options: Any) -> dict[str, Any]:
        """How much of what the teacher says survives W: `information.measure`."""
        return information.measure(self, positions, unembedding_VtxDt, **options)

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
        shared = (a.role != NONE) & (a.offset == 0)
        teacher_ids.append(a.teacher_ids[a.teacher_index[shared]])
        student_ids.append(a.student_ids[shared])
    empty: Sequence[np.ndarray] = [np.zeros(0, np.int32)]
    return np.concatenate(teacher_ids or empty), np.concatenate(student_ids or empty)

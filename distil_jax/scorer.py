"""What the teacher says at the positions that students need, batch by batch: the computation of the score stage."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt16
from ml_collections import ConfigDict

from distil_jax import learners, sharding
from distil_jax.data import scores
from distil_jax.data.loader import Batch
from distil_jax.data.scores import Layout
from distil_jax.losses import head, stored
from distil_jax.losses.kd import ProjectionRows, ProjectionTable, teacher_logits
from distil_jax.losses.vocabulary import LOWEST
from distil_jax.models.int8 import cast
from distil_jax.projection import Projection
from distil_jax.workdir import Workdir

BLOCK = 256  # positions whose logits exist at one time on a device: 0.25 GiB at 262,144 tokens


class Kept(NamedTuple):
    """What is stored of N positions (losses/stored.py)."""

    ids_NxK: Int[Array, "N K"]
    codes_NxK: UInt16[Array, "N K"]
    rest_NxTx2: Float[Array, "N T 2"]


class Scored(NamedTuple):
    """The scores of a batch: positions of each row, in the order of the rows, and what of them is stored."""

    positions: list[np.ndarray]
    tokens: int  # supervised tokens of the student
    kept: Kept
    sample: tuple[jax.Array, Kept]  # teacher states of at most BLOCK of the positions, and what is stored of these

    def records(self, layout: Layout) -> Iterator[bytes]:
        """A record for each row."""
        start = 0
        for positions in self.positions:
            rows = slice(start, start := start + len(positions))
            yield layout.pack(*(part[rows] for part in self.kept))


class Scorer:
    """The teacher of a run, asked on a mesh: rows of a batch over data and fsdp, then positions over all devices.

    The teacher's head is whole on every device, so each scores positions of its own and nothing moves between them.
    """

    def __init__(self, config: ConfigDict, work: Workdir, mesh: Mesh):
        """Raises UserError for a teacher whose ids are too large for the format."""
        self._mesh = mesh
        self._teacher, self._params = learners.teacher(work, mesh, config.teacher.dtype)
        nothing = np.zeros(0, np.int32)
        # W from first pieces alone: it maps the tokens that every W between these tokenizers maps, fitted or not.
        self._W = Projection.build(**learners.tables_of(work), counts=(nothing, nothing), k=1)
        mapped = np.flatnonzero(self._W.mapped[: self._teacher.unembedding(self._params).shape[0]])
        scores.pack_ids(mapped[None])
        self.layout = Layout(min(config.score.top_k, len(mapped)), tuple(config.score.temperatures))
        dtype = jnp.dtype(config.student.training.compute_dtype)  # in which the teacher in memory would speak
        whole = sharding.replicated(mesh)

        @jax.jit
        def hidden_of(params, batch):
            fields = {name: batch[f"teacher_{name}"] for name in ("segment_ids", "positions")}
            fields |= {"attention": config.attention, "mesh": mesh}
            hidden = self._teacher.hidden(cast(params, dtype), batch["teacher_tokens"], **fields)
            return hidden.reshape(-1, hidden.shape[-1])

        self._hidden_of = hidden_of
        unembedding_of = jax.jit(lambda p: self._teacher.unembedding(cast(p, dtype)), out_shardings=whole)
        self._unembedding = unembedding_of(self._params)
        self._mapped = jax.device_put(jnp.asarray(self._W.mapped), whole)
        self._unigram = np.load(work / "corpus" / "student_unigram.npy")

    def sweep(self, batches: Iterable[Batch]) -> Iterator[Scored]:
        """The scores of each batch. The next one is computed while this one is taken."""
        pending = None
        for batch in batches:
            started = self._start(batch)
            if pending:
                yield _read(*pending)
            pending = started
        if pending:
            yield _read(*pending)

    def _start(self, batch: Batch):
        positions = [scores.needed({name: x[n] for name, x in batch.items()})[0] for n in range(len(batch["role"]))]
        length = batch["teacher_tokens"].shape[1]
        at_N = np.concatenate([at + n * length for n, at in enumerate(positions)]).astype(np.int32)
        teacher = {name: x for name, x in batch.items() if name.startswith("teacher_")}
        hidden = self._hidden_of(self._params, sharding.put_batch(teacher, self._mesh))
        block = min(BLOCK, -(-len(hidden) // self._mesh.size)) * self._mesh.size
        at_N = np.pad(at_N, (0, block - len(at_N) % block if len(at_N) % block or not len(at_N) else 0))
        kept = [
            _keep(
                hidden[at_N[n : n + block]], self._unembedding, self._mapped,
                top_k=self.layout.top_k, temperatures=self.layout.temperatures, mesh=self._mesh,
            )
            for n in range(0, len(at_N), block)
        ]  # fmt: skip
        tokens = int((batch["student_weights"] > 0).sum())
        return positions, tokens, kept, hidden[at_N[:BLOCK]]

    def error(self, scored: Scored) -> dict[str, Any]:
        """What storing changes at the sampled positions, as the largest and the mean absolute difference: of the
        log-probabilities, and of the loss of one student, who says how frequent each token is.

        At the stored temperatures and half-way (in 1 / tau) between them, against the same K tokens of the teacher in
        memory. "loss_value" is the mean of that loss.
        """
        hidden, kept = scored.sample
        count = min(sum(map(len, scored.positions)), BLOCK)
        if not count:
            return {"positions": 0}
        stored_at = self.layout.temperatures
        betas = 1 / np.asarray(stored_at)
        taus = [*stored_at, *(2 / (betas[1:] + betas[:-1]))]
        measured = [
            jax.device_get(
                _differences(
                    hidden, self._unembedding, self._W.table(), self._W.rows(), jnp.log(self._unigram), kept,
                    jnp.float32(tau), temperatures=stored_at,
                )
            )
            for tau in taus
        ]  # fmt: skip
        log_prob, loss, value = (np.stack(x)[:, :count] for x in zip(*measured, strict=True))
        spread = lambda x: {"max": float(x.max()), "mean": float(x.mean())}  # noqa: E731
        return {
            "positions": count,
            "log_prob": spread(log_prob),
            "loss": spread(loss),
            "loss_value": float(value.mean()),
        }


def _read(positions, tokens, kept, hidden) -> Scored:
    count = sum(map(len, positions))
    parts = zip(*jax.device_get(kept), strict=True)
    first = Kept(*(x[: len(hidden)] for x in kept[0]))
    return Scored(positions, tokens, Kept(*(np.concatenate(part)[:count] for part in parts)), (hidden, first))


@functools.partial(jax.jit, static_argnames=("top_k", "temperatures", "mesh"))
def _keep(
    hidden_NxD: Float[Array, "N D"],
    unembedding: Any,
    mapped_Vt: Bool[Array, " Vt"],
    *,
    top_k: int,
    temperatures: tuple[float, ...],
    mesh: Mesh,
) -> Kept:
    """What is stored of N positions, spread over all devices of the mesh."""

    def one(hidden_NxD, unembedding, mapped_Vt):
        t_VxN = teacher_logits(hidden_NxD, unembedding, mapped_Vt)
        z_NxK, ids_NxK = stored.largest(t_VxN, top_k)
        others_VxN = t_VxN.at[ids_NxK.T, jnp.arange(len(hidden_NxD))[None]].set(LOWEST)
        rest = stored.rest_of(jnp.maximum(others_VxN - z_NxK[:, 0][None], LOWEST), temperatures)
        return Kept(ids_NxK, stored.codes_of(z_NxK - z_NxK[:, :1]), rest)

    spread, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(one, mesh=mesh, in_specs=(spread, whole, whole), out_specs=spread, check_vma=False)(
        hidden_NxD, unembedding, mapped_Vt
    )


@functools.partial(jax.jit, static_argnames="temperatures")
def _differences(
    hidden_NxD: Float[Array, "N D"],
    unembedding: Any,
    table: ProjectionTable,
    rows: ProjectionRows,
    log_unigram_Vs: Float[Array, " Vs"],
    kept: Kept,
    temperature: Float[Array, ""],
    *,
    temperatures: tuple[float, ...],
) -> tuple[Float[Array, "N K"], Float[Array, " N"], Float[Array, " N"]]:
    """(absolute differences of log-probabilities, of the loss, the loss) between the teacher and what is stored."""
    t_VtxN = teacher_logits(hidden_NxD, unembedding, table.mapped) / temperature
    exact_NxK = (jnp.take_along_axis(t_VtxN, kept.ids_NxK.T, axis=0) - jax.nn.logsumexp(t_VtxN, axis=0)[None]).T
    of = functools.partial(stored.log_probs, kept.codes_NxK, kept.rest_NxTx2, temperatures)
    said_NxK = of(temperature)
    named = head.TopKTeacher(kept.ids_NxK[None], said_NxK[None], of(1.0)[None], rows)
    N, K = said_NxK.shape
    ones = jnp.ones((1, N, 1), jnp.float32)

    def loss(teacher):
        labels, weights = jnp.zeros((1, N), jnp.int32), jnp.ones((1, N), jnp.float32)
        _, out = head.distill(
            ones, log_unigram_Vs.astype(jnp.float32)[:, None], labels, 0 * weights,
            teacher=teacher, kl_weights_BxL=weights, temperature=temperature, top_k=K,
        )  # fmt: skip
        return out.kl_BxL[0]

    online_N, stored_N = loss(head.Teacher(hidden_NxD[None], unembedding, table)), loss(named)
    return jnp.abs(exact_NxK - said_NxK), jnp.abs(online_N - stored_N), online_N

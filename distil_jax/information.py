"""How much of what the teacher says survives the projection, at positions where both tokenizations have a boundary.

With q the teacher's next-token distribution (tau 1), pi its mean over the positions, and M any map of distributions,

    IP_KL(M) = E[KL(M q || M pi)] / E[KL(q || pi)]

is the share of the teacher's information that passes through M. It is at most 1 (data processing inequality). Three
maps tell where the rest is lost: W itself; W followed by the other pieces that the student cuts a teacher token into,
which is what the interior positions add (chain rule); and the teacher's K likeliest tokens with all others as one.

    IP_bpb = (BPB_unigram - BPB_projected) / (BPB_unigram - BPB_teacher)

scores the text that follows, where one token of each side covers the same bytes. It can exceed 1: W has counted what
the teacher's distribution alone does not know.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from distil_jax.errors import UserError
from distil_jax.eval import bootstrap
from distil_jax.losses import stored
from distil_jax.losses.kd import ProjectionTable, project, teacher_logits
from distil_jax.sharding import to_host
from distil_jax.tokens.align import CLASSES
from distil_jax.tokens.bytes import ByteTable

if TYPE_CHECKING:
    from distil_jax.projection import Projection

Values = dict[str, np.ndarray]  # float64 [N], nats
SORTED = 2048  # positions at which distributions are sorted
_SMALLEST = 1e-30  # keeps one impossible token from making a whole measure infinite; it costs 69 nats


class Positions(NamedTuple):
    """N positions of held-out text where both tokenizations have a boundary."""

    hidden_NxDt: Float[np.ndarray, "N Dt"]  # the teacher's state that predicts what follows
    teacher_N: Int[np.ndarray, " N"]  # the teacher's next token
    student_N: Int[np.ndarray, " N"]  # the student's
    document_N: Int[np.ndarray, " N"]
    bytes_N: Int[np.ndarray, " N"]  # of the student's token
    one_to_one_N: np.ndarray  # bool: both next tokens are the same bytes
    class_N: Int[np.ndarray, " N"]  # of the student's token, in align.CLASSES
    specialty_N: Int[np.ndarray, " N"]


def measure(
    W: "Projection",
    positions: Positions,
    unembedding_VtxDt: Any,
    *,
    unigram_Vs: Float[np.ndarray, " Vs"],
    tables: dict[str, ByteTable],
    tail: int = 64,
    specialties: Sequence[str] = (),
    block: int = 256,
    samples: int = bootstrap.SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """`summary` of `values`: what the manifest of the projection holds."""
    found = values(W, positions, unembedding_VtxDt, unigram_Vs=unigram_Vs, tables=tables, tail=tail, block=block)
    return summary(found, positions, specialties=specialties, samples=samples, seed=seed)


def values(
    W: "Projection",
    positions: Positions,
    unembedding_VtxDt: Any,
    *,
    unigram_Vs: Float[np.ndarray, " Vs"],
    tables: dict[str, ByteTable],
    tail: int = 64,
    block: int = 256,
    pi_Vt: jax.Array | None = None,
) -> Values:
    """What is averaged, at each position.

    "kl": KL(q || pi), and the same through a map: "kl_projected", "kl_pieces", "kl_tail" (the teacher's `tail`
    likeliest tokens; left out where that is 0). "teacher", "projected", "unigram": -log probability of the token that
    follows. What W leaves to tokens that it does not name is spread over `unigram`, the student tokens' probabilities
    in training text. Logits exist for `block` positions at a time. pi_Vt: `mean_teacher` of these positions, where it
    is known from another W that maps the same tokens.
    """
    maps = {"projected": (W.table(), W.student_vocab), "pieces": piece_sequences(W, tables)}
    tables_of, sizes = ({name: x[i] for name, x in maps.items()} for i in (0, 1))
    pi = mean_teacher(W, positions, unembedding_VtxDt, block=block) if pi_Vt is None else pi_Vt
    through = {name: _cells(pi[:, None], tables_of[name], sizes[name]) for name in maps}
    unigram_N = unigram_Vs[positions.student_N]
    arrays = positions.hidden_NxDt, positions.teacher_N, positions.student_N, unigram_N.astype(np.float32)
    parts = [
        _values(tuple(sizes.items()), tail, *of_block, unembedding_VtxDt, tables_of, pi, through)
        for of_block in _blocks(block, *arrays)
    ]
    found = {name: _joined(parts, name, len(unigram_N)) for name in parts[0]}
    return found | {"unigram": -np.log(unigram_N)}


def mean_teacher(W: "Projection", positions: Positions, unembedding_VtxDt: Any, *, block: int = 256) -> jax.Array:
    """`[Vt]`: the mean of the teacher's distributions over the tokens that W maps."""
    return _mean(_sum_of_q, positions.hidden_NxDt, unembedding_VtxDt, jnp.asarray(W.mapped), block)


def sorted_match(
    positions: Positions, unembedding_VtxDt: Any, mapped_Vt: Any, *, block: int = 256, samples: int = bootstrap.SAMPLES
) -> dict[str, Any]:
    """IP_KL of the control that orders each distribution and forgets which token is which (ULD's view of it), at the
    first `SORTED` positions, as sorting is slow."""
    hidden, documents = positions.hidden_NxDt[:SORTED], positions.document_N[:SORTED]
    pi, sorted_pi = (_mean(f, hidden, unembedding_VtxDt, mapped_Vt, block) for f in (_sum_of_q, _sum_of_sorted_q))
    parts = [_sorted_values(h, unembedding_VtxDt, mapped_Vt, pi, sorted_pi) for (h,) in _blocks(block, hidden)]
    index = np.unique(documents, return_inverse=True)[1]
    sums = [np.bincount(index, _joined(parts, name, len(hidden))) for name in ("kl_sorted", "kl")]
    value, interval = bootstrap.ratio(*sums, samples=samples)
    return {"ip_kl": value, "ip_kl_interval": interval, "positions": len(hidden)}


def summary(
    v: Values, positions: Positions, *, specialties: Sequence[str] = (), samples: int = bootstrap.SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """The measures with their intervals over documents, whole, by class of token and by specialty."""
    documents, index = np.unique(positions.document_N, return_inverse=True)
    only, everywhere = positions.one_to_one_N.astype(np.float64), np.ones(len(index))

    def ratio(numerator, denominator, where=everywhere):
        sums = (np.bincount(index, where * x, minlength=len(documents)) for x in (numerator, denominator))
        return bootstrap.ratio(*sums, samples=samples, seed=seed)

    def preserved(where=everywhere):
        found: dict[str, Any] = {}
        for name, key in (("ip_kl", "kl_projected"), ("ip_kl_pieces", "kl_pieces")):
            found[name], found[f"{name}_interval"] = ratio(v[key], v["kl"], where)
        gain = {name: only * (v["unigram"] - v[name]) for name in ("projected", "teacher")}
        if (only * where).any():  # a control token is no bytes
            found["ip_bpb"], found["ip_bpb_interval"] = ratio(gain["projected"], gain["teacher"], where)
        return found | {"positions": int(where.sum())}

    bits = float((only * positions.bytes_N).sum()) * np.log(2)
    by_class = {name: positions.class_N == i for i, name in enumerate(CLASSES)}
    by_specialty = {name: positions.specialty_N == i for i, name in enumerate(specialties)}
    lost = {name: 1 - ratio(v[f"kl_{name}"], v["kl"])[0] for name in ("projected", "pieces", "tail")}
    return preserved() | {
        "lost": lost,  # of the information: to W, to W with all pieces, to the tokens beyond the likeliest
        "bits_per_byte": {name: float((only * v[name]).sum() / bits) for name in ("unigram", "projected", "teacher")},
        "nats_next_token": float(v["projected"].mean()),
        "positions": len(index),
        "one_to_one_positions": int(only.sum()),
        "documents": len(documents),
        "by_class": {name: preserved(where.astype(np.float64)) for name, where in by_class.items() if where.any()},
        "by_specialty": {n: preserved(where.astype(np.float64)) for n, where in by_specialty.items() if where.any()},
    }


def gain(before: Values, after: Values, positions: Positions, *, samples: int = bootstrap.SAMPLES, seed: int = 0):
    """Nats that `after` predicts the student's next token better by, a position, with its interval over documents."""
    index = np.unique(positions.document_N, return_inverse=True)[1]
    sums = [np.bincount(index, x["projected"]) for x in (before, after)]
    value, interval = bootstrap.ratio(sums[0], np.bincount(index), minus=sums[1], samples=samples, seed=seed)
    return {"nats": value, "interval": interval}


def piece_sequences(W: "Projection", tables: dict[str, ByteTable]) -> tuple[ProjectionTable, int]:
    """(W followed by the student's other pieces of each teacher token, how many cells to count with).

    A cell is a student token and the bytes of the teacher token that it leaves to the next ones. A student token that
    is longer than the teacher's is a cell for itself: what it goes on with is the next teacher token's affair.
    """
    table = W.table()
    cells: dict[Any, int] = {}
    teacher_ids, student_ids = np.asarray(table.teacher_ids), np.asarray(table.student_ids)
    ids = np.empty(len(teacher_ids), np.int32)
    for n, (v, u) in enumerate(zip(teacher_ids.tolist(), student_ids.tolist(), strict=True)):
        whole, piece = tables["teacher"].token_bytes(v), tables["student"].token_bytes(u)
        ids[n] = cells.setdefault((u, whole if whole.startswith(piece) else None), len(cells))
    order = np.argsort(ids, kind="stable")
    return (
        table._replace(
            teacher_ids=table.teacher_ids[order],
            student_ids=jnp.asarray(ids[order]),
            weights=table.weights[order],
            slots=table.slots[order],
        ),
        len(ids),  # at least as many as there are cells: the same for every W with as many entries, so compiled once
    )


def _cells(q_VxN, table: ProjectionTable, size: int):
    """What a map makes of distributions, with what it leaves as a last cell."""
    p = project(q_VxN, table, size)
    return p if table.rest is None else jnp.concatenate([p, (table.rest[: len(q_VxN)] @ q_VxN)[None]])


def _blocks(block: int, *arrays: np.ndarray):
    """`block` positions at a time, the last filled up with copies of the last position."""
    for at in range(0, len(arrays[0]), block):
        short = max(0, at + block - len(arrays[0]))
        yield [np.concatenate([a[at : at + block], np.repeat(a[-1:], short, axis=0)]) for a in arrays]


def _joined(parts: list[dict[str, Any]], name: str, count: int) -> np.ndarray:
    return np.concatenate([to_host(part[name]).astype(np.float64) for part in parts])[:count]


def _mean(sum_of: Any, hidden_NxDt: np.ndarray, unembedding: Any, mapped: Any, block: int) -> jax.Array:
    """A mean over all positions, summed in float64."""
    N, total = len(hidden_NxDt), 0.0
    if N == 0:
        raise UserError("no shared boundary to measure the projection at: is the held-out split empty?")
    for n, (hidden,) in enumerate(_blocks(block, hidden_NxDt)):
        real = n * block + np.arange(block) < N
        total = total + to_host(sum_of(hidden, np.float32(real), unembedding, mapped)).astype(np.float64)
    return jnp.asarray(total / N, jnp.float32)


# The head and W are arguments: as a constant of the function a head of 262,144 rows takes minutes to compile, and every
# W would compile anew.


def _q(hidden_NxDt, unembedding, mapped):
    return jax.nn.softmax(teacher_logits(hidden_NxDt, unembedding, mapped), axis=0)


@jax.jit
def _sum_of_q(hidden_NxDt, real_N, unembedding, mapped):
    """The teacher's distributions at some positions added up, [Vt]."""
    return jnp.sum(_q(hidden_NxDt, unembedding, mapped) * real_N[None], axis=1)


@jax.jit
def _sum_of_sorted_q(hidden_NxDt, real_N, unembedding, mapped):
    return jnp.sum(_descending(_q(hidden_NxDt, unembedding, mapped)) * real_N[None], axis=1)


def _descending(q_VxN):
    return -jnp.sort(-q_VxN, axis=0)


def _xlogy(a, b):
    return jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, b, 1.0)), 0.0)


def _kl(a_VxN, b_Vx1):
    return jnp.sum(_xlogy(a_VxN, a_VxN) - _xlogy(a_VxN, jnp.maximum(b_Vx1, _SMALLEST)), axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(sizes, tail, hidden_NxDt, teacher_N, student_N, unigram_N, unembedding, tables, pi, through):
    """`values` of some positions."""
    q = _q(hidden_NxDt, unembedding, tables["projected"].mapped)

    def nats_of(probability):
        return -jnp.log(jnp.maximum(probability, _SMALLEST))

    take = lambda x, ids: jnp.take_along_axis(x, ids[None], axis=0)[0]  # noqa: E731
    found = {"kl": _kl(q, pi[:, None]), "teacher": nats_of(take(q, teacher_N))}
    for name, size in sizes:
        cells = _cells(q, tables[name], size)
        found[f"kl_{name}"] = _kl(cells, through[name])
        if name == "projected":
            left = cells[size] * unigram_N if len(cells) > size else 0.0
            found["projected"] = nats_of(take(cells, student_N) + left)
    if not tail:
        return found
    top_NxK, ids_NxK = stored.largest(q, min(tail, len(q)))
    pi_NxK = jnp.maximum(pi[ids_NxK], _SMALLEST)
    rest, rest_pi = (jnp.maximum(1 - jnp.sum(x, axis=1), _SMALLEST) for x in (top_NxK, pi_NxK))
    named = jnp.sum(_xlogy(top_NxK, top_NxK) - _xlogy(top_NxK, pi_NxK), axis=1)
    return found | {"kl_tail": named + rest * jnp.log(rest / rest_pi)}


@jax.jit
def _sorted_values(hidden_NxDt, unembedding, mapped, pi, sorted_pi):
    q = _q(hidden_NxDt, unembedding, mapped)
    return {"kl": _kl(q, pi[:, None]), "kl_sorted": _kl(_descending(q), sorted_pi[:, None])}

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
from distil_jax.losses.kd import ProjectionTable, project, teacher_logits
from distil_jax.losses.vocabulary import floor_of_largest
from distil_jax.tokens.align import CLASSES
from distil_jax.tokens.bytes import ByteTable

if TYPE_CHECKING:
    from distil_jax.projection import Projection

Values = dict[str, np.ndarray]  # float64 [N], nats
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
) -> Values:
    """What is averaged, at each position.

    "kl": KL(q || pi), and the same through a map: "kl_projected", "kl_pieces", "kl_tail" (the teacher's `tail`
    likeliest tokens), "kl_sorted" (the control that orders each distribution and forgets which token is which).
    "teacher", "projected", "unigram": -log probability of the token that follows. What W leaves to tokens that it does
    not name is spread over `unigram`, the student tokens' probabilities in training text. Logits exist for `block`
    positions at a time.
    """
    N = len(positions.teacher_N)
    if N == 0:
        raise UserError("no shared boundary to measure the projection at: is the held-out split empty?")
    maps = {"projected": (W.table(), W.student_vocab), "pieces": piece_sequences(W, tables)}
    mapped = maps["projected"][0].mapped

    def blocks(*arrays):
        for at in range(0, N, block):
            short = max(0, at + block - N)
            yield [np.concatenate([a[at : at + block], np.repeat(a[-1:], short, axis=0)]) for a in arrays]

    pi = sorted_pi = 0.0
    for at, (hidden,) in zip(range(0, N, block), blocks(positions.hidden_NxDt), strict=True):
        real = np.arange(at, at + block) < N
        sums = _sums_of_q(hidden, np.float32(real), unembedding_VtxDt, mapped)
        pi, sorted_pi = (
            total + np.asarray(more, np.float64) for total, more in zip((pi, sorted_pi), sums, strict=True)
        )
    pi, sorted_pi = (jnp.asarray(x / N, jnp.float32) for x in (pi, sorted_pi))
    sizes = {name: size for name, (_, size) in maps.items()}
    tables_of = {name: table for name, (table, _) in maps.items()}
    through = {name: _cells(pi[:, None], tables_of[name], sizes[name]) for name in maps}
    parts = [
        _values(tuple(sizes.items()), tail, *arrays, unembedding_VtxDt, tables_of, pi, sorted_pi, through)
        for arrays in blocks(
            positions.hidden_NxDt, positions.teacher_N, positions.student_N, unigram_Vs[positions.student_N]
        )
    ]
    found = {name: np.concatenate([np.asarray(p[name], np.float64) for p in parts])[:N] for name in parts[0]}
    return found | {"unigram": -np.log(unigram_Vs[positions.student_N])}


def summary(
    v: Values, positions: Positions, *, specialties: Sequence[str] = (), samples: int = bootstrap.SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """The measures with their intervals over documents, whole, by class of token and by specialty."""
    documents, index = np.unique(positions.document_N, return_inverse=True)
    only, everywhere = positions.one_to_one_N.astype(np.float64), np.ones(len(index))

    def ratio(numerator, denominator, where=everywhere):
        sums = [np.bincount(index, where * x, minlength=len(documents)) for x in (numerator, denominator)]
        return bootstrap.ratio(*sums, samples=samples, seed=seed)

    def preserved(where=everywhere):
        found = {}
        for name, key in (("ip_kl", "kl_projected"), ("ip_kl_pieces", "kl_pieces")):
            found[name], found[f"{name}_interval"] = ratio(v[key], v["kl"], where)
        gain = {name: only * (v["unigram"] - v[name]) for name in ("projected", "teacher")}
        found["ip_bpb"], found["ip_bpb_interval"] = ratio(gain["projected"], gain["teacher"], where)
        return found | {"positions": int(where.sum())}

    bits = float((only * positions.bytes_N).sum()) * np.log(2)
    by_class = {name: positions.class_N == i for i, name in enumerate(CLASSES)}
    by_specialty = {name: positions.specialty_N == i for i, name in enumerate(specialties)}
    lost = {name: 1 - ratio(v[f"kl_{name}"], v["kl"])[0] for name in ("projected", "pieces", "tail")}
    return preserved() | {
        "lost": lost,  # of the information: to W, to W with all pieces, to the tokens beyond the likeliest
        "sorted_match": ratio(v["kl_sorted"], v["kl"])[0],
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
    """(W followed by the student's other pieces of each teacher token, how many cells there are).

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
        len(cells),
    )


def _cells(q_VxN, table: ProjectionTable, size: int):
    """What a map makes of distributions, with what it leaves as a last cell."""
    p = project(q_VxN, table, size)
    return p if table.rest is None else jnp.concatenate([p, (table.rest[: len(q_VxN)] @ q_VxN)[None]])


# The head and W are arguments: as a constant of the function a head of 262,144 rows takes minutes to compile, and every
# W would compile anew.


def _q(hidden_NxDt, unembedding, mapped):
    return jax.nn.softmax(teacher_logits(hidden_NxDt, unembedding, mapped), axis=0)


@jax.jit
def _sums_of_q(hidden_NxDt, real_N, unembedding, mapped):
    """The teacher's distributions at some positions added up, as they are and each in descending order, [Vt]."""
    q = _q(hidden_NxDt, unembedding, mapped)
    return tuple(jnp.sum(x * real_N[None], axis=1) for x in (q, -jnp.sort(-q, axis=0)))


def _xlogy(a, b):
    return jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, b, 1.0)), 0.0)


def _kl(a_VxN, b_Vx1):
    return jnp.sum(_xlogy(a_VxN, a_VxN) - _xlogy(a_VxN, jnp.maximum(b_Vx1, _SMALLEST)), axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(sizes, tail, hidden_NxDt, teacher_N, student_N, unigram_N, unembedding, tables, pi, sorted_pi, through):
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
    ordered, floor = floor_of_largest(q, jnp.ones((1, 1)), min(tail, len(q)))
    kept = ordered >= floor[None]
    rests = [jnp.maximum(1 - jnp.sum(jnp.where(kept, x, 0), axis=0), 0) for x in (q, pi[:, None])]
    named = jnp.sum(jnp.where(kept, _xlogy(q, q) - _xlogy(q, jnp.maximum(pi[:, None], _SMALLEST)), 0), axis=0)
    found["kl_tail"] = named + _xlogy(rests[0], rests[0]) - _xlogy(rests[0], jnp.maximum(rests[1], _SMALLEST))
    found["kl_sorted"] = _kl(-jnp.sort(-q, axis=0), sorted_pi[:, None])
    return found

"""Log-likelihoods of continuations, many at a time: what lm-evaluation-harness asks of a model, in JAX.

    scorer = Scorer(model, params, mesh=mesh)
    scores = scorer(requests)        # encoding.Request -> Score

A context is computed once for all of its continuations (models/branches.py), what many contexts begin with, such as the
examples of a task, once for all of them. Rows are sorted by length and padded to few shapes; hidden states are
unembedded at scored positions only, by the streamed head. Rows lie over the data and fsdp axes of a mesh.

The softmax is over every row of the unembedding, as in transformers, also over rows that are no token.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from distil_jax import sharding
from distil_jax.errors import UserError
from distil_jax.eval.encoding import Request
from distil_jax.losses import head
from distil_jax.models import branches

SCORE_BYTES = 256 << 20  # of a batch's attention scores in one layer, on one device
LEAST_SHARED = 32  # tokens; a shorter beginning is not worth a pass of its own
LEAST_SAVED = 256  # tokens that sharing must spare
AT_ONCE = {"cpu": 2048}  # tokens of a batch on one device
AT_ONCE_OTHERWISE = 16384


class Score(NamedTuple):
    """nats: log-likelihood of a continuation. greedy: whether each of its tokens is the most likely one."""

    nats: float
    greedy: bool


@dataclass
class Work:
    """What scoring took. asked: input tokens of all requests, each by itself; computed: those that went through the
    model, padding included; cut: requests that were too long; shapes: programs."""

    requests: int = 0
    asked: int = 0
    computed: int = 0
    cut: int = 0
    shapes: set[tuple] = field(default_factory=set)


@dataclass
class Row:
    """A context and its continuations, of which `numbers` are the requests'."""

    context: tuple[int, ...]
    numbers: list[int] = field(default_factory=list)
    continuations: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Input tokens: the last token of a continuation is predicted and never read."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)

    @property
    def scored(self) -> int:
        return sum(map(len, self.continuations))


class Scorer:
    """Scores requests with one model. `work` counts.

    mesh: that the parameters lie on. max_length: longest input in tokens, by default the model's; longer ones lose
    their beginning, as the harness has it.
    """

    def __init__(self, model: Any, params: Any, *, mesh: Mesh | None = None, max_length: int | None = None):
        self.model, self.params, self.mesh = model.with_tokenizer(None), params, mesh
        self.max_length = max_length or model.config.max_position_embeddings
        self.parts = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
        platform = (mesh.devices.flat[0] if mesh else jax.local_devices()[0]).platform
        self._at_once = AT_ONCE.get(platform, AT_ONCE_OTHERWISE)
        self.work = Work()

    def __call__(self, requests: Sequence[Request], told: Callable[[int, int], None] | None = None) -> list[Score]:
        """The score of each request. told: hears of (requests done so far, tokens that the last of them took).

        Raises UserError for a continuation that the model cannot hold.
        """
        scores: list[Score | None] = [None] * len(requests)
        done = 0

        def collect(batch: Batch, result: Any) -> None:
            nonlocal done
            _collect(batch, result, scores)
            done += sum(len(row.numbers) for row in batch.rows)
            if told:
                told(done, batch.size * batch.length)

        rows = self._rows(requests)
        with jax.default_matmul_precision("highest" if _is_float32(self.params) else "default"):
            for shared, members in beginnings(rows):
                prefix = self._read(members[0].context[:shared]) if shared else None
                # Dispatched ahead of what is read back: the device does not wait for the host.
                pending: list[tuple] = []
                for batch in self._batches(members, shared):
                    pending.append((batch, self._dispatch(batch, prefix, shared)))
                    if len(pending) > 2:
                        collect(*pending.pop(0))
                for one in pending:
                    collect(*one)
        return scores

    def _rows(self, requests: Sequence[Request]) -> list[Row]:
        rows: dict[tuple[int, ...], Row] = {}
        for number, (context, continuation) in enumerate(requests):
            if not continuation or not context:
                raise ValueError(f"request {number} has no {'continuation' if context else 'context'}")
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's {self.max_length}"
                )
            room = self.max_length + 1 - len(continuation)
            self.work.cut += len(context) > room
            context = tuple(context[-room:])
            self.work.asked += len(context) + len(continuation) - 1
            row = rows.setdefault(context, Row(context))
            row.numbers.append(number)
            row.continuations.append(tuple(continuation))
        self.work.requests += len(requests)
        return list(rows.values())

    def _read(self, tokens: tuple[int, ...]) -> branches.Prefix:
        padded = np.zeros(shared_bucket(len(tokens)), np.int32)
        padded[: len(tokens)] = tokens
        self.work.computed += len(padded)
        self.work.shapes.add(("shared", len(padded)))
        return _read(self.model, self.mesh, self.params, *_whole((padded, np.int32(len(tokens))), self.mesh))

    def _batches(self, rows: list[Row], shared: int) -> Iterable["Batch"]:
        """Rows sorted by length, the longest first, in batches of a few shapes."""
        before = shared_bucket(shared) if shared else 0
        heads = self.model.config.num_attention_heads
        order = sorted(rows, key=lambda row: (-row.length, row.context))
        while order:
            length = bucket(order[0].length - shared, 64)
            # Blocks of a quarter of the queries exist at a time (branches.attend).
            fits = SCORE_BYTES // (4 * heads * max(64, length // 4) * (before + length))
            most = power_below(max(1, min(self._at_once // length, fits)))
            # What is left over goes at a quarter of the size: two sizes for a length, to compile few programs.
            size = most // 4 if most >= 4 and 4 * len(order) <= most * self.parts else most
            taken, order = order[: size * self.parts], order[size * self.parts :]
            yield Batch(taken, shared, length, size * self.parts)

    def _dispatch(self, batch: "Batch", prefix: branches.Prefix | None, shared: int) -> Any:
        arrays = batch.arrays()
        self.work.computed += arrays["tokens"].size
        prefix_size = prefix.keys.shape[1] if prefix else 0
        self.work.shapes.add((prefix_size, arrays["tokens"].shape, arrays["targets"].shape))
        arrays = sharding.put_batch(arrays, self.mesh) if self.mesh else arrays
        return _score(self.model, self.mesh, self.params, prefix, arrays)


class Batch:
    """Rows that go through the model together, [size, length], without the `shared` tokens that all begin with."""

    def __init__(self, rows: Sequence[Row], shared: int, length: int, size: int):
        self.rows, self.shared, self.length, self.size = rows, shared, length, size
        self.scored = 4
        while self.scored < max(row.scored for row in rows):
            self.scored *= 4

    def arrays(self) -> dict[str, Int[np.ndarray, "B ..."]]:
        """tokens, positions, branch [B, L]; columns, targets, used [B, S]: hidden state, token, whether it counts."""
        B, L, S = self.size, self.length, self.scored
        a = {name: np.zeros((B, L), np.int32) for name in ("tokens", "positions")}
        a["branch"] = np.full((B, L), branches.PADDING, np.int32)
        a |= {name: np.zeros((B, S), np.int32) for name in ("columns", "targets", "used")}
        for b, row in enumerate(self.rows):
            own = row.context[self.shared :]
            end = len(own)
            a["tokens"][b, :end] = own
            a["positions"][b, :end] = np.arange(self.shared, self.shared + end)
            a["branch"][b, :end] = 0
            last, place, at = end - 1, self.shared + end, 0
            for number, continuation in enumerate(row.continuations, 1):
                more = len(continuation) - 1
                span = slice(end, end + more)
                a["tokens"][b, span] = continuation[:-1]
                a["positions"][b, span] = np.arange(place, place + more)
                a["branch"][b, span] = number
                scored = slice(at, at + more + 1)
                a["columns"][b, scored] = [last, *range(end, end + more)]
                a["targets"][b, scored] = continuation
                a["used"][b, scored] = 1
                end, at = end + more, at + more + 1
        return a


def _collect(batch: Batch, result: Any, scores: list[Score | None]) -> None:
    nats_BxS, right_BxS = (sharding.to_host(x) for x in result)
    for b, row in enumerate(batch.rows):
        at = 0
        for number, continuation in zip(row.numbers, row.continuations, strict=True):
            span = slice(at, at + len(continuation))
            scores[number] = Score(-float(nats_BxS[b, span].sum(dtype=np.float64)), bool(right_BxS[b, span].all()))
            at += len(continuation)


def beginnings(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """Rows in groups with the number of tokens that all contexts of a group begin with; 0 where sharing spares little.

    Sorted, contexts with one beginning are neighbours. A group goes on as long as it does not lose more than half of
    what it has in common.
    """
    if not rows:
        return []
    order = sorted(rows, key=lambda row: row.context)
    groups: list[tuple[int, list[Row]]] = []
    # At least one token of each row stays its own: its hidden state is what the first scored token needs.
    common, members = len(order[0].context) - 1, [order[0]]
    for row in order[1:]:
        meets = min(common, _common(members[-1].context, row.context), len(row.context) - 1)
        if meets >= LEAST_SHARED and (len(members) == 1 or 2 * meets >= common):
            common = meets
            members.append(row)
        else:
            groups.append((common, members))
            common, members = len(row.context) - 1, [row]
    groups.append((common, members))
    alone = [row for shared, group in groups if shared * (len(group) - 1) < LEAST_SAVED for row in group]
    kept = [(shared, group) for shared, group in groups if shared * (len(group) - 1) >= LEAST_SAVED]
    return kept + ([(0, alone)] if alone else [])


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    low, high = 0, most  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


def bucket(size: int, least: int) -> int:
    """The next of least, 2 least, 3 least, 4 least, 6 least, 8 least, 12 least, ...: at most a third is padding."""
    if size <= least:
        return least
    power = least << (math.ceil(size / least) - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def shared_bucket(size: int) -> int:
    """The next power of two from 256 on: what is padding costs attention alone."""
    return max(256, 1 << (size - 1).bit_length())


def power_below(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << size.bit_length() - 1


def _is_float32(params: Any) -> bool:
    return params["final_norm"]["scale"].dtype == jnp.float32


def _whole(arrays, mesh: Mesh | None):
    return jax.device_put(arrays, sharding.replicated(mesh)) if mesh else arrays


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(model, mesh, params, tokens_P, length):
    return branches.read(model, params, tokens_P, length)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(model, mesh, params, prefix, a):
    """(-log p of each target, whether it is the most likely token), [B, S]; 0 and True where none is asked."""
    hidden_BxLxD = branches.hidden(model, params, prefix, a["tokens"], a["positions"], a["branch"])
    hidden_BxSxD = jnp.take_along_axis(hidden_BxLxD, a["columns"][:, :, None], axis=1)
    nats, prediction = head.score(
        hidden_BxSxD,
        model.unembedding(params),
        a["targets"],
        a["used"].astype(jnp.float32),
        text_vocab=model.config.vocab_size,
        mesh=mesh,
    )
    return nats, (prediction == a["targets"]) | (a["used"] == 0)

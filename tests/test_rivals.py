"""The rival objectives against float64 references that walk over documents and positions one by one."""

import copy
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from distil_jax import recipe, sharding
from distil_jax.config import load_config_file
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError
from distil_jax.losses.rivals import (
    RIVALS,
    Sides,
    alm,
    divergence,
    gold,
    learned,
    positions,
    strict,
    uld,
    vocabularies,
    xtoken,
)  # fmt: skip
from distil_jax.losses.schedules import schedule
from distil_jax.models import hub
from distil_jax.objective import Frozen, Loss, Objective, reduce
from distil_jax.step import init_state, make_optimizer, make_step
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.pack import make_example, pack

SYLLABLES = ("hy", "per", "ten", "sion", "car", "dio", "myo", "pathy", "neph", "ro", "sis", "macro", "cephaly", "a")
TEXTS = [
    f"Question: What is {''.join(SYLLABLES[i * k % 14] for k in (1, 3, 5, 9))}?\nAnswer: A rare abnormality of the "
    f"{part} seen in {i * 37 % 211} patients, 140 to 211, 0.25 mg  twice daily."
    for i in range(300)
    for part in ("kidney", "retina", "cerebellum")
]
DOCUMENTS = [
    ("What is hypertension?", " 140 of 211 patients,\n  0.25 mg Δ😀."),
    ("Dose:", " 100 mg twice daily; cardiomyopathy 99.5 %"),
    ("é", "the kidney  and 2024"),
]
TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"
D, DT, EXTRA = 5, 6, 3
TAU = 1.7


pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_gemma_style(TEXTS, 460, folder / "teacher")
    train_llama_style(TEXTS, 420, folder / "student")
    return {side: ByteTable.from_tokenizer(folder / side) for side in ("teacher", "student")}


@pytest.fixture(scope="module")
def case(tables):
    """Packed rows of real tokenizations, random states, heads with rows that are no tokens, and where documents lie."""
    examples = [make_example(*d, **tables, document=n) for n, d in enumerate(DOCUMENTS)]
    rows = pack(examples, 72, 96).rows
    r = np.random.default_rng(0)
    Vs, Vt = tables["student"].vocab_size, tables["teacher"].vocab_size
    B, Ls = rows["student_tokens"].shape
    Lt = rows["teacher_tokens"].shape[1]
    arrays = {
        "hidden": r.normal(size=(B, Ls, D)),
        "U": r.normal(size=(Vs + EXTRA, D)),
        "teacher_hidden": r.normal(size=(B, Lt, DT)),
        "Ut": r.normal(size=(Vt + EXTRA, DT)),
    }
    arrays = {name: np.float32(x).astype(np.float64) for name, x in arrays.items()}
    return {"examples": examples, "batch": rows, **arrays}


def sides(c):
    return Sides(*(jnp.float32(c[name]) for name in ("hidden", "U", "teacher_hidden", "Ut")))


def parameters(kind, tables):
    """What a rival learns, away from where it starts."""
    if RIVALS[kind].start is None:
        return None
    r = np.random.default_rng(5)
    Vs, Vt = tables["student"].vocab_size, tables["teacher"].vocab_size
    start = RIVALS[kind].start(jax.random.key(0), Vt + EXTRA, r.dirichlet(np.ones(Vs)), 4)
    return {name: x + 0.3 * r.normal(size=x.shape).astype(np.float32) for name, x in start.items()}


def value_of(kind, c, tables, *, block=7, mesh=None):
    """The weighted sum of D and what makes it: one number to differentiate."""
    rival, static = RIVALS[kind], RIVALS[kind].tables(tables["teacher"], tables["student"])
    batch = {name: jnp.asarray(x) for name, x in c["batch"].items()}
    w = jnp.float32(weights(c))

    def value(s, learned):
        told = divergence(
            rival, static, learned, s, batch, jnp.float32(TAU), text_vocab=tables["student"].vocab_size, block=block,
            mesh=mesh,
        )  # fmt: skip
        own = 0 if told.own_BxL is None else jnp.sum(w * told.own_BxL)
        return jnp.sum(w * told.divergence_BxL), (told, rival.taught(static, batch), own)

    return value


def weights(c):
    return np.random.default_rng(9).uniform(0.5, 2, c["batch"]["role"].shape).astype(np.float32).astype(np.float64)


# ---- the reference ----------------------------------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


class Reference:
    """Everything a rival needs, in float64 and Python loops, from the bytes and the documents alone."""

    def __init__(self, c, tables, tau=TAU):
        self.c, self.tau = c, tau
        self.student, self.teacher = tables["student"], tables["teacher"]
        self.Vs, self.Vt = self.student.vocab_size, self.teacher.vocab_size
        self.sb = [self.student.token_bytes(i) for i in range(self.Vs)]
        self.tb = [self.teacher.token_bytes(i) for i in range(self.Vt)]
        shared = [(self.teacher.roles[r], self.student.roles[r]) for r in self.teacher.roles if r in self.student.roles]
        self.role = dict(shared)
        self.mapped = np.array([bool(b) or i in self.role for i, b in enumerate(self.tb)])
        self.documents = [self._document(r, segment) for r, segment in self._segments()]

    def moved(self, **arrays):
        """The same with other states or another head."""
        there = copy.copy(self)
        there.c = self.c | arrays
        return there

    def _segments(self):
        ids = self.c["batch"]["student_segment_ids"]
        return [(r, s) for r in range(len(ids)) for s in range(1, ids[r].max() + 1)]

    def _document(self, row, segment):
        """(row, first positions of both sides, the example, its groups as index lists, its roots as index pairs)."""
        b = self.c["batch"]
        at = int(np.flatnonzero(b["student_segment_ids"][row] == segment)[0])
        teacher_at = int(np.flatnonzero(b["teacher_segment_ids"][row] == segment)[0])
        e = self.c["examples"][b["document"][row, at]]
        s, t = e["student_tokens"].tolist(), e["teacher_tokens"].tolist()
        assert s[0] == self.student.roles["bos"] and t[0] == self.teacher.roles["bos"]
        assert s[-1] == self.student.roles["eos"] and t[-1] == self.teacher.roles["eos"]
        ends = np.cumsum([0, *(len(self.sb[i]) for i in s[1:-1])]).tolist()
        teacher_ends = np.cumsum([0, *(len(self.tb[i]) for i in t[1:-1])]).tolist()
        groups, roots = [], []
        cuts = sorted(set(ends) & set(teacher_ends))
        for low, high in zip(cuts[:-1], cuts[1:], strict=True):
            groups.append(
                (
                    [i + 1 for i in range(len(ends) - 1) if low <= ends[i] < high],
                    [j + 1 for j in range(len(teacher_ends) - 1) if low <= teacher_ends[j] < high],
                )
            )
        groups.append(([len(s) - 1], [len(t) - 1]))
        for i in range(1, len(s) - 1):
            for j in range(1, len(t) - 1):
                if ends[i - 1] == teacher_ends[j - 1] and ends[i] <= teacher_ends[j]:
                    roots.append((i, j))
        roots.append((len(s) - 1, len(t) - 1))
        on = e["student_supervised"]
        groups = [g for g in groups if all(on[i] for i in g[0])]
        return row, at, teacher_at, s, t, groups, [x for x in roots if on[x[0]]]

    def s(self, row, p, tau=None):
        return softmax(self.c["U"][: self.Vs] @ self.c["hidden"][row, p] / (tau or self.tau))

    def q(self, row, p, tau=None, known=None):
        known = self.mapped if known is None else known
        z = self.c["Ut"][: self.Vt] @ self.c["teacher_hidden"][row, p] / (tau or self.tau)
        out = np.zeros(self.Vt)
        out[known] = softmax(z[known])
        return out

    @functools.cached_property
    def matched(self):
        """{teacher id: student id}."""
        eos = self.teacher.roles["eos"]
        pairs = {}
        for t, s in sorted(self.role.items(), key=lambda x: x[0] != eos):
            if s not in pairs.values():
                pairs[t] = s
        by_bytes = {}
        for t, piece in enumerate(self.tb):
            if piece and self.teacher.id_of(piece) == t:
                by_bytes[piece] = t
        for s, piece in enumerate(self.sb):
            if piece in by_bytes and piece and self.student.id_of(piece) == s:
                pairs[by_bytes[piece]] = s
        return pairs

    def pieces(self, s):
        """The student token as at most four teacher tokens."""
        if not self.sb[s]:
            return [t for t, own in self.role.items() if own == s][-1:]
        own = self.teacher.id_of(self.sb[s])
        if own is not None:
            return [own]
        try:
            return self.teacher.encode(self.sb[s].decode()).tolist()[:4]
        except UnicodeDecodeError:
            out, left = [], self.sb[s]
            while left:
                n = max(n for n in range(1, len(left) + 1) if self.teacher.id_of(left[:n]) is not None)
                out.append(self.teacher.id_of(left[:n]))
                left = left[n:]
            return out[:4]

    @functools.cached_property
    def W(self):
        W = np.zeros((self.Vt, self.Vs))
        for s in range(self.Vs):
            ids = self.pieces(s)
            total = sum(0.9 * 0.1**i for i in range(len(ids)))
            for i, t in enumerate(ids):
                W[t, s] += 0.9 * 0.1**i / total
        return W

    def positions(self, kind):
        """{(row, position): (index of the teacher's position)} of a rival that looks at single positions."""
        out = {}
        for row, at, teacher_at, s, t, _, roots in self.documents:
            for i, j in roots:
                if kind != "strict" or len(self.sb[s[i]]) == len(self.tb[t[j]]):
                    out[row, at + i - 1] = teacher_at + j - 1
        return out

    def divergences(self, kind, learned=None):
        """D at every position, [B, L]; a group's or chunk's dealt out to its positions."""
        out = np.zeros(self.c["batch"]["role"].shape)
        if kind == "gold":
            for row, at, teacher_at, s, t, groups, _ in self.documents:
                for ours, theirs in groups:
                    out[row, [at + i - 1 for i in ours]] = self.gold(row, at, teacher_at, s, t, ours, theirs) / len(
                        ours
                    )
        elif kind == "alm":
            for document in self.documents:
                self.alm(out, *document)
        else:
            for (row, p), j in self.positions(kind).items():
                out[row, p] = getattr(self, kind)(row, p, j, learned)
        return out

    def strict(self, row, p, j, _):
        q, s, pairs = self.q(row, j), self.s(row, p), self.matched
        top = [t for t in np.argsort(-q)[:16] if t in pairs]
        total = sum(q[t] * np.log(q[t] / s[pairs[t]]) for t in top)
        q_rest, s_rest = 1 - sum(q[t] for t in top), 1 - sum(s[pairs[t]] for t in top)
        return total + q_rest * np.log(q_rest / s_rest)

    def uld(self, row, p, j, _):
        return self.l1(self.q(row, j), self.s(row, p))

    @staticmethod
    def l1(a, b):
        n = max(len(a), len(b))
        a, b = (np.sort(np.pad(x, (0, n - len(x))))[::-1] for x in (a, b))
        return np.abs(a - b).sum()

    def gold(self, row, at, teacher_at, s, t, ours, theirs):
        S, Q = self.s(row, at + ours[0] - 1), self.q(row, teacher_at + theirs[0] - 1)
        for i in ours[1:]:
            S = S * self.s(row, at + i - 1)[s[i]]
        for j in theirs[1:]:
            Q = Q * self.q(row, teacher_at + j - 1)[t[j]]
        v, u = map(list, (self.matched, self.matched.values()))
        m = (Q[v] + S[u]) / 2
        total = (Q[v] * np.log(Q[v] / m) + S[u] * np.log(S[u] / m)).sum() / 2
        share = len(v) / self.mapped.sum()
        return share * total + (1 - share) * self.l1(np.delete(Q, v), np.delete(S, u))

    def xtoken_p(self, row, p, j, _):
        q, carried = self.q(row, j), np.maximum(self.W @ self.s(row, p), 1e-10)
        return (q[q > 0] * np.log(q[q > 0] / carried[q > 0])).sum()

    @functools.cached_property
    def pairs(self):
        out = {}
        for t in range(self.Vt):
            best = [s for s in range(self.Vs) if self.W[t, s] >= 0.6 and self.pieces(s)[0] == t]
            if best:
                out[t] = min(best, key=lambda s: (-self.W[t, s], len(self.sb[s]), s))
        return out

    def xtoken_h(self, row, p, j, _):
        q, s = self.q(row, j), self.s(row, p)
        v, u = map(list, (self.pairs, self.pairs.values()))
        return (q[v] * np.log(q[v] / s[u])).sum() + self.l1(np.delete(q, v), np.delete(s, u))

    @functools.cached_property
    def prefixes(self):
        """{teacher id: student id}."""
        out = {}
        for v, piece in enumerate(self.tb):
            u = self.role.get(v)
            for n in range(len(piece), 0, -1):
                u = self.student.id_of(piece[:n])
                if u is not None:
                    break
            if u is not None and (piece.strip() or self.sb[u] == piece):
                out[v] = u
        return out

    def bpm(self, row, p, j, _):
        q, s = self.q(row, j, known=np.ones(self.Vt, bool)), self.s(row, p)
        mass = np.zeros(self.Vs)
        for v, u in self.prefixes.items():
            mass[u] += q[v]
        reached = np.isin(np.arange(self.Vs), list(self.prefixes.values()))
        total = sum(mass[u] * np.log(mass[u] / s[u]) for u in range(self.Vs) if mass[u] > 0)
        return total + (1 - mass.sum()) * np.log((1 - mass.sum()) / s[~reached].sum())

    def mlp_distribution(self, row, j, w, tau):
        z = self.c["Ut"] @ self.c["teacher_hidden"][row, j]
        x = np.zeros(len(z))
        x[: self.Vt] = np.where(self.mapped, z[: self.Vt] - z[: self.Vt][self.mapped].mean(), 0)
        return softmax((w["W2"] @ np.maximum(w["W1"] @ x + w["b1"], 0) + w["b2"]) / tau)

    def low_rank_distribution(self, row, j, w, tau):
        B, C = (np.stack([softmax(column) for column in w[name].T], 1) for name in ("B", "C"))
        return B @ (C[:, : self.Vt] @ self.q(row, j, tau))

    def mlp(self, row, p, j, w):
        m, s = self.mlp_distribution(row, j, w, self.tau), self.s(row, p)
        return (m * np.log(m / s)).sum()

    def low_rank(self, row, p, j, w):
        m, s = self.low_rank_distribution(row, j, w, self.tau), self.s(row, p)
        return (m * np.log(m / s)).sum()

    def alm(self, out, row, at, teacher_at, s, t, groups, _):
        """Chunks of one document, by the definition in alm.py."""
        space = b" \t\n\r\x0b\x0c"  # b"" of a control token is in it too
        student_begins = np.array([piece[:1] in space for piece in self.sb])
        teacher_begins = np.array([piece[:1] in space for piece in self.tb]) & self.mapped
        chunk = [[], []]
        for n, (ours, theirs) in enumerate(groups):
            chunk = [chunk[0] + ours, chunk[1] + theirs]
            after = self.q(row, teacher_at + theirs[-1], 1.0)[teacher_begins].sum()
            following = n + 1 < len(groups) and groups[n + 1][0][0] == ours[-1] + 1
            if after < 0.1 and following:
                continue
            log_q = sum(np.log(self.q(row, teacher_at + j - 1, 1.0)[t[j]]) for j in chunk[1]) + np.log(after)
            log_s = sum(np.log(self.s(row, at + i - 1, 1.0)[s[i]]) for i in chunk[0])
            log_s += np.log(self.s(row, at + chunk[0][-1], 1.0)[student_begins].sum())
            q, p = np.exp(log_q / 100 - 1e-6), np.exp(log_s / 100 - 1e-6)
            D = 100 * (q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)))
            out[row, [at + i - 1 for i in chunk[0]]] = D / len(chunk[0])
            chunk = [[], []]


# ---- values and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RIVALS)
def test_values_and_gradients_are_those_of_the_reference(kind, case, tables):
    parameters_ = parameters(kind, tables)
    value = value_of(kind, case, tables)
    (_, (told, taught, _)), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(sides(case), parameters_)
    as_float64 = parameters_ and {n: np.asarray(x, np.float64) for n, x in parameters_.items()}
    reference = Reference(case, tables)
    expected = reference.divergences(kind, as_float64)
    assert (expected != 0).sum() > 20
    np.testing.assert_array_equal(taught, expected != 0)
    np.testing.assert_allclose(told.divergence_BxL, expected, rtol=1e-5, atol=1e-6)

    # Along random directions of the states and of the head; nothing flows into the teacher.
    assert not np.any(gradient.teacher_hidden_BxLtxDt) and not np.any(gradient.teacher_unembedding_VtxDt)
    r, w, e = np.random.default_rng(3), weights(case), 1e-7  # small: sorted masses have kinks everywhere
    slopes = {"hidden": gradient.hidden_BxLsxD, "U": gradient.unembedding_VsxD}
    assert not np.any(slopes["U"][-EXTRA:])
    for name, slope in slopes.items():
        slope = np.asarray(slope, np.float64)
        direction = r.normal(size=slope.shape)
        direction += np.sign((direction * slope).sum()) * slope * np.sqrt(slope.size) / np.linalg.norm(slope)
        ends = []
        for sign in (1, -1):
            there = reference.moved(**{name: case[name] + sign * e * direction})
            ends.append((w * there.divergences(kind, as_float64)).sum())
        assert (slope * direction).sum() == pytest.approx((ends[0] - ends[1]) / (2 * e), rel=1e-5)


def test_blocks_and_a_mesh_change_nothing(case, tables, kind="gold"):
    """Seven positions at a time leave a short block; a mesh takes each row to a device of its own."""
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    results = [
        jax.jit(jax.value_and_grad(value_of(kind, case, tables, **options), has_aux=True))(sides(case), None)
        for options in ({}, {"block": 1000, "mesh": mesh})
    ]
    for a, b in zip(*(jax.tree.leaves(r) for r in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_model_that_is_its_own_teacher_differs_from_itself_in_nothing(tables):
    """With one tokenizer whose tokens all count on both sides, whatever the objective."""
    table = tables["student"]
    assert vocabularies.mapped(table, table).all()
    examples = [make_example(*d, table, table, document=n) for n, d in enumerate(DOCUMENTS)]
    batch = {name: jnp.asarray(x) for name, x in pack(examples, 72, 72).rows.items()}
    r = np.random.default_rng(1)
    hidden = jnp.float32(r.normal(size=(*batch["role"].shape, D)))
    head = jnp.float32(r.normal(size=(table.vocab_size, D)))

    def all_of(hidden, head):
        same = Sides(hidden, head, hidden, head)
        kinds = [kind for kind in RIVALS if RIVALS[kind].start is None]
        return {
            kind: divergence(
                RIVALS[kind], RIVALS[kind].tables(table, table), None, same, batch, jnp.float32(TAU),
                text_vocab=table.vocab_size, block=64,
            ).divergence_BxL
            for kind in kinds
        }  # fmt: skip

    for kind, D_BxL in jax.jit(all_of)(hidden, head).items():
        np.testing.assert_allclose(D_BxL, 0, atol=2e-5, err_msg=kind)


# ---- small cases by hand ----------------------------------------------------------------------------------------


def test_sorted_masses():
    a, b = jnp.float32([[0.1], [0.6], [0.3]]), jnp.float32([[0.2], [0.4], [0.1], [0.3]])
    expected = abs(0.6 - 0.4) + abs(0.3 - 0.3) + abs(0.1 - 0.2) + 0.1
    assert float(uld.sorted_l1(a, b)[0]) == pytest.approx(expected)
    assert float(uld.sorted_l1(b, a)[0]) == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [(7, 5), (5, 7), (6, 6), (3, 0)])
def test_the_derivative_of_sorted_masses_is_that_of_sorting(sizes):
    U, V = sizes
    r = np.random.default_rng(U)
    a, b, ct = (jnp.asarray(r.dirichlet(np.ones(max(n, 1)), 4).T[:n], jnp.float32) for n in (U, V, 4))

    def by_sorting(a, b):
        more = max(U, V)
        a, b = (jnp.pad(jnp.sort(x, axis=0, descending=True), ((0, more - len(x)), (0, 0))) for x in (a, b))
        return jnp.sum(jnp.abs(a - b), axis=0)

    (ours, ours_back), (theirs, theirs_back) = (jax.vjp(f, a, b) for f in (uld.sorted_l1, by_sorting))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for g, h in zip(ours_back(ct[0]), theirs_back(ct[0]), strict=True):
        np.testing.assert_array_equal(g, h)


def test_a_remainder_keeps_its_digits_where_it_is_small():
    p = jnp.float32([[1.0], [3e-9], [2e-9], [0.0]])
    left = strict.without(p, jnp.int32([[0, -1]]), jnp.array([[True, False]]))
    assert float(left[0]) == pytest.approx(5e-9, rel=1e-6)
    assert float(strict.rest_kl(left, jnp.float32([1e-9]))[0]) == pytest.approx(5e-9 * np.log(5), rel=1e-5)
    assert float(strict.rest_kl(jnp.zeros(1), jnp.zeros(1))[0]) == 0


def test_jsd_of_masses_that_do_not_sum_to_one():
    q, s = jnp.float32([[0.5], [0.0]]), jnp.float32([[0.25], [0.25]])
    expected = (0.5 * np.log(0.5 / 0.375) + 0.25 * np.log(0.25 / 0.375) + 0.25 * np.log(2)) / 2
    assert float(gold.jsd(q, s)[0]) == pytest.approx(expected)
    slope = jax.grad(lambda s: gold.jsd(q, s)[0])(jnp.zeros((2, 1)))
    assert np.isfinite(slope).all()


def test_the_divergence_of_a_chunk_goes_to_that_of_its_log_likelihoods():
    """T KL of the two Bernoullis -> a log(a / b) - a + b."""
    a, b = 2.0, 3.0
    value = float(alm.binary_kl(jnp.float32([[-a]]), jnp.float32([[-b]]))[0, 0])
    assert value == pytest.approx(a * np.log(a / b) - a + b, rel=0.02)
    assert float(alm.binary_kl(jnp.float32([[-a]]), jnp.float32([[-a]]))[0, 0]) == 0


def test_a_chunk_goes_on_where_the_teacher_would_go_on_with_the_word():
    groups = positions.Groups(
        student_BxLs=jnp.int32([[0, 2, 2, 3, 4, 0, 6, 0]]),
        teacher_BxLt=jnp.int32([[2, 3, 3, 4, 0, 0, 6, 0]]),
        size_BxG=jnp.ones((1, 8), jnp.int32),
        valid_BxG=jnp.array([[False, False, True, True, True, False, True, False]]),
    )
    likely = jnp.log(jnp.float32([[0.05, 0.9, 0.5, 0.01, 0.9, 0.9, 0.01, 0.9]]))  # behind each token of the teacher
    # Group 2 goes on into 3, which ends; 4 ends because 5 is not compared, 6 likewise.
    np.testing.assert_array_equal(alm.chunks(groups, likely), [[0, 0, 1, 1, 2, 0, 3, 0]])


def test_a_numeral_is_its_digits_in_the_teachers_vocabulary(tables):
    teacher, student = tables["teacher"], tables["student"]
    numeral = student.id_of(b"140")
    assert teacher.id_of(b"140") is None
    digits = [teacher.id_of(digit) for digit in (b"1", b"4", b"0")]
    teacher_ids, student_ids, weights = xtoken.entries(teacher, student)
    here = student_ids == numeral
    assert teacher_ids[here].tolist() == digits
    np.testing.assert_allclose(weights[here], np.array([0.9, 0.09, 0.009]) / 0.999)
    np.testing.assert_allclose(np.bincount(student_ids, weights)[student.is_text], 1)


def test_matched_tokens_have_the_same_bytes_or_role_one_to_one(tables):
    teacher, student = tables["teacher"], tables["student"]
    teacher_ids, student_ids = vocabularies.matched(teacher, student)
    assert len(set(teacher_ids.tolist())) == len(set(student_ids.tolist())) == len(teacher_ids)
    for t, s in zip(teacher_ids.tolist(), student_ids.tolist(), strict=True):
        assert teacher.token_bytes(t) == student.token_bytes(s)
    assert teacher.roles["eos"] in teacher_ids and student.roles["eos"] in student_ids
    bytes_of = lambda table: {table.token_bytes(i) for i in np.flatnonzero(table.is_text).tolist()}  # noqa: E731
    assert (teacher.lengths[teacher_ids] > 0).sum() == len(bytes_of(teacher) & bytes_of(student))


@pytest.mark.parametrize("kind", ["mlp", "low_rank"])
def test_a_map_starts_at_the_unigram_and_learns_from_text_or_through_the_divergence(kind, case, tables):
    rival = RIVALS[kind]
    unigram = np.random.default_rng(2).dirichlet(np.ones(tables["student"].vocab_size))
    start = rival.start(jax.random.key(0), tables["teacher"].vocab_size + EXTRA, unigram, 4)
    t = jnp.float32(np.random.default_rng(3).normal(size=(tables["teacher"].vocab_size + EXTRA, 2)))
    of = {"mlp": learned.mlp, "low_rank": learned.low_rank}[kind]
    p = jnp.exp(of(start, t, jnp.float32(1)))
    np.testing.assert_allclose(p.sum(0), 1, rtol=1e-5)
    np.testing.assert_allclose(p, np.tile(unigram[:, None], 2), rtol=0.2)

    value, at = value_of(kind, case, tables, block=128), parameters(kind, tables)
    apart = jax.jacrev(lambda w: (lambda D, rest: {"divergence": D, "text": rest[2]})(*value(sides(case), w)))
    moved = {name: any(np.any(x) for x in jax.tree.leaves(slope)) for name, slope in jax.jit(apart)(at).items()}
    assert moved == {"divergence": False, "text": True}


def test_a_map_that_learns_from_text_finds_what_follows():
    """A teacher that knows the next token, in ids of its own: the map learns the student's id of each."""
    V, N = 6, 64
    ids = np.random.default_rng(0).integers(0, V, N)
    to = np.array([3, 0, 5, 1, 2, 4])
    t = 8 * jnp.float32(np.eye(V))[ids].T
    for start, of in ((learned.start_mlp, learned.mlp), (learned.start_low_rank, learned.low_rank)):
        w = start(jax.random.key(1), V, np.ones(V) / V, 24)

        def nats(w, of=of):
            return -jnp.mean(jnp.take_along_axis(of(w, t, jnp.float32(1)), jnp.asarray(to[ids])[None], axis=0))

        optimizer = optax.adam(0.1)

        def update(carry, _, nats=nats, optimizer=optimizer):
            w, state = carry
            change, state = optimizer.update(jax.grad(nats)(w), state)
            return (optax.apply_updates(w, change), state), None

        run = jax.jit(lambda w: jax.lax.scan(update, (w, optimizer.init(w)), None, 200)[0][0])  # noqa: B023
        assert float(nats(w)) == pytest.approx(np.log(V), rel=0.05) and float(nats(run(w))) < 0.1


# ---- in the loss ------------------------------------------------------------------------------------------------


STEPS = ("gold", "alm", "mlp")
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
SIZES |= {"num_key_value_heads": 1, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def models(tables):
    sizes = {side: table.vocab_size for side, table in tables.items()}
    student = hub.model_from_config(SIZES | {"model_type": "llama", "vocab_size": sizes["student"]})
    teacher = hub.model_from_config(
        SIZES | {"model_type": "gemma3_text", "vocab_size": sizes["teacher"], "sliding_window": 8}
    )
    return student, jax.jit(student.init)(jax.random.key(0)), teacher, jax.jit(teacher.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def cross_entropy(case, models):
    """Of the untrained student at every position, [B, L], float64."""
    batch = {name: jnp.asarray(x) for name, x in case["batch"].items()}
    names = ("student_tokens", "student_segment_ids", "student_positions")
    z = np.asarray(jax.jit(models[0].apply)(models[1], *(batch[name] for name in names)), np.float64)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, case["batch"]["student_targets"][..., None], -1)[..., 0]


def training(kind, case, tables, models):
    """(the loss, its parameters, frozen, batch) of the two models with a rival between them."""
    student, params, teacher, teacher_params = models
    rival = RIVALS[kind]
    alpha, tau = (schedule("constant", x, x, 4) for x in (0.25, 2.0))
    loss = Loss(Objective(student, teacher=teacher, alpha=alpha, temperature=tau, rival=rival, block=64))
    frozen = Frozen(jnp.ones(1), teacher_params, rival=rival.tables(tables["teacher"], tables["student"]))
    params = {"model": jax.tree.map(jnp.copy, params)}
    if rival.start:
        unigram = np.ones(tables["student"].vocab_size) / tables["student"].vocab_size
        params["projection"] = rival.start(jax.random.key(2), teacher.config.vocab_size, unigram, 4)
    return loss, params, frozen, {name: jnp.asarray(x) for name, x in case["batch"].items()}


def check_formula(value, report, rival, frozen, batch, cross_entropy):
    """Untaught positions keep their whole cross-entropy, the others a quarter; tau^2 = 4 where a temperature counts."""
    taught = np.asarray(jax.jit(rival.taught)(frozen.rival, batch))
    mask = np.asarray(batch["student_weights"]) > 0
    expected = (np.where(taught, 0.25, 1.0) * cross_entropy * mask).sum() / mask.sum()
    expected += 0.75 * (4 if rival.softened else 1) * float(report["kl"]) * taught.sum() / mask.sum()
    expected += float(report.get("map_nats", 0)) * taught.sum() / mask.sum()
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(report["taught"]) == pytest.approx(taught.sum() / mask.sum())


@pytest.mark.parametrize("kind", [kind for kind in RIVALS if kind not in STEPS])
def test_the_loss_is_its_formula(kind, case, tables, models, cross_entropy):
    loss, params, frozen, batch = training(kind, case, tables, models)
    value, metrics = jax.jit(loss)(params, frozen, batch, jnp.int32(0))
    check_formula(value, reduce(metrics), RIVALS[kind], frozen, batch, cross_entropy)


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_of_training_is_finite_and_moves_what_learns(kind, case, tables, models, cross_entropy):
    """One of each sort: groups, groups without a temperature, and a map that learns beside the model."""
    loss, params, frozen, batch = training(kind, case, tables, models)
    rate = schedule("constant", 1e-2, 1e-2, 4)
    optimizer = make_optimizer(rate, weight_decay=0.1, clip=1.0)
    before = jax.tree.map(np.array, params)  # copies: the state is donated
    begin = jax.jit(functools.partial(init_state, optimizer=optimizer))
    state, report = make_step(loss, optimizer, rate)(begin(params), frozen, batch)
    assert int(report["skipped"]) == 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(report))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, state["params"])
    assert moved["model"]["embedding"] and any(jax.tree.leaves(moved.get("projection", True)))
    check_formula(report["loss"], report, RIVALS[kind], frozen, batch, cross_entropy)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"kind": "goldd"}, "did you mean 'gold'"),
        ({"kind": "uld", "top_k": 8}, "objective.top_k is 8"),
        ({"kind": "bpm", "divergence": "jsd"}, "objective.divergence is 'jsd'"),
        ({"kind": "gold", "learn_projection": True}, "objective.learn_projection: gold has nothing that learns"),
        ({"map_size": 0}, "objective.map_size=0"),
    ],
)
def test_settings_that_a_rival_would_not_heed_are_refused(changed, said):
    o = ConfigDict(load_config_file(str(TINY)).objective.to_dict() | changed)
    with pytest.raises(UserError, match=said):
        recipe.rival_of(o)


def test_a_rival_needs_the_teacher_in_memory_and_whole_vocabularies():
    o = load_config_file(str(TINY)).objective
    assert recipe.rival_of(o) is None
    recipe.check_rival(o, "stored", sharding.make_mesh(2, 2, 2))  # the projected teacher can do both
    o.kind = "alm"
    assert recipe.rival_of(o) is RIVALS["alm"]
    recipe.check_rival(o, "online", sharding.make_mesh(8, 1, 1))
    with pytest.raises(UserError, match="teacher.scores=stored"):
        recipe.check_rival(o, "stored", sharding.make_mesh(8, 1, 1))
    with pytest.raises(UserError, match="fsdp and tensor"):
        recipe.check_rival(o, "online", sharding.make_mesh(2, 4, 1))

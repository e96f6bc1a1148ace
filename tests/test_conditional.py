"""Targets inside and across the teacher's tokens, against a reference that goes through bytes position by position."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax import recipe
from distil_jax.config import load_config_file
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError
from distil_jax.losses import conditional, head
from distil_jax.losses.kd import EMPTY, REST, place, rows_of
from distil_jax.losses.vocabulary import Shards
from distil_jax.projection import Projection
from distil_jax.sharding import make_mesh
from distil_jax.tokens.align import CROSSING, INTERIOR, NONE
from distil_jax.tokens.bytes import ByteTable, RoundTripError
from distil_jax.tokens.pack import make_example, pack
from distil_jax.tokens.prefixes import PrefixTables

TEXTS = [
    f"Hypertension {number} mg, nephropathy in {number * 7 % 1000} of {number + 1000} patients with cardiomyopathies; "
    f"macrocephaly {word} Δα 😀."
    for number in range(100, 400, 3)
    for word in ("seen", "hyper", "perhaps")
]
NUMBERS = [f"{number} mg in {number + 7} patients" for number in range(100, 400, 3)]  # the student knows few words
D, DT = 6, 5

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_gemma_style(TEXTS[::3], 360, folder / "teacher")
    train_llama_style(NUMBERS + TEXTS[:2], 355, folder / "student")
    tables = {side: ByteTable.from_tokenizer(folder / side) for side in ("teacher", "student")}
    W = Projection.build(**tables, corpus=TEXTS[:60], k=3)
    words = ("Nephromyopathy 127 macro 45 mg 2024", "hypercardio 9 a Δ 😀 perhaps", "1234567 patient", "cephaly")
    examples = [
        make_example("", text, tables["student"], tables["teacher"], document=n)
        for n, text in enumerate((*words, *TEXTS[7:9], *TEXTS[200:202]))
    ]
    batch = pack(examples, 80, 80).rows
    batch = {name: jnp.asarray(np.concatenate([x, x])[:4]) for name, x in batch.items()}
    r = np.random.default_rng(0)
    B, Ls = batch["role"].shape
    Vt, Vs = tables["teacher"].vocab_size, tables["student"].vocab_size
    return {
        "tables": tables,
        "W": W,
        "prefixes": PrefixTables.build(**tables),
        "batch": batch,
        "teacher_hidden": np.float32(r.normal(size=(B, batch["teacher_tokens"].shape[1], DT))),
        "Et": np.float32(r.normal(size=(Vt, DT))),
        "hidden": np.float32(r.normal(size=(B, Ls, D))),
        "E": np.float32(r.normal(size=(Vs, D))),
        "weights": np.float32(r.uniform(0.5, 1, size=(B, Ls)) * (np.asarray(batch["student_weights"]) > 0)),
    }


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def first_piece(student, piece):
    try:
        return int(student.encode(piece.decode())[0])
    except (UnicodeDecodeError, RoundTripError):
        return next(i for n in range(len(piece), 0, -1) if (i := student.id_of(piece[:n])) is not None)


def reference(c, tau):
    """{(row, position): p [Vs]} in float64, everything looked up in bytes."""
    teacher, student, W = c["tables"]["teacher"], c["tables"]["student"], c["W"]
    b = {name: np.asarray(x) for name, x in c["batch"].items()}
    logits = c["teacher_hidden"].astype(np.float64) @ c["Et"].T.astype(np.float64) / tau
    everything = np.stack([[softmax(x) for x in row] for row in logits])
    named = np.stack([[softmax(np.where(W.mapped, x, -np.inf)) for x in row] for row in logits])
    spelled = [teacher.token_bytes(v) for v in range(teacher.vocab_size)]
    weights = W.weights().astype(np.float64)
    found = {}
    for r, n in zip(*np.nonzero((b["role"] == INTERIOR) | (b["role"] == CROSSING)), strict=True):
        if not b["student_weights"][r, n]:
            continue
        i, o, t = b["teacher_position"][r, n], b["offset"][r, n], b["student_targets"][r, n]
        across = b["role"][r, n] == CROSSING
        v_i, text = b["teacher_targets"][r, i], student.token_bytes(t)
        written = spelled[v_i][:o]
        q = np.where([s.startswith(written) or o == 0 for s in spelled], named[r, i], 0)
        q /= q.sum()
        p = np.zeros(student.vocab_size)
        for v in np.argsort(-q, kind="stable")[: conditional.LIKELIEST]:
            if q[v] == 0 or (v == v_i and across):
                continue
            if v == v_i:
                p[t] += q[v]
            elif o == 0:
                for u, w in zip(W.ids[v], weights[v], strict=True):
                    if u not in (EMPTY, REST):
                        p[u] += q[v] * w
            elif len(spelled[v]) > o:
                p[first_piece(student, spelled[v][o:])] += q[v]
        if across:
            j, left = i, text[len(spelled[v_i]) - o :]
            mass = q[v_i]
            while True:
                j += 1
                last = spelled[b["teacher_targets"][r, j]]
                if len(left) <= len(last):
                    break
                mass *= everything[r, j, b["teacher_targets"][r, j]]
                left = left[len(last) :]
            before = text[: len(text) - len(left)]
            p[t] += q[v_i]
            for v in np.argsort(-named[r, j], kind="stable")[: conditional.LIKELIEST]:
                u = student.id_of(before + spelled[v]) if spelled[v] and v == teacher.id_of(spelled[v]) else None
                if u is not None and u != t:
                    p[u] += mass * named[r, j, v]
                    p[t] -= mass * named[r, j, v]
        found[r, n] = p
    return found


def run(c, tau, mesh=None, kind="forward", block=16):
    batch, E = c["batch"], jnp.asarray(c["E"])
    table = place(c["W"].table(), Shards.of(mesh))
    tables = conditional.Tables(jax.tree.map(jnp.asarray, c["prefixes"]), c["W"].rows())
    taught = (batch["role"] == INTERIOR) | (batch["role"] == CROSSING) if "only" in c else batch["role"] != NONE
    weights = jnp.asarray(c["weights"]) * taught
    Et = jnp.asarray(c["Et"])

    def likelihood(hidden, tokens, mask):
        return head.score(hidden, Et, tokens, mask, block=block, mesh=mesh)[0]

    def loss(hidden, E):
        states = jnp.asarray(c["teacher_hidden"])
        reading = conditional.read(batch, tables.prefixes, states, jnp.float32(tau), likelihood)
        at = batch["teacher_position"][..., None]
        following = jnp.take_along_axis(batch["teacher_targets"], batch["teacher_position"], axis=1)
        here = jnp.take_along_axis(states, at, axis=1)
        teacher = head.Teacher(here, rows_of(Et, table), table, following, reading, tables)
        return head.distill(
            hidden, E, batch["student_targets"], jnp.zeros_like(weights), teacher=teacher, kl_weights_BxL=weights,
            temperature=tau, divergence=kind, block=block, mesh=mesh,
        )  # fmt: skip

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(jnp.asarray(c["hidden"]), E)


def expected(c, tau, targets):
    """The divergence at the conditional positions, over what is named and the rest, the whole loss there, and what that
    sends back, in float64. The share of the mass that is not named stays with cross-entropy."""
    z = c["hidden"].astype(np.float64) @ c["E"].T.astype(np.float64)
    kl, loss, d_hidden = np.zeros(z.shape[:2]), 0.0, np.zeros(c["hidden"].shape)
    labels = np.asarray(c["batch"]["student_targets"])
    for (r, n), p in targets.items():
        s, on = softmax(z[r, n] / tau), p > 0
        rest, s_rest = 1 - p.sum(), s[~on].sum()
        kl[r, n] = (p[on] * np.log(p[on] / s[on])).sum() + (rest * np.log(rest / s_rest) if rest > 1e-12 else 0)
        d_z = tau * (s - np.where(on, p, s * rest / s_rest))
        s1, w = softmax(z[r, n]), c["weights"][r, n]
        d_ce = s1 - np.eye(len(s))[labels[r, n]]
        loss += w * ((1 - rest) * tau**2 * kl[r, n] - rest * np.log(s1[labels[r, n]]))
        d_hidden[r, n] = w * ((1 - rest) * d_z + rest * d_ce) @ c["E"].astype(np.float64)
    return kl, loss, d_hidden


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_targets_and_gradients_equal_the_reference_in_bytes(case, tau):
    targets = reference(case, tau)
    roles = np.asarray(case["batch"]["role"])
    assert sum(roles[key] == INTERIOR for key in targets) > 5 and sum(roles[key] == CROSSING for key in targets) > 20
    assert all(0 < p.sum() < 1 + 1e-9 for p in targets.values())
    (_, out), (d_hidden, _) = run(case, tau)
    (loss, _), _ = run(case | {"only": True}, tau)
    kl, expected_loss, expected_d = expected(case, tau, targets)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    kl1 = expected(case, 1.0, reference(case, 1.0))[0]
    at = tuple(np.array(list(targets)).T)
    np.testing.assert_allclose(out.kl_BxL[at], kl[at], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.kl1_BxL[at], kl1[at], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_hidden[at], expected_d[at], rtol=1e-4, atol=1e-5 * np.abs(expected_d).max())


def test_numbers_are_taught(case):
    """A number of three digits is three of the teacher's tokens: those that share two digits are named."""
    student, targets = case["tables"]["student"], reference(case, 1.0)
    text = {key: student.token_bytes(int(np.asarray(case["batch"]["student_targets"])[key])) for key in targets}
    numbers = [key for key, piece in text.items() if len(piece) == 3 and piece.isdigit()]
    assert numbers
    for key in numbers:
        named = {student.token_bytes(int(u)) for u in np.flatnonzero(targets[key])}
        alike = [text[key][:2] + bytes([d]) for d in b"0123456789"]
        assert {piece for piece in alike if student.id_of(piece) is not None} <= named


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_a_mesh_gives_the_numbers_of_one_device(case, kind):
    one = run(case, 2.0, kind=kind)
    with jax.set_mesh(mesh := make_mesh(2, 2, 2)):
        many = run(case, 2.0, mesh=mesh, kind=kind, block=8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6, atol=2e-6), one, many)


def test_another_word_for_the_positions_is_refused():
    config = load_config_file(str(Path(__file__).resolve().parent.parent / "configs" / "tiny.py"))
    config.objective.positions = "rots"
    with pytest.raises(UserError, match="objective.positions is 'rots'.*roots"):
        recipe.teaching(config.objective, 10)


def test_prefix_tables_say_what_the_bytes_say(case):
    teacher, student, t = case["tables"]["teacher"], case["tables"]["student"], case["prefixes"]
    spelled = [teacher.token_bytes(v) for v in range(teacher.vocab_size)]
    order = np.argsort(t.rank)
    for v in range(0, teacher.vocab_size, 3):
        for o in range(len(spelled[v])):
            at = t.start[v] + o
            begins = {u for u in range(teacher.vocab_size) if spelled[u].startswith(spelled[v][:o])}
            assert set(order[t.low[at] : t.high[at]].tolist()) == begins
            assert t.piece[at] == (first_piece(student, spelled[v][o:]) if o else -1)
    for u in np.flatnonzero(student.is_text)[::3]:
        whole = student.token_bytes(u)
        for n in range(1, len(whole)):
            at = t.student_start[u] + n
            found = {
                (int(v), int(x))
                for v, x in zip(
                    t.split_teacher[t.split_low[at] : t.split_high[at]],
                    t.split_student[t.split_low[at] : t.split_high[at]],
                    strict=True,
                )
            }
            same = [x for x in np.flatnonzero(student.is_text) if student.token_bytes(x).startswith(whole[:n])]
            pairs = [
                (teacher.id_of(student.token_bytes(x)[n:]), int(x)) for x in same if len(student.token_bytes(x)) > n
            ]
            assert found == {pair for pair in pairs if pair[0] is not None}

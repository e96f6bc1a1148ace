"""The projection W: its support, its rows, its fit, and measures whose value is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError
from distil_jax.losses.kd import project
from distil_jax.projection import EMPTY, Projection
from distil_jax.tokens.align import ROOT, align
from distil_jax.tokens.bytes import ByteTable

SYLLABLES = ("hy", "per", "ten", "sion", "car", "dio", "myo", "pathy", "neph", "ro", "sis", "macro", "cephaly", "a")
TEXTS = [
    f"Question: What is {''.join(SYLLABLES[i * k % 14] for k in (1, 3, 5, 9))}?\nAnswer: A rare abnormality of the "
    f"{part} seen in {i * 37 % 211} patients, Δ α 😀."
    for i in range(300)
    for part in ("kidney", "retina", "cerebellum", "long bones", "heart valves")
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_gemma_style(TEXTS, 420, folder / "teacher")
    train_llama_style(TEXTS, 380, folder / "student")
    return {side: ByteTable.from_tokenizer(folder / side) for side in ("teacher", "student")}


@pytest.fixture(scope="module")
def W(tables):
    return Projection.build(teacher=tables["teacher"], student=tables["student"], corpus=TEXTS)


def test_every_text_token_and_shared_role_has_a_row_that_sums_to_one(W, tables):
    teacher, student = tables["teacher"], tables["student"]
    sums = W.weights().sum(1)
    np.testing.assert_allclose(sums[W.mapped], 1, atol=1e-6)
    assert (sums[~W.mapped] == 0).all()
    assert W.mapped[teacher.is_text].all()
    row = W.ids[teacher.roles["eos"]]
    assert row[0] == student.roles["eos"] and (row[1:] == EMPTY).all()
    unmatched = [r for r in teacher.roles if r not in student.roles]
    assert unmatched and not W.mapped[[teacher.roles[r] for r in unmatched]].any()


def test_support_is_the_identical_token_then_the_first_piece_then_what_the_corpus_shows(W, tables):
    teacher, student = tables["teacher"], tables["student"]
    first_only = Projection.build(teacher=teacher, student=student)
    for v in np.flatnonzero(teacher.is_text):
        piece = teacher.token_bytes(v)
        expected = student.id_of(piece)
        got = first_only.ids[v]
        assert (got[1:] == EMPTY).all()
        if expected is not None:
            assert got[0] == expected
        else:
            assert piece.startswith(student.token_bytes(got[0]))
        assert got[0] in W.ids[v]
    # Counted by hand: the rows of W hold log(count + prior of the first piece) of what follows shared boundaries.
    counts = {}
    for text in TEXTS:
        a = align(text, student=student, teacher=teacher)
        for s, i in zip(a.student_ids[a.role == ROOT], a.teacher_index[a.role == ROOT], strict=True):
            key = (int(a.teacher_ids[i]), int(s))
            counts[key] = counts.get(key, 0) + 1
    v = max(counts, key=lambda key: counts[key])[0]
    for s, logit in zip(W.ids[v], W.logits[v], strict=True):
        if s != EMPTY:
            n = counts.get((v, int(s)), 0) + (1 if s == first_only.ids[v, 0] else 0)
            assert np.exp(logit) == pytest.approx(n)


def test_projecting_keeps_all_mass(W, tables):
    Vt, Vs = tables["teacher"].vocab_size, tables["student"].vocab_size
    q = np.random.default_rng(0).dirichlet(np.ones(Vt) * 0.1, size=5).T * W.mapped[:, None]
    q = (q / q.sum(0)).astype(np.float32)
    p = np.asarray(project(jnp.asarray(q), W.table(), Vs))
    dense = np.zeros((Vt, Vs))
    for v in range(Vt):
        for s, w in zip(W.ids[v], W.weights()[v], strict=True):
            if s != EMPTY:
                dense[v, s] += w
    np.testing.assert_allclose(p, dense.T @ q, atol=1e-6)
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-6)


def test_save_and_load_and_a_projection_of_other_tokenizers_is_refused(W, tables, tmp_path):
    W.save(tmp_path)
    again = Projection.load(tmp_path, **tables)
    for name in ("ids", "logits", "start_logits"):
        np.testing.assert_array_equal(getattr(again, name), getattr(W, name))
    with pytest.raises(UserError, match="another teacher tokenizer"):
        Projection.load(tmp_path, teacher=tables["student"], student=tables["student"])
    with pytest.raises(UserError, match="no projection"):
        Projection.load(tmp_path / "nothing", **tables)


def test_fit_learns_the_true_map_and_raises_the_likelihood(tables):
    """One teacher token that truly becomes two student tokens, 3 to 1, and starts as if 1 to 1."""
    rng = np.random.default_rng(0)
    ids = np.full((tables["teacher"].vocab_size, 4), EMPTY, np.int32)
    ids[300, :2] = (10, 11)
    start = np.zeros(ids.shape, np.float32)
    W = Projection(ids, start, start, tables["student"].vocab_size, "t", "s")
    targets = np.where(rng.uniform(size=4000) < 0.75, 10, 11).astype(np.int32)
    top_ids = np.full((4000, 2), 300, np.int32)
    top_ids[:, 1] = 301
    probs = np.tile(np.float32([0.9, 0.1]), (4000, 1))
    fitted, facts = W.fit(top_ids, probs, targets, steps=300, learning_rate=0.05, keep=0.0)
    assert facts["nats_after"] < facts["nats_before"]
    assert fitted.weights()[300, 0] == pytest.approx(0.75, abs=0.03)
    kept, _ = W.fit(top_ids, probs, targets, steps=300, learning_rate=0.05, keep=100.0)
    assert kept.weights()[300, 0] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(fitted.start_logits, start)


def measured(W, E, hidden, t, s, documents, sizes, only, unigram):
    return W.measure(hidden, E, t, s, documents, sizes, only, unigram, block=7, samples=200)


def test_an_identical_vocabulary_preserves_everything_and_a_shuffled_one_less(tables):
    """The measures' anchors: W = identity gives exactly 1; the same W with its targets shuffled is clearly lower."""
    table = tables["student"]
    rng = np.random.default_rng(1)
    V, N, D = table.vocab_size, 60, 8
    W = Projection.build(teacher=table, student=table)
    E = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    hidden = rng.normal(size=(N, D)).astype(np.float32) * 2
    text = np.flatnonzero(table.is_text)
    t = rng.choice(text, N).astype(np.int32)
    args = (E, hidden, t, t, np.arange(N) // 6, table.lengths[t], np.ones(N, bool), np.full(V, 1 / V))
    same = measured(W, *args)
    assert same["ip_kl"] == pytest.approx(1, abs=1e-5)
    assert same["ip_bpb"] == pytest.approx(1, abs=1e-5)
    assert same["positions"] == N and same["documents"] == 10
    # Many teacher tokens onto few: what they said apart is lost.
    ids = np.where(W.ids == EMPTY, EMPTY, text[W.ids % 7])
    lossy = measured(Projection(ids, W.logits, W.logits, V, "t", "s"), *args)
    assert lossy["ip_kl"] < 0.9
    assert lossy["ip_kl_interval"][0] <= lossy["ip_kl"] <= lossy["ip_kl_interval"][1]


def test_measures_equal_a_float64_reference(W, tables):
    rng = np.random.default_rng(2)
    teacher, student = tables["teacher"], tables["student"]
    N, D, Vt, Vs = 40, 6, teacher.vocab_size, student.vocab_size
    E, hidden = rng.normal(size=(Vt, D)), rng.normal(size=(N, D))
    t = rng.choice(np.flatnonzero(W.mapped), N).astype(np.int32)
    s = np.array([W.ids[v, 0] for v in t], np.int32)
    only, sizes = rng.uniform(size=N) < 0.7, rng.integers(1, 6, N)
    unigram = rng.dirichlet(np.ones(Vs))
    got = measured(W, jnp.float32(E), np.float32(hidden), t, s, np.arange(N) // 4, sizes, only, unigram)

    logits = hidden @ E.T
    logits[:, ~W.mapped] = -np.inf
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    dense = np.zeros((Vt, Vs))
    for v in range(Vt):
        for j, w in zip(W.ids[v], W.weights()[v].astype(np.float64), strict=True):
            if j != EMPTY:
                dense[v, j] += w
    p, pi = q @ dense, q.mean(0)
    kl = lambda a, b: np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / np.where(a > 0, b, 1)), 0).sum()  # noqa: E731
    ip_kl = sum(kl(x, pi @ dense) for x in p) / sum(kl(x, pi) for x in q)
    nats = {
        "unigram": -np.log(unigram[s]),
        "projected": -np.log(p[np.arange(N), s]),
        "teacher": -np.log(q[np.arange(N), t]),
    }
    sums = {name: (only * n).sum() for name, n in nats.items()}
    assert got["ip_kl"] == pytest.approx(ip_kl, rel=1e-4)
    assert got["ip_bpb"] == pytest.approx(
        (sums["unigram"] - sums["projected"]) / (sums["unigram"] - sums["teacher"]), rel=1e-4
    )
    for name, n in sums.items():
        assert got["bits_per_byte"][name] == pytest.approx(n / np.log(2) / (only * sizes).sum(), rel=1e-4)

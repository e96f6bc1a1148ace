"""The projection W: its support, its rows, its fit, and measures whose value is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax import information
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError
from distil_jax.information import Positions
from distil_jax.losses.kd import EMPTY, REST, project
from distil_jax.projection import Projection
from distil_jax.tokens.align import NONE, align, token_classes
from distil_jax.tokens.bytes import ByteTable

SYLLABLES = ("hy", "per", "ten", "sion", "car", "dio", "myo", "pathy", "neph", "ro", "sis", "macro", "cephaly", "a")
TEXTS = [
    f"Question: What is {''.join(SYLLABLES[i * k % 14] for k in (1, 3, 5, 9))}?\nAnswer: A rare abnormality of the "
    f"{part} seen in {i * 37 % 23 + 95} patients, Δ α 😀."
    for i in range(300)
    for part in ("kidney", "retina", "cerebellum", "long bones", "heart valves")
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_gemma_style(TEXTS, 420, folder / "teacher")
    train_llama_style(TEXTS, 440, folder / "student")
    return {side: ByteTable.from_tokenizer(folder / side) for side in ("teacher", "student")}


@pytest.fixture(scope="module")
def W(tables):
    return Projection.build(teacher=tables["teacher"], student=tables["student"], corpus=TEXTS, k=3)


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
        shared = (a.role != NONE) & (a.offset == 0)
        for s, i in zip(a.student_ids[shared], a.teacher_index[shared], strict=True):
            key = (int(a.teacher_ids[i]), int(s))
            counts[key] = counts.get(key, 0) + 1
    most = max(counts, key=lambda key: counts[key])[0]
    leaves = np.flatnonzero(W.ids[:, -1] == REST)
    assert len(leaves)
    for v in (most, leaves[0]):
        of_row = {s: n for (row, s), n in counts.items() if row == v}
        of_row[int(first_only.ids[v, 0])] = of_row.get(int(first_only.ids[v, 0]), 0) + 1
        for s, logit in zip(W.ids[v], W.logits[v], strict=True):
            if s != EMPTY:
                left = sum(n for s, n in of_row.items() if s not in W.ids[v])
                assert np.exp(logit) == pytest.approx(left if s == REST else of_row[int(s)])


def test_projecting_keeps_all_mass(W, tables):
    Vt, Vs = tables["teacher"].vocab_size, tables["student"].vocab_size
    q = np.random.default_rng(0).dirichlet(np.ones(Vt) * 0.1, size=5).T * W.mapped[:, None]
    q = (q / q.sum(0)).astype(np.float32)
    table = W.table()
    p, rest = np.asarray(project(jnp.asarray(q), table, Vs)), np.asarray(table.rest @ q)
    dense = np.zeros((Vt, Vs))
    for v in range(Vt):
        for s, w in zip(W.ids[v], W.weights()[v], strict=True):
            if s >= 0:
                dense[v, s] += w
    np.testing.assert_allclose(p, dense.T @ q, atol=1e-6)
    np.testing.assert_allclose(p.sum(0) + rest, 1, atol=1e-6)
    assert (rest > 0).all()


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


def positions_of(hidden, t, s, documents, table, only=None, specialties=3):
    """Positions whose tokens are `t` and `s`; classes are those of the student's tokens."""
    only = np.ones(len(t), bool) if only is None else only
    return Positions(
        np.float32(hidden), t, s, documents, table.lengths[s], only, token_classes(table)[s], documents % specialties
    )


def test_an_identical_vocabulary_preserves_everything_and_controls_less(tables):
    """The anchors: W = identity gives 1 to 1e-9; rows given to other tokens, and tokens sorted, clearly less."""
    table = tables["student"]
    rng = np.random.default_rng(1)
    V, N, D = table.vocab_size, 60, 8
    W = Projection.build(teacher=table, student=table)
    E = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    hidden = rng.normal(size=(N, D)).astype(np.float32) * 2
    text = np.flatnonzero(table.is_text)
    t = text[(hidden @ np.asarray(E)[text].T).argmax(1)].astype(np.int32)  # what the teacher expects does follow
    positions = positions_of(hidden, t, t, np.arange(N) // 6, table)
    options = {"unigram_Vs": np.full(V, 1 / V), "tables": {"teacher": table, "student": table}, "block": 7}
    same = W.measure(positions, E, samples=200, **options)
    for key in ("ip_kl", "ip_kl_pieces", "ip_bpb"):
        assert same[key] == pytest.approx(1, abs=1e-9)
    assert same["positions"] == N and same["documents"] == 10
    unsorted = information.sorted_match(positions, E, W.table().mapped, block=7, samples=200)
    assert unsorted["ip_kl"] < 0.9
    wrong = W.shuffled().measure(positions, E, samples=200, **options)
    assert wrong["ip_bpb"] < 0.5
    # Many teacher tokens onto few: what they said apart is lost.
    ids = np.where(W.ids == EMPTY, EMPTY, text[W.ids % 7])
    lossy = Projection(ids, W.logits, W.logits, V, "t", "s").measure(positions, E, samples=200, **options)
    assert lossy["ip_kl"] < 0.9
    assert lossy["ip_kl_interval"][0] <= lossy["ip_kl"] <= lossy["ip_kl_interval"][1]


def test_measures_equal_a_float64_reference(W, tables):
    rng = np.random.default_rng(2)
    teacher, student = tables["teacher"], tables["student"]
    N, D, Vt, Vs, K = 40, 6, teacher.vocab_size, student.vocab_size, 5
    E, hidden = rng.normal(size=(Vt, D)), rng.normal(size=(N, D))
    t = rng.choice(np.flatnonzero(W.mapped), N).astype(np.int32)
    s = np.array([W.ids[v, 0] for v in t], np.int32)
    only = rng.uniform(size=N) < 0.7
    unigram = rng.dirichlet(np.ones(Vs))
    positions = positions_of(hidden, t, s, np.arange(N) // 4, student, only)
    options = {"unigram_Vs": unigram, "tables": tables, "tail": K, "block": 7}
    got = W.measure(positions, jnp.float32(E), samples=200, specialties=("a", "b", "c"), **options)

    logits = np.float32(hidden) @ E.T
    logits[:, ~W.mapped] = -np.inf
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    dense, cells = np.zeros((Vt, Vs + 1)), {}
    for v in range(Vt):
        for j, w in zip(W.ids[v], W.weights()[v].astype(np.float64), strict=True):
            if j == EMPTY:
                continue
            dense[v, Vs if j == REST else j] += w
            cell = "rest"
            if j != REST:
                whole, piece = teacher.token_bytes(v), student.token_bytes(j)
                cell = (j, whole[len(piece) :] if whole.startswith(piece) else "more")
            cells.setdefault(cell, np.zeros(Vt))[v] += w
    np.testing.assert_allclose(dense.sum(1), W.mapped, atol=1e-6)
    assert dense[:, Vs].any()  # some rows leave something
    p, pi, pieces = q @ dense, q.mean(0), np.stack(list(cells.values()), axis=1)
    kl = lambda a, b: np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / np.where(a > 0, b, 1)), 0).sum(-1)  # noqa: E731
    whole = kl(q, pi)
    nats = {
        "unigram": -np.log(unigram[s]),
        "projected": -np.log(p[np.arange(N), s] + p[:, Vs] * unigram[s]),
        "teacher": -np.log(q[np.arange(N), t]),
    }
    sums = {name: (only * n).sum() for name, n in nats.items()}
    assert got["ip_kl"] == pytest.approx(kl(p, pi @ dense).sum() / whole.sum(), rel=1e-4)
    assert got["ip_kl_pieces"] == pytest.approx(kl(q @ pieces, pi @ pieces).sum() / whole.sum(), rel=1e-4)
    assert got["ip_kl"] < got["ip_kl_pieces"] <= 1
    assert got["ip_bpb"] == pytest.approx(
        (sums["unigram"] - sums["projected"]) / (sums["unigram"] - sums["teacher"]), rel=1e-4
    )
    for name, n in sums.items():
        assert got["bits_per_byte"][name] == pytest.approx(n / np.log(2) / (only * positions.bytes_N).sum(), rel=1e-4)
    kept = q >= np.sort(q)[:, -K:][:, :1]
    coarse = lambda x: np.concatenate([np.where(kept, x, 0), np.where(kept, 0, x).sum(1)[:, None]], axis=1)  # noqa: E731
    tail = kl(coarse(q), coarse(np.broadcast_to(pi, q.shape)))
    assert got["lost"]["tail"] == pytest.approx(1 - tail.sum() / whole.sum(), rel=1e-3)
    ordered = -np.sort(-q, axis=1)
    by_rank = information.sorted_match(positions, jnp.float32(E), W.table().mapped, block=7, samples=50)
    assert by_rank["ip_kl"] == pytest.approx(kl(ordered, ordered.mean(0)).sum() / whole.sum(), rel=1e-3)
    # By class and specialty: the same sums over fewer positions.
    where = positions.specialty_N == 1
    expected = kl(p, pi @ dense)[where].sum() / whole[where].sum()
    assert got["by_specialty"]["b"]["ip_kl"] == pytest.approx(expected, rel=1e-4)
    assert sum(part["positions"] for part in got["by_class"].values()) == N


def test_a_gain_is_paired_by_document():
    documents = np.repeat(np.arange(20), 3)
    positions = positions_with(documents)
    before = {"projected": 1.0 + np.random.default_rng(0).uniform(size=60)}
    found = information.gain(before, {"projected": before["projected"] - 0.25}, positions, samples=50)
    assert found["nats"] == pytest.approx(0.25) and found["interval"] == pytest.approx([0.25, 0.25])


def positions_with(documents):
    nothing = np.zeros(len(documents), np.int32)
    return Positions(np.zeros((len(documents), 1)), *[nothing] * 2, documents, *[nothing] * 4)

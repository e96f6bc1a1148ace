"""Promise: attention is compared over the same bytes, in pieces, and with the numbers of whole maps in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pack import BARE, NO_BOS, STUDENT, TEACHER

from distil_jax import sharding
from distil_jax.errors import UserError
from distil_jax.losses import attention
from distil_jax.losses.attention import Pair, byte_groups, choose, distances, group_count, layer_pairs
from distil_jax.models import hub
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.pack import make_example, pack

pytestmark = pytest.mark.usefixtures("quickly_compiled")


AWKWARD = (
    ("Dose: 12.5 mg/kg, 3 times", " every 24 hours\r\n\tα-blocker \U0001f9ec  x"),
    ("次の問題 ", "答えは 1234567 é e\u0301 \u200b end"),
    ("p < 0.001", " and <bos> is no token"),
)
STUDENT_SIZES = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
STUDENT_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
TEACHER_SIZES = STUDENT_SIZES | {"model_type": "gemma3_text", "hidden_size": 24, "num_hidden_layers": 6}
TEACHER_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 5, "head_dim": 8}


def packed(texts, student, teacher, length=64, copies=1):
    examples = [make_example(a, b, student, teacher) for a, b in texts]
    result = pack(examples * copies, length, length)
    assert not result.over_long
    return result.rows


def bytes_of(table, tokens, group, number):
    return b"".join(table.token_bytes(int(t)) for t in tokens[group == number])


def assert_same_bytes(rows, student, teacher):
    """Every group holds the same bytes on both sides, groups count 1, 2, ..., and no finer cut exists."""
    a, b = (np.asarray(g) for g in jax.jit(byte_groups)(rows))
    assert (a.max(1) == b.max(1)).all()
    for r in range(len(a)):
        assert ((a[r] > 0) == (rows["student_segment_ids"][r] > 0)).all()
        assert ((b[r] > 0) == (rows["teacher_segment_ids"][r] > 0)).all()
        for number in range(1, a[r].max() + 1):
            texts = [
                bytes_of(table, rows[f"{side}_tokens"][r], group[r], number)
                for table, side, group in ((student, "student", a), (teacher, "teacher", b))
            ]
            assert texts[0] == texts[1]
            sizes = [
                np.cumsum([len(table.token_bytes(int(t))) for t in rows[f"{side}_tokens"][r][group[r] == number]])
                for table, side, group in ((student, "student", a), (teacher, "teacher", b))
            ]
            inner = set(sizes[0][:-1]) & set(sizes[1][:-1]) - {0, sizes[0][-1]}
            assert not inner, "a boundary of both tokenizations inside a group"
    return a, b


def test_groups_hold_the_same_bytes_with_the_real_tokenizers(tokenizers_dir):
    gemma, llama = (ByteTable.from_tokenizer(tokenizers_dir / name) for name in ("gemma3", "llama3"))
    for student, teacher in ((llama, gemma), (gemma, llama)):
        rows = packed(AWKWARD, student, teacher, length=128)
        a, _ = assert_same_bytes(rows, student, teacher)
        assert len(rows["student_tokens"]) < len(AWKWARD) and a.max() > 50  # packed, and finely cut


@pytest.mark.parametrize("student, teacher", [(STUDENT, TEACHER), (STUDENT, BARE), (NO_BOS, TEACHER), (BARE, NO_BOS)])
def test_groups_where_one_side_lacks_control_tokens(student, teacher):
    assert_same_bytes(packed([("abc", "c1234"), ("", "ab123"), ("xabcx", "1")], student, teacher), student, teacher)


def test_groups_spelled_out():
    rows = packed([("abc", "c1234")], STUDENT, TEACHER, length=10)
    a, b = byte_groups(rows)
    #                             bos ab c  c 123 4 eos
    assert a[0].tolist()[:7] == [1, 2, 2, 3, 4, 5, 6]
    #                             bos abc c 1  2  3  4 eos
    assert b[0].tolist()[:8] == [1, 2, 3, 4, 4, 4, 5, 6]
    assert float(group_count(a)) == 6


@pytest.fixture(scope="module")
def models():
    student = hub.model_from_config(STUDENT_SIZES | {"vocab_size": STUDENT.vocab_size})
    teacher = hub.model_from_config(TEACHER_SIZES | {"vocab_size": TEACHER.vocab_size})

    def sharp(params):  # maps that are far from uniform
        params["layers"]["attention"]["q"] *= 4
        return params

    return student, sharp(student.init(jax.random.key(0))), teacher, sharp(teacher.init(jax.random.key(1)))


@pytest.fixture(scope="module")
def rows():
    texts = [("abc", "c1234ab"), ("", "ab123 12312345"), ("xabcx", "1abcab"), ("abab", "1234")]
    found = packed(texts, STUDENT, TEACHER, length=40, copies=4)
    assert len(found["student_tokens"]) >= 4
    return {k: np.resize(v, (8, *v.shape[1:])) for k, v in found.items()}


PAIRS = (Pair(1, 2, None, 5), Pair(3, 5, None, None))


def seen_of(model, params, rows, side, chosen, **options):
    fields = {name: rows[f"{side}_{name}"] for name in ("segment_ids", "positions")}
    _, seen = model.hidden(params, rows[f"{side}_tokens"], observe=chosen, **fields, **options)
    return tuple(seen[layer] for layer in chosen)


def apart(models, params, rows, mixing=None, projections=None, mesh=None, remat="none"):
    student, _, teacher, teacher_params = models
    a = seen_of(student, params, rows, "student", tuple(p.student for p in PAIRS), remat=remat)
    b = seen_of(teacher, teacher_params, rows, "teacher", tuple(p.teacher for p in PAIRS))
    return distances(a, b, rows, PAIRS, mixing=mixing, projections=projections, mesh=mesh)


def reference(models, params, rows, mixing, projections):
    """Whole maps of the batch, then plain loops over groups in float64."""
    student, _, teacher, teacher_params = models
    groups = [np.asarray(g) for g in byte_groups(rows)]
    total = hidden = 0.0
    for n, pair in enumerate(PAIRS):
        maps, states = [], []
        for model, p, side, layer in (
            (student, params, "student", pair.student),
            (teacher, teacher_params, "teacher", pair.teacher),
        ):
            fields = {name: rows[f"{side}_{name}"] for name in ("segment_ids", "positions")}
            _, found = model.hidden(p, rows[f"{side}_tokens"], attention_layers=(layer,), **fields)
            maps.append(np.asarray(found[layer], np.float64))
            seen = seen_of(model, p, rows, side, (layer,))[0]
            states.append(np.asarray(seen.x_BxLxD, np.float64))
        for r in range(len(groups[0])):
            count = groups[0][r].max()
            pools = []
            for side, m, g, window in zip(
                ("student", "teacher"), maps, groups, (pair.student_window, pair.teacher_window), strict=True
            ):
                weights = np.full(m.shape[1], 1 / m.shape[1])
                if mixing:
                    e = np.exp(np.asarray(mixing[side][n], np.float64))
                    weights = e / e.sum()
                mean = np.tensordot(weights, m[r], 1)
                members = [np.flatnonzero(g[r] == i) for i in range(1, count + 1)]
                pool = np.array([[mean[np.ix_(i, j)].sum(1).mean() for j in members] for i in members])
                seen = [[window is None or i.max() - j.min() < window for j in members] for i in members]
                pools.append((pool, np.array(seen), members))
            kept = pools[0][1] & pools[1][1]
            rowsums = []
            for pool, _, _ in pools:
                cut = np.where(kept, pool, 0) if pair.teacher_window else pool
                rowsums.append(cut / np.maximum(cut.sum(1, keepdims=True), 0.05) if pair.teacher_window else cut)
            total += ((rowsums[0] - rowsums[1]) ** 2).sum() / len(PAIRS)
            if projections:
                ends = [np.array([i.max() for i in members]) for _, _, members in pools]
                x = states[0][r][ends[0]] @ np.asarray(projections[n], np.float64)
                y = states[1][r][ends[1]]
                rms = lambda v: v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
                hidden += ((rms(x) - rms(y)) ** 2).mean(-1).sum() / len(PAIRS)
    return total, hidden


def test_distances_are_those_of_whole_maps_in_float64(models, rows):
    r = np.random.default_rng(0)
    student, params, teacher, _ = models
    mixing = {"student": jnp.float32(r.normal(size=(2, 4))), "teacher": jnp.float32(r.normal(size=(2, 2)))}
    matrices = tuple(jnp.float32(r.normal(size=(16, 24))) for _ in PAIRS)
    for options in ({}, {"mixing": mixing, "projections": matrices}):
        found = jax.jit(functools.partial(apart, models))(params, rows, **options)
        expected = reference(models, params, rows, options.get("mixing"), options.get("projections"))
        assert expected[0] > 1
        assert float(found.attention) == pytest.approx(expected[0], rel=1e-5)
        assert float(found.hidden) == pytest.approx(expected[1], rel=1e-5)


def test_the_gradient_equals_finite_differences(models, rows):
    """Along itself, for every part that learns, with layers computed again in the backward pass."""
    mixing = {"student": jnp.zeros((2, 4)), "teacher": jnp.zeros((2, 2))}
    learned = {"params": models[1], "mixing": mixing, "matrices": tuple(jnp.ones((16, 24)) / 4 for _ in PAIRS)}

    @jax.jit
    def value(learned):
        d = apart(models, learned["params"], rows, learned["mixing"], learned["matrices"], remat="full")
        return d.attention + d.hidden

    gradient = jax.jit(jax.grad(value))(learned)
    for part in learned:
        size = float(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient[part])) ** 0.5)
        assert size > 1e-2
        e = 3e-4
        unit = jax.tree.map(lambda g, size=size: g / size, gradient[part])
        there = lambda e: jax.tree.map(lambda p, u: p + e * u, learned[part], unit)  # noqa: B023, E731
        moved = [value(learned | {part: there(step)}) for step in (e, -e)]
        assert float(moved[0] - moved[1]) / (2 * e) == pytest.approx(size, rel=2e-2)


@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_the_same_on_a_mesh_of_eight(models, rows, shape):
    student, params, *_ = models
    f = lambda params, rows, mesh: apart(models, params, rows, mesh=mesh).attention  # noqa: E731
    grad = jax.jit(jax.value_and_grad(f), static_argnums=2)
    one, one_gradient = grad(params, rows, None)
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(student, mesh))
        many, gradient = grad(placed, sharding.put_batch(rows, mesh), mesh)
    assert float(many) == pytest.approx(float(one), rel=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(one_gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), one_gradient, gradient)


def test_no_map_of_the_batch_exists():
    """The compiled gradient needs less room than one [B, H, L, L] of the student's."""
    student = hub.model_from_config(STUDENT_SIZES | {"vocab_size": 64})
    teacher = hub.model_from_config(TEACHER_SIZES | {"vocab_size": 64})
    B, L = 8, 512
    fields = {f"{side}_{name}": (B, L) for side in ("student", "teacher") for name in ("tokens", "segment_ids")}
    fields |= {
        name: (B, L) for name in ("role", "offset", "teacher_position", "student_positions", "teacher_positions")
    }
    rows = {k: jax.ShapeDtypeStruct(v, jnp.int32) for k, v in fields.items()}
    case = (student, None, teacher, None)

    def value(params, teacher_params, rows):
        models = case[:1] + (params,) + case[2:3] + (teacher_params,)
        return apart(models, params, rows, remat="full").attention

    def temporary(f):
        compiled = jax.jit(jax.grad(f)).lower(student.abstract_params(), teacher.abstract_params(), rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    without = temporary(
        lambda p, t, rows: jnp.sum(seen_of(student, p, rows, "student", (1, 3), remat="full")[1].x_BxLxD)
    )
    assert temporary(value) - without < B * 4 * L * L * 4


def test_the_distance_falls_when_it_alone_is_trained(models, rows):
    _, params, *_ = models
    value = jax.jit(jax.value_and_grad(lambda p: apart(models, p, rows).attention))
    first, _ = value(params)
    for _ in range(40):
        _, gradient = value(params)
        norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)) ** 0.5
        params = jax.tree.map(lambda p, g, norm=norm: p - 0.3 * g / norm, params, gradient)
    assert float(value(params)[0]) < 0.6 * float(first)


def test_layers_are_paired_by_depth_or_by_name(models):
    student, _, teacher, _ = models
    assert layer_pairs(16, 34, 2) == ((7, 16), (15, 33))
    assert layer_pairs(2, 4, 4) == ((0, 0), (0, 1), (1, 2), (1, 3))
    assert choose(student, teacher, count=1) == (Pair(3, 5, None, None),)
    named = choose(student, teacher, count=9, student_layers="0, 1", teacher_layers="2,5")
    assert named == (Pair(0, 2, None, 5), Pair(1, 5, None, None))
    with pytest.raises(UserError, match="student_layers='4'.*from 0 to 3"):
        choose(student, teacher, count=1, student_layers="4", teacher_layers="1")
    with pytest.raises(UserError, match="2 student and 1 teacher"):
        choose(student, teacher, count=1, student_layers="0,1", teacher_layers="1")
    with pytest.raises(UserError, match="pairs=0"):
        choose(student, teacher, count=0)


def test_what_the_alignment_learns_starts_level(models):
    student, _, teacher, _ = models
    learned = attention.init(jax.random.key(0), PAIRS, student, teacher, mixed=True, hidden=True)
    assert learned["mixing"]["student"].shape == (2, 4) and not learned["mixing"]["teacher"].any()
    assert [m.shape for m in learned["hidden"]] == [(16, 24)] * 2
    assert attention.init(jax.random.key(0), PAIRS, student, teacher, mixed=False, hidden=False) == {}

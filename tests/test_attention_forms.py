"""The forms of attention compute one thing: values and gradients against float64, whole models against each other."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_run import config_of

from distil_jax import compile as command
from distil_jax import hlo, sharding
from distil_jax.errors import UserError
from distil_jax.models import attention_blocks, model_from_config
from distil_jax.models.attention import IMPLEMENTATIONS, attention, check, chosen
from distil_jax.models.attention_blocks import block_of, tile_mask, tiles
from distil_jax.plan import plan

pytestmark = pytest.mark.usefixtures("quickly_compiled")

B, L, H, G, K = 2, 70, 4, 2, 8
SEGMENTS = np.asarray([[1] * 33 + [2] * 30 + [0] * 7, [5] * 70], np.int32)  # no multiple of any block; padding
FORMS = {name: functools.partial(attention, implementation=name) for name in ("explicit", "splash")}
FORMS["blocks"] = lambda q, k, v, segment_ids, window: attention_blocks.attend(q, k, v, segment_ids, window, 16)
FORMS["one block"] = functools.partial(attention, implementation="blocks")


@pytest.fixture(scope="module")
def arrays():
    """(q, k, v, what the gradient of the output is), float32; nothing flows into padding."""
    rng = np.random.default_rng(0)
    q, k, v, given = (rng.normal(size=(B, L, n, K)).astype(np.float32) for n in (H, G, G, H))
    return q, k, v, given * (SEGMENTS != 0)[:, :, None, None]


def seen(segments_L: np.ndarray, window: int | None) -> np.ndarray:
    """Entry by entry: query i sees key j."""
    square = range(len(segments_L))
    near = window or len(segments_L)
    return np.asarray([[i - near < j <= i and segments_L[i] == segments_L[j] for j in square] for i in square])


def reference(q, k, v, given, window):
    """Output and gradients of q, k and v in float64, from the whole square."""
    q, k, v, given = (x.astype(np.float64) for x in (q, k, v, given))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b in range(B):
        mask = seen(SEGMENTS[b], window)
        for h in range(H):
            g = h // (H // G)
            scores = np.where(mask, q[b, :, h] @ k[b, :, g].T, -np.inf)
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            out[b, :, h] = p @ v[b, :, g]
            dp = given[b, :, h] @ v[b, :, g].T
            ds = p * (dp - (p * dp).sum(axis=1, keepdims=True))
            dq[b, :, h] = ds @ k[b, :, g]
            dk[b, :, g] += ds.T @ q[b, :, h]
            dv[b, :, g] += p.T @ given[b, :, h]
    return out, dq, dk, dv


def value_and_gradients(form, window, segments=SEGMENTS):
    """`f(q, k, v, given)` -> (output, gradients of q, k, v), jitted."""

    def both(q, k, v, given):
        out, back = jax.vjp(lambda *a: form(*a, jnp.asarray(segments), window=window), q, k, v)
        return out, *back(given)

    return jax.jit(both)


# Splash is interpreted here, and its block is 128 at least: two windows say what four do.
CASES = [(name, window) for name in FORMS for window in ([None, 16] if name == "splash" else [None, 1, 16, 40])]


@pytest.mark.parametrize("name, window", CASES)
def test_values_and_gradients_are_those_of_float64(name, window, arrays):
    real = (SEGMENTS != 0)[:, :, None, None]
    found = value_and_gradients(FORMS[name], window)(*arrays)
    for what, ours, exact in zip(("values", "q", "k", "v"), found, reference(*arrays, window), strict=True):
        assert np.isfinite(ours).all(), what
        np.testing.assert_allclose(np.where(real, ours, 0), np.where(real, exact, 0), atol=2e-5, err_msg=what)
        assert np.abs(exact).max() > 0.5 or (what, window) in (("q", 1), ("k", 1))  # a query alone has no choice


def test_tiles_of_bfloat16_add_up_in_float32(arrays):
    q, k, v, given = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    exact = reference(*(np.asarray(x, np.float64) for x in (q, k, v, given)), 16)
    for ours, whole in zip(value_and_gradients(FORMS["blocks"], 16)(q, k, v, given), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.where((SEGMENTS != 0)[:, :, None, None], ours.astype(jnp.float32) - whole, 0)
        assert np.abs(error).max() < 0.02 * np.abs(whole).max()


@pytest.mark.parametrize("name", ["explicit", "blocks", "splash"])
def test_a_row_of_padding_alone_is_finite(name, arrays):
    q, k, v, given = arrays
    found = value_and_gradients(FORMS[name], 4, np.zeros_like(SEGMENTS))(q, 1e4 * k, v, given)
    assert all(np.isfinite(x).all() for x in found)


# ---- what a query sees ----------------------------------------------------------------------------------------------

PACKED = np.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]], np.int32)
SEEN = np.asarray([  # a window of 3; padding sees padding, so that no softmax is empty
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
])  # fmt: skip


def test_the_tiles_of_a_sliding_window_on_a_packed_row():
    b, square = 4, np.zeros((12, 12), int)
    for i, j in tiles(3, b, 3):
        parts = (jnp.asarray(PACKED[:, n * b : (n + 1) * b]) for n in (i, j))
        square[i * b : (i + 1) * b, j * b : (j + 1) * b] += np.asarray(tile_mask(*parts, (i - j) * b, 3)[0])
    np.testing.assert_array_equal(square, SEEN)


def test_the_window_of_splash_on_one_document():
    """Its masks know positions alone; segment ids are compared in the kernel."""
    from jax.experimental.pallas.ops.tpu.splash_attention import LocalMask

    inside = LocalMask((12, 12), (3 - 1, 0), 0)[:, :]
    np.testing.assert_array_equal(inside & (PACKED[0][:, None] == PACKED[0][None]), SEEN)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 9, 100])
def test_no_tile_is_visited_in_vain_and_none_is_left_out(window):
    n, b = 5, 4
    square = seen(np.ones(n * b), window)
    visible = {(i, j) for i in range(n) for j in range(n) if square[i * b : (i + 1) * b, j * b : (j + 1) * b].any()}
    visited = [tuple(pair) for pair in tiles(n, b, window).tolist()]
    assert set(visited) == visible and len(visited) == len(visible)
    # A query block's own keys come first, and its tiles stand together: the sums of one block are all that is carried.
    firsts = [place for place, (i, j) in enumerate(visited) if i == j]
    assert [visited[place][0] for place in firsts] == list(range(n)) and visited == sorted(visited, key=lambda t: t[0])


def test_blocks_are_even_and_their_tiles_stay_small():
    assert [block_of(1, length, 8) for length in (40, 600, 1024, 8192)] == [40, 304, 512, 512]
    for rows, heads in ((1, 32), (16, 32), (80, 8)):
        b = block_of(rows, 8192, heads)
        assert b == 64 or 4 * rows * heads * b * b <= attention_blocks.TILE_BYTES


def test_nothing_of_the_size_of_the_scores_is_in_memory():
    length, heads = 2048, 4
    shape = lambda n: jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32)  # noqa: E731
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def temporaries(form):
        loss = lambda q, k, v, ids: jnp.sum(attention(q, k, v, ids, None, form))  # noqa: E731
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape(heads), shape(2), shape(2), ids).compile()
        return program.memory_analysis().temp_size_in_bytes

    scores = 4 * heads * length**2
    assert temporaries("blocks") < scores / 3
    assert temporaries("explicit") > scores / 2  # the ruler measures


# ---- whole models ---------------------------------------------------------------------------------------------------

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 9}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@pytest.fixture(scope="module")
def gemma():
    """(model, parameters, tokens, what its explicit form says and learns) with sliding and full layers."""
    model = model_from_config(SIZES | GEMMA)
    tokens = np.random.default_rng(1).integers(0, 64, (B, L), dtype=np.int32)
    params = jax.jit(model.init)(jax.random.key(0))
    return model, params, tokens, loss_and_gradient(model, tokens, attention="explicit")(params)


def loss_and_gradient(model, tokens, **options):
    real = jnp.asarray(SEGMENTS != 0)[:, :, None]

    def loss(params):
        hidden, maps = model.hidden(params, tokens, segment_ids=jnp.asarray(SEGMENTS), attention_layers=(2,), **options)
        logits = jnp.where(real, hidden @ params["embedding"].T, 0)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1)), (logits, maps[2])

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


MODELS = [("none", "blocks", ""), ("full", "blocks", "fsdp:2,tensor:4"), ("full", "splash", "")]


@pytest.mark.parametrize("remat, form, mesh", MODELS)
def test_a_model_says_and_learns_the_same_in_every_form(remat, form, mesh, gemma, monkeypatch):
    """Logits, the map that is asked for, loss and gradient, through a scan over two kinds and a layer by itself."""
    monkeypatch.setattr(attention_blocks, "LARGEST", 16)  # several blocks in a short row
    model, params, tokens, ((value, (logits, attention_map)), gradient) = gemma
    mesh = sharding.mesh_of(mesh) if mesh else None
    if mesh:
        params = jax.device_put(params, sharding.param_shardings(model, mesh))
        tokens = sharding.put_batch({"tokens": tokens}, mesh)["tokens"]
    run = loss_and_gradient(model, tokens, attention=form, remat=remat, mesh=mesh)
    (again, (same, seen_map)), theirs = run(params)
    np.testing.assert_allclose(same, logits, atol=1e-4)
    np.testing.assert_allclose(seen_map, attention_map, atol=1e-5)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 + 1e-4 * np.abs(a).max()), gradient, theirs)


@pytest.mark.parametrize("form", ["blocks", "explicit"])
def test_a_step_that_compares_no_maps_holds_nothing_of_length_by_length(form):
    """Both models, both heads and the targets inside tokens, in rows of a length that nothing else has."""
    lengths = {"data.student_length": 1000, "data.teacher_length": 1000}
    config = config_of("nowhere", attention=form, **lengths, **{"student.training.batch_size": 2})
    text = plan(config, "distilled", sharding.mesh_of("data:1", jax.devices()[:1])).lower().as_text()
    squares = re.findall(r"tensor<(?:\d+x)*10\d\dx(?:\d+x)?10\d\dx\w+>", text)  # 1000, or filled up to whole blocks
    assert bool(squares) == (form == "explicit"), set(squares)


# ---- meshes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["data:2,fsdp:1,tensor:4", "fsdp:2,data:1,tensor:4", "data:4,fsdp:2"])
def test_on_a_mesh_each_device_attends_for_itself(mesh, arrays):
    """Rows and heads are cut where they divide; 4 parts of the query heads share 2 key heads; nothing is sent."""
    mesh = sharding.mesh_of(mesh)
    q, k, v, given = arrays
    form = lambda q, k, v, ids, window: attention(q, k, v, ids, window, "blocks", mesh)  # noqa: E731
    found = value_and_gradients(form, 16)(q, k, v, given)
    for ours, one in zip(found, value_and_gradients(FORMS["blocks"], 16)(q, k, v, given), strict=True):
        np.testing.assert_allclose(ours, one, atol=2e-5)
    rows = sharding.batch_sharding(mesh) if B % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    if rows is None:
        return
    described = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for x in (q, k, v)]
    one_way = jax.jit(lambda *a: form(*a, jnp.asarray(SEGMENTS), 16)).lower(*described).compile()
    assert not hlo.collectives(one_way.as_text())


# ---- which form -----------------------------------------------------------------------------------------------------


def test_the_form_follows_the_rows_and_the_devices_of_the_mesh():
    here = sharding.mesh_of("data:8")
    assert [chosen("auto", length, here) for length in (128, 512, 513, 8192)] == ["explicit"] * 2 + ["blocks"] * 2
    assert [chosen(name, 8192, here) for name in IMPLEMENTATIONS[1:]] == list(IMPLEMENTATIONS[1:])
    with pytest.raises(UserError, match="config.attention is 'spalsh'.*did you mean 'splash'"):
        check("spalsh", here)
    with pytest.raises(UserError, match="splash is a kernel for TPUs, and config.mesh has cpu devices"):
        check("splash", here)


def test_a_plan_for_tpus_takes_what_tpus_run():
    pytest.importorskip("libtpu", reason="no libtpu: pip install 'distil-jax[tpu-compile]'")
    from ml_collections import ConfigDict

    there = command.mesh_of(ConfigDict({"mesh": "fsdp:4"}), "v5e:2x2")
    assert [chosen("auto", length, there) for length in (64, 128, 8192)] == ["explicit", "splash", "splash"]
    check("splash", there)

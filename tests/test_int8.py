"""Weights in 8 bits: what they are, that every path takes them, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax.generation import engine, text
from distil_jax.losses import head, kd
from distil_jax.losses.kd import ProjectionTable
from distil_jax.losses.vocabulary import Shards
from distil_jax.models import model_from_config
from distil_jax.models.int8 import Int8, cast, quantize
from distil_jax.sharding import make_mesh, param_shardings

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "gemma3_text": SIZES | {"num_hidden_layers": 3, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "llama": SIZES | {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    model = model_from_config({"model_type": request.param} | CONFIGS[request.param])
    params = jax.jit(model.init)(jax.random.key(0))
    return model, params, quantize(model, params)


def dequantized(params):
    """The same numbers as plain float32 arrays."""

    def plain(leaf):
        if not isinstance(leaf, Int8):
            return leaf
        scale, inputs = leaf.scale, leaf.values.ndim - leaf.scale.ndim
        first = (
            0 if leaf.values.ndim == 2 else 1
        )  # an embedding is scaled by rows; a stacked kernel sums after the layers
        axes = (1,) if first == 0 else range(1, 1 + inputs)
        return leaf.values.astype(jnp.float32) * jnp.expand_dims(scale, tuple(axes))

    return jax.tree.map(plain, params, is_leaf=lambda leaf: isinstance(leaf, Int8))


def test_every_weight_is_within_half_a_step_and_no_norm_is_touched(case):
    _, params, small = case
    for (path, array), leaf, plain in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(small, is_leaf=lambda leaf: isinstance(leaf, Int8)),
        jax.tree.leaves(dequantized(small)),
        strict=True,
    ):
        if "norm" in str(path) or "bias" in str(path):
            assert leaf is array
        else:
            assert leaf.values.dtype == jnp.int8 and leaf.scale.dtype == jnp.float32
            assert int(jnp.max(jnp.abs(leaf.values))) == 127
            assert float(jnp.max(jnp.abs(plain - array))) <= float(jnp.max(leaf.scale)) / 2 * 1.0001


def test_the_model_computes_with_exactly_these_numbers(case):
    model, _, small = case
    tokens = np.random.default_rng(0).integers(0, 64, (2, 20), dtype=np.int32)
    got = jax.jit(model.apply)(small, tokens)
    np.testing.assert_allclose(got, jax.jit(model.apply)(dequantized(small), tokens), atol=1e-4)
    half = jax.jit(model.hidden)(cast(small, "bfloat16"), tokens)
    assert half.dtype == jnp.bfloat16 and cast(small, "bfloat16")["embedding"].scale.dtype == jnp.float32


def test_generation_and_heads_take_them_on_a_mesh_too(case):
    model, params, small = case
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = quantize(model, jax.device_put(params, param_shardings(model, mesh)))
    prompts = [np.arange(3, 9, dtype=np.int32), np.arange(5, 20, dtype=np.int32)]
    write = functools.partial(engine.steps, max_new_tokens=8, sampling=text.GREEDY)
    want = np.stack(list(write(model, dequantized(small), prompts)))
    np.testing.assert_array_equal(np.stack(list(write(model, small, prompts))), want)
    np.testing.assert_array_equal(np.stack(list(write(model, placed, prompts))), want)

    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 4, 32)), jnp.float32)
    E = jnp.asarray(rng.normal(size=(50, 32)), jnp.float32)
    labels, weights = jnp.asarray(rng.integers(0, 50, (8, 4))), jnp.ones((8, 4))
    table = ProjectionTable(jnp.arange(50), jnp.arange(50), jnp.ones(50), jnp.ones(50, bool), jnp.arange(50))

    def loss(hidden, E, params, mesh):
        placed_table = kd.place(table, Shards.of(mesh))
        teacher = head.Teacher(hidden[:, ::-1], kd.rows_of(model.unembedding(params), placed_table), placed_table)
        return head.distill(hidden, E, labels, weights, teacher=teacher, kl_weights_BxL=weights, mesh=mesh)[0]

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=3)
    want = grad(hidden, E, dequantized(small), None)
    for params, on in ((small, None), (placed, mesh)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grad(hidden, E, params, on), want
        )

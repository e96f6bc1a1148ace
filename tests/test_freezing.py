"""Frozen parameters have no gradient and no optimiser state; the others learn exactly what they would have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax import freezing, sharding
from distil_jax.errors import UserError
from distil_jax.losses.head import distill
from distil_jax.losses.schedules import learning_rate
from distil_jax.models import hub
from distil_jax.objective import Frozen, Loss, Objective
from distil_jax.step import init_state, make_optimizer, make_step

pytestmark = pytest.mark.usefixtures("quickly_compiled")

B, L, V = 8, 12, 53
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
SIZES |= {"num_key_value_heads": 1, "vocab_size": V, "tie_word_embeddings": True, "sliding_window": 4}
WEIGHT_DECAY, CLIP = 0.1, 0.05  # the clip binds


@pytest.fixture(scope="module")
def model():
    return hub.model_from_config(SIZES | {"model_type": "gemma3_text"})


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    r = np.random.default_rng(0)
    segments = np.repeat([[1] * 7 + [2] * 4 + [0]], B, 0)
    fields = {
        "tokens": r.integers(0, V, (B, L)) * (segments > 0),
        "segment_ids": segments,
        "positions": np.repeat([[*range(7), *range(4), 0]], B, 0),
        "targets": r.integers(0, V, (B, L)) * (segments > 0),
        "weights": (r.uniform(size=(B, L)) < 0.6) * (segments > 0),
    }
    return {f"teacher_{k}": np.asarray(v, np.int32) for k, v in fields.items()}


@pytest.fixture(scope="module")
def whole(model, params, batch):
    """Loss and gradient of the model when all of it learns."""
    return jax.jit(jax.value_and_grad(Loss(Objective(model, "teacher", block=16)), has_aux=True))(
        {"model": params}, Frozen(jnp.ones(1)), batch, jnp.int32(0)
    )


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("freeze", ["", "embedding", "embedding, final_norm", "layers.attention.q", "layers"])
def test_split_and_merge_are_inverse(params, freeze):
    freeze = freeze.replace("layers.attention.q", next(k for k in dotted(params) if k.startswith("layers.")))
    learning, frozen = freezing.split(params, freeze)
    assert leaves(freezing.merge(learning, frozen)).keys() == leaves(params).keys()
    assert set(dotted(learning)) | set(dotted(frozen)) == set(dotted(params))
    named = [part.strip() for part in freeze.split(",") if part.strip()]
    assert set(dotted(frozen)) == {k for k in dotted(params) if any(k == n or k.startswith(n + ".") for n in named)}


def dotted(tree):
    return [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_a_path_that_leads_nowhere_names_the_nearest_and_everything_is_refused(params):
    with pytest.raises(UserError, match=r"no parameter 'embeding' \(did you mean 'embedding'\?\)"):
        freezing.split(params, "embeding")
    with pytest.raises(UserError, match="no parameter 'emb'"):  # whole names, no beginnings of names
        freezing.split(params, "emb")
    with pytest.raises(UserError, match="leave something to learn"):
        freezing.split(params, ",".join(params))


@pytest.mark.parametrize("freeze", ["embedding", "layers,final_norm"])
def test_the_first_update_is_adamw_over_what_learns(model, params, batch, whole, freeze):
    """Written out in float64 from the gradients of the whole model: one norm, one clip, over what learns."""
    loss, everything = Loss(Objective(model, "teacher", block=16)), leaves(whole[1]["model"])
    learning, own = freezing.split(params, freeze)
    gradient = {k: everything[k].astype(np.float64) for k in leaves(learning)}
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert norm > CLIP and norm < np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in everything.values()))

    rate = learning_rate(1e-2, 1, 10, 0.1)
    optimizer = make_optimizer(rate, weight_decay=WEIGHT_DECAY, clip=CLIP)
    state = init_state({"model": jax.tree.map(jnp.copy, learning)}, optimizer)
    state, report = make_step(loss, optimizer, rate)(state, Frozen(jnp.ones(1), own=own), batch)
    assert float(report["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    before, after = leaves(learning), leaves(state["params"]["model"])
    for name, g in gradient.items():
        g = g * min(1, CLIP / norm)
        decayed = before[name].ndim >= 2 and "scale" not in name
        update = g / (np.abs(g) + 1e-8) + (WEIGHT_DECAY * before[name] if decayed else 0)
        sure = np.abs(g) > 1e-6  # a gradient near 0 has a sign that float32 does not know
        assert sure.mean() > 0.5
        np.testing.assert_allclose(
            after[name][sure], (before[name] - float(rate(0)) * update)[sure], rtol=1e-4, atol=1e-6
        )
    # No moments of a frozen parameter: two numbers for each that learns, and the counter.
    assert sum(x.size for x in jax.tree.leaves(state["opt_state"]) if x.ndim) == 2 * sum(
        g.size for g in gradient.values()
    )


def test_on_a_mesh_of_eight_what_learns_has_the_gradient_it_has_in_the_whole(model, params, batch, whole):
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(model, mesh))
        learning, own = freezing.split(placed, "embedding")
        loss = jax.jit(jax.value_and_grad(Loss(Objective(model, "teacher", block=16, mesh=mesh)), has_aux=True))
        frozen = Frozen(jnp.ones(1), own=own)
        (value, _), gradient = loss({"model": learning}, frozen, sharding.put_batch(batch, mesh), jnp.int32(0))
    assert float(value) == pytest.approx(float(whole[0][0]), rel=1e-6)
    expected = freezing.split(whole[1]["model"], "embedding")[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, gradient["model"])


def test_the_gradient_of_a_frozen_embedding_never_exists():
    """Compiled, the head with a frozen matrix has no temporary of that matrix' size; with a learned one it has."""
    tokens, vocab, d = 256, 8192, 512
    h, E = jnp.ones((1, tokens, d)), jnp.ones((vocab, d))
    labels, w = jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens))
    f = lambda h, E: distill(h, E, labels, w, block=16)[0]  # noqa: E731
    sizes = [jax.jit(jax.grad(f, argnums=wanted)).lower(h, E).compile().memory_analysis() for wanted in ((0,), (0, 1))]
    frozen, learned = (m.temp_size_in_bytes + m.output_size_in_bytes for m in sizes)
    assert frozen < vocab * d * 4 / 2 < vocab * d * 4 <= learned

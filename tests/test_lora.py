"""Adapters: the numbers of the merged weights, a base that stays as it is, an export that computes the same."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_run import corpus_only, definitions, finished, result_of  # noqa: F401

from distil_jax import learners, lora, sharding, train
from distil_jax.errors import UserError
from distil_jax.eval import checkpointed
from distil_jax.losses.schedules import learning_rate
from distil_jax.metrics import read_metrics
from distil_jax.models import hub
from distil_jax.models.int8 import Int8, quantize
from distil_jax.models.layers import linear
from distil_jax.models.lora import Lora, dense
from distil_jax.objective import Frozen, Loss, Objective
from distil_jax.step import init_state, make_optimizer, make_step
from distil_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TARGETS = "layers.attention,layers.mlp"
RANK, SCALE = 4, 2.0
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": True, "sliding_window": 4}
B, L = 8, 12


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def adapted(request):
    """(model, base, an adapter that has learned something)."""
    model = hub.model_from_config(SIZES | {"model_type": request.param})
    adapter = lora.init(model, jax.random.key(1), TARGETS, RANK)
    r = np.random.default_rng(2)
    return (
        model,
        model.init(jax.random.key(0)),
        jax.tree.map(lambda x: x + jnp.float32(0.1 * r.normal(size=x.shape)), adapter),
    )


@pytest.fixture(scope="module")
def batch():
    r = np.random.default_rng(0)
    segments = np.repeat([[1] * 7 + [2] * 4 + [0]], B, 0)
    fields = {
        "tokens": r.integers(0, 40, (B, L)) * (segments > 0),
        "segment_ids": segments,
        "positions": np.repeat([[*range(7), *range(4), 0]], B, 0),
        "targets": r.integers(0, 40, (B, L)) * (segments > 0),
        "weights": (r.uniform(size=(B, L)) < 0.6) * (segments > 0),
    }
    out = {f"student_{k}": np.asarray(v, np.int32) for k, v in fields.items()}
    return out | {"specialty": np.zeros((B, L), np.int32)}


def merged(base, adapter, scale=SCALE):
    """W + scale a b written out in float64, kernel by kernel."""
    out = jax.tree.map(lambda x: np.asarray(x, np.float64), base)
    for path, pair in adapter.items():
        *above, last = path.split(".")
        tree = functools.reduce(lambda t, k: t[k], above, out)
        a, b = (np.asarray(pair[n], np.float64) for n in ("a", "b"))
        tree[last] = tree[last] + scale * np.stack([np.tensordot(x, y, axes=1) for x, y in zip(a, b, strict=True)])
    return out


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_linear_with_an_adapter_in_float64(inputs):
    """Value and every gradient, against W + scale a b: dx = g W'^T, da = s x^T g b^T, db = s (x a)^T g."""
    r = np.random.default_rng(0)
    ins, outs = ((6,), (2, 5)) if inputs == 1 else ((2, 3), (7,))
    x, W = r.normal(size=(2, 3, *ins)), r.normal(size=(*ins, *outs))
    a, b, g = r.normal(size=(*ins, 4)), r.normal(size=(4, *outs)), r.normal(size=(2, 3, *outs))

    def value(x, a, b):
        return jnp.sum(g32 * linear(x, Lora(jnp.float32(W), a, b, SCALE), inputs=inputs, bias=jnp.float32(bias)))

    bias, g32 = r.normal(size=outs), jnp.float32(g)
    got, (dx, da, db) = jax.value_and_grad(value, argnums=(0, 1, 2))(*map(jnp.float32, (x, a, b)))
    X, G, A, M = x.reshape(6, -1), g.reshape(6, -1), a.reshape(-1, 4), b.reshape(4, -1)
    whole = W.reshape(len(A), -1) + SCALE * A @ M
    assert float(got) == pytest.approx((G * (X @ whole + bias.reshape(1, -1))).sum(), rel=1e-5)
    np.testing.assert_allclose(dx.reshape(6, -1), G @ whole.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(da.reshape(-1, 4), SCALE * X.T @ G @ M.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(db.reshape(4, -1), SCALE * (X @ A).T @ G, rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_are_those_of_the_merged_weights(adapted, batch):
    """The chain rule from the merged model: da = scale dW b^T, db = scale a^T dW, in float64 from its float32 dW."""
    model, base, adapter = adapted
    loss, batch = Loss(Objective(model, block=16, adapter_scale=SCALE)), jax.tree.map(jnp.asarray, batch)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, Frozen(jnp.ones(1), own=base), batch, 0)[0]))(
        {"adapter": adapter}
    )
    plain = jax.tree.map(jnp.float32, merged(base, adapter))
    expected, dW = jax.jit(jax.value_and_grad(lambda p: loss({"model": p}, Frozen(jnp.ones(1)), batch, 0)[0]))(plain)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert set(adapter) == {f"layers.attention.{k}" for k in "qkvo"} | {
        f"layers.mlp.{k}" for k in ("gate", "up", "down")
    }
    for path, pair in adapter.items():
        d = np.asarray(functools.reduce(lambda t, k: t[k], path.split("."), dW), np.float64)
        a, b = (np.asarray(pair[n], np.float64) for n in ("a", "b"))
        layers = len(d)
        d = d.reshape(layers, np.prod(a.shape[1:-1]), -1)
        a, b = a.reshape(layers, -1, RANK), b.reshape(layers, RANK, -1)
        got = gradient["adapter"][path]
        np.testing.assert_allclose(got["a"].reshape(a.shape), SCALE * d @ b.swapaxes(1, 2), rtol=1e-3, atol=2e-6)
        np.testing.assert_allclose(got["b"].reshape(b.shape), SCALE * a.swapaxes(1, 2) @ d, rtol=1e-3, atol=2e-6)


def test_a_new_adapter_changes_nothing_and_has_the_shapes_and_spread_of_the_paper(adapted):
    model, base, _ = adapted
    adapter = lora.init(model, jax.random.key(0), TARGETS, 8)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 10), dtype=np.int32)
    # The sum with zero is exact; what differs is how the compiler fuses the two programs.
    new = model.apply(lora.attach(base, adapter, SCALE), tokens)
    np.testing.assert_allclose(new, model.apply(base, tokens), atol=5e-6)
    o = adapter["layers.attention.o"]
    assert o["a"].shape == (3, 4, 8, 8) and o["b"].shape == (3, 8, 16) and not o["b"].any()
    q = adapter["layers.attention.q"]
    assert q["a"].shape == (3, 16, 8) and q["b"].shape == (3, 8, 4, 8)
    for path, inputs in (("layers.mlp.down", 24), ("layers.attention.o", 32)):
        assert float(adapter[path]["a"].std()) == pytest.approx(inputs**-0.5, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_export_is_plain_float32_with_the_logits_of_the_adapted_model(adapted, dtype, tmp_path):
    model, base, adapter = adapted
    if dtype != "float32":
        base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    if dtype == "int8":
        base = quantize(model, base, vocabulary=False)
        assert isinstance(base["layers"]["mlp"]["up"], Int8) and base["embedding"].dtype == jnp.bfloat16
    attached = lora.attach(base, adapter, SCALE)
    hub.save_pretrained(model, attached, tmp_path / "model", dtype="float32")
    again, params = hub.load_pretrained(tmp_path / "model")
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract_params())
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    tokens = np.random.default_rng(0).integers(0, 40, (2, 10), dtype=np.int32)
    exact = jax.tree.map(lambda x: x if isinstance(x, Int8) else x.astype(jnp.float32), attached, is_leaf=is_int8)
    np.testing.assert_allclose(again.apply(params, tokens), model.apply(exact, tokens), atol=2e-5)
    plain = jax.tree.map(lambda x: np.asarray(dense(x), np.float64), base, is_leaf=is_int8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged(plain, adapter), params)


def is_int8(leaf):
    return isinstance(leaf, Int8)


@pytest.mark.parametrize("held", ["bfloat16", "int8"])
def test_a_step_moves_the_adapters_alone_and_never_forms_a_merged_kernel(adapted, batch, held):
    model, base, adapter = adapted
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    base = quantize(model, base, vocabulary=False) if held == "int8" else base
    rate = learning_rate(1e-2, 1, 10, 0.1)
    optimizer = make_optimizer(rate, weight_decay=0.0, clip=1.0)
    loss = Loss(Objective(model, block=16, adapter_scale=SCALE, compute_dtype="bfloat16", remat="full"))
    state = init_state({"adapter": jax.tree.map(jnp.copy, adapter)}, optimizer)
    state_leaves = sum(x.size for x in jax.tree.leaves(state))
    assert state_leaves < 3 * sum(x.size for x in jax.tree.leaves(adapter)) + 10
    step, frozen, losses = make_step(loss, optimizer, rate, accumulate=2), Frozen(jnp.ones(1), own=base), []
    for _ in range(12):
        state, report = step(state, frozen, batch)
        losses.append(float(report["loss"]))
    assert losses[-1] < losses[1] - 0.02
    for before, after in zip(jax.tree.leaves(adapter), jax.tree.leaves(state["params"]["adapter"]), strict=True):
        assert (np.asarray(before) != after).mean() > 0.9 and after.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2)])
def test_adapters_are_cut_as_their_kernels_and_give_the_same_numbers(adapted, batch, shape):
    model, base, adapter = adapted
    mesh = sharding.make_mesh(*shape)
    where = lora.shardings(model, mesh, TARGETS, RANK)
    kernels = sharding.param_shardings(model, mesh)["layers"]
    spec = lambda x: tuple(x.spec)  # noqa: E731
    q, o = kernels["attention"]["q"], kernels["attention"]["o"]
    assert spec(where["layers.attention.q"]["a"]) == (*spec(q)[:2], None)
    assert spec(where["layers.attention.q"]["b"]) == (None, None, *spec(q)[2:])
    assert spec(where["layers.attention.o"]["a"]) == (*spec(o)[:3], None)
    loss = lambda mesh: Loss(Objective(model, block=16, adapter_scale=SCALE, mesh=mesh))  # noqa: E731
    value = lambda mesh: jax.jit(jax.value_and_grad(lambda p, f, b: loss(mesh)(p, f, b, 0)[0]))  # noqa: E731
    one = value(None)({"adapter": adapter}, Frozen(jnp.ones(1), own=base), batch)
    with jax.set_mesh(mesh):
        own = jax.device_put(base, sharding.param_shardings(model, mesh))
        placed = jax.device_put({"adapter": adapter}, {"adapter": where})
        many = value(mesh)(placed, Frozen(jnp.ones(1), own=own), sharding.put_batch(batch, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, many)


def test_targets_name_kernels_or_what_holds_them(adapted):
    model = adapted[0]
    assert list(lora.kernels(model, "layers.attention.q, layers.mlp")) == [
        "layers.attention.q",
        "layers.mlp.gate",
        "layers.mlp.up",
        "layers.mlp.down",
    ]
    assert lora.kernels(model, "layers.attention.o")["layers.attention.o"] == 2
    for wrong in ("embedding", "layers.input_norm", "layers.attention.z", "layers.att"):
        with pytest.raises(UserError, match=f"no kernel '{wrong}'"):
            lora.kernels(model, f"layers.mlp,{wrong}")
    with pytest.raises(UserError, match="empty"):
        lora.kernels(model, " , ")


LORA = {"student.lora.rank": 4, "student.lora.alpha": 8.0, "student.training.accumulate": 1}
EXTRAS = {"objective.specialty_weighting": "dro", "objective.dro_rate": 0.1, "student.training.ema": 0.8}


def test_a_distilled_run_with_adapters_resumes_bit_for_bit_and_leaves_a_plain_model(corpus_only):  # noqa: F811
    """With the average and driven weights on: the whole of what a checkpoint has to hold."""
    config = corpus_only(**LORA, **EXTRAS, **{"student.training.remat": "dots", "student.lora.dtype": "float32"})
    work = Workdir(config)
    facts = train.train(config, "distilled")
    folder = work / "distilled"
    model, params = learners.trained(work, "distilled", learners.mesh_of(config))
    adapters = sum(x.size for x in jax.tree.leaves(lora.init(model, jax.random.key(0), TARGETS, 4)))
    whole = learners.count(params)
    assert (facts["parameters"], facts["trainable_parameters"]) == (whole, adapters)
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract_params())

    before = learners.untrained(work, "student", learners.mesh_of(config))[1]
    np.testing.assert_array_equal(before["embedding"], params["embedding"])
    update = np.asarray(params["layers"]["mlp"]["up"] - before["layers"]["mlp"]["up"])[0]
    size = np.linalg.svd(update, compute_uv=False)
    assert size[0] > 1e-3 and (size[4:] < 1e-5 * max(1, size[0])).all()  # of rank 4, as it was averaged after 12 steps

    # Checkpoints hold the adapters (with two moments and their average) and no parameter of the base.
    held = json.loads((folder / "checkpoints" / "12" / "whole.json").read_text())["files"]
    assert not any("embedding" in name for name in held)
    stored = sum(size for size, _ in held.values())
    assert stored < 4 * 4 * adapters + 400_000
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    weights = [{k: v for k, v in row.items() if k.startswith("weight/")} for row in rows]
    assert len(weights[0]) > 5 and all(v == pytest.approx(1) for v in weights[0].values())
    assert max(weights[-1].values()) > 1 > min(weights[-1].values())

    # A checkpoint is evaluated as the model that the run leaves: its average, attached to the base.
    step, at, kept = checkpointed.load(work, "distilled", learners.mesh_of(config))
    assert step == 12 and at == model
    tokens = np.arange(24)[None] % 97
    np.testing.assert_allclose(model.hidden(kept, tokens), model.hidden(params, tokens), atol=1e-4)

    # The measure of the last step is that of the model that was kept.
    last = [row for row in read_metrics(folder / "metrics.jsonl") if "validation_bits_per_byte" in row][-1]
    corpus, tables = work.require("corpus"), learners.tables_of(work)
    mesh = learners.mesh_of(config)
    with jax.set_mesh(mesh):
        curve = train.Curve(config, work, corpus, "student", model, mesh, tables)
        assert curve(params)["validation_bits_per_byte"] == pytest.approx(last["validation_bits_per_byte"], rel=1e-5)

    first = result_of(folder)
    for there in (folder / "model", folder / "checkpoints" / "12"):
        shutil.rmtree(there)
    (folder / "manifest.json").unlink()
    assert train.train(config, "distilled")["resumed_at"] == 8
    assert result_of(folder) == first


def test_settings_that_cannot_be_met_stop_a_run_at_its_start(corpus_only):  # noqa: F811
    for settings, message in (
        (LORA | {"student.training.freeze": "embedding"}, "every parameter is frozen already"),
        ({"student.lora.targets": "layers.atention"}, "did you mean 'layers.attention"),
        (LORA | {"student.lora.dtype": "int4"}, "float32, bfloat16, int8"),
        ({"student.training.remat": "true"}, "'none', 'full', 'dots'"),
        ({"student.training.ema": 1.0}, "student.training.ema=1.0"),
        ({"student.training.accumulate": 3}, "accumulate=3 pieces"),
        ({"student.training.accumulate": 2}, "set batch_size to a multiple of 16"),  # 8 rows on 8 devices
        ({"objective.dro_rate": 0.0}, "dro_rate=0.0"),
    ):
        with pytest.raises(UserError, match=message):
            train.train(corpus_only(**settings), "control")


def test_a_run_in_pieces_is_a_run_in_one(corpus_only):  # noqa: F811
    rows = {"student.training.batch_size": 16, "student.training.steps": 3, "student.training.evaluate_every": 3}
    losses = []
    for pieces in (1, 2):
        config = corpus_only(**rows, **{"student.training.accumulate": pieces, "student.training.log_every": 1})
        train.train(config, "control")
        lines = read_metrics(Path(config.workdir) / "control" / "metrics.jsonl")
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)

"""The whole loss against a float64 reference on real models, and its independence of mesh, packing and order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax import sharding
from distil_jax.config import numbers_by_name
from distil_jax.errors import UserError
from distil_jax.losses.kd import ProjectionRows, ProjectionTable, place, rows_of
from distil_jax.losses.schedules import learning_rate, schedule
from distil_jax.losses.vocabulary import Shards
from distil_jax.losses.weights import specialty_weights
from distil_jax.models import hub
from distil_jax.objective import Frozen, Loss, Objective
from distil_jax.step import init_state, make_optimizer, make_step
from distil_jax.tokens.align import CROSSING, NONE, ROOT

pytestmark = pytest.mark.usefixtures("quickly_compiled")

B, L, VS, VT = 8, 12, 29, 41
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
SIZES["num_key_value_heads"] = 1
SIDE_FIELDS = ("tokens", "segment_ids", "positions", "targets", "weights")


@pytest.fixture(scope="module")
def models():
    student = hub.model_from_config(SIZES | {"model_type": "llama", "vocab_size": VS, "tie_word_embeddings": True})
    teacher = hub.model_from_config(
        SIZES | {"model_type": "gemma3_text", "vocab_size": VT, "sliding_window": 4, "tie_word_embeddings": True}
    )
    return student, student.init(jax.random.key(0)), teacher, teacher.init(jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    r = np.random.default_rng(0)
    out = {}
    for side, vocab in (("student", VS), ("teacher", VT)):
        segments = np.repeat([[1] * 7 + [2] * 4 + [0]], B, 0)
        positions = np.repeat([[*range(7), *range(4), 0]], B, 0)
        out |= {
            f"{side}_tokens": r.integers(0, vocab, (B, L)) * (segments > 0),
            f"{side}_segment_ids": segments,
            f"{side}_positions": positions,
            f"{side}_targets": r.integers(0, vocab, (B, L)) * (segments > 0),
            f"{side}_weights": (r.uniform(size=(B, L)) < 0.6) * (segments > 0),
        }
    out["role"] = r.choice([NONE, ROOT, ROOT, CROSSING], (B, L))
    out["teacher_position"] = r.integers(0, 7, (B, L))
    out["offset"] = np.where(out["role"] == ROOT, 0, r.integers(0, 2, (B, L)))
    out["specialty"] = r.integers(0, 3, (B, L))
    return {k: np.asarray(v, np.int32) for k, v in out.items()}


@pytest.fixture(scope="module")
def frozen(models):
    r = np.random.default_rng(1)
    W = np.zeros((VT, VS))
    for v in range(VT):
        W[v, r.choice(VS, 2, replace=False)] = r.dirichlet([1, 1])
    t, s = np.nonzero(W)  # two entries a row
    o = np.argsort(s, kind="stable")
    rows = ProjectionRows(jnp.int32(s.reshape(VT, 2)), jnp.float32(W[t, s].reshape(VT, 2)))
    table = ProjectionTable(jnp.int32(t[o]), jnp.int32(s[o]), jnp.float32(W[t, s][o]), jnp.ones(VT, bool), jnp.int32(o))
    return Frozen(jnp.float32([0.5, 1.0, 1.5]), models[3], table, rows), W


def distilling(models, **options):
    student, _, teacher, _ = models
    settings = {"alpha": schedule("linear", 0.3, 0.7, 10), "temperature": schedule("exponential", 4.0, 1.0, 10)}
    return Loss(Objective(student, teacher=teacher, **settings | options))


def test_the_loss_is_its_formula(models, batch, frozen):
    """Per-token alpha, tau^2, specialty weights and one global normaliser, from whole logits in float64."""
    student, params, teacher, teacher_params = models
    f, W = frozen
    step = 5
    value, metrics = distilling(models)({"model": params}, f, batch, jnp.int32(step))
    alpha, tau = 0.5, 4 * np.exp(-np.log(4) * step / 10)

    def log_softmax(model, params, side, t):
        args = (batch[f"{side}_tokens"], batch[f"{side}_segment_ids"], batch[f"{side}_positions"])
        z = np.asarray(model.apply(params, *args), np.float64) / t
        z -= z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    def kl_at(tau):
        at = batch["teacher_position"][..., None]
        q = np.take_along_axis(np.exp(log_softmax(teacher, teacher_params, "teacher", tau)), at, axis=1)
        # The mass of the teacher token that follows goes to the student's that follows, that of the others through W.
        follows = np.take_along_axis(batch["teacher_targets"], batch["teacher_position"], axis=1)
        known = np.take_along_axis(q, follows[..., None], axis=-1)
        p = q @ W + known * (np.eye(W.shape[1])[batch["student_targets"]] - W[follows])
        s = log_softmax(student, params, "student", tau)
        return np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - s), 0).sum(-1)

    kl = kl_at(tau)
    ce = -np.take_along_axis(log_softmax(student, params, "student", 1), batch["student_targets"][..., None], -1)[
        ..., 0
    ]
    mask = batch["student_weights"] > 0
    weight = np.array([0.5, 1.0, 1.5])[batch["specialty"]] * mask
    taught = (batch["role"] == ROOT) & mask
    a = np.where(taught, alpha, 1.0)
    expected = (weight * (a * ce + (1 - a) * tau**2 * kl)).sum() / weight.sum()
    assert float(value) == pytest.approx(expected, rel=1e-5)
    # Metrics are unweighted (sum, count) pairs.
    assert float(metrics["ce"][0]) == pytest.approx((ce * mask).sum(), rel=1e-5)
    assert float(metrics["ce"][1]) == mask.sum()
    assert float(metrics["kl"][0]) == pytest.approx((kl * taught).sum(), rel=1e-4)
    assert float(metrics["taught"][0]) == taught.sum()
    for i in range(3):
        at_i = mask & (batch["specialty"] == i)
        assert float(metrics["ce_by_specialty"][0][i]) == pytest.approx((ce * at_i).sum(), rel=1e-4)
    # What an evaluation measures: at temperature 1, whatever the step's is.
    found, spoken = distilling(models).kl_at_1(params, f, batch)
    np.testing.assert_array_equal(spoken, taught)
    np.testing.assert_allclose(found, kl_at(1.0) * taught, rtol=1e-4, atol=1e-6)


def test_the_gradient_equals_finite_differences(models, batch, frozen):
    _, params, *_ = models
    loss = distilling(models)
    value = lambda p: loss({"model": p}, frozen[0], batch, jnp.int32(3))[0]  # noqa: E731
    gradient = jax.grad(value)(params)
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(7), x.shape), params)
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)))
    e = 1e-3
    moved = [value(jax.tree.map(lambda p, d, step=step: p + step * d, params, direction)) for step in (e, -e)]
    assert float(along) == pytest.approx(float(moved[0] - moved[1]) / (2 * e), rel=2e-2)


def test_a_w_that_learns_starts_at_w0_and_is_held_there(models, batch, frozen):
    """At W0 the loss is that of a fixed W; elsewhere lambda |W - W0|^2 is added; its rate and decay are its own."""
    f, W = frozen
    params = {"model": models[1]}
    fixed = float(distilling(models)(params, f, batch, jnp.int32(3))[0])
    logits = jnp.log(f.rows.weights)
    same, metrics = distilling(models, keep=5.0)(params | {"projection": logits}, f, batch, jnp.int32(3))
    assert float(same) == pytest.approx(fixed, rel=1e-6) and float(metrics["projection_drift"][0]) < 1e-10

    moved = params | {"projection": logits + jnp.float32([1.0, 0.0])[None]}
    free, held = (float(distilling(models, keep=k)(moved, f, batch, jnp.int32(3))[0]) for k in (0.0, 5.0))
    w = np.asarray(f.rows.weights, np.float64) * [np.e, 1]
    drift = ((w / w.sum(1, keepdims=True) - np.asarray(f.rows.weights)) ** 2).sum()
    assert held - free == pytest.approx(5 * drift, rel=1e-4) and free != pytest.approx(fixed, rel=1e-5)

    rate = learning_rate(1e-2, 1, 10, 0.1)
    optimizer = make_optimizer(rate, weight_decay=0.5, clip=1e9, projection_rate=3.0)
    state = init_state(jax.tree.map(jnp.copy, moved), optimizer)
    state, _ = make_step(Loss(distilling(models, keep=5.0).objective), optimizer, rate)(state, f, batch)
    change = np.asarray(state["params"]["projection"]) - np.asarray(moved["projection"])
    assert np.abs(change).max() == pytest.approx(3 * float(rate(0)), rel=1e-3)  # Adam's first step, no decay in it


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_the_same_numbers_on_a_mesh_of_eight(models, batch, frozen, shape):
    student, params, *_ = models
    params = {"model": params}
    one = jax.jit(jax.value_and_grad(distilling(models), has_aux=True))(params, frozen[0], batch, jnp.int32(4))
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, {"model": sharding.param_shardings(student, mesh)})
        loss = distilling(models, mesh=mesh)
        table = place(frozen[0].projection, Shards.of(mesh))
        rows = rows_of(models[2].unembedding(models[3]), table)
        there = frozen[0]._replace(projection=table, teacher_rows=rows)
        many = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            sharded, there, sharding.put_batch(batch, mesh), jnp.int32(4)
        )
    (one_value, one_metrics), one_gradient = one
    (value, metrics), gradient = many
    assert float(value) == pytest.approx(float(one_value), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one_metrics, metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one_gradient, gradient)


def test_the_loss_does_not_depend_on_the_packing(models, frozen):
    """Two documents in one row, or in two rows of their own."""
    r = np.random.default_rng(3)
    fields = [f"{side}_{f}" for side in ("student", "teacher") for f in SIDE_FIELDS]
    fields += ["role", "teacher_position", "specialty"]
    packed = {k: np.zeros((1, L), np.int32) for k in fields}
    apart = {k: np.zeros((2, L), np.int32) for k in fields}
    start = 0
    for n, length in enumerate((5, 6)):
        here, there = slice(start, start + length), slice(0, length)
        for side, vocab in (("student", VS), ("teacher", VT)):
            values = {
                "tokens": r.integers(0, vocab, length),
                "segment_ids": np.full(length, n + 1),
                "positions": np.arange(length),
                "targets": r.integers(0, vocab, length),
                "weights": np.arange(length) > 1,
            }
            for name, value in values.items():
                packed[f"{side}_{name}"][0, here] = value
                apart[f"{side}_{name}"][n, there] = value
        packed["role"][0, here] = apart["role"][n, there] = ROOT
        where = r.integers(0, length, length)
        packed["teacher_position"][0, here], apart["teacher_position"][n, there] = start + where, where
        packed["specialty"][0, here] = apart["specialty"][n, there] = n
        start += length
    loss = distilling(models)
    values = [float(loss({"model": models[1]}, frozen[0], b, jnp.int32(0))[0]) for b in (packed, apart)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(models, batch):
    student, params, *_ = models
    rate = learning_rate(1e-2, 1, 10, 0.1)
    optimizer = make_optimizer(rate, weight_decay=0.1, clip=1.0)
    loss = Loss(Objective(student))
    step = make_step(loss, optimizer, rate)
    state = init_state({"model": jax.tree.map(jnp.copy, params)}, optimizer)
    state, report = step(state, Frozen(jnp.ones(3)), batch)
    good = jax.tree.map(np.asarray, state)
    assert int(report["skipped"]) == 0
    state, report = step(state, Frozen(jnp.full(3, jnp.nan)), batch)
    assert int(report["skipped"]) == 1 and int(state["step"]) == 2
    jax.tree.map(np.testing.assert_array_equal, good["params"], jax.tree.map(np.asarray, state["params"]))
    jax.tree.map(np.testing.assert_array_equal, good["opt_state"], jax.tree.map(np.asarray, state["opt_state"]))
    state, report = step(state, Frozen(jnp.ones(3)), batch)
    assert int(report["skipped"]) == 1 and np.isfinite(report["loss"])


def test_norm_scales_are_not_decayed(models):
    params = models[1]
    optimizer = make_optimizer(lambda step: 1.0, weight_decay=0.5, clip=1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert not np.any(updates["layers"]["input_norm"]["scale"]) and not np.any(updates["final_norm"]["scale"])
    np.testing.assert_allclose(updates["embedding"], -0.5 * params["embedding"], rtol=1e-6)


def test_schedules():
    tau = schedule("exponential", 8.0, 1.0, 50_000)
    for t in (0, 12_345, 50_000, 90_000):  # the paper's formula
        assert float(tau(t)) == pytest.approx(max(1, 8 * np.exp(-np.log(8) / 50_000 * t)), rel=1e-5)
    assert [float(schedule("linear", 2, 4, 4)(t)) for t in (0, 1, 4, 9)] == [2, 2.5, 4, 4]
    assert [float(schedule("cosine", 2, 4, 2)(t)) for t in (0, 1, 2)] == pytest.approx([2, 3, 4])
    assert float(schedule("constant", 3, 9, 2)(1)) == 3
    for bad in (("sudden", 1, 1, 1), ("linear", 1, 1, 0), ("exponential", 1, 2, 5)):
        with pytest.raises(UserError):
            schedule(*bad)


def test_specialty_weights_have_mean_one_over_tokens_and_name_what_they_do_not_know():
    names, tokens = ["cardiology", "radiology", "skin"], [100, 300, 600]
    given = specialty_weights(
        "given", numbers_by_name("objective.specialty_weights", "cardiology=1.2, radiology=0.5"), names, tokens
    )
    assert given @ tokens / 1000 == pytest.approx(1)
    assert given[0] / given[2] == pytest.approx(1.2)
    rare = specialty_weights("inverse_frequency", {}, names, tokens)
    assert rare @ tokens / 1000 == pytest.approx(1)
    assert rare[0] / rare[2] == pytest.approx(6**0.5)
    with pytest.raises(UserError, match="did you mean 'cardiology'"):
        specialty_weights("given", {"cardiologi": 1.0}, names, tokens)
    with pytest.raises(UserError, match="NAME=NUMBER"):
        numbers_by_name("objective.specialty_weights", "cardiology")
    with pytest.raises(UserError, match="weight 0"):
        specialty_weights("given", dict.fromkeys(names, 0.0), names, tokens)
    with pytest.raises(UserError, match="inverse_frequency"):
        specialty_weights("loud", {}, names, tokens)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(UserError, match="8 devices"):
        sharding.make_mesh(3, 1, 1)
    with pytest.raises(UserError, match="at most one -1"):
        sharding.make_mesh(-1, -1, 1)

"""The step: pieces of a batch add up to it, averages and specialty weights follow their formulas, rows stay put."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distil_jax import sharding
from distil_jax.checkpoint import Checkpoints
from distil_jax.errors import UserError
from distil_jax.losses.kd import ProjectionTable, place, rows_of
from distil_jax.losses.schedules import learning_rate, schedule
from distil_jax.losses.vocabulary import Shards
from distil_jax.losses.weights import dro_update, specialty_weights
from distil_jax.models import hub
from distil_jax.objective import Frozen, Loss, Objective
from distil_jax.step import LOG_WEIGHTS, gradient, init_state, make_optimizer, make_step, to_use
from distil_jax.tokens.align import CROSSING, NONE, ROOT

pytestmark = pytest.mark.usefixtures("quickly_compiled")

B, L, VS, VT, S = 16, 12, 40, 48, 3
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "tie_word_embeddings": True}
MESHES = [(8, 1, 1), (2, 2, 2)]


@pytest.fixture(scope="module")
def models():
    student = hub.model_from_config(SIZES | {"model_type": "llama", "vocab_size": VS})
    teacher = hub.model_from_config(SIZES | {"model_type": "gemma3_text", "vocab_size": VT, "sliding_window": 4})
    return student, student.init(jax.random.key(0)), teacher, teacher.init(jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    """Packed rows: two documents and padding in each, of lengths that differ from row to row, one row all padding."""
    r = np.random.default_rng(0)
    first = r.integers(3, 7, B)
    columns = np.arange(L)[None]
    segments = np.where(columns < first[:, None], 1, np.where(columns < 11, 2, 0))
    segments[5] = 0
    positions = np.where(segments == 2, columns - first[:, None], columns) * (segments > 0)
    out = {}
    for side, vocab in (("student", VS), ("teacher", VT)):
        out |= {
            f"{side}_tokens": r.integers(0, vocab, (B, L)) * (segments > 0),
            f"{side}_segment_ids": segments,
            f"{side}_positions": positions,
            f"{side}_targets": r.integers(0, vocab, (B, L)) * (segments > 0),
            f"{side}_weights": (r.uniform(size=(B, L)) < 0.6) * (segments > 0),
        }
    out["role"] = r.choice([NONE, ROOT, ROOT, CROSSING], (B, L))
    out["teacher_position"] = r.integers(0, 10, (B, L))
    out["specialty"] = r.integers(0, S, (B, L))
    return {k: np.asarray(v, np.int32) for k, v in out.items()}


@pytest.fixture(scope="module")
def frozen(models):
    ids = np.sort(np.random.default_rng(1).integers(0, VS, VT)).astype(np.int32)
    table = ProjectionTable(jnp.arange(VT), jnp.asarray(ids), jnp.ones(VT), jnp.ones(VT, bool), jnp.arange(VT))
    return Frozen(jnp.float32([0.5, 1.0, 1.5]), models[3], table)


def distilling(models, **options):
    settings = {"alpha": schedule("linear", 0.3, 0.7, 10), "temperature": schedule("exponential", 4.0, 1.0, 10)}
    return Loss(Objective(models[0], teacher=models[2], block=16, **settings | options))


def optimizer_of(rate=1e-2):
    rate = learning_rate(rate, 1, 10, 0.1)
    return make_optimizer(rate, weight_decay=0.1, clip=1.0), rate


def close(one, many, rtol=1e-6, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, many)


def slope(loss, pieces):
    return jax.jit(functools.partial(gradient, loss, pieces=pieces))


@pytest.mark.parametrize("pieces", [2, 16])
def test_a_batch_in_pieces_has_the_numbers_of_the_whole(models, batch, frozen, pieces):
    """Pieces differ in their number of tokens: only the totals of the whole make them add up."""
    args = {"model": models[1]}, frozen, batch, jnp.int32(4)
    one, many = slope(distilling(models), 1)(*args), slope(distilling(models), pieces)(*args)
    assert len({int(batch["student_weights"][n::pieces].sum()) for n in range(pieces)}) > 1
    assert float(many[0]) == pytest.approx(float(one[0]), rel=1e-6)
    for name, (total, count) in one[1].items():
        close(total / np.maximum(count, 1e-6), many[1][name][0] / np.maximum(many[1][name][1], 1e-6))
    close(one[2], many[2])


def on_mesh(models, batch, frozen, shape, pieces):
    """(the jitted step on that mesh, its state, frozen, the batch), placed as training places them."""
    mesh = sharding.make_mesh(*shape)
    optimizer, rate = optimizer_of()
    where = {"model": sharding.param_shardings(models[0], mesh)}
    with jax.set_mesh(mesh):
        state = init_state({"model": jax.tree.map(jnp.copy, models[1])}, optimizer, ema=0.5)
        state = jax.device_put(state, sharding.of_state(state, optimizer, where, mesh))
        step = make_step(distilling(models, mesh=mesh), optimizer, rate, accumulate=pieces, ema=0.5)
        table = place(frozen.projection, Shards.of(mesh))
        there = frozen._replace(projection=table, teacher_rows=rows_of(models[2].unembedding(models[3]), table))
        return mesh, step, state, there, sharding.put_batch(batch, mesh)


@pytest.mark.parametrize("shape", MESHES)
def test_updates_in_pieces_on_a_mesh_are_those_of_one_device(models, batch, frozen, shape):
    optimizer, rate = optimizer_of()
    state = init_state({"model": jax.tree.map(jnp.copy, models[1])}, optimizer, ema=0.5)
    alone = make_step(distilling(models), optimizer, rate, ema=0.5)
    mesh, step, sharded, f, rows = on_mesh(models, batch, frozen, shape, 2)
    for _ in range(2):
        state, report = alone(state, frozen, batch)
        with jax.set_mesh(mesh):
            sharded, again = step(sharded, f, rows)
        close(report, again, rtol=2e-6)
    # Adam divides by the size of the gradient, so an element near 0 may move either way: see its moments instead.
    close(state["opt_state"][1].mu, sharded["opt_state"][1].mu)
    close(state["opt_state"][1].nu, sharded["opt_state"][1].nu)
    sure = jax.tree.map(lambda m: np.abs(m) > 1e-5, state["opt_state"][1].mu)
    for part in ("params", "ema"):
        pick = lambda tree: jax.tree.map(lambda x, ok: np.where(ok, x, 0), tree, sure)  # noqa: E731
        close(pick(state[part]), pick(sharded[part]), atol=2e-6)


@pytest.mark.parametrize("shape", MESHES[1:])
def test_no_collective_moves_rows_for_the_pieces_and_the_sums_lie_as_the_parameters(models, batch, frozen, shape):
    """In the compiled step. Rows are whole numbers; only the lookup of the embedding, whose table is cut, and the head,
    whose devices score each other's tokens, send ids."""
    mesh, step, state, f, rows = on_mesh(models, batch, frozen, shape, 2)
    with jax.set_mesh(mesh):
        lines = step.lower(state, f, rows).compile().as_text().splitlines()
    kinds = r"(?:all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\("
    moved = [line for line in lines if re.search(rf" {kinds}", line)]
    assert moved
    for line in moved:
        made = line.split(" = ")[1].split("metadata=")[0]
        assert not re.search(r"\b[su]32\[\d", made) or "_take" in line or "shard_map" in line, line
        assert not re.search(rf"\[\d+,2,{L}\]|\[2,\d+,{L}\]", made), line  # of the split rows, [B / 2, 2, L]
    # The accumulated gradient crosses the pieces in its shards: a loop carries the local shape of the gate kernels.
    gate = state["params"]["model"]["layers"]["mlp"]["gate"]
    local = ",".join(map(str, gate.addressable_shards[0].data.shape))
    loops = [line for line in lines if " while(" in line]
    assert any(f"f32[{local}]" in line.split(" while(")[0] for line in loops)


def test_gradients_of_pieces_are_added_in_float32(models, batch, frozen):
    """bfloat16 computation, 16 pieces: the sum is the float32 sum of the pieces, and no bfloat16 sum of them."""
    loss = distilling(models, compute_dtype="bfloat16")
    params, step = {"model": models[1]}, jnp.int32(0)
    exactly = {"xla_allow_excess_precision": False}  # XLA may leave out a rounding to bfloat16 between two operations
    got = jax.jit(functools.partial(gradient, loss, pieces=B), compiler_options=exactly)(params, frozen, batch, step)[2]
    totals = loss.totals(frozen, batch)
    cast, held = loss.cast(params, frozen)
    assert {x.dtype for x in jax.tree.leaves((cast, held.teacher))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    one = jax.jit(jax.grad(lambda p, piece: loss(p, held, piece, step, totals)[0]), compiler_options=exactly)
    pieces = [one(cast, {k: v[n::B] for k, v in batch.items()}) for n in range(B)]
    exact = jax.tree.map(lambda *g: np.sum([np.asarray(x, np.float64) for x in g], axis=0), *pieces)
    rounded = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), pieces)
    error = lambda tree: optax.tree.norm(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, tree, exact))  # noqa: E731
    assert error(got) < 1e-6 * optax.tree.norm(exact) < 1e-3 * error(rounded)


def test_the_cast_happens_once_a_step(models, batch, frozen):
    """No float32 parameter enters the loop over the pieces, so nothing in it can be cast again."""
    loss = distilling(models, compute_dtype="bfloat16")
    jaxpr = jax.make_jaxpr(functools.partial(gradient, loss, pieces=4))(
        {"model": models[1]}, frozen, batch, jnp.int32(0)
    )
    (loop,) = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 4]
    read = loop.invars[: loop.params["num_consts"]]
    kernels = [v.aval for v in read if v.aval.ndim >= 2 and jnp.issubdtype(v.aval.dtype, jnp.floating)]
    assert len(kernels) > 20 and {a.dtype for a in kernels} == {jnp.dtype(jnp.bfloat16)}


def test_training_in_bfloat16_stays_near_float32(models, batch, frozen):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        optimizer, rate = optimizer_of()
        step = make_step(distilling(models, compute_dtype=dtype), optimizer, rate, accumulate=2)
        state = init_state({"model": jax.tree.map(jnp.copy, models[1])}, optimizer)
        losses[dtype] = []
        for _ in range(20):
            state, report = step(state, frozen, batch)
            losses[dtype].append(float(report["ce"]))
        assert {x.dtype for x in jax.tree.leaves(state["params"])} == {jnp.dtype(jnp.float32)}
    assert losses["float32"][-1] < losses["float32"][0] - 0.1  # it learns
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.01)


def test_the_average_follows_its_formula_on_finite_updates_alone(models, batch):
    decay = 0.8
    optimizer, rate = optimizer_of()
    step = make_step(Loss(Objective(models[0], block=16)), optimizer, rate, ema=decay)
    params = {"model": jax.tree.map(jnp.copy, models[1])}
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    state = init_state(params, optimizer, ema=decay)
    for weights in (jnp.ones(S), jnp.full(S, jnp.nan), jnp.ones(S), jnp.ones(S)):
        before = jax.tree.map(np.asarray, state["ema"])
        state, report = step(state, Frozen(weights), batch)
        if np.isfinite(report["loss"]):
            expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * np.asarray(p), expected, state["params"])
        else:
            jax.tree.map(np.testing.assert_array_equal, before, state["ema"])
    assert int(report["skipped"]) == 1
    close(expected, state["ema"])
    assert to_use(state) is state["ema"] and to_use({"params": 1}) == 1
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state["ema"], state["params"])
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_driven_weights_are_the_multiplicative_updates_of_the_paper():
    """q_g *= exp(rate * loss_g), normalised, in float64 over some steps; weights are q over the share of the tokens."""
    r = np.random.default_rng(0)
    share, rate = np.array([0.7, 0.25, 0.05]), 0.3
    log_weights = jnp.zeros(3)
    q = share.copy()
    for n in range(30):
        counts = r.integers(1, 50, 3) * np.array([1, 1, n % 2])  # the rare one is in every second batch
        loss = np.array([1.0, 1.4, 2.0]) + r.normal(size=3) * 0.1
        seen = np.where(counts > 0, loss, (counts * loss).sum() / counts.sum())
        q *= np.exp(rate * seen)
        q /= q.sum()
        log_weights = dro_update(log_weights, jnp.float32(counts * loss), jnp.float32(counts), share_S=share, rate=rate)
        np.testing.assert_allclose(jnp.exp(log_weights), q / share, rtol=2e-5)
        assert float(jnp.exp(log_weights) @ share) == pytest.approx(1, rel=1e-6)
    weights = np.exp(log_weights)
    assert weights[2] > 1 > weights[0]  # the hardest is heard the most


def driven(models, batch, share=(0.5, 0.3, 0.2), rate=0.5):
    optimizer, schedule_ = optimizer_of()
    reweigh = functools.partial(dro_update, share_S=np.array(share), rate=rate)
    step = make_step(Loss(Objective(models[0], block=16)), optimizer, schedule_, accumulate=2, reweigh=reweigh)
    start = jnp.asarray(specialty_weights("dro", {"a": 2.0}, ["a", "b", "c"], [50, 30, 20]))
    return step, init_state({"model": jax.tree.map(jnp.copy, models[1])}, optimizer, weights_S=start), start


def test_a_step_uses_the_weights_that_the_steps_before_it_left(models, batch):
    step, state, start = driven(models, batch)
    share = np.array([0.5, 0.3, 0.2])
    weights = np.asarray(start, np.float64)
    assert weights[0] / weights[1] == pytest.approx(2)
    mask = batch["student_weights"] > 0
    for _ in range(3):
        plain = Loss(Objective(models[0], block=16))
        params = jax.tree.map(jnp.copy, state["params"])
        value, metrics = plain(params, Frozen(jnp.float32(weights)), batch, state["step"])
        state, report = step(state, Frozen(jnp.ones(S)), batch)
        np.testing.assert_allclose(report["weight_by_specialty"], weights, rtol=1e-5)
        assert float(report["loss"]) == pytest.approx(float(value), rel=1e-5)
        total, count = (np.asarray(x, np.float64) for x in metrics["ce_by_specialty"])
        np.testing.assert_allclose(report["ce_by_specialty"], total / count, rtol=1e-5)  # unweighted
        assert count.sum() == mask.sum()
        q = share * weights * np.exp(0.5 * total / count)
        weights = q / q.sum() / share
        np.testing.assert_allclose(np.exp(state[LOG_WEIGHTS]), weights, rtol=1e-5)


def test_a_batch_that_is_not_finite_leaves_the_weights(models, batch):
    step, state, start = driven(models, batch)
    state["params"]["model"]["embedding"] *= jnp.nan
    state, report = step(state, Frozen(jnp.ones(S)), batch)
    assert int(report["skipped"]) == 1
    np.testing.assert_allclose(np.exp(state[LOG_WEIGHTS]), start, rtol=1e-6)


def test_a_state_with_all_its_parts_goes_on_from_a_checkpoint_bit_for_bit(models, batch, tmp_path):
    optimizer, rate = optimizer_of()
    reweigh = functools.partial(dro_update, share_S=np.full(S, 1 / S), rate=0.5)
    step = make_step(Loss(Objective(models[0], block=16)), optimizer, rate, accumulate=4, ema=0.9, reweigh=reweigh)
    state = init_state({"model": jax.tree.map(jnp.copy, models[1])}, optimizer, ema=0.9, weights_S=jnp.ones(S))
    f = Frozen(jnp.ones(S))
    state, _ = step(state, f, batch)
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state)
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for _ in range(2):
        state, _ = step(state, f, batch)
    _, again = checkpoints.restore_latest(abstract)
    checkpoints.close()
    for _ in range(2):
        again, _ = step(again, f, batch)
    assert {"ema", LOG_WEIGHTS} < again.keys()
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_every_remat_has_the_gradient_of_none_and_another_name_is_refused(models, batch, frozen):
    args = {"model": models[1]}, frozen, batch, jnp.int32(2)
    plain = slope(distilling(models), 1)(*args)
    for remat in ("full", "dots"):
        close(plain, slope(distilling(models, remat=remat), 1)(*args), rtol=1e-5)
    with pytest.raises(UserError, match="'none', 'full', 'dots'"):
        distilling(models, remat="some")(*args)


def test_remat_keeps_less_the_more_it_computes_again():
    """Temporaries of a deep narrow model's gradient, as compiled: none > dots > full."""
    model = hub.model_from_config(SIZES | {"model_type": "llama", "vocab_size": VS, "num_hidden_layers": 12})
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    temporaries = {}
    for remat in ("none", "dots", "full"):
        value = lambda p, t, remat=remat: jnp.sum(model.hidden(p, t, remat=remat))  # noqa: E731
        compiled = jax.jit(jax.grad(value)).lower(model.abstract_params(), tokens).compile()
        temporaries[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries["none"] > 1.5 * temporaries["dots"] and temporaries["dots"] > 1.3 * temporaries["full"]

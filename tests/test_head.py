"""The streamed head against float64 references, whatever the block, the mesh and the temperature."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from distil_jax.losses.divergence import KINDS, UNIFORM
from distil_jax.losses.head import Teacher, TopKTeacher, block_size, distill, score
from distil_jax.losses.kd import PlacedTable, ProjectionRows, ProjectionTable, place, rows_of, with_weights
from distil_jax.losses.vocabulary import Shards
from distil_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quickly_compiled")
B, L, D, DT, VS, VT, TEXT_VS, TEXT_VT = 8, 9, 6, 5, 23, 37, 21, 34


@pytest.fixture(scope="module")
def case():
    return make_case()


@pytest.fixture(scope="module")
def leaving():
    """A W some of whose rows leave a part to student tokens that they do not name."""
    return make_case(leaving=True)


def make_case(leaving=False):
    r = np.random.default_rng(0)
    W = np.zeros((VT, VS))
    for v in range(TEXT_VT):
        ids = r.choice(TEXT_VS - 2 * leaving, size=r.integers(1, 4), replace=False)
        W[v, ids] = r.dirichlet(np.ones(len(ids))) * (1 if not leaving or v % 3 else 0.7)
    teacher_ids, student_ids = np.nonzero(W)
    order = np.argsort(student_ids, kind="stable")
    teacher_ids, student_ids = teacher_ids[order], student_ids[order]
    ce_w = r.uniform(size=(B, L)) * (r.uniform(size=(B, L)) < 0.6)
    return dict(
        hidden=r.normal(size=(B, L, D)),
        E=r.normal(size=(VS, D)),
        teacher_hidden=r.normal(size=(B, L, DT)),
        Et=r.normal(size=(VT, DT)),
        labels=r.integers(0, TEXT_VS, size=(B, L)),
        ce_w=ce_w,
        kl_w=r.uniform(size=(B, L)) * (ce_w > 0) * (r.uniform(size=(B, L)) < 0.7),
        W=W,
        rest=np.where(W.any(1), 1 - W.sum(1), 0) * leaving,
        table=(teacher_ids, student_ids, W[teacher_ids, student_ids]),
        slots=teacher_ids * (VS + 1) + student_ids,
        tokens=r.integers(0, TEXT_VT, size=(B, L)),
    )


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(c, tau, smoothing):
    """Whole logit matrices in float64, gradients written out by hand."""
    z = (c["hidden"] @ c["E"].T)[..., :TEXT_VS]
    t = (c["teacher_hidden"] @ c["Et"].T)[..., :TEXT_VT]
    s1, s = softmax(z), softmax(z / tau)
    p = (softmax(t / tau) @ c["W"][:TEXT_VT])[..., :TEXT_VS]
    p1 = (softmax(t) @ c["W"][:TEXT_VT])[..., :TEXT_VS]
    one_hot = np.eye(TEXT_VS)[c["labels"]]
    ce = -np.log((s1 * one_hot).sum(-1))
    target = (1 - smoothing) * one_hot + smoothing / TEXT_VS
    smoothed = -(target * np.log(s1)).sum(-1)
    xlogy = lambda a, b: np.where(a > 0, a * np.log(np.where(a > 0, b, 1)), 0)  # noqa: E731
    kl = (xlogy(p, p) - xlogy(p, s)).sum(-1)
    kl1 = (xlogy(p1, p1) - xlogy(p1, s1)).sum(-1)
    loss = (c["ce_w"] * smoothed + c["kl_w"] * tau**2 * kl).sum()
    dz = c["ce_w"][..., None] * (s1 - target) + c["kl_w"][..., None] * tau * (s - p)
    E = c["E"][:TEXT_VS]
    dE = np.zeros_like(c["E"])
    dE[:TEXT_VS] = np.einsum("blv,bld->vd", dz, c["hidden"])
    return loss, ce, kl, kl1, z.argmax(-1), dz @ E, dE


def table_of(c):
    mapped = jnp.arange(VT - 1) < TEXT_VT
    return ProjectionTable(
        jnp.int32(c["table"][0]), jnp.int32(c["table"][1]), jnp.float32(c["table"][2]), mapped, c["slots"],
        jnp.float32(c["rest"]) if c["rest"].any() else None,
    )  # fmt: skip


def teacher_of(c, mesh=None, taken=False):
    table = place(table_of(c), Shards.of(mesh))
    tokens = jnp.int32(c["tokens"]) if taken else None
    return Teacher(jnp.float32(c["teacher_hidden"]), rows_of(jnp.float32(c["Et"]), table), table, tokens)


def named_teacher_of(c, tau, k, taken=False):
    """What a store of the teacher's k likeliest tokens holds, made in float64."""
    t = (c["teacher_hidden"] @ c["Et"].T)[..., :TEXT_VT]
    ids = np.argsort(-t, axis=-1)[..., :k]
    logs = [np.take_along_axis(np.log(softmax(t / x)), ids, axis=-1) for x in (tau, 1.0)]
    slots = np.argsort(c["W"] == 0, axis=1, kind="stable")[:, :4]
    weights = np.take_along_axis(c["W"], slots, axis=1)
    rows = ProjectionRows(jnp.int32(np.where(weights > 0, slots, -1)), jnp.float32(weights))
    tokens = jnp.int32(c["tokens"]) if taken else None
    return TopKTeacher(jnp.int32(ids), *map(jnp.float32, logs), rows, tokens)


def run(c, tau, smoothing=0.0, block=512, mesh=None, kd=True, teacher=None, **options):
    if kd and teacher is None:
        teacher = teacher_of(c, mesh)

    def f(h, E):
        return distill(
            h, E, jnp.int32(c["labels"]), jnp.float32(c["ce_w"]), teacher=teacher,
            kl_weights_BxL=jnp.float32(c["kl_w"]) if kd else None, temperature=tau, label_smoothing=smoothing,
            text_vocab=TEXT_VS, block=block, mesh=mesh, **options,
        )  # fmt: skip

    g = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))
    (loss, out), grads = g(jnp.float32(c["hidden"]), jnp.float32(c["E"]))
    return loss, out, grads


def rows_of_w(c):
    """Its entries and, in the last column, what they leave."""
    return np.concatenate([c["W"], c["rest"][:, None]], axis=1)


def softmax_of_support(logits_VtxVs1, W):
    """W from the logits of its entries."""
    return jnp.where(W > 0, jax.nn.softmax(jnp.where(W > 0, logits_VtxVs1, -1e30), axis=1), 0)


def plain(c, tau, kind, skew, k, taken=False):
    """The loss written down with whole matrices and differentiated by JAX in float64. taken: the mass of the teacher's
    token goes to the label."""
    with jax.enable_x64(True):
        x = {name: jnp.asarray(value) for name, value in c.items() if name != "table"}

        def f(h, E, logits):
            z = (h @ E.T)[..., :TEXT_VS]
            t = (x["teacher_hidden"] @ x["Et"].T)[..., :TEXT_VT]
            q = jax.nn.softmax(t / tau)
            W = softmax_of_support(logits, rows_of_w(c))[:TEXT_VT, :TEXT_VS]
            if k:
                q = jnp.where(t >= jnp.sort(t)[..., -k][..., None], q, 0)
            p, s = q @ W, jax.nn.softmax(z / tau)
            if taken:
                q_taken = jnp.take_along_axis(q, x["tokens"][..., None], axis=-1)
                p = p + q_taken * (jnp.eye(TEXT_VS)[x["labels"]] - W[x["tokens"]])
            u = jnp.full(p.shape, 1 / TEXT_VS)
            if k or c["rest"].any():  # cells: the tokens reached, and one for all others
                on = p > 0
                rest = lambda a: jnp.sum(jnp.where(on, 0, a), axis=-1, keepdims=True)  # noqa: E731
                cells = lambda a, r: jnp.concatenate([jnp.where(on, a, 0), r], axis=-1)  # noqa: E731
                p, s, u = cells(p, 1 - jnp.sum(p, -1, keepdims=True)), cells(s, rest(s)), cells(u, rest(u))
            kl = lambda a, b: jnp.sum(  # noqa: E731
                jnp.where(a > 0, a * (jnp.log(jnp.where(a > 0, a, 1)) - jnp.log(jnp.where(a > 0, b, 1))), 0), -1
            )
            m = {"skewed_reverse": (1 - skew) * p + skew * s}.get(kind, skew * p + (1 - skew) * s)
            divergence = {
                "forward": lambda: kl(p, s),
                "reverse": lambda: kl(s, (1 - UNIFORM) * p + UNIFORM * u),
                "skewed_forward": lambda: kl(p, m),
                "skewed_reverse": lambda: kl(s, m),
                "jsd": lambda: skew * kl(p, m) + (1 - skew) * kl(s, m),
            }[kind]()
            log_s1 = jax.nn.log_softmax(z)
            ce = -jnp.take_along_axis(log_s1, x["labels"][..., None], -1)[..., 0]
            return jnp.sum(x["ce_w"] * ce + x["kl_w"] * tau**2 * divergence), divergence

        logits = jnp.log(jnp.maximum(jnp.asarray(rows_of_w(c)), 1e-30))
        grad = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)
        (loss, divergence), grads = grad(x["hidden"], x["E"], logits)
        return jax.tree.map(np.asarray, (loss, divergence, grads))


def close(c, found, expected):
    """Within 1e-5 of the largest number of each array."""
    (loss, out, grads), (r_loss, r_divergence, r_grads) = found, expected
    np.testing.assert_allclose(loss, r_loss, rtol=1e-5)
    np.testing.assert_allclose(out.kl_BxL, r_divergence * (c["kl_w"] > 0), rtol=1e-5, atol=2e-6)
    for a, b in zip(grads, r_grads, strict=False):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("kind, k, tau", [(kind, k, 3.0) for kind in KINDS for k in (0, 5)] + [("forward", 1, 1.0)])
def test_every_divergence_equals_its_definition_in_float64(case, kind, k, tau):
    """With all of the teacher and with its k likeliest tokens, whether it is at hand or was stored."""
    skew = 0.5 if kind == "jsd" else 0.1
    expected = plain(case, tau, kind, skew, k)
    close(case, run(case, tau, block=7, divergence=kind, skew=skew, top_k=k), expected)
    if k:
        stored = run(case, tau, block=7, divergence=kind, skew=skew, teacher=named_teacher_of(case, tau, k))
        close(case, stored, expected)
        np.testing.assert_allclose(
            stored[1].kl1_BxL, plain(case, 1.0, "forward", skew, k)[1] * (case["kl_w"] > 0), rtol=1e-5, atol=2e-6
        )


@pytest.mark.parametrize("kind, k", [(kind, 0) for kind in KINDS] + [("forward", 4), ("jsd", 4)])
def test_what_rows_leave_is_compared_as_one_cell(leaving, kind, k):
    skew = 0.5 if kind == "jsd" else 0.1
    expected = plain(leaving, 3.0, kind, skew, k)
    close(leaving, run(leaving, 3.0, block=7, divergence=kind, skew=skew, top_k=k), expected)
    with jax.set_mesh(mesh := make_mesh(2, 2, 2)):
        close(leaving, run(leaving, 3.0, block=7, divergence=kind, skew=skew, top_k=k, mesh=mesh), expected)


@pytest.mark.parametrize("which, k", [("case", 0), ("case", 5), ("leaving", 0), ("leaving", 5)])
def test_the_mass_of_the_token_that_follows_goes_to_the_label(request, which, k):
    """Whatever W says of it; from entries, from placed entries and from rows."""
    c = request.getfixturevalue(which)
    expected = plain(c, 3.0, "forward", 0.1, k, taken=True)
    close(c, run(c, 3.0, block=7, top_k=k, teacher=teacher_of(c, taken=True)), expected)
    with jax.set_mesh(mesh := make_mesh(2, 2, 2)):
        many = run(c, 3.0, block=7, top_k=k, teacher=teacher_of(c, mesh, taken=True), mesh=mesh)
    close(c, many, expected)
    if k and which == "case":
        close(c, run(c, 3.0, block=7, teacher=named_teacher_of(c, 3.0, k, taken=True)), expected)


CASES = [(kind, 5, None) for kind in KINDS] + [("forward", 0, None), ("forward", 5, (2, 2, 2)), ("jsd", 0, (2, 2, 2))]


CASES = [("case", *c) for c in CASES] + [("leaving", *c) for c in CASES if c[0] in ("forward", "jsd")]


@pytest.mark.parametrize("which, kind, k, shape", CASES)
def test_w_learns_through_every_divergence(request, which, kind, k, shape):
    """The gradient with respect to the logits of W's rows, from entries, from placed entries and from rows."""
    case = request.getfixturevalue(which)
    mesh = shape and make_mesh(*shape)
    logits = jnp.log(jnp.maximum(jnp.float32(rows_of_w(case)), 1e-30))
    expected = plain(case, 2.0, kind, 0.3, k)[2][2]

    def loss(logits, teacher):
        W = softmax_of_support(logits, rows_of_w(case))
        if isinstance(teacher, TopKTeacher):
            weights = jnp.take_along_axis(W, jnp.maximum(teacher.projection.ids, 0), axis=1)
            rows = teacher.projection._replace(weights=jnp.where(teacher.projection.ids >= 0, weights, 0))
            teacher = teacher._replace(projection=rows)
        else:
            teacher = teacher._replace(projection=with_weights(teacher.projection, W))
        return distill(
            jnp.float32(case["hidden"]), jnp.float32(case["E"]), jnp.int32(case["labels"]), jnp.float32(case["ce_w"]),
            teacher=teacher, kl_weights_BxL=jnp.float32(case["kl_w"]), temperature=2.0, divergence=kind, skew=0.3,
            top_k=k, text_vocab=TEXT_VS, block=7, mesh=mesh,
        )[0]  # fmt: skip

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        for teacher in (teacher_of(case, mesh), named_teacher_of(case, 2.0, k)) if k else (teacher_of(case, mesh),):
            found = jax.jit(jax.grad(loss))(logits, teacher)
            assert np.abs(expected).max() > 1e-3
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), equal_nan=False)


def test_a_remainder_is_taught_and_not_renormalised_away(case):
    """With one token of the teacher, what the student puts anywhere else is pushed towards the teacher's remainder."""
    full, _, _ = plain(case, 1.0, "forward", 0.1, 0)
    coarse, _, _ = plain(case, 1.0, "forward", 0.1, 3)
    assert coarse < full  # coarser cells can only lose divergence
    assert float(run(case, 1.0, top_k=TEXT_VT)[0]) == pytest.approx(float(full), rel=1e-5)


@pytest.mark.parametrize("tau", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("block", [7, 16, 512])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradients_equal_the_float64_reference(case, tau, block, smoothing):
    loss, out, (dh, dE) = run(case, tau, smoothing, block)
    r_loss, ce, kl, kl1, prediction, r_dh, r_dE = reference(case, tau, smoothing)
    used, taught = case["ce_w"] > 0, case["kl_w"] > 0
    np.testing.assert_allclose(loss, r_loss, rtol=1e-5)
    np.testing.assert_allclose(dh, r_dh, rtol=1e-4, atol=1e-5 * np.abs(r_dh).max())
    np.testing.assert_allclose(dE, r_dE, rtol=1e-4, atol=1e-5 * np.abs(r_dE).max())
    np.testing.assert_allclose(out.ce_BxL, ce * used, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(out.kl_BxL, kl * taught, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(out.kl1_BxL, kl1 * taught, rtol=1e-4, atol=2e-6)
    np.testing.assert_array_equal(out.prediction_BxL, prediction * used)


def test_a_mesh_of_eight_gives_the_numbers_of_one_device(case):
    one = run(case, 2.0, block=7)
    for shape in ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1), (1, 4, 2)):
        mesh = make_mesh(*shape)
        with jax.set_mesh(mesh):
            many = run(case, 2.0, block=7, mesh=mesh)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one, many)


@pytest.mark.parametrize("options", [{"divergence": "jsd"}, {"top_k": 3}, {"smoothing": 0.1}, {"stored": 4}])
def test_so_do_the_other_losses(case, options):
    """On a mesh whose axes do both: hand tokens to each other, and cut the vocabulary."""
    stored = options.pop("stored", 0)
    teacher = named_teacher_of(case, 2.0, stored) if stored else None
    one = run(case, 2.0, block=7, teacher=teacher, **options)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        many = run(case, 2.0, block=7, teacher=teacher, mesh=mesh, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), one, many)


def test_a_projection_that_was_not_placed_is_refused(case):
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="place"):
        run(case, 1.0, mesh=mesh, teacher=teacher_of(case))


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8), (1, 2, 4), (1, 4, 2), (2, 2, 2)])
def test_rows_are_dealt_out_and_collected(shape):
    """Shard r holds rows r, r + S, ... of the matrix, whole; back again it is as it was stored."""
    mesh = make_mesh(*shape)
    shards = Shards.of(mesh)
    matrix = jnp.arange(150.0 * 12).reshape(150, 12)
    stored = shards.padded(matrix, mesh)
    S, at = shards.size, PartitionSpec(shards.axes)
    deal = jax.shard_map(shards.deal, mesh=mesh, in_specs=shards.stored, out_specs=at, check_vma=False)
    collect = jax.shard_map(shards.collect, mesh=mesh, in_specs=at, out_specs=shards.stored, check_vma=False)
    with jax.set_mesh(mesh):
        dealt = jax.jit(deal)(stored)
        np.testing.assert_array_equal(jax.jit(collect)(dealt), stored)
    rows = np.asarray(dealt).reshape(S, -1, stored.shape[1])
    for r in range(S):
        np.testing.assert_array_equal(rows[r], np.asarray(stored)[r::S])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_placed_entries_are_the_entries_of_w(case, size):
    """Each lies on the shard of its student token, in order, once; the filling weighs nothing."""
    shards = Shards(("tensor",), size)
    table, placed = table_of(case), place(table_of(case), shards)
    assert isinstance(placed, PlacedTable)
    rows, H = len(placed.weights) // size, len(placed.heavy)
    W = np.zeros_like(case["W"])
    for r in range(size):
        teacher_ids, segments, weights = (np.asarray(x)[r * rows : (r + 1) * rows] for x in placed[:3])
        assert (np.diff(segments) >= 0).all()
        students = np.where(
            segments < H, np.asarray(placed.heavy)[np.minimum(segments, H - 1)], (segments - H) * size + r
        )
        np.add.at(W, (teacher_ids[weights > 0], students[weights > 0]), weights[weights > 0])
    np.testing.assert_array_equal(W, np.float32(case["W"]))
    assert np.asarray(placed.first).sum() == len(np.unique(np.asarray(table.teacher_ids)))


def test_a_token_of_thousands_fills_no_shard():
    """A student token that is the first piece of most teacher tokens: its entries are spread, and its sum is right."""
    r = np.random.default_rng(0)
    students = np.sort(np.where(r.uniform(size=4096) < 0.9, 5, r.integers(0, 64, 4096)))
    table = ProjectionTable(
        jnp.arange(4096), jnp.int32(students), jnp.ones(4096), jnp.ones(4096, bool), jnp.arange(4096)
    )
    mesh = make_mesh(1, 8, 1)
    shards = Shards.of(mesh)
    placed = place(table, shards)
    assert 5 in np.asarray(placed.heavy) and len(placed.weights) <= 1.01 * 4096 + 8 * 128
    mass = jnp.asarray(r.uniform(size=(4096, 3)), jnp.float32)
    expected = np.zeros((64, 3))
    np.add.at(expected, students, np.asarray(mass, np.float64))

    def back_and_forth(placed, mass):
        p = placed.gather(mass, 8, shards)
        return p, placed.spread(p, shards)

    specs = (PlacedTable.specs(shards), PartitionSpec(shards.axes))
    with jax.set_mesh(mesh):
        f = jax.shard_map(back_and_forth, mesh=mesh, in_specs=specs, out_specs=(specs[1],) * 2, check_vma=False)
        rows = mass[placed.teacher_ids] * placed.weights[:, None]
        p, spread = jax.jit(f)(placed, rows)
    p = np.asarray(p).reshape(8, 8, 3).swapaxes(0, 1).reshape(64, 3)  # row j of shard r is token 8 j + r
    np.testing.assert_allclose(p, expected, rtol=1e-5)
    used = np.asarray(placed.weights) > 0
    np.testing.assert_allclose(
        np.asarray(spread)[used], expected[students[np.asarray(placed.teacher_ids)[used]]], rtol=1e-5
    )


def test_the_block_is_chosen_from_shapes_and_memory(case):
    assert block_size(2048) == 512  # of a small vocabulary, as many as a CPU takes
    huge = Teacher(None, jax.ShapeDtypeStruct((262_144, 4), jnp.float32), None)
    assert 8 <= block_size(128_256, huge) < 128  # 5.7 MB a token
    assert block_size(128_256, huge, make_mesh(1, 2, 4)) > 2 * block_size(128_256, huge)


def test_without_a_teacher_it_is_cross_entropy_and_score_agrees(case):
    loss, out, _ = run(case, 1.0, kd=False, block=10)
    _, ce, *_ = reference(case, 1.0, 0.0)
    np.testing.assert_allclose(loss, (ce * case["ce_w"]).sum(), rtol=1e-5)
    args = jnp.float32(case["hidden"]), jnp.float32(case["E"]), jnp.int32(case["labels"]), jnp.float32(case["ce_w"])
    ce_s, prediction = score(*args, text_vocab=TEXT_VS, block=10)
    np.testing.assert_allclose(ce_s, out.ce_BxL, rtol=1e-6)
    np.testing.assert_array_equal(prediction, out.prediction_BxL)


def test_no_intermediate_holds_the_logits_of_all_tokens(case):
    """The compiled step's temporaries stay far below one [tokens, Vs] matrix when the tokens outnumber the block."""
    tokens, vocab, d = 4096, 2048, 16
    h, E = jnp.ones((1, tokens, d)), jnp.ones((vocab, d))
    labels, w = jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens))
    f = jax.jit(jax.grad(lambda h, E: distill(h, E, labels, w, block=128)[0], argnums=(0, 1)))
    temporary = f.lower(h, E).compile().memory_analysis().temp_size_in_bytes
    assert temporary < tokens * vocab * 4 / 4


def test_the_gradient_scales_with_what_is_built_on_top(case):
    """custom_vjp: the stored gradients are scaled by the cotangent, not returned as they are."""
    h, E = jnp.float32(case["hidden"]), jnp.float32(case["E"])
    labels, w = jnp.int32(case["labels"]), jnp.float32(case["ce_w"])
    f = lambda k: jax.grad(lambda h: k * distill(h, E, labels, w, text_vocab=TEXT_VS)[0])(h)  # noqa: E731
    np.testing.assert_allclose(3 * f(1.0), f(3.0), rtol=1e-6)

"""The streamed head against float64 references, whatever the block, the mesh and the temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax.losses.head import Teacher, distill, score
from distil_jax.losses.kd import ProjectionTable
from distil_jax.sharding import make_mesh

B, L, D, DT, VS, VT, TEXT_VS, TEXT_VT = 8, 9, 6, 5, 23, 37, 21, 34


@pytest.fixture(scope="module")
def case():
    r = np.random.default_rng(0)
    W = np.zeros((VT, VS))
    for v in range(TEXT_VT):
        ids = r.choice(TEXT_VS, size=r.integers(1, 4), replace=False)
        W[v, ids] = r.dirichlet(np.ones(len(ids)))
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
        table=(teacher_ids, student_ids, W[teacher_ids, student_ids]),
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


def run(c, tau, smoothing=0.0, block=512, mesh=None, kd=True, jit=True):
    table = ProjectionTable(
        jnp.int32(c["table"][0]), jnp.int32(c["table"][1]), jnp.float32(c["table"][2]), jnp.arange(VT - 1) < TEXT_VT
    )
    teacher = Teacher(jnp.float32(c["teacher_hidden"]), jnp.float32(c["Et"]), table) if kd else None

    def f(h, E):
        return distill(
            h, E, jnp.int32(c["labels"]), jnp.float32(c["ce_w"]), teacher=teacher,
            kl_weights_BxL=jnp.float32(c["kl_w"]) if kd else None, temperature=tau, label_smoothing=smoothing,
            text_vocab=TEXT_VS, block=block, mesh=mesh,
        )  # fmt: skip

    g = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)
    (loss, out), grads = (jax.jit(g) if jit else g)(jnp.float32(c["hidden"]), jnp.float32(c["E"]))
    return loss, out, grads


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
    for shape in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
        mesh = make_mesh(*shape)
        with jax.set_mesh(mesh):
            many = run(case, 2.0, block=7, mesh=mesh)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, many)


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

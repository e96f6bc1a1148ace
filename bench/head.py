"""The loss head at the real vocabularies, three ways: streamed, whole logits in JAX, whole logits in PyTorch.

    python bench/head.py [--tokens 1024 --teacher 262144 2560 --student 128256 2048 --block 0]

alpha CE + (1 - alpha) tau^2 KL(W^T q || s), its value and its gradients for the hidden states and the unembedding,
float32, CPU. W is random with a mean support of 1.12. First what each form adds to resident memory at its peak
(gradients included) in a process of its own, then seconds, in turns in one process; value and gradients of all three
must agree. At the default sizes that process needs about 14 GB.
"""

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from memory import peak_of, resident
from timing import side_by_side

from distil_jax.losses.head import Teacher, distill
from distil_jax.losses.kd import ProjectionTable, project

ALPHA = 0.5
SUPPORT = 1.12  # student tokens that a teacher token becomes, in the mean


class Inputs(NamedTuple):
    """Host arrays. Teacher states speak about the same positions as the student's."""

    hidden_NxD: np.ndarray
    E_VsxD: np.ndarray
    teacher_hidden_NxDt: np.ndarray
    Et_VtxDt: np.ndarray
    labels_N: np.ndarray
    teacher_ids: np.ndarray  # W, its entries sorted by student token
    student_ids: np.ndarray
    weights: np.ndarray


Value = tuple[Any, tuple[Any, Any]]  # the loss, its gradients for the hidden states and the unembedding


def make_inputs(tokens: int, teacher: tuple[int, int], student: tuple[int, int]) -> Inputs:
    (Vt, Dt), (Vs, D) = teacher, student
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        array = rng.standard_normal(shape, np.float32)
        array *= scale
        return array

    second = rng.choice(Vt, round((SUPPORT - 1) * Vt), replace=False)
    teacher_ids = np.concatenate([np.arange(Vt), second])
    student_ids = np.concatenate([rng.integers(0, Vs, Vt), rng.integers(0, Vs, len(second))])
    share = rng.uniform(0.05, 0.5, len(second))  # of the second entry
    first = np.ones(Vt)
    first[second] -= share
    order = np.argsort(student_ids, kind="stable")
    return Inputs(
        normal(tokens, D), normal(Vs, D, scale=2 * D**-0.5),
        normal(tokens, Dt), normal(Vt, Dt, scale=2 * Dt**-0.5),
        rng.integers(0, Vs, tokens).astype(np.int32),
        teacher_ids[order].astype(np.int32), student_ids[order].astype(np.int32),
        np.concatenate([first, share])[order].astype(np.float32),
    )  # fmt: skip


def jax_form(loss: Callable[..., jax.Array], given: Inputs, printed: bool) -> Callable[[], Value]:
    arrays = Inputs(*(jnp.asarray(array) for array in given))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()
    if printed:
        print(f"{compiled.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB of temporaries, says the compiler")
    return lambda: compiled(*arrays)


def streamed(block, temperature, hidden, E, teacher_hidden, Et, labels, teacher_ids, student_ids, weights):
    table = ProjectionTable(teacher_ids, student_ids, weights, jnp.ones(Et.shape[0], bool), jnp.arange(len(weights)))
    tokens = labels.shape[0]
    return distill(
        hidden[None], E, labels[None], jnp.full((1, tokens), ALPHA / tokens),
        teacher=Teacher(teacher_hidden[None], Et, table), kl_weights_BxL=jnp.full((1, tokens), (1 - ALPHA) / tokens),
        temperature=temperature, block=block,
    )[0]  # fmt: skip


def dense(temperature, hidden, E, teacher_hidden, Et, labels, teacher_ids, student_ids, weights):
    table = ProjectionTable(teacher_ids, student_ids, weights, jnp.ones(Et.shape[0], bool), jnp.arange(len(weights)))
    logits_NxVs = hidden @ E.T
    log_s_NxVs = jax.nn.log_softmax(logits_NxVs / temperature)
    q_VtxN = jax.nn.softmax(Et @ teacher_hidden.T / temperature, axis=0)
    p_NxVs = project(q_VtxN, table, E.shape[0]).T
    log_p = jnp.log(jnp.where(p_NxVs > 0, p_NxVs, 1.0))
    kl_N = jnp.sum(p_NxVs * (log_p - log_s_NxVs), axis=1)
    ce_N = -jnp.take_along_axis(jax.nn.log_softmax(logits_NxVs), labels[:, None], axis=1)[:, 0]
    return jnp.mean(ALPHA * ce_N + (1 - ALPHA) * temperature**2 * kl_N)


def torch_form(given: Inputs, temperature: float) -> Callable[[], Value]:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(os.cpu_count())
    hidden, E, teacher_hidden, Et = (torch.from_numpy(np.array(a, copy=None)) for a in given[:4])
    labels = torch.from_numpy(given.labels_N.astype(np.int64))
    W_VsxVt = torch.sparse_coo_tensor(
        np.stack([given.student_ids, given.teacher_ids]), torch.from_numpy(given.weights), (len(E), len(Et))
    ).to_sparse_csr()
    hidden.requires_grad_(True), E.requires_grad_(True)

    def value():
        with torch.no_grad():
            scores_NxVt = (teacher_hidden @ Et.T).div_(temperature)
            q_NxVt = torch.softmax(scores_NxVt, dim=1)
            del scores_NxVt
            p_NxVs = (W_VsxVt @ q_NxVt.T).T
            del q_NxVt
        logits_NxVs = hidden @ E.T
        kl = F.kl_div(F.log_softmax(logits_NxVs / temperature, dim=1), p_NxVs, reduction="sum") / len(labels)
        loss = ALPHA * F.cross_entropy(logits_NxVs, labels) + (1 - ALPHA) * temperature**2 * kl
        del logits_NxVs
        gradients = torch.autograd.grad(loss, (hidden, E))
        return loss.item(), gradients

    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--teacher", type=int, nargs=2, default=(262_144, 2560), help="vocabulary and width")
    parser.add_argument("--student", type=int, nargs=2, default=(128_256, 2048))
    parser.add_argument(
        "--block", type=int, default=0, help="tokens that the streamed head takes at once; 0: it chooses"
    )
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="measure the memory of this form, here")
    args = parser.parse_args()
    given = make_inputs(args.tokens, tuple(args.teacher), tuple(args.student))
    losses = {
        "distil_jax": functools.partial(streamed, args.block, args.temperature),
        "JAX, whole logits": functools.partial(dense, args.temperature),
    }
    forms = {"torch, whole logits": lambda: torch_form(given, args.temperature)}
    forms |= {name: lambda loss=loss: jax_form(loss, given, bool(args.only)) for name, loss in losses.items()}
    if args.only:
        form = forms[args.only]()
        resting = resident()
        print(f"{(peak_of(form)[0] - resting) / 2**30:.2f} GiB above the inputs at its peak")
        return

    for name in forms:
        out = subprocess.run([sys.executable, *sys.argv, "--only", name], check=True, stdout=subprocess.PIPE, text=True)
        print(f"{name:20s} {', '.join(out.stdout.splitlines())}", flush=True)
    made = {name: make() for name, make in forms.items()}
    value, gradients = made["torch, whole logits"]()
    gradients = [np.asarray(gradient) for gradient in gradients]
    for name in losses:
        other, others = made[name]()
        np.testing.assert_allclose(other, value, rtol=1e-4)
        for mine, theirs in zip(others, gradients, strict=True):
            error = np.linalg.norm(np.asarray(mine) - theirs) / np.linalg.norm(theirs)
            assert error < 1e-4, (name, error)
    print(f"value {float(value):.5f} and both gradients agree")
    side_by_side(made, args.rounds)


if __name__ == "__main__":
    main()

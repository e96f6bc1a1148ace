"""Where the training step's time goes, beside the time its matrix products need at the machine's own rate.

    python bench/step_profile.py TEACHER_DIR STUDENT_DIR [--rows 4 --length 126 --block 0 --remat dots --rounds 5]

Each part is jitted alone and all are run in turns in one process: the teacher's hidden states, the student's forward
pass, its forward and backward pass (from a given gradient of its hidden states), the head with its gradients, the
optimiser, the batch (from host memory to the device), and the whole step. The floor of a part is its matrix products
alone, at the shapes of the model, timed here too: what is left is everything that is no matrix product, and what XLA
makes of these.
"""

import jax
import jax.numpy as jnp
import numpy as np
from step_case import ALPHA, arguments, make_case, make_ours
from timing import side_by_side

from distil_jax import sharding
from distil_jax.losses.head import Teacher, block_size, distill
from distil_jax.tokens.align import ROOT


def products(config, tokens: int) -> list[tuple[int, tuple[int, int, int]]]:
    """(how many, (rows, inner, columns)) of the forward products with the kernels of a model's layers."""
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    Q, KV = config.num_attention_heads * K, config.num_key_value_heads * K
    N = config.num_hidden_layers
    return [(N * n, (tokens, a, b)) for n, a, b in ((1, D, Q), (2, D, KV), (1, Q, D), (2, D, F), (1, F, D))]


def backward(forward: list[tuple[int, tuple[int, int, int]]]) -> list[tuple[int, tuple[int, int, int]]]:
    """Those of the gradients of both factors."""
    return [(n, shape) for n, (t, a, b) in forward for shape in ((t, b, a), (a, t, b))]


def seconds_of_products(shapes: list[tuple[int, int, int]], rounds: int) -> dict[tuple[int, int, int], float]:
    """Median seconds of one product of each shape, jnp.dot, float32."""
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(shapes)))
    forms = {}
    for m, k, n in shapes:
        a, b = jax.random.normal(next(keys), (m, k)), jax.random.normal(next(keys), (k, n))
        dot = jax.jit(jnp.dot)
        forms[str((m, k, n))] = lambda a=a, b=b, dot=dot: dot(a, b)
    medians = side_by_side(forms, rounds)
    for (m, k, n), seconds in zip(shapes, medians.values(), strict=True):
        print(f"{str((m, k, n)):40s} {2e-9 * m * k * n / seconds:9.0f} GFLOP/s")
    return dict(zip(shapes, medians.values(), strict=True))


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    case = make_case(args.teacher, args.student, rows=args.rows, length=args.length, temperature=1.0)
    made = make_ours(case, args.block, args.remat)
    objective, frozen, batch = made.loss.objective, made.frozen, made.batch
    params = jax.tree.map(jnp.copy, made.state["params"]["model"])
    tokens = args.rows * args.length
    state = made.state

    def hidden(model, params, side):
        fields = {name: batch[f"{side}_{name}"] for name in ("segment_ids", "positions")}
        return model.hidden(params, batch[f"{side}_tokens"], **fields)

    teacher_forward = jax.jit(lambda p: hidden(objective.teacher, p, "teacher"))
    forward = jax.jit(lambda p: hidden(objective.model, p, "student"))
    both = jax.jit(lambda p, d: jax.vjp(lambda p: hidden(objective.model, p, "student"), p)[1](d)[0])

    @jax.jit
    def head(states, p, teacher_states, frozen):
        weights = batch["student_weights"] / jnp.sum(batch["student_weights"])
        taught = ((batch["role"] == ROOT) & (weights > 0)) * (1 - ALPHA)
        at = jnp.take_along_axis(teacher_states, batch["teacher_position"][..., None], axis=1)
        teacher = Teacher(at, objective.teacher.unembedding(frozen.teacher), frozen.projection)

        def loss(states, E):
            return distill(
                states, E, batch["student_targets"], weights * (1 - taught), teacher=teacher,
                kl_weights_BxL=weights * taught, block=args.block, mesh=objective.mesh,
            )[0]  # fmt: skip

        return jax.value_and_grad(loss, argnums=(0, 1))(states, objective.model.unembedding(p))

    def update(gradient, opt_state, p):
        updates, opt_state = made.optimizer.update(gradient, opt_state, p)
        return jax.tree.map(jnp.add, p, updates), opt_state

    update = jax.jit(update, donate_argnums=(1, 2))
    states, teacher_states = forward(params), teacher_forward(frozen.teacher)
    gradient = {"model": both(params, jnp.ones_like(states) / tokens)}
    learning = jax.tree.map(jnp.copy, (state["opt_state"], state["params"]))

    def optimiser():
        nonlocal learning
        opt_state, p = learning
        p, opt_state = update(gradient, opt_state, p)
        learning = opt_state, p
        return p

    def step():
        nonlocal state
        state, report = made.update(state, frozen, batch)
        return report["loss"]

    student, teacher = objective.model.config, objective.teacher.config
    head_block = args.block or block_size(
        student.vocab_size, Teacher(None, objective.teacher.unembedding(frozen.teacher), None)
    )
    taught = -(-int(((case.batch["role"] == ROOT) & (case.batch["student_weights"] > 0)).sum()) // head_block)
    blocks = -(-tokens // head_block)
    student_head = [(blocks, (student.vocab_size, student.hidden_size, head_block))]
    student_head += [(blocks, (head_block, student.vocab_size, student.hidden_size))]
    student_head += [(blocks, (student.vocab_size, head_block, student.hidden_size))]
    parts = {
        "whole step": (step, None),
        "teacher forward": (lambda: teacher_forward(frozen.teacher), products(teacher, tokens)),
        "student forward": (lambda: forward(params), products(student, tokens)),
        "student forward and backward": (
            lambda: both(params, states),
            products(student, tokens) + backward(products(student, tokens)),
        ),
        "head": (
            lambda: head(states, params, teacher_states, frozen),
            student_head + [(taught, (teacher.vocab_size, teacher.hidden_size, head_block))],
        ),
        "optimiser": (optimiser, []),
        "batch": (lambda: sharding.put_batch({k: np.asarray(v) for k, v in case.batch.items()}, objective.mesh), []),
    }
    shapes = sorted({shape for _, floor in parts.values() for _, shape in floor or ()})
    one = seconds_of_products([(2048, 2048, 2048), *shapes], args.rounds)
    best = 2 * 2048**3 / one[2048, 2048, 2048]
    medians = side_by_side({name: form for name, (form, _) in parts.items()}, args.rounds)
    whole = [parts[name][1] for name in ("teacher forward", "student forward and backward", "head")]
    floors = {name: sum(whole, []) if floor is None else floor for name, (_, floor) in parts.items()}
    print(f"{'':30s} {'seconds':>8s} {'floor':>8s} {'at best':>8s} {'ratio':>8s}")
    for name, seconds in medians.items():
        floor = sum(n * one[shape] for n, shape in floors[name])
        ideal = sum(n * 2 * np.prod(shape, dtype=float) for n, shape in floors[name]) / best
        print(f"{name:30s} {seconds:8.3f} {floor:8.3f} {ideal:8.3f} {seconds / floor if floor else np.nan:8.2f}")


if __name__ == "__main__":
    main()

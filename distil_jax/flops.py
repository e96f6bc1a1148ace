"""Floating-point operations of a step, counted from the models, and the least time that chips need for them.

A product [m, k] x [k, n] counts 2 m k n. Attention counts the keys that a query sees: half of a row, or the window.
Norms, activations and softmaxes are left out. `model` is what the mathematics asks for (Chowdhery et al. 2022, "PaLM",
appendix B) and what MFU is told by; `run` counts in what rematerialisation computes again.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from distil_jax.chips import Chip


class Flops(NamedTuple):
    """Of one step, over all devices."""

    student: float  # forward and backward, of the layers
    teacher: float  # forward
    heads: float  # scores of both vocabularies, and the gradient of the student's
    again: float  # what remat computes a second time

    @property
    def model(self) -> float:
        return self.student + self.teacher + self.heads

    @property
    def run(self) -> float:
        return self.model + self.again


def of_step(objective: Any, learns: Any, projection: Any, batch: Any) -> Flops:
    """Of a step with this objective.Objective. learns: params of objective.Loss; projection: of Frozen. All positions
    count as supervised and taught, and of arrays only the shapes matter."""
    o = objective
    model, rows = o.model, next(iter(batch.values())).shape[0]
    length = {side: batch[f"{side}_tokens"].shape[1] for side in ("student", "teacher")}
    own = forward(model, rows, length[o.side])
    backward = own if "adapter" in learns else 2 * own  # kernels that do not learn have no gradient
    tokens = rows * length[o.side]
    V, D = model.config.vocab_size, model.config.hidden_size
    head = "embedding" if model.config.tie_word_embeddings else "lm_head"
    heads = 2 * tokens * V * D * (3 if head in learns.get("model", {}) else 2)
    teacher = 0.0
    if o.teacher is not None:
        teacher = forward(o.teacher, rows, length["teacher"])
        scored = getattr(projection, "teacher_ids", np.zeros(0)).shape[0]  # a row for each entry of W, at least
        heads += 2 * tokens * max(scored, o.teacher.config.vocab_size) * o.teacher.config.hidden_size
    return Flops(own + backward, teacher, heads, own if o.remat == "full" else 0.0)


def forward(model: Any, rows: int, length: int) -> float:
    """One pass through the layers of a model, without embedding and head."""
    c = model.config
    kernels = jax.tree.leaves(model.abstract_params()["layers"])
    products = 2 * rows * length * sum(k.size for k in kernels if len(k.shape) > 2)
    kinds, of_layer = model.layer_kinds()
    seen = sum(min(length / 2, kinds[kind].window or length) for kind in of_layer)
    return products + 4 * rows * length * seen * c.num_attention_heads * c.head_dim


class Bound(NamedTuple):
    """The least seconds that a step can take, by what it waits for."""

    arithmetic: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def by(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))


def bound(plan: Any, chip: Chip, flops: Flops, sent_bytes: float) -> Bound:
    """sent_bytes: what one device receives in collectives.

    Memory is the least traffic: every pass over a model reads its parameters once, gathered, in the dtype of the
    computation or as they are held; the optimiser reads and writes parameters, moments and gradient once. Activations
    are left out.
    """
    o, devices = plan.objective, plan.objective.mesh.size
    cut = o.mesh.shape["tensor"]
    pieces, passes = plan.training.accumulate, 3 if o.remat == "full" else 2
    width = np.dtype(o.compute_dtype).itemsize
    learned, own = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (plan.state["params"], plan.frozen.own))
    traffic = pieces * passes * width * (learned + own) / cut
    traffic += pieces * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.frozen.teacher)) / cut
    traffic += 28 * learned / (o.mesh.shape["fsdp"] * cut)  # float32: three read, three written, and the gradient
    return Bound(flops.run / (devices * chip.flops), traffic / chip.bandwidth, sent_bytes / chip.links)

"""Adapters: the part of a run that learns when the student's own weights stay as they are (Hu et al. 2021).

`params["adapter"]` is a dict by the dotted path of the kernel, {"layers.attention.q": {"a": [N, in..., r],
"b": [N, r, out...]}}, float32. The base is `Frozen.own`, all of the model, in whatever dtype it is held. `attach` puts
the two together for the model to compute with (models/lora.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from distil_jax import sharding
from distil_jax.errors import UserError, nearest
from distil_jax.freezing import merge
from distil_jax.models.lora import Lora

Adapter = dict[str, dict[str, Any]]


def kernels(model: Any, targets: str) -> dict[str, int]:
    """Dotted path -> leading input axes of every stacked kernel that `targets` names.

    targets: dotted paths separated by commas, each of a kernel or of all kernels below it ("layers.mlp").
    Raises UserError for a path that leads to no kernel, and for no path at all.
    """
    known = {".".join(w.path): w.inputs for w in model.weights if w.stacked and w.inputs}
    chosen = {}
    for name in (part.strip() for part in targets.split(",") if part.strip()):
        found = {path: inputs for path, inputs in known.items() if path == name or path.startswith(f"{name}.")}
        if not found:
            raise UserError(
                f"student.lora.targets: no kernel {name!r}{nearest(name, known, cutoff=0)}; paths are dotted and "
                "separated by commas, and embeddings, norms and biases take no adapter"
            )
        chosen |= found
    if not chosen:
        raise UserError("student.lora.targets is empty: name the kernels to adapt, or set student.lora.rank to 0")
    return chosen


def init(model: Any, key: Array, targets: str, rank: int) -> Adapter:
    """Adapters that change nothing yet: `a` Gaussian with deviation 1/sqrt(inputs), `b` zero."""
    adapter = {}
    for n, (path, (a, b)) in enumerate(_each(model, targets, model.abstract_params(), lambda x: x.shape, rank)):
        inputs = jnp.prod(jnp.asarray(a[1:-1]))
        gaussian = jax.random.normal(jax.random.fold_in(key, n), a, jnp.float32)
        adapter[path] = {"a": gaussian * inputs**-0.5, "b": jnp.zeros(b, jnp.float32)}
    return adapter


def shardings(model: Any, mesh: Mesh, targets: str, rank: int) -> Adapter:
    """Where adapters lie: `a` is cut as the kernel's inputs are, `b` as its outputs."""
    axes = dict(_each(model, targets, model.logical_axes(), lambda x: x, None))
    shapes = dict(_each(model, targets, model.abstract_params(), lambda x: x.shape, rank))
    return {
        path: {name: sharding.place(mesh, axes[path][n], shapes[path][n]) for n, name in enumerate(("a", "b"))}
        for path in axes
    }


def attach(base: dict[str, Any], adapter: Adapter, scale: float) -> dict[str, Any]:
    """The parameters to compute with: `base` with a `Lora` in place of each adapted kernel; scale: alpha / rank."""
    for path, pair in adapter.items():
        base = _replaced(base, path.split("."), lambda kernel, pair=pair: Lora(kernel, pair["a"], pair["b"], scale))
    return base


def whole(params: dict[str, Any], own: dict[str, Any] | None, scale: float = 1.0) -> dict[str, Any]:
    """The model's whole parameters, from the parts that learn (`objective.Loss`) and what is frozen of it."""
    return attach(merge(params.get("model", {}), own or {}), params.get("adapter", {}), scale)


def _each(model, targets, tree, describe, rank):
    """(path, (of a, of b)) of every target; describe: a leaf of `tree` -> its shape, or its axes, as a tuple."""
    for path, inputs in kernels(model, targets).items():
        leaf = tree
        for key in path.split("."):
            leaf = leaf[key]
        layers, *rest = describe(leaf)
        yield path, ((layers, *rest[:inputs], rank), (layers, rank, *rest[inputs:]))


def _replaced(tree, path, change):
    key, *below = path
    return tree | {key: _replaced(tree[key], below, change) if below else change(tree[key])}

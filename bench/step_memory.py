"""What the remat policies keep, and what adapters cost in two forms: temporaries of compiled gradients, nothing is run.

    python bench/step_memory.py [remat] [lora]

remat: a Llama of 16 layers of width 512 on 4 rows of 512, by the CPU compiler. lora: Llama 3.2 1B with a bfloat16
base on 4 rows of 1,024, by the TPU compiler (libtpu, no TPU): kernels as they are trained, x W + scale (x a) b, against
stacked kernels merged at every step. The tables are in docs/training.md.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from recipe_memory import STUDENT, one_chip, shapes

from distil_jax import lora
from distil_jax.models import hub
from distil_jax.models.decoder import REMAT
from distil_jax.models.int8 import cast
from distil_jax.objective import Frozen, Loss, Objective

MIDDLE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
TARGETS, RANK = "layers", 64


def batch_of(rows: int, length: int) -> dict[str, Any]:
    fields = ("tokens", "segment_ids", "positions", "targets", "weights")
    return {
        k: jax.ShapeDtypeStruct((rows, length), jnp.int32) for k in (*(f"student_{f}" for f in fields), "specialty")
    }


def temporaries(function: Any, *arguments: Any) -> str:
    m = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return f"{m.temp_size_in_bytes / 1e9:.2f} GB"


def remat() -> None:
    model, frozen = hub.model_from_config(MIDDLE), Frozen(jax.ShapeDtypeStruct((1,), jnp.float32))
    for name in REMAT:
        loss = Loss(Objective(model, remat=name))
        value = jax.grad(lambda p, f, b, loss=loss: loss({"model": p}, f, b, 0)[0])
        print(f"| `{name}` | {temporaries(value, model.abstract_params(), frozen, batch_of(4, 512))} |", flush=True)


def adapters() -> None:
    model, mesh = hub.model_from_config(STUDENT), one_chip()
    base = shapes(model.abstract_params("bfloat16"), mesh)
    adapter = shapes(jax.eval_shape(lambda: lora.init(model, jax.random.key(0), TARGETS, RANK)), mesh)
    rows = shapes(batch_of(4, 1024), mesh)
    loss = Loss(Objective(model, remat="full", compute_dtype="bfloat16", mesh=mesh))

    def thin(adapter, base, batch):
        return loss({"adapter": adapter}, Frozen(jnp.ones(1), own=base), batch, 0)[0]

    def stacked(adapter, base, batch):
        for path, inputs in lora.kernels(model, TARGETS).items():
            *above, last = path.split(".")
            base = tree = base | {above[0]: base[above[0]] | {above[1]: dict(base[above[0]][above[1]])}}
            for key in above:
                tree = tree[key]
            pair = cast(adapter[path], jnp.bfloat16)
            letters = "nxyr,nro->nxyo" if inputs == 2 else "nxr,nroz->nxoz" if tree[last].ndim == 4 else "nxr,nro->nxo"
            tree[last] = tree[last] + jnp.einsum(letters, pair["a"], pair["b"])
        return loss({"model": base}, Frozen(jnp.ones(1)), batch, 0)[0]

    with jax.set_mesh(mesh):
        for name, value in (("x W + scale (x a) b", thin), ("stacked kernels merged", stacked)):
            print(f"| {name} | {temporaries(jax.grad(value), adapter, base, rows)} |", flush=True)


if __name__ == "__main__":
    for part in sys.argv[1:] or ["remat", "lora"]:
        {"remat": remat, "lora": adapters}[part]()

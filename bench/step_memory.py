"""What the remat policies keep: temporaries of a compiled gradient, by the CPU compiler; nothing is run.

    python bench/step_memory.py

A Llama of 16 layers of width 512 on 4 rows of 512 tokens in float32. The table is in docs/training.md.
"""

import jax
import jax.numpy as jnp

from distil_jax.models import hub
from distil_jax.models.decoder import REMAT
from distil_jax.objective import Frozen, Loss, Objective

ROWS, LENGTH = 4, 512
SHAPE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    model, frozen = hub.model_from_config(SHAPE), Frozen(jax.ShapeDtypeStruct((1,), jnp.float32))
    fields = [f"student_{name}" for name in ("tokens", "segment_ids", "positions", "targets", "weights")]
    batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32) for name in (*fields, "specialty")}
    for name in REMAT:
        loss = Loss(Objective(model, remat=name))
        gradient = jax.jit(jax.grad(lambda p, f, b, loss=loss: loss({"model": p}, f, b, 0)[0]))
        memory = gradient.lower(model.abstract_params(), frozen, batch).compile().memory_analysis()
        print(f"| `{name}` | {memory.temp_size_in_bytes / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()

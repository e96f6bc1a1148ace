"""The real shapes through import and export: MedGemma 4B (a vision file) and Llama 3.2 1B, random bfloat16 weights.

    python bench/real_shapes.py

Writes up to 14 GB under the temporary directory, removes them, and needs about 12 GB of memory. Prints time and peak
memory of both imports; then exports the 1B and compares its logits with transformers'. The table is in
bench/RESULTS.md.
"""

import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from random_checkpoint import OURS, measure, random_checkpoint

from distil_jax.models import load_pretrained, save_pretrained

MEDGEMMA_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
    "image_token_index": 262144, "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}  # fmt: skip
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
}  # fmt: skip
VISION = {
    f"vision_tower.vision_model.encoder.layers.{layer}.mlp.fc1.weight": np.ones((4304, 1152), ml_dtypes.bfloat16)
    for layer in range(2)
}


def report(name: str, directory: Path, size: int) -> None:
    used = measure(OURS, directory)
    peak = used["bytes"]
    print(
        f"{name}: {size / 1e9:.2f} GB, {used['seconds']:.1f} s, peak {peak / 1e9:.2f} GB = {peak / size:.2f} x",
        flush=True,
    )


def main() -> None:
    spellings = {
        "language_model.model.*": lambda name: f"language_model.{name}",
        "model.language_model.*": lambda name: name.replace("model.", "model.language_model.", 1),
    }
    for spelling, rename in spellings.items():
        with random_checkpoint(MEDGEMMA_4B, 4_960_000_000, rename, VISION) as (directory, size):
            report(f"MedGemma 4B as {spelling}", directory, size)
    with random_checkpoint(LLAMA_1B, 5_000_000_000) as (directory, size), tempfile.TemporaryDirectory() as folder:
        report("Llama 3.2 1B", directory, size)
        model, params = load_pretrained(directory, dtype="bfloat16")
        start = time.perf_counter()
        save_pretrained(model, params, Path(folder) / "export")
        print(f"Llama 3.2 1B: exported in {time.perf_counter() - start:.1f} s", flush=True)
        compare(model, params, Path(folder) / "export")


def compare(model, params, directory: Path) -> None:
    import torch
    import transformers

    tokens = np.random.default_rng(0).integers(0, 128_000, (1, 24), dtype=np.int32)
    ours = np.asarray(jax.jit(model.apply)(params, tokens))
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.float().numpy()
    difference = np.abs(ours - logits)
    print(
        f"logits against transformers in bfloat16: deviation {logits.std():.3f}, mean difference "
        f"{difference.mean():.4f}, largest {difference.max():.4f}, same argmax at "
        f"{(ours.argmax(-1) == logits.argmax(-1)).mean():.0%} of {tokens.size} positions"
    )


if __name__ == "__main__":
    main()

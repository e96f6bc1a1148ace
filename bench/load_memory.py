"""Time and peak memory of loading a 4 GB checkpoint in 8 files, here and in transformers.

    python bench/load_memory.py

Writes 4 GB under the temporary directory and removes them. The table is in bench/RESULTS.md.
"""

from random_checkpoint import OURS, TRANSFORMERS, measure, random_checkpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 28, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def main(rounds: int = 2) -> None:
    with random_checkpoint(CONFIG, shard_bytes=530_000_000) as (directory, size):
        files = len(list(directory.glob("*.safetensors")))
        print(f"{size / 1e9:.2f} GB in {files} files")
        for _ in range(rounds):
            for name, script in (("distil_jax", OURS), ("transformers", TRANSFORMERS)):
                used = measure(script, directory)
                peak = used["bytes"]
                print(f"{name:14s} {used['seconds']:6.1f} s   peak {peak / 1e9:5.2f} GB = {peak / size:.2f} x")


if __name__ == "__main__":
    main()

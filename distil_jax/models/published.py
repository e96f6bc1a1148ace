"""The shapes of models whose recipes are in configs/, as their config.json states them.

For `distil-jax compile`, which asks before anything is fetched or a licence is accepted. Everything else reads the
config.json of the model itself.
"""

from typing import Any

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
}
_LLAMA_8B = _LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
_SCALED = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GEMMA_4B = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}

SHAPES: dict[str, dict[str, Any]] = {
    "google/medgemma-4b-it": _GEMMA_4B,
    "google/medgemma-4b-pt": _GEMMA_4B,
    "google/gemma-3-4b-it": _GEMMA_4B,
    "m42-health/Llama3-Med42-8B": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.2-1B": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rope_scaling": _SCALED,
    },
    "google/gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
    },
}
# Ids of the tokenizer where the model has more rows than that.
TOKENIZER_SIZES = {"gemma3_text": 262144}

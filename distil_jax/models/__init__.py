"""Teacher and student architectures: Gemma 3 and Llama, read from and written to Hugging Face directories."""

from distil_jax.models.config import RopeParameters
from distil_jax.models.decoder import Model
from distil_jax.models.gemma3 import Gemma3, Gemma3Config
from distil_jax.models.hub import load_pretrained, model_from_config, save_pretrained
from distil_jax.models.llama import Llama, LlamaConfig

__all__ = [
    "Gemma3",
    "Gemma3Config",
    "Llama",
    "LlamaConfig",
    "Model",
    "RopeParameters",
    "load_pretrained",
    "model_from_config",
    "save_pretrained",
]

"""Generation: prompts in, text out, with a key/value cache, sampling and streaming.

sampling.py picks tokens from logits, engine.py runs the model over batches of ids, text.py turns text to ids and back,
command.py is `distil-jax generate`.
"""

from distil_jax.generation.sampling import Sampling
from distil_jax.generation.text import Completion, complete, generate, stream

__all__ = ["Completion", "Sampling", "complete", "generate", "stream"]

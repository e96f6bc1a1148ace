"""Checkpoints of real shapes with random weights, and what a process of its own needs to load one."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from distil_jax.models import model_from_config, shards
from distil_jax.models.tensors import write_json, write_tensors


@contextlib.contextmanager
def random_checkpoint(
    config: dict, shard_bytes: int, rename: Callable[[str], str] = str, extra: dict | None = None
) -> Iterator[tuple[Path, int]]:
    """(directory, bytes of the model) with config.json and bfloat16 weights of deviation 0.02, norms near 1 or 0 as the
    family has them. Removed at the end. `extra`: further tensors."""
    model = model_from_config(config)
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(ml_dtypes.bfloat16)

    def tensors():
        yield from (extra or {}).items()
        for weight, leaf in shards.leaves(model):
            shape = weight.hf_shape(shards.layer_shape(weight, leaf.shape))
            for layer, name in enumerate(shards.names(weight, leaf.shape)):
                values = np.resize(np.roll(noise, 1000 * layer), shape)
                yield rename(name), values + values.dtype.type("norm" in name and not model.one_plus)

    with tempfile.TemporaryDirectory() as folder:
        write_tensors(tensors(), Path(folder), shard_bytes)
        write_json(Path(folder) / "config.json", config)
        yield Path(folder), 2 * sum(leaf.size for _, leaf in shards.leaves(model))


MEASURE = """
import json, re, sys, time
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
{prepare}
before, start = status("VmRSS"), time.perf_counter()
{load}
print(json.dumps({{"seconds": time.perf_counter() - start, "bytes": status("VmHWM") - before}}))
"""
OURS = MEASURE.format(
    prepare="import jax; from distil_jax.models import load_pretrained; jax.numpy.zeros(1).block_until_ready()",
    load="model, params = load_pretrained(sys.argv[1], dtype='bfloat16'); jax.block_until_ready(params)",
)
TRANSFORMERS = MEASURE.format(
    prepare="import torch, transformers; transformers.logging.disable_progress_bar(); "
    "from transformers.models.llama import modeling_llama",
    load="model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
    "sum(float(p.view(torch.int16).max()) for p in model.parameters())  # it maps the files and reads on first use",
)


def measure(script: str, directory: Path) -> dict[str, float]:
    """Seconds and peak resident bytes above those before, of loading in a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", script, str(directory)]
    out = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(out.splitlines()[-1])

"""Generation beside transformers on torch, CPU, float32: the same random weights, in one process, in turns.

    python bench/generation.py [smollm135m|gemma270m] [rounds]

Prefill is 8 x 128 tokens to the first new token of each; decode is 64 greedy tokens after that, at batch 1 and 8. Then,
each in a fresh process and in turns: seconds to load, resident memory that loading adds at its peak, and seconds from a
loaded model to the first token with a warm compilation cache.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

SHAPES = {
    "smollm135m": dict(
        model_type="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "gemma270m": dict(
        model_type="gemma3_text", vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=32_768,
    ),
}  # fmt: skip
PROMPT, NEW = 128, 64


def main(name: str = "smollm135m", rounds: int = 5) -> None:
    from distil_jax.models import model_from_config, save_pretrained

    model = model_from_config(SHAPES[name])
    params = jax.jit(model.init)(jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, params, Path(folder) / "model")
        del params
        speeds(Path(folder) / "model", rounds)
        loads(Path(folder) / "model", rounds)


def speeds(folder: Path, rounds: int) -> None:
    """Tokens per second, A B A B."""
    import torch
    from transformers import AutoModelForCausalLM

    from distil_jax.generation import engine, text
    from distil_jax.models import load_pretrained

    model, params = load_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)

    def jax_side(prompts, new):
        steps = engine.steps(model, params, list(prompts), max_new_tokens=new, sampling=text.GREEDY)
        return np.stack(list(steps), axis=1)

    def torch_side(prompts, new):
        ids = torch.tensor(prompts.astype(np.int64))
        with torch.inference_mode():
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, PROMPT:].numpy()

    sides = {"distil_jax": jax_side, "transformers": torch_side}
    for batch in (1, 8):
        prompts = rng.integers(5, 1000, (batch, PROMPT)).astype(np.int32)
        for form in sides.values():  # compiles
            form(prompts, 1), form(prompts, 3)
        prefill, decode = ({side: [] for side in sides} for _ in range(2))
        written = {}
        for _ in range(rounds):
            for side, form in sides.items():
                start = time.perf_counter()
                form(prompts, 1)
                first = time.perf_counter() - start
                start = time.perf_counter()
                written[side] = form(prompts, 1 + NEW)
                prefill[side].append(first)
                decode[side].append(time.perf_counter() - start - first)
        same = int((written["distil_jax"] == written["transformers"]).sum())
        for what, seconds, tokens in (("prefill", prefill, PROMPT), ("decode", decode, NEW)):
            rates = {side: batch * tokens / statistics.median(s) for side, s in seconds.items()}
            print(
                f"{what:8s} batch {batch}: "
                + "  ".join(f"{side} {rate:8.1f} tokens/s" for side, rate in rates.items())
                + f"   ratio {rates['distil_jax'] / rates['transformers']:.2f}"
            )
        print(f"         {same} of {written['distil_jax'].size} greedy tokens equal")


LOAD = {
    "distil_jax": """
from distil_jax.cli import use_compilation_cache
use_compilation_cache()
import jax
from distil_jax.generation import engine, text
from distil_jax.models import load_pretrained
jax.block_until_ready(jax.numpy.zeros(3) + 1)
before = peak(); start = time.perf_counter()
model, params = load_pretrained(folder)
jax.block_until_ready(params)
loaded = time.perf_counter(); after = peak()
ids = [np.arange(5, 133, dtype=np.int32)]
next(engine.steps(model, params, ids, max_new_tokens=64, sampling=text.GREEDY))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
""",
    "transformers": """
import torch
from transformers import AutoModelForCausalLM
before = peak(); start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
loaded = time.perf_counter(); after = peak()
with torch.inference_mode():
    model.generate(torch.arange(5, 133)[None], max_new_tokens=1, do_sample=False, pad_token_id=0)
size = sum(p.numel() * 4 for p in model.parameters())
""",
}
FRAME = """
import json, sys, time
import numpy as np
folder = sys.argv[1]
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
{body}
first = time.perf_counter()
print(json.dumps(dict(load=loaded - start, first=first - loaded, ratio=(after - before) / size)))
"""


def loads(folder: Path, rounds: int) -> None:
    """Loading and the first token, each time in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in LOAD}
    for turn in range(rounds + 1):
        for side, body in LOAD.items():
            program = FRAME.replace("{body}", body)
            out = subprocess.run([sys.executable, "-c", program, folder], check=True, capture_output=True, text=True)
            if turn:  # the first turn fills the compilation cache and the page cache
                found[side].append(json.loads(out.stdout.splitlines()[-1]))
    for side, runs in found.items():
        load, first, ratio = (statistics.median(run[key] for run in runs) for key in ("load", "first", "ratio"))
        print(f"{side:12s} load {load:5.2f} s, peak {ratio:.2f} x the weights; first token after {first:5.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))

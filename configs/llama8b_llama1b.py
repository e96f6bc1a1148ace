"""Llama 3 8B Instruct teaches Llama 3.2 1B: the same tokenizer, another size.

    distil-jax run --config configs/llama8b_llama1b.py --config.workdir=/shared/run

As configs/medgemma4b_llama1b.py, which has every key and takes the same argument, with another teacher. Both tokenizers
have the ids of Llama 3, so W is one-to-one and every position is a root: a control of the method as much as a recipe.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(objective: str = "") -> ConfigDict:
    base = runpy.run_path(str(Path(__file__).with_name("medgemma4b_llama1b.py")))["get_config"](objective)
    with base.unlocked():
        base.workdir = "work/llama8b_llama1b"
        base.teacher.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    return base

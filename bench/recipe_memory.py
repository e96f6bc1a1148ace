"""Whether configs/medgemma4b_llama1b_24gb.py fits 24 GB: its real steps, compiled for one chip, not run.

    python bench/recipe_memory.py [VARIANT ...] [--config.KEY=VALUE ...]

VARIANT: of VARIANTS below; all by default, minutes each. It is `distil-jax compile` for each: the compiler of a TPU
with more memory than 24 GB says what arguments, outputs and temporaries of the whole step take. A GPU's compiler lays
arrays out and fuses differently, so this stands in for it and measures none. The table is in docs/recipes.md.
"""

import sys
from pathlib import Path
from typing import Any

from distil_jax import chips, compile
from distil_jax.config import load_config

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "medgemma4b_llama1b_24gb.py"
TOPOLOGY = "v5p:2x2x1"  # 95 GiB a chip, of which one is used
LIMIT = 24e9
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "remat dots": {"student.training.remat": "dots"},
    "teacher in bfloat16": {"teacher.dtype": "bfloat16"},
    "control": {"export.run": "control"},
    "all parameters": {"student.lora.rank": 0},
    "all but the embedding": {"student.lora.rank": 0, "student.training.freeze": "embedding"},
}


def main(arguments: list[str]) -> None:
    flags = [a for a in arguments if a.startswith("--")]
    wanted = [a for a in arguments if not a.startswith("--")] or [*VARIANTS]
    print("| variant | arguments | new outputs | temporaries | together, GB | of 24 GB |\n|---|---|---|---|---|---|")
    for name in wanted:
        changes = dict(VARIANTS[name])
        run = changes.pop("export.run", "distilled")
        overrides = [f"--config.{k}={v}" for k, v in changes.items()]
        config = load_config(["--config", str(RECIPE), *overrides, *flags])[0]
        chip = chips.named(TOPOLOGY)._replace(memory=LIMIT)
        fit = compile.compiled(config, run, compile.mesh_of(config, TOPOLOGY, 1), chip)
        m = fit.program.memory_analysis()
        new = m.output_size_in_bytes - m.alias_size_in_bytes
        numbers = (m.argument_size_in_bytes, new, m.temp_size_in_bytes, fit.needed)
        cells = " | ".join(f"{n / 1e9:.2f}" for n in numbers)
        print(
            f"| {name} | {cells} | {'fits' if fit.fits else 'does not fit'} |  <!-- {fit.seconds:.0f} s -->", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])

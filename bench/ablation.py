"""The ladder of configs/tiny.py:ablation over several seeds, as one table in Markdown (docs/ablation.md).

    python bench/ablation.py [--seeds=0,1,2] [--workdir=work/ablation] [--config.KEY=VALUE ...]

The seeds are run as bench/several_seeds.py says. The table goes to standard output and to WORKDIR/ablation.md.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from several_seeds import TINY, markdown, run_all, shown, spread

from distil_jax import variants
from distil_jax.config import numbers_by_name
from distil_jax.tables import gain, models_of


def main(arguments: Sequence[str]) -> None:
    config, folder, results = run_all(arguments, f"{TINY}:ablation", "work/ablation")
    given_weights = [config.variants[run].get("specialty_weights", "") for run in config.variants]
    named = (numbers_by_name("objective.specialty_weights", weights) for weights in given_weights)
    text = table(results, list(dict.fromkeys(name for numbers in named for name in numbers)))
    (folder / "ablation.md").write_text(text, encoding="utf-8")
    print(text, end="")


def table(results: dict[int, dict[str, Any]], specialties: Sequence[str] = ()) -> str:
    """A row for each rung and seed and, of several seeds, one with means and ranges.

    specialties: those that get a column of what a rung gained over the one below it there.
    """
    runs = next(iter(results.values()))["runs"]
    columns = ["rung", "seed", "bits per byte", "control - it", "the rung below - it"]
    columns += [f"the rung below - it, in {name}" for name in specialties] + ["seconds a step", "of the control's"]
    lines = []
    for run in ("teacher", *runs):
        bits = {seed: models_of(r)[run]["bits_per_byte"] for seed, r in results.items()}
        seconds = {seed: r["seconds_per_step"].get(run) for seed, r in results.items()}
        times = {seed: s and s / results[seed]["seconds_per_step"]["control"] for seed, s in seconds.items()}
        gained = gains(results, runs, run, specialties)
        for seed in results:
            cells = [gain(column.get(seed)) for column in gained]
            row = [run, str(seed), f"{bits[seed]:.4f}", *cells, shown(seconds[seed], "{:.3f}")]
            lines.append([*row, shown(times[seed], "{:.2f}")])
        if len(results) > 1:
            cells = [spread([d["bits_per_byte"] for d in column.values()], "{:+.4f}") for column in gained]
            row = [run, "mean [range]", spread(bits.values(), "{:.4f}"), *cells]
            lines.append([*row, spread(seconds.values(), "{:.3f}"), spread(times.values(), "{:.2f}")])
    return markdown(columns, lines)


def gains(
    results: dict[int, dict[str, Any]], runs: Sequence[str], run: str, specialties: Sequence[str]
) -> list[dict[int, Any]]:
    """The columns of differences of one run, each by seed: to the control, to the rung below, and that by specialty."""
    if run not in variants.taught(runs):
        return [{}] * (2 + len(specialties))
    below = f"{variants.below(runs, run)} - {run}"
    columns: list[Callable[[dict[str, Any]], Any]] = [
        lambda r: r["differences"][f"control - {run}"],
        lambda r: r["differences"][below],
        *(lambda r, name=name: r["differences_by_specialty"][name][below] for name in specialties),
    ]
    return [{seed: column(r) for seed, r in results.items()} for column in columns]


if __name__ == "__main__":
    main(sys.argv[1:])

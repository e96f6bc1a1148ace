"""The objectives of configs/tiny.py:objectives over several seeds, as one table in Markdown (docs/objectives.md).

    python bench/objectives.py [--short] [--config=configs/tiny.py:objectives,numbers] [--seeds=0,1,2]
                               [--workdir=work/objectives] [--config.KEY=VALUE ...]

Runs every student that the config names, equal in all but the objective; the seeds are run as bench/several_seeds.py
says. --short trains fewer steps, so that ten objectives, three seeds and two corpora take about an hour and a half on
two cores. The table goes to standard output and to WORKDIR/objectives.md.

Columns: bits per byte of the held-out text; what the control has more, paired by document, with its 95 % interval;
agreement with the teacher at root positions; bits per byte and accuracy of the tokens with digits (eval/by_class.py),
and what the control has more of those bits.
"""

import sys
from collections.abc import Sequence
from typing import Any

from several_seeds import TINY, markdown, run_all, shown, spread

from distil_jax import variants
from distil_jax.tables import gain, models_of

CLASS = "digit"
HEADER = (
    *("objective", "seed", "bits per byte", "control - it", "agreement with the teacher"),
    *("bits per byte of numbers", "control - it, in numbers", "accuracy of numbers", "seconds a step"),
)
SHORT = (
    "--config.teacher.training.steps=300",
    "--config.student.training.steps=200",
    "--config.evaluation.answers=0",
    "--config.report.turns=0",
    "--config.report.calibration_rows=0",
)


def main(arguments: Sequence[str]) -> None:
    given = [a for a in arguments if a != "--short"]
    short = SHORT if len(given) < len(arguments) else ()
    _, folder, results = run_all(given, f"{TINY}:objectives", "work/objectives", short)
    text = table(results)
    (folder / "objectives.md").write_text(text, encoding="utf-8")
    print(text, end="")


def table(results: dict[int, dict[str, Any]]) -> str:
    """A row for each model and seed and, of several seeds, one with means and ranges."""
    runs = next(iter(results.values()))["runs"]
    rows = []
    for run in ("teacher", *runs):
        measures = {seed: measured(result, run) for seed, result in results.items()}
        for seed, m in measures.items():
            cells = [f"{m['bits']:.4f}", gain(m["gained"]), f"{m['agreement']:.4f}"]
            cells += [shown(m["bits_of_class"], "{:.4f}"), gain(m["gained_of_class"])]
            rows.append([run, str(seed), *cells, shown(m["accuracy"], "{:.4f}"), shown(m["seconds"], "{:.3f}")])
        if len(results) > 1:
            of = {key: [m[key] for m in measures.values()] for key in next(iter(measures.values()))}
            gained = {key: [d and d["bits_per_byte"] for d in of[key]] for key in ("gained", "gained_of_class")}
            cells = [spread(of["bits"], "{:.4f}"), spread(gained["gained"], "{:+.4f}")]
            cells += [spread(of["agreement"], "{:.4f}"), spread(of["bits_of_class"], "{:.4f}")]
            cells += [spread(gained["gained_of_class"], "{:+.4f}"), spread(of["accuracy"], "{:.4f}")]
            rows.append([run, "mean [range]", *cells, spread(of["seconds"], "{:.3f}")])
    return markdown(HEADER, rows)


def measured(result: dict[str, Any], run: str) -> dict[str, Any]:
    """The cells of one model of one seed; None where it has none."""
    model = models_of(result)[run]
    pair = f"control - {run}" if run in variants.taught(result["runs"]) else ""
    of_class = model["by_class"].get(CLASS, {})
    return {
        "bits": model["bits_per_byte"],
        "gained": result["differences"].get(pair),
        "agreement": model["agreement_with_teacher"],
        "bits_of_class": of_class.get("bits_per_byte"),
        "gained_of_class": result["differences_by_class"].get(CLASS, {}).get(pair),
        "accuracy": of_class.get("accuracy"),
        "seconds": result["seconds_per_step"].get(run),
    }


if __name__ == "__main__":
    main(sys.argv[1:])

"""Stage 6: the result, three times: summary.json for programs, a table for the terminal, a page for people.

    distil-jax report --config configs/tiny.py

Writes summary.json, report/index.html and its plots as PNG. What the page needs of the models is asked first
(exhibits.py) and stays in report/exhibits.json, so that `distil-jax report DIR` makes pages of finished folders.
"""

import json
import platform
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import distil_jax
from distil_jax import hosts, variants
from distil_jax.config import flatten
from distil_jax.errors import UserError
from distil_jax.eval import comparison
from distil_jax.exhibits import exhibits
from distil_jax.manifest import write_json_atomic
from distil_jax.metrics import read_metrics
from distil_jax.page.command import PAGE, write
from distil_jax.page.record import EXHIBITS, SUMMARY
from distil_jax.tables import class_rows, interval, ladder_rows, models_of, table_rows, verdict
from distil_jax.workdir import Workdir


def main(config: ConfigDict) -> dict[str, Any]:
    """Writes summary and page unless that is done; returns the manifest."""
    work = Workdir(config)
    if found := work.done("report"):
        return found
    work.require("evaluate"), work.require("export")
    stage = work.begin("report")
    told = exhibits(config, work) | {"config": flatten(config)}
    summary = summarise(config, work, told)
    if hosts.is_first_process():
        write_json_atomic(stage.folder / EXHIBITS, told)
        write_json_atomic(work / SUMMARY, summary)
        write([work.root], stage.folder / PAGE)
    return stage.finish()


def summarise(config: ConfigDict, work: Workdir, told: dict[str, Any]) -> dict[str, Any]:
    """The result of a run as one JSON object (docs/summary.md explains every field). told: what `exhibits` found."""
    done = {name: work.require(name) for name in ("corpus", "projection", *config.runs, "evaluate", "export")}
    if work.teacher_is_trained():
        done["teacher"] = work.require("teacher")
    if work.scores_are_stored():
        done["scores"] = work.require("scores")
    models, differences = done["evaluate"]["models"], done["evaluate"]["differences"]
    run = config.export.run
    against = next(d for d in (f"control - {run}", f"student_before - {run}") if d in differences)
    low, high = differences[against]["interval"]
    seconds = {name: done[name]["seconds"] for name in done}
    whole = ("by_class", "by_specialty")  # stay in projection/manifest.json
    fitted, built = ({k: v for k, v in done["projection"][of].items() if k not in whole} for of in ("fitted", "built"))
    summary: dict[str, Any] = {name: measures for name, measures in models.items() if name not in config.variants}
    summary["variants"] = {name: models[name] for name in config.runs if name in config.variants}
    summary["runs"] = list(config.runs)
    summary["difference"] = differences[against] | {
        "of": against,
        "verdict": f"{run} is better" if low > 0 else f"{run} is worse" if high < 0 else "no difference shown",
    }
    summary["differences"] = differences
    summary["token_accuracy_retained"] = models[run]["token_accuracy"] / max(models["teacher"]["token_accuracy"], 1e-9)
    summary["benchmarks"] = benchmarks(work, config)
    summary["calibration"] = {  # its curves stay in report/exhibits.json
        name: {k: v for k, v in found.items() if k != "curve"} for name, found in told["calibration"].items()
    }
    summary["speed"] = told["speed"]
    summary["projection"] = fitted | {"built": built} | {k: done["projection"][k] for k in ("fit", "gain")}
    summary["alignment"] = done["corpus"]["alignment"]["test"]
    summary["export"] = done["export"]["path"]
    summary["seconds"] = seconds | {"total": round(sum(seconds.values()), 2)}
    summary["seconds_of_the_teacher"] = {
        "training it": seconds.get("teacher", 0.0),
        "projection": seconds["projection"],
        "scoring": seconds.get("scores"),
        f"{run} beyond control": round(seconds[run] - seconds["control"], 2) if "control" in seconds else None,
    }
    summary["seconds_per_step"] = {name: seconds_per_step(work, name) for name in config.runs}
    summary["peak_memory_bytes"] = max(manifest["peak_memory_bytes"] for manifest in done.values())
    summary["corpus"] = {k: done["corpus"][k] for k in ("rows", "quarantined", "provenance")}
    summary["seed"] = config.seed
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers")
    summary["versions"] = {"distil-jax": distil_jax.__version__, "python": platform.python_version()}
    summary["versions"] |= {name: version(name) for name in packages}
    return summary


def benchmarks(work: Workdir, config: ConfigDict) -> dict[str, Any]:
    """The scores of all models on tasks with choices (eval/comparison.py); empty where `evaluate` asked none."""
    answers = comparison.read(work / "evaluate", config.runs)
    return comparison.compared(answers, variants.taught(config.runs), config.evaluation.bootstrap) if answers else {}


def seconds_per_step(work: Workdir, run: str) -> float | None:
    """The median over the stretches between two lines of a run's metrics.jsonl, so that compiling, evaluating and
    interruptions do not count; None if there are no two."""
    lines = [(m["time"], m["step"]) for m in read_metrics(work / run / "metrics.jsonl") if "loss" in m]
    stretches = np.diff(np.asarray(lines, np.float64).reshape(-1, 2), axis=0)
    return float(np.median(stretches[:, 0] / stretches[:, 1])) if len(stretches) else None


def read_summary(work: Workdir) -> dict[str, Any]:
    """The summary of a finished run. Raises UserError if there is none."""
    file = work / SUMMARY
    if not file.is_file():
        raise UserError(f"no {file}: run `distil-jax run` with this config first")
    return json.loads(file.read_text(encoding="utf-8"))


def print_table(summary: dict[str, Any]) -> None:
    """The result in the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130)
    ladder = ("Bits per byte, paired by document; above 0: it is better", ladder_rows(summary))
    models = models_of(summary)
    by_class = ("By class of token: bits per byte (accuracy)", class_rows(models))
    for title, (header, *rows) in (("Held-out text", table_rows(models)), by_class, ladder):
        if rows:
            table = Table(title=title)
            for column in header:
                table.add_column(column, justify="left" if not column else "right")
            for row in rows:
                table.add_row(*row)
            console.print(table)
    console.print(verdict(summary), soft_wrap=True, highlight=False, markup=False)
    p = summary["projection"]
    line = (
        f"projection: IP_KL {p['ip_kl']:.4f} {interval(p['ip_kl_interval'])}, IP_bpb {p['ip_bpb']:.4f} "
        f"{interval(p['ip_bpb_interval'])}. Peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB, "
        f"{summary['seconds']['total']:.0f} s in all."
    )
    console.print(line, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))

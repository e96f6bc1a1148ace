"""Stage 6: the result, three times: summary.json for programs, a table for the terminal, a page for people.

    distil-jax report --config configs/tiny.py

Writes summary.json and report/index.html, a single file with curves, the table and sample answers.
"""

import html
import io
import json
import platform
import sys
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import distil_jax
from distil_jax import learners
from distil_jax.errors import UserError
from distil_jax.generation import generate
from distil_jax.manifest import write_json_atomic
from distil_jax.metrics import read_metrics
from distil_jax.workdir import STUDENT_RUNS, Workdir

SUMMARY = "summary.json"
MEASURES = ("bits_per_byte", "token_accuracy", "agreement_with_teacher")
LABELS = {
    "teacher": "teacher",
    "student_before": "student, untouched",
    "control": "student, text alone (control)",
    "smoothing": "student, smoothed labels",
    "distilled": "student, distilled",
}
COLORS = {"teacher": "#7f7f7f", "control": "#1f77b4", "smoothing": "#ff7f0e", "distilled": "#2ca02c"}


def main(config: ConfigDict) -> dict[str, Any]:
    """Writes summary and page unless that is done; returns the manifest."""
    work = Workdir(config)
    if found := work.done("report"):
        return found
    work.require("evaluate"), work.require("export")
    stage = work.begin("report")
    answers = sample_answers(config, work)
    summary = summarise(config, work)
    (stage.folder / "index.html").write_text(page(config, work, summary, answers), encoding="utf-8")
    write_json_atomic(work / SUMMARY, summary)
    return stage.finish(answers=answers)


def summarise(config: ConfigDict, work: Workdir) -> dict[str, Any]:
    """The result of a run as one JSON object (docs/summary.md explains every field)."""
    done = {name: work.require(name) for name in ("corpus", "projection", *config.runs, "evaluate", "export")}
    if work.teacher_is_trained():
        done["teacher"] = work.require("teacher")
    if work.scores_are_stored():
        done["scores"] = work.require("scores")
    models, differences = done["evaluate"]["models"], done["evaluate"]["differences"]
    against = next(d for d in ("control - distilled", "student_before - distilled") if d in differences)
    low, high = differences[against]["interval"]
    seconds = {name: done[name]["seconds"] for name in done}
    fitted = done["projection"]["fitted"]
    summary: dict[str, Any] = dict(models)
    summary["difference"] = differences[against] | {
        "of": against,
        "verdict": "distilled is better" if low > 0 else "distilled is worse" if high < 0 else "no difference shown",
    }
    summary["differences"] = differences
    summary["token_accuracy_retained"] = models["distilled"]["token_accuracy"] / max(
        models["teacher"]["token_accuracy"], 1e-9
    )
    summary["projection"] = fitted | {"built": done["projection"]["built"], "fit": done["projection"]["fit"]}
    summary["alignment"] = done["corpus"]["alignment"]["test"]
    summary["export"] = done["export"]["path"]
    summary["seconds"] = seconds | {"total": round(sum(seconds.values()), 2)}
    summary["seconds_of_the_teacher"] = {
        "training it": seconds.get("teacher", 0.0),
        "projection": seconds["projection"],
        "scoring": seconds.get("scores"),
        "distilled beyond control": round(seconds["distilled"] - seconds["control"], 2)
        if "control" in seconds
        else None,
    }
    summary["peak_memory_bytes"] = max(manifest["peak_memory_bytes"] for manifest in done.values())
    summary["corpus"] = {k: done["corpus"][k] for k in ("rows", "quarantined", "provenance")}
    summary["seed"] = config.seed
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers")
    summary["versions"] = {"distil-jax": distil_jax.__version__, "python": platform.python_version()}
    summary["versions"] |= {name: version(name) for name in packages}
    return summary


def read_summary(work: Workdir) -> dict[str, Any]:
    """The summary of a finished run. Raises UserError if there is none."""
    file = work / SUMMARY
    if not file.is_file():
        raise UserError(f"no {file}: run `distil-jax run` with this config first")
    return json.loads(file.read_text(encoding="utf-8"))


def sample_answers(config: ConfigDict, work: Workdir) -> list[dict[str, str]]:
    """Greedy answers of every trained model to a few held-out questions, spread over the test split."""
    lines = (work / "corpus" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [d for d in map(json.loads, lines) if d["split"] == "test" and d["prompt"]]
    wanted = min(config.evaluation.answers, len(documents))
    if wanted == 0:
        return []
    chosen = [documents[i] for i in np.linspace(0, len(documents) - 1, wanted).astype(int)]
    prompts = [d["prompt"] for d in chosen]
    mesh, tables = learners.mesh_of(config), learners.tables_of(work)
    answers = [{"prompt": d["prompt"], "reference": d["completion"]} for d in chosen]
    with jax.set_mesh(mesh):
        models = {"teacher": ("teacher", learners.teacher(work, mesh))}
        models |= {run: ("student", learners.trained(work, run, mesh)) for run in config.runs}
        for name, (side, (model, params)) in models.items():
            texts = generate(model, params, tables[side], prompts, max_new_tokens=config.evaluation.answer_tokens)
            for answer, text in zip(answers, texts, strict=True):
                answer[name] = text
    return answers


def table_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The result table as text cells, header first."""
    rows = [("", "parameters", "bits per byte", "token accuracy", "agrees with teacher")]
    for name, label in LABELS.items():
        if name in summary:
            m = summary[name]
            cells = [f"{m[key]:.4f} [{m[key + '_interval'][0]:.4f}, {m[key + '_interval'][1]:.4f}]" for key in MEASURES]
            rows.append((label, f"{m['parameters']:,}", *cells))
    return rows


def verdict(summary: dict[str, Any]) -> str:
    """The sentence that says whether the teacher helped, either way."""
    d = summary["difference"]
    cost = summary["seconds_of_the_teacher"]
    extra = "; ".join(f"{k} {v:.0f} s" for k, v in cost.items() if v is not None)
    return (
        f"{d['of']}: {d['bits_per_byte']:+.4f} bits per byte, 95 % interval over documents "
        f"[{d['interval'][0]:+.4f}, {d['interval'][1]:+.4f}]: {d['verdict']}. What the teacher cost: {extra}."
    )


def print_table(summary: dict[str, Any]) -> None:
    """The result in the terminal."""
    from rich.console import Console
    from rich.table import Table

    header, *rows = table_rows(summary)
    table = Table(title="Held-out text")
    for column in header:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(verdict(summary), soft_wrap=True, highlight=False, markup=False)
    p = summary["projection"]
    line = (
        f"projection: IP_KL {p['ip_kl']:.4f} {interval(p['ip_kl_interval'])}, IP_bpb {p['ip_bpb']:.4f} "
        f"{interval(p['ip_bpb_interval'])}. Peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB, "
        f"{summary['seconds']['total']:.0f} s in all."
    )
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def interval(pair: list[float]) -> str:
    return f"[{pair[0]:.4f}, {pair[1]:.4f}]"


# ---- the page
# -----------------------------------------------------------------------------------------------------------


def page(config: ConfigDict, work: Workdir, summary: dict[str, Any], answers: list[dict[str, str]]) -> str:
    """One self-contained HTML file."""
    header, *rows = table_rows(summary)
    e = html.escape
    cells = lambda row, tag: "".join(f"<{tag}>{e(c)}</{tag}>" for c in row)  # noqa: E731
    table = f"<table><tr>{cells(header, 'th')}</tr>" + "".join(f"<tr>{cells(r, 'td')}</tr>" for r in rows) + "</table>"
    told = []
    for answer in answers:
        told.append(f"<h3>{e(answer['prompt'])}</h3><dl>")
        for name in ("reference", "teacher", *STUDENT_RUNS):
            if name in answer:
                told.append(f"<dt>{e(LABELS.get(name, name))}</dt><dd>{e(answer[name])}</dd>")
        told.append("</dl>")
    provenance = summary["corpus"]["provenance"]
    sources = "".join(f"<li>{e(k)}: {e(v)}</li>" for k, v in provenance.items() if isinstance(v, str))
    by_role = ", ".join(f"{role} {summary['alignment'][role]:.1%}" for role in ("root", "interior", "crossing"))
    facts = {k: summary[k] for k in ("projection", "seconds", "peak_memory_bytes", "versions", "seed")}
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{e(str(work.root))}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-size: 14px }} td, th {{ padding: .3rem .7rem; border-bottom: 1px solid #ddd }}
td:not(:first-child) {{ text-align: right }} dt {{ font-weight: 600 }} dd {{ margin: 0 0 .4rem 1rem }}
pre {{ background: #f6f6f6; padding: 1rem; overflow: auto; font-size: 12px }} svg {{ max-width: 100%; height: auto }}
h3 {{ white-space: pre-wrap; font-size: 15px; margin-bottom: .2rem }}
</style>
<h1>{e(str(work.root))}</h1>
<p>{e(verdict(summary))}</p>
{table}
<p>Research only: nothing here has been evaluated for clinical use.</p>
<h2>Curves</h2>
{curves(config, work)}
<h2>Alignment</h2>
<p>Supervised student tokens of the test split by role: {e(by_role)}.</p>
<h2>Answers to held-out questions</h2>
{"".join(told)}
<h2>Facts</h2>
<ul>{sources}</ul>
<pre>{e(json.dumps(facts, indent=2))}</pre>
</html>
"""


def curves(config: ConfigDict, work: Workdir) -> str:
    """Held-out bits per byte, cross-entropy and KL over the steps of every run, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = (("teacher",) if work.teacher_is_trained() else ()) + tuple(config.runs)
    metrics = {run: read_metrics(work / run / "metrics.jsonl") for run in runs}
    panels = (
        ("validation_bits_per_byte", "validation, bits per byte"),
        ("ce", "training cross-entropy, nats per own token"),
        ("kl_at_1", "KL to the projected teacher at tau = 1, nats"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(15, 4.2), constrained_layout=True)
    for axis, (key, title) in zip(axes, panels, strict=True):
        for run, lines in metrics.items():
            points = [(m["step"], m[key]) for m in lines if key in m and m["step"] > 0]
            if points:
                axis.plot(*zip(*points, strict=True), label=run, color=COLORS[run], linewidth=1.3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    out = io.StringIO()
    figure.savefig(out, format="svg")
    pyplot.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))

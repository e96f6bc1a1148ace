"""The result of a run as one self-contained HTML file: table, curves, alignment, answers."""

import html
import io
import itertools
import json
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from distil_jax.config import flatten
from distil_jax.metrics import read_metrics
from distil_jax.tables import class_rows, label_of, ladder_rows, models_of, table_rows, verdict
from distil_jax.workdir import Workdir

COLORS = {"teacher": "#7f7f7f", "control": "#1f77b4", "smoothing": "#ff7f0e", "distilled": "#2ca02c"}
# Of the variants, in their order; when the colours are used up, the next kind of line begins with the first again.
OTHER_COLORS = ("#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#000000", "#98df8a")
LINES = ("-", "--", ":", "-.")


def page(config: ConfigDict, work: Workdir, summary: dict[str, Any], answers: list[dict[str, str]]) -> str:
    """One self-contained HTML file."""
    e = html.escape
    told = []
    for answer in answers:
        told.append(f"<h3>{e(answer['prompt'])}</h3><dl>")
        for name in ("reference", "teacher", *config.runs):
            label = name if name == "reference" else label_of(name)
            told.append(f"<dt>{e(label)}</dt><dd>{e(answer[name])}</dd>")
        told.append("</dl>")
    provenance = summary["corpus"]["provenance"]
    sources = "".join(f"<li>{e(k)}: {e(v)}</li>" for k, v in provenance.items() if isinstance(v, str))
    by_role = ", ".join(f"{role} {summary['alignment'][role]:.1%}" for role in ("root", "interior", "crossing"))
    shown = ("projection", "seconds", "seconds_per_step", "peak_memory_bytes", "versions", "seed")
    facts = {k: summary[k] for k in shown}
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
{table(table_rows(models_of(summary)))}
<p>By class of the student's tokens: bits per byte and, in brackets, how often the most likely token was right.</p>
{table(class_rows(models_of(summary)))}
{ladder(config, summary)}
<p>Research only: nothing here has been evaluated for clinical use.</p>
<h2>Curves</h2>
{curves(config, work)}
<h2>Alignment and the vocabulary projection</h2>
<p>Supervised student tokens of the test split by role: {e(by_role)}.</p>
<p>How much of what the teacher says about the next token survives the projection, and where the rest is lost.</p>
{information(work.require("projection"))}
<h2>Answers to held-out questions</h2>
{"".join(told)}
<h2>Facts</h2>
<ul>{sources}</ul>
<pre>{e(json.dumps(facts, indent=2))}</pre>
</html>
"""


def table(rows: list[tuple[str, ...]]) -> str:
    """Text cells, header first, as HTML."""
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    lines = [cells(rows[0], "th"), *(cells(row, "td") for row in rows[1:])]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def ladder(config: ConfigDict, summary: dict[str, Any]) -> str:
    """What each rung gained, and what each variant changes in the objective; nothing where there are no variants."""
    rows = ladder_rows(summary)
    gains = f"<h2>Rung by rung</h2><p>Bits per byte, paired by document; above 0: it is better.</p>{table(rows)}"
    chosen = [run for run in config.runs if run in config.variants]
    changes = [f"{run}: " + ", ".join(f"{k} {v}" for k, v in flatten(config.variants[run]).items()) for run in chosen]
    items = "".join(f"<li>{html.escape(change)}</li>" for change in changes)
    listed = f"<p>What each variant sets in the objective:</p><ul>{items}</ul>"
    return (gains if len(rows) > 1 else "") + (listed if changes else "")


def curves(config: ConfigDict, work: Workdir) -> str:
    """Held-out bits per byte, cross-entropy and KL over the steps of every run, as SVG."""
    pyplot = _pyplot()
    runs = (("teacher",) if work.teacher_is_trained() else ()) + tuple(config.runs)
    metrics = {run: read_metrics(work / run / "metrics.jsonl") for run in runs}
    look = looks(runs)
    panels = (
        ("validation_bits_per_byte", "validation, bits per byte"),
        ("ce", "training cross-entropy, nats per own token"),
        ("kl_at_1", "KL to the projected teacher at tau = 1, nats"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(15, 4.6), constrained_layout=True)
    for axis, (key, title) in zip(axes, panels, strict=True):
        for run, lines in metrics.items():
            points = [(m["step"], m[key]) for m in lines if key in m and m["step"] > 0]
            if points:
                axis.plot(*zip(*points, strict=True), label=run, linewidth=1.3, **look[run])
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()  # every run has this curve
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 8), frameon=False)
    return _svg(figure)


def information(found: dict[str, Any]) -> str:
    """IP_KL by class of token with its intervals, the controls, and the parts that are lost, as SVG."""
    pyplot = _pyplot()
    fitted = found["fitted"]
    classes = {"all": fitted} | fitted["by_class"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 3.8), constrained_layout=True)
    for shift, key, label in ((-0.2, "ip_kl", "fitted W"), (0.2, "ip_kl_pieces", "with all pieces of a token")):
        values = [of[key] for of in classes.values()]
        around = [[abs(of[key] - of[f"{key}_interval"][end]) for of in classes.values()] for end in (0, 1)]
        left.bar([n + shift for n in range(len(classes))], values, 0.38, yerr=around, label=label)
    for key, style, value in (
        ("shuffled W", "--", found["shuffled"]["ip_kl"]),
        ("sorted match", ":", found["sorted_match"]["ip_kl"]),
    ):
        left.axhline(value, linestyle=style, color="#7f7f7f", label=key)
    left.set(title="information preserved at shared boundaries (IP_KL), 95 %", ylim=(0, 1.05))
    left.set_xticks(range(len(classes)), [f"{name}\n{of['positions']:,}" for name, of in classes.items()])
    left.legend(framealpha=0.9, fontsize=8, loc="lower right")
    parts = {"W at boundaries": "projected", "with all pieces": "pieces", "64 likeliest teacher tokens": "tail"}
    right.barh(list(parts), [fitted["lost"][key] for key in parts.values()])
    right.set(title="share of the information that is lost")
    return _svg(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    _pyplot().close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def looks(runs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and kind of line of each run's curves; no two runs look the same, up to 32 variants."""
    others = itertools.product(LINES, OTHER_COLORS)
    found = {}
    for run in runs:
        line, color = ("-", COLORS[run]) if run in COLORS else next(others)
        found[run] = {"color": color, "linestyle": line}
    return found

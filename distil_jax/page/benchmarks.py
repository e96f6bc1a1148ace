"""Tasks with choices: accuracies with intervals and tests, means, calibration, abstention, probes; and how sure each
model is of the next token of held-out text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distil_jax.eval import comparison, probes, statistics
from distil_jax.eval.answers import Answers
from distil_jax.page.elements import heading, paragraph, section, table, text
from distil_jax.page.figures import LINE, Plots, key, looks, together
from distil_jax.page.record import Record
from distil_jax.tables import accuracy_rows, calibration_rows, free_rows, label_of, paired_rows, probe_rows

Curve = tuple[np.ndarray, np.ndarray]


def benchmarks(records: Sequence[Record], plots: Plots) -> str:
    """The section on tasks; nothing where `evaluate` asked none."""
    parts = []
    for record in records:
        found = record.summary.get("benchmarks") or {"tasks": [], "means": []}
        written = free_rows(record.evaluate.get("benchmarks", {}))
        if not found["tasks"] and not written:
            continue
        if len(records) > 1:
            parts.append(heading(record.name))
        searched = [name.strip() for name in record.config.get("data.benchmarks", "").split(",") if name.strip()]
        warnings = comparison.overlap(record.corpus, searched, [t["task"] for t in found["tasks"] if not t["probe"]])
        if warnings:
            parts.append('<div class="warn" role="note">' + "".join(map(paragraph, warnings)) + "</div>")
        models = [name for name in record.answers if any(name in t["models"] for t in found["tasks"])]
        tasks = [t for t in found["tasks"] if not t["probe"]]
        probed = [t for t in found["tasks"] if t["probe"]]
        if tasks:
            parts += [
                paragraph(
                    "Accuracy: how often the likeliest choice is the right one, with 95 % bootstrap intervals over "
                    "items; in brackets at the end, by nats a byte. Chance is drawing a choice at random."
                ),
                table(accuracy_rows(tasks, found["means"], models)),
                paragraph(
                    "Paired by item: accuracy of the student less that of the other, its interval, and McNemar's p "
                    "(exact below 25 items that one alone had right). Many tests are made here: of 20 true zeros one "
                    "comes out below 0.05."
                ),
                table(paired_rows(tasks)),
                paragraph(
                    "Calibration: ECE with 15 bins of equal width and of equal mass, Brier score, and the area under "
                    "the abstention curve; lower is better of all."
                ),
                table(calibration_rows(tasks, models)),
            ]
            parts += _pooled(record, plots, len(records) > 1)
        if probed:
            parts += [
                paragraph(
                    "Probes after Med-HALT: does a model notice that no choice is right, or that no choice answers the "
                    "question? Beside each stands a control of the same form whose added choice is wrong. In brackets "
                    "Med-HALT's points, 1 for right and -0.25 for wrong."
                ),
                table(probe_rows(probed, models)),
            ]
        if written:
            parts += [paragraph("Free answers: how often what a model writes is a right answer."), table(written)]
    return section("benchmarks", "Benchmarks", parts)


def _pooled(record: Record, plots: Plots, several: bool) -> list[str]:
    """Reliability and abstention over the items of all tasks together."""
    sure, right = {}, {}
    for name, given in record.answers.items():
        asked = [one for one in given if one.ids and not probes.is_probe(one.task)]
        if asked:
            sure[name], right[name] = _stacked(asked, statistics.confidence), _stacked(asked, lambda a: a.right())
    curves = {name: statistics.reliability(sure[name], right[name]) for name in sure}
    abstention = {name: statistics.abstention(sure[name], right[name]) for name in sure}
    shown, place = looks(list(sure)), f" {record.name}" if several else ""
    drawn = [
        plots.draw(
            f"reliability of tasks{place}",
            lambda axes: reliability(axes, {n: [list(b) for b in c] for n, c in curves.items()}, shown),
            "All tasks: how often a model is right where it is so sure. On the diagonal it is as right as it is sure.",
        ),
        plots.draw(
            f"abstention{place}",
            lambda axes: _risk(axes, {n: (a.coverage_I, a.risk_I) for n, a in abstention.items()}, shown),
            "All tasks: the share of errors if only the surest items are answered.",
        ),
    ]
    return [key(shown, {name: label_of(name) for name in shown}), together(drawn)]


def _stacked(asked: Sequence[Answers], of: Callable[[Answers], np.ndarray]) -> np.ndarray:
    return np.concatenate([of(one) for one in asked])


def _risk(axes: Any, curves: Mapping[str, Curve], shown: Mapping[str, Any]) -> None:
    for name, (coverage, risk) in curves.items():
        at = np.unique(np.linspace(0, len(risk) - 1, min(len(risk), 300)).astype(int))
        axes.plot(coverage[at], risk[at], linewidth=1.4, **shown[name])
    axes.set(xlabel="share that is answered", ylabel="share of that which is wrong", xlim=(0, 1), ylim=(0, None))


def reliability(axes: Any, curves: Mapping[str, Sequence[Sequence[float]]], shown: Mapping[str, Any]) -> None:
    """Accuracy over confidence with intervals. curves: [count, confidence, accuracy, low, high] of each bin."""
    axes.plot([0, 1], [0, 1], color=LINE, linewidth=1.2, zorder=1)
    for name, curve in curves.items():
        _, sure, right, low, high = np.array(curve, np.float64).T
        axes.plot(sure, right, marker="o", markersize=3, linewidth=1.4, **shown[name])
        axes.vlines(sure, low, high, linewidth=1.0, color=shown[name]["color"])
    axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))


def next_token(records: Sequence[Record], plots: Plots) -> str:
    """How sure and how right each model is of the next token of held-out text."""
    parts: list[str] = []
    for record in records:
        found = record.told.get("calibration")
        if not found:
            continue
        shown = looks(list(found))
        curves = {name: of["curve"] for name, of in found.items()}
        caption = "Next token of held-out text: how often the likeliest is the true one where its probability is so."
        drawn = plots.draw(
            f"reliability {record.name if len(records) > 1 else ''}",
            lambda axes, curves=curves, shown=shown: reliability(axes, curves, shown),
            caption,
        )
        rows: list[Sequence[str]] = [("", "tokens", "right", "mean confidence", "ECE")]
        for name, of in found.items():
            low, high = of["ece_interval"]
            ece = f"{of['ece']:.4f} [{low:.4f}, {high:.4f}]"
            shares = f"{of['accuracy']:.1%}", f"{of['confidence']:.1%}"
            rows.append((label_of(name), f"{of['tokens']:,}", *shares, ece))
        if len(records) > 1:
            parts.append(heading(record.name))
        parts += [key(shown, {name: label_of(name) for name in shown}), together([drawn]), table(rows)]
    if parts:
        note = (
            "A model's own tokens, so teacher and student are asked at other places. Intervals: 95 %, over documents."
        )
        parts.insert(0, f"<p>{text(note)}</p>")
    return section("reliability", "Reliability of the next token", parts)

"""How training went: every curve that a run has, all runs in one plot each."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distil_jax.page.elements import paragraph, section
from distil_jax.page.figures import LINES, Plots, Series, key, lines, looks, together
from distil_jax.page.record import Record, label

# (key of metrics.jsonl or timing.jsonl, title of its plot); those that no run has are left out.
PANELS = (
    ("validation_bits_per_byte", "validation, bits per byte"),
    ("loss", "loss"),
    ("ce", "cross-entropy, nats a token"),
    ("kl_at_1", "KL to the projected teacher at tau = 1, nats"),
    ("kl", "KL at the temperature of the step, nats"),
    ("attention", "distance of attention maps"),
    ("hidden_states", "distance of hidden states"),
    ("map_nats", "loss of the map of a rival, nats"),
    ("projection_drift", "squared distance of W from where it was"),
    ("temperature", "temperature"),
    ("alpha", "alpha, share of cross-entropy"),
    ("beta", "beta, weight of attention"),
    ("taught", "share of tokens that are taught"),
    ("learning_rate", "learning rate"),
    ("gradient_norm", "gradient norm"),
    ("accuracy", "training accuracy of the next token"),
    ("tokens_per_second", "tokens a second"),
    ("waited_for_data", "share of time waiting for data"),
    ("mfu", "model FLOPs over what the chips can do"),
)
FROM_ZERO = ("gradient_norm", "tokens_per_second", "waited_for_data", "mfu", "learning_rate")
POINTS = 300  # of a line; more are averaged


def training(records: Sequence[Record], plots: Plots) -> str:
    """The section."""
    runs = {f"{r.name}/{run}" if len(records) > 1 else run: (r, run) for r in records for run in r.metrics}
    shown = _looks(records)
    drawn = []
    for name, title in PANELS:
        series = {}
        for of, (record, run) in runs.items():
            points = _points([*record.metrics[run], *record.timing.get(run, ())], name)
            if len(points[0]):
                series[of] = points
        if series:
            drawn.append(plots.draw(f"curve {name}", _drawing(name, series, shown, title), title, titled=True))
    if not drawn:
        return ""
    names = {of: label(record, run, records) for of, (record, run) in runs.items()}
    note = "Over the steps. Losses are per token, and tokens are not those of the teacher; bits per byte compare."
    return section("training", "Training", [paragraph(note), key(shown, names), together(drawn)])


def _looks(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """The look of each run; of several folders a run of one name has one colour, and each folder its kind of line."""
    of_run = looks(list(dict.fromkeys(run for record in records for run in record.metrics)))
    if len(records) == 1:
        return of_run
    return {
        f"{record.name}/{run}": of_run[run] | {"linestyle": LINES[n % len(LINES)]}
        for n, record in enumerate(records)
        for run in record.metrics
    }


def _drawing(name: str, series: Series, shown: dict[str, dict[str, str]], title: str) -> Any:
    def draw(axes: Any) -> None:
        lines(axes, series, shown, title=title, xlabel="step")
        if name in FROM_ZERO:
            axes.set_ylim(bottom=0)

    return draw


def _points(rows: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of what is finite, in at most POINTS means of neighbours."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float)) and row["step"] > 0]
    values = np.array(found, np.float64).reshape(-1, 2)
    values = values[np.isfinite(values[:, 1])]
    parts = [part.mean(axis=0) for part in np.array_split(values, POINTS) if len(part)]
    step, value = np.array(parts).reshape(-1, 2).T
    return step, value

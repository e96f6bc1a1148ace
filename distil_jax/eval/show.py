"""Benchmarks in the terminal."""

import sys
from collections.abc import Mapping
from typing import Any


def table(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """{model: benchmarks.summary} as one table: a row for each model, task and number of shots; groups last."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130)
    shown = Table(title="Benchmarks: share of items answered rightly, with 95 % intervals over items")
    for column in ("model", "task", "shots", "items", "acc", "acc_norm", "exact match", "chance"):
        shown.add_column(column, justify="left" if column in ("model", "task") else "right")
    for row in rows(summaries):
        shown.add_row(*row)
    console.print(shown)


def rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table."""
    found = []
    for model, summary in summaries.items():
        for facts in summary["tasks"]:
            cells = [_with_interval(facts, metric) for metric in ("acc", "acc_norm")]
            match = _with_interval(facts, "exact_match") if "acc" not in facts else f"{facts['exact_match']:.1%}"
            head = (model, facts["task"], str(facts["shots"]), f"{facts['items']:,}")
            found.append((*head, *cells, match, f"{facts['chance']:.1%}" if facts["chance"] else ""))
        for facts in summary["groups"]:
            for kind, words in (("macro", "mean of tasks"), ("by_size", "mean of items")):
                cells = [_with_interval(facts, f"{metric}_{kind}") for metric in ("acc", "acc_norm")]
                head = (model, f"{facts['group']}, {words}", str(facts["shots"]), f"{facts['items']:,}")
                found.append((*head, *cells, "", f"{facts['chance']:.1%}"))
    return found


def warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _with_interval(facts: Mapping[str, Any], metric: str) -> str:
    if metric not in facts:
        return ""
    low, high = facts[f"{metric}_interval"]
    return f"{facts[metric]:.1%} [{low:.1%}, {high:.1%}]"

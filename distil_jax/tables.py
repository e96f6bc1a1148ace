"""Results as rows of text, for the terminal, the page and the model card."""

from typing import Any

from distil_jax import variants

MEASURES = ("bits_per_byte", "token_accuracy", "agreement_with_teacher")
LABELS = {
    "teacher": "teacher",
    "student_before": "student, untouched",
    "control": "student, text alone (control)",
    "smoothing": "student, smoothed labels",
    "distilled": "student, distilled",
}


def models_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The measures of every model by its name, in the order of the table: teacher, untouched student, the runs."""
    every = summary | summary["variants"]
    return {name: every[name] for name in ("teacher", "student_before", *summary["runs"])}


def label_of(name: str) -> str:
    """A model in the words of the report."""
    return LABELS.get(name, f"student, {name}")


def table_rows(models: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The result table as text cells, header first."""
    rows = [("", "parameters", "bits per byte", "token accuracy", "agrees with teacher")]
    for name, m in models.items():
        cells = [f"{m[key]:.4f} [{m[key + '_interval'][0]:.4f}, {m[key + '_interval'][1]:.4f}]" for key in MEASURES]
        rows.append((label_of(name), f"{m['parameters']:,}", *cells))
    return rows


def class_rows(models: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Bits per byte and, in brackets, accuracy by class of token as text cells, header first."""
    classes = list(next(iter(models.values()))["by_class"])
    rows = [("", *classes)]
    for name, m in models.items():
        cells = [f"{m['by_class'][c]['bits_per_byte']:.4f} ({m['by_class'][c]['accuracy']:.1%})" for c in classes]
        rows.append((label_of(name), *cells))
    return rows


def ladder_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """What each rung gained in bits per byte, as text cells, header first; no rows where there is one rung or none."""
    runs, differences = summary["runs"], summary["differences"]
    rows = [("", "control - it", "the rung below - it", "seconds a step")]
    if len(variants.taught(runs)) < 2:
        return rows
    for run in variants.taught(runs):
        seconds = summary["seconds_per_step"][run]
        cells = [gain(differences.get(f"{other} - {run}")) for other in ("control", variants.below(runs, run))]
        rows.append((label_of(run), *cells, "" if seconds is None else f"{seconds:.3f}"))
    return rows


def gain(difference: dict[str, Any] | None) -> str:
    """A difference in bits per byte with its interval; nothing for none."""
    if difference is None:
        return ""
    low, high = difference["interval"]
    return f"{difference['bits_per_byte']:+.4f} [{low:+.4f}, {high:+.4f}]"


def verdict(summary: dict[str, Any]) -> str:
    """The sentence that says whether the teacher helped, either way."""
    d = summary["difference"]
    cost = summary["seconds_of_the_teacher"]
    extra = "; ".join(f"{k} {v:.0f} s" for k, v in cost.items() if v is not None)
    return (
        f"{d['of']}: {d['bits_per_byte']:+.4f} bits per byte, 95 % interval over documents "
        f"[{d['interval'][0]:+.4f}, {d['interval'][1]:+.4f}]: {d['verdict']}. What the teacher cost: {extra}."
    )


def interval(pair: list[float]) -> str:
    return f"[{pair[0]:.4f}, {pair[1]:.4f}]"

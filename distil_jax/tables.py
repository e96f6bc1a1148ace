"""Results as rows of text, for the terminal, the page and the model card."""

from collections.abc import Sequence
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


def speed_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Tokens per second (eval/speed.py) as text cells, header first; bytes too, where a token's are known."""
    in_bytes = all("bytes_per_token" in of_model for of_model in found["models"].values())
    header = ("", "parameters", "prefill, tokens/s", "decode, tokens/s", "whole, new tokens/s", "times as fast")
    table: list[tuple[str, ...]] = [(*header, *(("whole, new bytes/s",) if in_bytes else ()))]
    for name, of_model in found["models"].items():
        each = of_model["tokens_per_second"]
        cells = [name, f"{of_model['parameters']:,}", *(f"{each[p]:,.1f}" for p in ("prefill", "decode", "whole"))]
        if pair := found["ratios"].get(name, {}).get("whole"):
            cells.append(f"{pair['value']:.2f} [{pair['interval'][0]:.2f}, {pair['interval'][1]:.2f}]")
        else:
            cells.append("1")
        table.append((*cells, *((f"{each['whole'] * of_model['bytes_per_token']:,.1f}",) if in_bytes else ())))
    return table


def speed_in_words(found: dict[str, Any]) -> str:
    """The protocol of a measurement of speed as a sentence."""
    p = found["protocol"]
    dtypes = dict.fromkeys(of_model["dtype"] for of_model in found["models"].values())
    return (
        f"{p['prompt_tokens']} prompt and {p['new_tokens']} new tokens, prompts at a time: {p['batch']}, greedy; "
        f"medians of {p['turns']} turns after {p['warm_up']} to warm up, the models in turns, on {found['device']} in "
        f"{', '.join(dtypes)}. Times as fast: of the whole, against {found['against']}, with a 95 % bootstrap over "
        "turns. Tokens are each model's own."
    )


# ---- tasks with choices (eval/comparison.py) -------------------------------------------------------------------------


def accuracy_rows(tasks: Sequence[Any], means: Sequence[Any], models: Sequence[str]) -> list[Sequence[str]]:
    """A row for each task and each mean, header first."""
    rows: list[Sequence[str]] = [("", "shots", "items", "chance", *map(label_of, models))]
    for t in tasks:
        cells = []
        for name in models:
            m = t["models"].get(name)
            cells.append(f"{share(m['accuracy'], m['interval'])} ({m['acc_bytes']:.1%})" if m else "")
        rows.append((t["task"], f"{t['shots']}", f"{t['items']:,}", f"{t['chance']:.1%}", *cells))
    for mean in means:
        for kind, words in (("unweighted", "mean over"), ("weighted", "mean by size over")):
            cells = [share(mean["models"][n][kind], mean["models"][n][f"{kind}_interval"]) for n in models]
            rows.append((f"{words} {mean['of']}", f"{mean['shots']}", f"{len(mean['tasks'])} tasks", "", *cells))
    return rows


def paired_rows(tasks: Sequence[Any]) -> list[Sequence[str]]:
    """A row for each task and pair of models."""
    rows: list[Sequence[str]] = [("", "shots", "it less", "difference", "only it right", "only the other", "p")]
    for t in tasks:
        for pair, d in t["differences"].items():
            other, _, run = pair.partition(" - ")
            low, high = d["interval"]
            told = f"{d['difference']:+.1%} [{low:+.1%}, {high:+.1%}]"
            p = f"{d['p']:.2g}" + (" (exact)" if d["test"] == "exact" else "")
            counts = f"{d['only_one']:,}", f"{d['only_other']:,}"
            rows.append((f"{t['task']}: {label_of(run)}", f"{t['shots']}", label_of(other), told, *counts, p))
    return rows


def calibration_rows(tasks: Sequence[Any], models: Sequence[str]) -> list[Sequence[str]]:
    """A row for each task and model."""
    rows: list[Sequence[str]] = [("", "shots", "ECE", "ECE, equal mass", "Brier", "abstention area")]
    keys = ("ece", "ece_equal_mass", "brier", "abstention_area")
    for t in tasks:
        for name in models:
            if m := t["models"].get(name):
                row = f"{t['task']}: {label_of(name)}", f"{t['shots']}", *(f"{m[key]:.4f}" for key in keys)
                rows.append(row)
    return rows


def probe_rows(tasks: Sequence[Any], models: Sequence[str]) -> list[Sequence[str]]:
    """A row for each probe, its control after it."""
    rows: list[Sequence[str]] = [("", "shots", "items", *map(label_of, models))]
    for t in tasks:
        found = [t["models"].get(name) for name in models]
        cells = [f"{share(m['accuracy'], m['interval'])} ({m['points']:+.2f})" if m else "" for m in found]
        rows.append((t["task"], f"{t['shots']}", f"{t['items']:,}", *cells))
    return rows


def free_rows(evaluated: dict[str, Any]) -> list[Sequence[str]]:
    """A row for each task with free answers, from "benchmarks" of the manifest of `evaluate`; no rows without any."""
    asked: dict[tuple[str, int], dict[str, Any]] = {}
    for model, of_model in evaluated.items():
        for facts in of_model["tasks"]:
            if "acc" not in facts:
                asked.setdefault((facts["task"], facts["shots"]), {})[model] = facts
    rows: list[Sequence[str]] = [("", "shots", *map(label_of, evaluated))]
    for (task, shots), found in asked.items():
        cells = [
            share(found[m]["exact_match"], found[m]["exact_match_interval"]) if m in found else "" for m in evaluated
        ]
        rows.append((task, f"{shots}", *cells))
    return rows if asked else []


def share(value: float, interval: Sequence[float]) -> str:
    """A share with its interval, in percent."""
    return f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"

"""What goes on between the two models: the alignment of a sentence, the projection, attention."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distil_jax.page import strip
from distil_jax.page.elements import folded, heading, paragraph, section, table
from distil_jax.page.figures import COLORS, INK, MUTED, Plots, bars, heat, together
from distil_jax.page.record import Record
from distil_jax.tables import interval, label_of

HEAT = {"teacher": "#2f81f7", "student": "#2ea043"}  # which stand on white and on black


def alignment(records: Sequence[Record]) -> str:
    """Both tokenizations of a sentence, and how often which role occurs."""
    parts = [strip.LEGEND]
    for record in records:
        shares = record.summary["alignment"]
        by_role = ", ".join(f"{role} {shares[role]:.1%}" for role in ("root", "interior", "crossing"))
        parts += [heading(record.name)] if len(records) > 1 else []
        parts.append(paragraph(f"Supervised student tokens of the test split by role: {by_role}."))
        parts.append(strip.drawn(record.told["sentence"]["alignment"]))
    return section("alignment", "Alignment of a sentence", parts)


def projection(records: Sequence[Record], plots: Plots) -> str:
    """How much of what the teacher says survives W, by class of token, and what W says of some tokens."""
    parts = []
    for record in records:
        found, shown = record.projection, record.told["sentence"]["projection"]
        fitted, place = found["fitted"], f" {record.name}" if len(records) > 1 else ""
        parts += [heading(record.name)] if len(records) > 1 else []
        parts += [
            paragraph(
                f"IP_KL {fitted['ip_kl']:.4f} {interval(fitted['ip_kl_interval'])}, IP_bpb {fitted['ip_bpb']:.4f} "
                f"{interval(fitted['ip_bpb_interval'])}: the shares of the teacher's information about the next token, "
                "and of its bits, that pass through W; the latter can exceed 1, as W knows counts of text too."
            ),
            together(
                [
                    plots.draw(
                        f"information{place}",
                        lambda axes, found=found: _kept(axes, found),
                        "Information kept at shared boundaries (IP_KL) by class of token, with 95 % intervals; the "
                        "controls: a shuffled W (dashed) and a match of sorted probabilities (dotted).",
                        (4.6, 3.6),
                    ),
                    plots.draw(
                        f"lost{place}",
                        lambda axes, fitted=fitted: _lost(axes, fitted),
                        "The share of the information that is lost, by where.",
                        (4.6, 2.2),
                    ),
                ]
            ),
            heading("Kept mass"),
            paragraph(
                "The share of the teacher's tokens of held-out text, by class, that W gives to student tokens by name; "
                "the rest is a remainder that no token has."
            ),
            table([("", "tokens", "named"), *_named(shown["kept"])]),
            folded(
                "What the teacher's tokens of the sentence become",
                table([("teacher token", "student tokens and weights"), *map(_becomes, shown["rows"])], "words"),
            ),
        ]
    return section("projection", "Projection of the vocabulary", parts)


def _kept(axes: Any, found: Mapping[str, Any]) -> None:
    fitted = found["fitted"]
    classes = {"all": fitted} | fitted["by_class"]
    names = [f"{name} ({of['positions']:,})" for name, of in classes.items()]
    bars(axes, names, [of["ip_kl"] for of in classes.values()], [of["ip_kl_interval"] for of in classes.values()])
    axes.axvline(found["shuffled"]["ip_kl"], linestyle="--", color=MUTED, linewidth=1.2)
    axes.axvline(found["sorted_match"]["ip_kl"], linestyle=":", color=INK, linewidth=1.2)
    axes.set(xlim=(0, 1.02), xlabel="IP_KL")


def _lost(axes: Any, fitted: Mapping[str, Any]) -> None:
    parts = {"W at boundaries": "projected", "with all pieces": "pieces", "64 likeliest alone": "tail"}
    bars(axes, list(parts), [fitted["lost"][part] for part in parts.values()], color=COLORS["control"][0])


def _named(kept: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(name, f"{of['tokens']:,}", f"{of['named']:.2%}") for name, of in kept.items()]


def _becomes(row: Sequence[Any]) -> tuple[str, str]:
    token, entries = row
    return token, ", ".join(f"{name} {weight:.3f}" for name, weight in entries) or "nothing"


def attention(records: Sequence[Record], plots: Plots) -> str:
    """Maps of teacher and student over the same byte groups."""
    parts = []
    for record in records:
        found = record.told["sentence"]["attention"]
        labels, place = found["labels"], f"{record.name} " if len(records) > 1 else ""
        student = label_of(found["student"])
        parts += [heading(record.name)] if len(records) > 1 else []
        parts.append(
            paragraph(
                "Rows attend to columns, both groups of bytes at which the two tokenizations meet; means over heads. "
                f"The first {len(labels)} groups of the sentence; layers at equal relative depths, counted from 0."
            )
        )
        for n, layers in enumerate(zip(found["layers"]["student"], found["layers"]["teacher"], strict=True)):
            maps = {side: np.array(found["maps"][side][n]) for side in ("teacher", "student")}
            apart = float(((maps["teacher"] - maps["student"]) ** 2).sum(axis=1).mean())
            drawn = []
            for side, who, layer in (("teacher", "teacher", layers[1]), ("student", student, layers[0])):
                caption = f"{place}{who}, layer {layer}"
                if side == "student":
                    caption += f"; squared distance to the teacher's {apart:.3f} a group, whole maps"
                drawn.append(
                    plots.draw(
                        f"attention {place}{side} layer {layer}",
                        functools.partial(heat, values_RxC=maps[side], names=labels, color=HEAT[side]),
                        caption,
                        (4.8, 4.8),
                    )
                )
            parts.append(together(drawn))
    return section("attention", "Attention", parts)

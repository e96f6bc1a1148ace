"""The results: every model beside the teacher, the untouched student and the control, with intervals."""

from collections.abc import Sequence
from typing import Any

from distil_jax import variants
from distil_jax.page.elements import bullets, folded, heading, paragraph, section, table
from distil_jax.page.figures import Plots, bars, looks, tall, together
from distil_jax.page.record import Record
from distil_jax.tables import class_rows, gain, interval, label_of, ladder_rows, models_of, table_rows, verdict

OTHERS = ("student_before", "control", "smoothing", "teacher")  # what a taught student is compared with
BARS = 30  # specialties in a plot


def results(records: Sequence[Record], plots: Plots) -> str:
    """The section."""
    several = len(records) > 1
    parts = [paragraph(f"{r.name}: {verdict(r.summary)}" if several else verdict(r.summary)) for r in records]
    parts += [
        table(joined(records, lambda r: table_rows(models_of(r.summary)))),
        together([_bits(r, plots, several) for r in records]),
        heading("Differences in bits per byte"),
        paragraph(
            "Paired by document, with 95 % bootstrap intervals over documents; above 0 the taught student is better."
        ),
        table(joined(records, difference_rows)),
    ]
    if any(len(ladder_rows(r.summary)) > 1 for r in records):
        parts += [heading("Rung by rung"), table(joined(records, lambda r: ladder_rows(r.summary)))]
    for record in records:
        if changes := _changes(record):
            of = f" of {record.name}" if several else ""
            parts.append(paragraph(f"What each variant{of} sets in the objective:") + bullets(changes))
    parts += [
        heading("By class of the student's tokens"),
        paragraph("Bits per byte and, in brackets, how often the most likely token was right."),
        table(joined(records, lambda r: class_rows(models_of(r.summary)))),
    ]
    if told := [r for r in records if "retention" in r.evaluate]:  # an older evaluation has none
        parts += [
            heading("What a student keeps of the teacher"),
            paragraph(
                "On held-out text: how often its most likely token is right, over how often the teacher's is; how "
                "often it is the first piece of the teacher's; KL of the projected teacher to it at temperature 1."
            ),
            table(joined(told, retention_rows)),
            *(kept_by(record, part, several) for part in ("by_class", "by_specialty") for record in told),
        ]
    return section("results", "Results", parts)


KEPT = ("token_accuracy_retained", "agreement_with_teacher", "kl_to_teacher")  # eval/retention.py
OF_KEPT = ("accuracy, of the teacher's", "agrees with the teacher", "KL to the teacher, nats")


def retention_rows(record: Record) -> list[tuple[str, ...]]:
    """What each student keeps, with intervals."""
    found = record.evaluate["retention"]
    return [("", *OF_KEPT), *((label_of(name), *_kept(of)) for name, of in found.items())]


def kept_by(record: Record, part: str, several: bool) -> str:
    """The same of the exported student, by class of token or by specialty."""
    found = record.evaluate["retention"][record.exported][part]
    rows = [("", "positions", *OF_KEPT), *((name, f"{of['positions']:,}", *_kept(of)) for name, of in found.items())]
    of = f"{record.name}, " if several else ""
    return folded(f"{of}{label_of(record.exported)}, {part.replace('_', ' ')}", table(rows))


def _kept(of: dict[str, Any]) -> list[str]:
    return [f"{of[key]:.4f} {interval(of[f'{key}_interval'])}" if key in of else "" for key in KEPT]


def joined(records: Sequence[Record], rows_of: Any) -> list[Sequence[Any]]:
    """The rows of every folder under one header. rows_of: of a record, the header first; columns are matched by
    their names, and first comes the folder's where there are several."""
    found = [(r, rows) for r in records if (rows := rows_of(r))]
    columns = list(dict.fromkeys(name for _, rows in found for name in rows[0]))
    joined_rows: list[Sequence[Any]] = [columns]
    for record, (header, *rows) in found:
        for row in rows:
            cells = dict(zip(header, row, strict=True))
            first = f"{record.name}: {row[0]}" if len(records) > 1 else row[0]
            joined_rows.append([first, *(cells.get(name, "") for name in columns[1:])])
    return joined_rows


def difference_rows(record: Record) -> list[tuple[str, ...]]:
    """Of each taught student, the others' bits per byte less its own."""
    differences = record.summary["differences"]
    others = [o for o in OTHERS if any(d.startswith(f"{o} - ") for d in differences)]
    rows: list[tuple[str, ...]] = [("", *(f"{label_of(other)} - it" for other in others))]
    for run in variants.taught(record.runs):
        rows.append((label_of(run), *(gain(differences.get(f"{other} - {run}")) for other in others)))
    return rows


def _bits(record: Record, plots: Plots, several: bool) -> str:
    models = models_of(record.summary)
    look = looks(list(models))

    def draw(axes: Any) -> None:
        bars(
            axes,
            [label_of(name) for name in models],
            [m["bits_per_byte"] for m in models.values()],
            [m["bits_per_byte_interval"] for m in models.values()],
            [look[name]["color"] for name in models],
            above=True,
        )
        axes.set(xlabel="bits per byte, lower is better")

    caption = "Held-out text in bits per byte; the line on a bar is its 95 % interval."
    caption = f"{record.name}. {caption}" if several else caption
    return plots.draw(f"bits per byte {record.name if several else ''}", draw, caption, tall(len(models)))


def _changes(record: Record) -> list[str]:
    """What each variant changes, in the order of the runs."""
    changes = []
    for run in record.runs:
        start = f"variants.{run}."
        set_here = {k.removeprefix(start): v for k, v in record.config.items() if k.startswith(start)}
        if set_here:
            changes.append(f"{run}: " + ", ".join(f"{k} {v}" for k, v in set_here.items()))
    return changes


def specialties(records: Sequence[Record], plots: Plots) -> str:
    """What the exported student gained in each specialty over the rung below it."""
    parts = []
    for record in records:
        run, by = record.exported, record.evaluate["differences_by_specialty"]
        below = variants.below(record.runs, run)
        pair = f"{below} - {run}"
        found = {name: of[pair] for name, of in by.items() if pair in of}
        if not found:
            continue
        ordered = sorted(found.items(), key=lambda item: -item[1]["bits_per_byte"])
        shown = ordered if len(ordered) <= BARS else [*ordered[: BARS // 2], *ordered[-BARS // 2 :]]

        def draw(axes: Any, shown=shown, pair=pair) -> None:
            values, intervals = [d["bits_per_byte"] for _, d in shown], [d["interval"] for _, d in shown]
            bars(axes, [name for name, _ in shown], values, intervals, above=True)
            axes.set(xlabel=f"{pair}, bits per byte")

        caption = f"{pair} by specialty: right of 0, {run} is better. The line on a bar is its 95 % interval."
        if len(shown) < len(ordered):
            caption += f" The {BARS // 2} largest and the {BARS // 2} smallest of {len(ordered)}."
        caption = f"{record.name}. {caption}" if len(records) > 1 else caption
        drawn = plots.draw(f"specialties {record.name if len(records) > 1 else ''}", draw, caption, tall(len(shown)))
        bits = record.evaluate["bits_per_byte_by_specialty"]
        models = list(next(iter(bits.values()), {}))
        rows = [("", *map(label_of, models), f"{pair}")]
        rows += [(name, *(f"{bits[name][m]:.4f}" for m in models), gain(difference)) for name, difference in ordered]
        every = folded(f"All {len(ordered)} specialties in bits per byte", table(rows))
        parts.append(f"<div>{drawn}{every}</div>")
    return section("specialties", "By specialty", [together(parts)])

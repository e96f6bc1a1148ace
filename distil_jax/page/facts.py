"""Answers, speed, data, settings: what is told as it is."""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from distil_jax.page.elements import folded, heading, pairs, paragraph, section, table, text
from distil_jax.page.record import Record
from distil_jax.tables import label_of, speed_in_words, speed_rows

LONGEST = 4000  # characters of an answer that are shown


def answers(records: Sequence[Record]) -> str:
    """What each model wrote after the same questions, side by side."""
    parts = []
    for record in records:
        told = record.told["answers"]
        parts += [heading(record.name)] if told and len(records) > 1 else []
        for answer in told:
            said = {name: words for name, words in answer.items() if name != "prompt"}
            names = {name: name if name == "reference" else label_of(name) for name in said}
            boxes = [f"<div><b>{text(names[n])}</b>{text(words.strip(), LONGEST)}</div>" for n, words in said.items()]
            asked = f"<pre>{text(answer['prompt'], LONGEST)}</pre>"
            parts.append(f'<div class="asked">{asked}<div class="answers">{"".join(boxes)}</div></div>')
    note = paragraph("Greedy, cut at a fixed number of tokens. The reference is the held-out text itself.")
    return section("answers", "Answers to held-out questions", [note, *parts] if parts else [])


def speed(records: Sequence[Record]) -> str:
    """Tokens a second, under one protocol."""
    parts = []
    for record in records:
        if found := record.told.get("speed"):
            parts += [heading(record.name)] if len(records) > 1 else []
            parts += [table(speed_rows(found)), paragraph(speed_in_words(found))]
    return section("speed", "Speed", parts)


def data(records: Sequence[Record]) -> str:
    """Where the text came from, and what was left out of it, with the reasons."""
    parts = []
    for record in records:
        corpus = record.corpus
        parts += [heading(record.name)] if len(records) > 1 else []
        provenance = corpus["provenance"]
        told = {name: value for name, value in provenance.items() if isinstance(value, (str, int, float))}
        parts.append(pairs(told))
        splits = list(corpus["sources"])
        sources = list(dict.fromkeys(name for of in corpus["sources"].values() for name in of))
        rows: list[Sequence[str]] = [("source", *splits)]
        rows += [(_last(s), *(f"{corpus['sources'][split].get(s, 0):,}" for split in splits)) for s in sources]
        rows.append(("rows used, after what was dropped", *(f"{corpus['rows'].get(split, 0):,}" for split in splits)))
        parts.append(table(rows))
        parts.append(_counts("Dropped", "reason", corpus["quarantined"]))
        by_source = {
            f"{_last(source)}: {reason}": n
            for source, of in corpus["quarantined_by_source"].items()
            for reason, n in of.items()
        }
        parts.append(folded("Dropped, by source", table([("", "rows"), *_numbers(by_source)])) if by_source else "")
        parts.append(_counts("Licences", "source: licence", provenance.get("licences", {})))
        parts.append(_counts("Mended", "what", corpus.get("mended", {})))
        parts.append(_found_benchmarks(corpus.get("contamination", {})))
    return section("data", "Data", parts)


def _counts(title: str, what: str, counts: Mapping[str, int]) -> str:
    return heading(title) + table([(what, "rows"), *_numbers(counts)]) if counts else ""


def _numbers(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), f"{n:,}" if isinstance(n, int) else str(n)) for name, n in counts.items()]


def _found_benchmarks(found: Mapping[str, Any]) -> str:
    rows = [
        (f"{_last(source)}: {benchmark}", f"{hits['rows']:,}")
        for source, of in found.items()
        for benchmark, hits in of.items()
    ]
    if not rows:
        return ""
    return heading("Benchmark questions that were taken out") + table([("source: benchmark", "rows"), *rows])


def _last(name: str) -> str:
    """The last part of a path; folders say more of a machine than of a source."""
    return PurePath(name).name or name


def settings(records: Sequence[Record]) -> str:
    """The config of each folder, what differs between them, and the facts of the runs."""
    parts = []
    if len(records) > 1:
        keys = sorted({key for record in records for key in record.config})
        told = {key: [_value(record.config[key]) if key in record.config else "" for record in records] for key in keys}
        apart = [(key, *values) for key, values in told.items() if len(set(values)) > 1]
        parts += [
            heading("Keys that differ"),
            table([("key", *(record.name for record in records)), *apart], "words") if apart else paragraph("None."),
        ]
    for record in records:
        facts = ("seconds", "seconds_per_step", "seconds_of_the_teacher", "peak_memory_bytes", "versions", "seed")
        found = {name: record.summary[name] for name in facts}
        config = {key: _value(value) for key, value in sorted(record.config.items())}
        of = f" of {record.name}" if len(records) > 1 else ""
        parts.append(folded(f"The config{of}, {len(config)} keys", pairs(config, ("key", "value"))))
        parts.append(folded(f"Seconds, memory, versions{of}", pairs(_flat(found))))
    return section("settings", "Config and facts", parts)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(found: Mapping[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}: ")
        else:
            flat[f"{before}{name}"] = f"{value:,.4g}" if isinstance(value, float) else _value(value)
    return flat

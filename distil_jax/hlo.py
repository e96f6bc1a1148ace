"""What a compiled program sends between devices, read from its text.

XLA names the body of a loop once, however often it runs; here every operation counts as often as the loops around it,
whose trip counts XLA notes where it knows them.
"""

import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf"= (\(?.*?\)?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_CALLED_OF_OLD = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One kind of traffic: `count` operations a run of the program, each of which makes an array of this shape."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    bytes: int  # of one such array, on each device


def collectives(text: str) -> list[Collective]:
    """All of them, those that move most first."""
    computations, entry = _computations(text)
    runs = _runs(computations, entry)
    found: Counter[tuple[str, str, tuple[int, ...], int]] = Counter()
    for name, lines in computations.items():
        for line in lines:
            if (match := _OPERATION.search(line)) and runs[name]:
                dtype, shape, size = max((_array(*a) for a in _ARRAY.findall(match[1])), key=lambda a: a[2])
                found[match[2], dtype, shape, size] += runs[name]
    made = [Collective(kind, dtype, shape, n, size) for (kind, dtype, shape, size), n in found.items()]
    return sorted(made, key=lambda c: -c.count * c.bytes)


def _array(dtype: str, dims: str) -> tuple[str, tuple[int, ...], int]:
    shape = tuple(int(n) for n in dims.split(",") if n)
    size = _BYTES.get(dtype, 4)
    for n in shape:
        size *= n
    return dtype, shape, size


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(name -> lines of each computation, the name of the first that runs)."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line.strip() if line.startswith("ENTRY") else line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs: in a loop as often as it turns, once where XLA does not say how often."""
    edges: dict[str, list[tuple[str, int]]] = {}
    for name, lines in computations.items():
        for line in lines:
            trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
            body = found[1] if (found := _BODY.search(line)) else None
            for one, several in _CALLED.findall(line):
                for called in [one] if one else [part.strip().lstrip("%") for part in several.split(",")]:
                    edges.setdefault(name, []).append((called, trips if called == body else 1))
            edges.setdefault(name, []).extend((called, 1) for called in _CALLED_OF_OLD.findall(line))
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for called, trips in edges.get(name, ()):
            visit(called, times * trips)

    visit(entry, 1)
    return runs

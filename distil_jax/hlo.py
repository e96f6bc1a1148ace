"""What a compiled program sends between devices, read from its text.

XLA names the body of a loop once, however often it runs; here every operation counts as often as the loops around it
turn: as XLA notes, or else as condition and body say, which count from 0 to a constant in equal steps. A branch counts
as taken, and a loop that says neither as one turn.
"""

import re
from collections import Counter
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf"= (\(?.*?\)?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_CALLED_OF_OLD = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"ROOT .* compare\([^,]*?%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_ELEMENT = re.compile(r"%?([\w.\-]+) = \S+ get-tuple-element\(.*\), index=(\d+)")
_STATE = re.compile(r"ROOT .* tuple\((.*?)\)(?:,|$)")
_ADD = re.compile(r"%?([\w.\-]+) = \S+ add\(%?([\w.\-]+), %?([\w.\-]+)\)")
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
    once: dict[Any, tuple[tuple[str, str, tuple[int, ...], int], int]] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            if (match := _OPERATION.search(line)) and runs[name]:
                dtype, shape, size = max((_array(*a) for a in _ARRAY.findall(match[1])), key=lambda a: a[2])
                # A TPU moves an array in pieces beside other work, each of which names the operation and its channel.
                channel = (match[2], found[1]) if (found := _CHANNEL.search(line)) else (name, number)
                times = min(runs[name], once[channel][1]) if channel in once else runs[name]
                once[channel] = ((match[2], dtype, shape, size), times)
    total: Counter[tuple[str, str, tuple[int, ...], int]] = Counter()
    for what, times in once.values():
        total[what] += times
    made = [Collective(kind, dtype, shape, n, size) for (kind, dtype, shape, size), n in total.items()]
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
        elif line.startswith("}") and not line.startswith("}}"):  # which ends what a kernel says of itself over lines
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry


def _turns(condition: list[str], body: list[str]) -> int:
    """How often a loop turns: its condition compares an element of the state with a constant, to which the body adds
    another constant. 1 where they do something else."""
    less = next((found for line in condition if (found := _LESS.search(line))), None)
    element = {found[1]: int(found[2]) for line in condition if (found := _ELEMENT.search(line))}.get(less and less[1])
    limit = _constants(condition).get(less and less[2])
    if element is None or limit is None:
        return 1
    state = next((found[1].split(", ") for line in body if (found := _STATE.search(line))), [])
    counter = state[element].split()[-1].lstrip("%") if element < len(state) else ""
    added = next((found for line in body if (found := _ADD.search(line)) and found[1] == counter), None)
    constants = _constants(body)
    steps = [constants[name] for name in (added.groups()[1:] if added else ()) if name in constants]
    return -(-limit // (steps[0] if steps and steps[0] else 1))


def _constants(lines: list[str]) -> dict[str, int]:
    return {found[1]: int(found[2]) for line in lines if (found := _CONSTANT.search(line))}


def _runs(computations: dict[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs: in a loop as often as it turns, once where XLA does not say how often."""
    edges: dict[str, list[tuple[str, int]]] = {}
    for name, lines in computations.items():
        for line in lines:
            condition, body = found.groups() if (found := _LOOP.search(line)) else ("", "")
            noted, loop = _TRIPS.search(line), (computations.get(condition, []), computations.get(body, []))
            trips = int(noted[1]) if noted else _turns(*loop)
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

"""`distil-jax compile`: whether a config's step fits a TPU slice, before the slice is there.

distil-jax compile --config configs/medgemma4b_llama1b.py --topology v5e:4x4

The step that `train` runs is compiled by the TPU's own compiler (pip install 'distil-jax[tpu-compile]'), from shapes
alone: no TPU, no weights and no data are needed, a minute or two of one core is. Prints where every parameter lies, the
memory of a chip by kind, what is sent between chips, floating-point operations, and the least time of a step.
Exit status 70 if the step does not fit.
"""

import argparse
import os
import pickle
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distil_jax import arguments, chips
from distil_jax.errors import OUT_OF_MEMORY, UserError

_GIB = 2**30


def parser() -> arguments.Parser:
    """The arguments of the command."""
    p = arguments.Parser(
        prog="distil-jax compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--config", metavar="FILE", help="the config whose step is compiled")
    p.add_argument("--topology", required=True, help="the slice, in chips: v5e:4x4, v5p:2x2x1, v6e:2x4, v4:2x2x1, ...")
    p.add_argument("--run", help="teacher, control, distilled or a variant (default: config.export.run)")
    p.add_argument("--chips", type=int, default=0, metavar="N", help="only the first N devices of the slice")
    p.add_argument("--memory", type=float, default=0, metavar="BYTES", help="of a chip, in place of the data sheet's")
    p.add_argument("--largest", action="store_true", help="search the largest batch that fits; several compilations")
    p.add_argument("--shardings", action="store_true", help="where every parameter lies")
    p.add_argument("--save", metavar="DIR", help="keep the compiled step there: step.hlo.txt and step.executable")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status. Raises UserError for what the user can mend."""
    from distil_jax.config import load_config

    ours, of_config = arguments.split(argv)
    args = parser().parse_args(ours)
    chip = chips.named(args.topology)
    if args.memory:
        chip = chip._replace(memory=args.memory)
    config, leftover = load_config(of_config)
    if leftover:
        raise UserError(f"distil-jax compile takes no {leftover[0]!r}")
    mesh = mesh_of(config, args.topology, args.chips)
    run = args.run or config.export.run
    fit = compiled(config, run, mesh, chip)
    name = dict(zip(of_config, of_config[1:], strict=False)).get("--config", config.workdir)
    print(f"{run} of {name} on {args.topology}: mesh {dict(mesh.shape)}, {mesh.size} devices")
    print("\n".join(describe(fit, chip, shardings=args.shardings)))
    if args.save and fit.program is not None:
        save(fit.program, Path(args.save))
    if args.largest:
        print(largest(config, run, mesh, chip, fit))
    return 0 if fit.fits else OUT_OF_MEMORY


def mesh_of(config: Any, topology: str, first: int = 0) -> Any:
    """config.mesh over the devices of a topology, which need not exist. Raises UserError for one that is not known."""
    # Read when libtpu is loaded: no word to a metadata server, no look for a TPU, which several may do at a time.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for level in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
        os.environ.setdefault(level, "3")
    import jax
    from jax.experimental import topologies

    from distil_jax import sharding

    slices = re.search(r"slices:(\d+)", config.mesh)
    several = {"num_slices": int(slices[1])} if slices and int(slices[1]) > 1 else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology={topology}: {str(error).splitlines()[0][:200]}. If libtpu is missing: "
            "pip install 'distil-jax[tpu-compile]'"
        ) from error
    return sharding.mesh_of(config.mesh, list(devices)[: first or None])


class Fit(NamedTuple):
    """A step that was compiled, or why it could not be."""

    plan: Any
    rows: int
    seconds: float
    program: Any  # None: it does not fit
    complaint: str  # of the compiler, in one line
    needed: int  # bytes on each device
    fits: bool


def compiled(config: Any, run: str, mesh: Any, chip: chips.Chip, rows: int = 0) -> Fit:
    """Compiles the step of `run` for a batch of `rows` (0: the config's)."""
    import jax

    from distil_jax.plan import plan

    jax.config.update("jax_enable_compilation_cache", False)  # what it holds cannot be loaded without the chips
    started = time.monotonic()
    planned = plan(config, run, mesh, rows)
    rows = planned.batch["student_tokens"].shape[0]
    try:
        program = planned.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        complaint = re.sub(r"\s+", " ", str(error))
        used = re.search(r"Used ([\d.]+)([GM]) of", complaint)
        needed = int(float(used[1]) * {"G": _GIB, "M": 2**20}[used[2]]) if used else 0
        return Fit(planned, rows, time.monotonic() - started, None, complaint[:300], needed, False)
    m = program.memory_analysis()
    needed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return Fit(planned, rows, time.monotonic() - started, program, "", needed, needed <= chip.memory)


def describe(fit: Fit, chip: chips.Chip, *, shardings: bool = False) -> list[str]:
    """The lines that the command prints."""
    from distil_jax import flops, hlo

    plan, t = fit.plan, fit.plan.training
    mesh = plan.objective.mesh
    lines = [f"compiled in {fit.seconds:.0f} s: {fit.rows} rows a step in {t.accumulate} pieces, remat {t.remat}", ""]
    if shardings:
        lines += [*table(["parameter", "shape", "lies over", "MiB a chip"], placements(plan)), ""]
    lines += table(["memory of a chip", "GiB"], memory(fit, chip))
    if fit.program is None:
        return [*lines, "", f"DOES NOT FIT: {fit.complaint}", advice(plan)]
    sent = hlo.collectives(fit.program.as_text())
    by_kind: Counter[str] = Counter()
    for c in sent:
        by_kind[c.kind] += c.count * c.bytes
    rows = [
        [c.kind, f"{c.dtype}[{','.join(map(str, c.shape))}]", c.count, f"{c.count * c.bytes / 2**20:,.1f}"]
        for c in sent[:12]
    ]
    rest = sum(c.count * c.bytes for c in sent[12:])
    rows += [[f"{len(sent) - 12} more", "", "", f"{rest / 2**20:,.1f}"]] if len(sent) > 12 else []
    title = ["sent between chips in a step", "array", "times", "MiB a chip"]
    lines += ["", *(table(title, rows) if rows else ["nothing is sent between chips"])]
    f = flops.of_step(plan.objective, plan.state["params"], plan.frozen.projection, plan.batch)
    least = flops.bound(plan, chip, f, sum(by_kind.values()))
    tokens = fit.rows * plan.batch[f"{plan.objective.side}_tokens"].shape[1]
    parts = {"student": f.student, "teacher": f.teacher, "heads": f.heads, "again, by remat": f.again}
    lines += ["", *table(["floating-point operations of a step", "TFLOP"], _cells(parts, 1e12))]
    bounds = {f"{name}, at {chip.name}'s peak": 1e3 * getattr(least, name) for name in least._fields}
    lines += ["", *table(["least time of a step", "ms"], _cells(bounds, 1))]
    lines += [
        "",
        f"bound by {least.by}: {1e3 * least.seconds:,.0f} ms a step, {tokens / least.seconds:,.0f} packed "
        f"{plan.objective.side} tokens/s on {mesh.size} devices; MFU there "
        f"{f.model / (least.seconds * mesh.size * chip.flops):.0%}",
    ]
    verdict = "fits" if fit.fits else "DOES NOT FIT"
    lines += [f"{verdict}: {fit.needed / _GIB:.2f} of {chip.memory / _GIB:.2f} GiB a chip"]
    return lines if fit.fits else [*lines, advice(plan)]


def memory(fit: Fit, chip: chips.Chip) -> list[list[Any]]:
    """Rows of (what, GiB a chip)."""
    plan = fit.plan
    state, frozen = plan.state, plan.frozen
    parts = {
        "parameters that learn": bytes_here(state["params"]),
        "moments of the optimiser": bytes_here(state["opt_state"]),
        "average of the parameters": bytes_here(state.get("ema")),
        "frozen part of the student": bytes_here(frozen.own),
        "teacher": bytes_here(frozen.teacher),
        "teacher's head, as W reads it": bytes_here(frozen.teacher_rows),
        "W and tables of tokens": bytes_here((frozen.projection, frozen.inside, frozen.rows)),
        "batch": bytes_here(plan.batch),
    }
    rows = [[name, f"{size / _GIB:.2f}"] for name, size in parts.items() if size]
    if fit.program is not None:
        m = fit.program.memory_analysis()
        rows.append(["activations, gradient and buffers", f"{m.temp_size_in_bytes / _GIB:.2f}"])
        new = m.output_size_in_bytes - m.alias_size_in_bytes
        rows += [["outputs that replace no input", f"{new / _GIB:.2f}"]] if new > 0.005 * _GIB else []
    if fit.needed:
        rows.append(["together", f"{fit.needed / _GIB:.2f}"])
    return [*rows, [f"of {chip.name}", f"{chip.memory / _GIB:.2f}"]]


def bytes_here(tree: Any) -> int:
    """Bytes of described arrays on one device."""
    import jax
    import numpy as np

    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)


def placements(plan: Any) -> list[list[Any]]:
    """Rows of (parameter, shape, mesh axes of each dimension, MiB a chip) for what learns and for the teacher."""
    import jax

    rows = []
    for title, tree in (
        ("learns", plan.state["params"]),
        ("frozen", plan.frozen.own),
        ("teacher", plan.frozen.teacher),
    ):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{title}: {jax.tree_util.keystr(path, simple=True, separator='.')}"
            spec = ", ".join("-" if axis is None else str(axis) for axis in x.sharding.spec) or "-"
            rows.append([name, f"{x.dtype}{list(x.shape)}", spec, f"{bytes_here(x) / 2**20:,.1f}"])
    return rows


def advice(plan: Any) -> str:
    """What to change where memory does not suffice, the cheapest first."""
    t, o = plan.training, plan.objective
    mesh, ideas = o.mesh.shape, []
    if t.remat != "full":
        ideas.append("training.remat=full")
    rows = plan.batch["student_tokens"].shape[0] // t.accumulate // (mesh["data"] * mesh["fsdp"])
    if rows > 1:
        ideas.append(f"a larger training.accumulate (a piece has {rows} rows a chip now)")
    if mesh["data"] > 1:
        ideas.append("fsdp in place of data in config.mesh")
    if o.teacher is not None:
        ideas.append("teacher.dtype=int8 or teacher.spread=fsdp")
    ideas.append("objective.block smaller, shorter data lengths, student.lora, or more chips")
    return "To make it fit, in this order: " + "; ".join(ideas) + "."


def largest(config: Any, run: str, mesh: Any, chip: chips.Chip, fit: Fit) -> str:
    """Searches the largest batch that fits, of batches whose pieces are a multiple of data x fsdp; what it says was
    compiled."""
    step = mesh.shape["data"] * mesh.shape["fsdp"] * fit.plan.training.accumulate
    tried = {fit.rows: (fit.needed, fit.fits and fit.program is not None)}

    def needed(rows: int) -> tuple[int, bool]:
        one = compiled(config, run, mesh, chip, rows)
        size, fits = tried[rows] = one.needed, one.fits and one.program is not None
        told = f"{size / _GIB:.2f} GiB a chip" if size else "as much as the compiler does not say"
        print(f"{rows} rows a step: {told}, {'fits' if fits else 'too much'} ({one.seconds:.0f} s)", flush=True)
        return tried[rows]

    low, high = most(needed, tried[fit.rows], fit.rows, step, chip.memory)
    tries = f"{len(tried)} compilations"
    if not low:
        return f"no batch that was tried fits: {high} rows do not, {step} are the fewest to share out ({tries})"
    beyond = f"{high} do not fit" if high else "more were not tried"
    return f"largest batch that fits: {low} rows a step, {tried[low][0] / _GIB:.2f} GiB a chip ({tries}; {beyond})"


def most(
    needed: Callable[[int], tuple[int, bool]], first: tuple[int, bool], rows: int, step: int, memory: float
) -> tuple[int, int]:
    """(the most rows found to fit, the fewest found not to), multiples of step; 0: none. At most six more tries, which
    end when the two are a step or a sixteenth apart.

    needed: rows -> bytes (0: not known) and whether they fit. first: that of `rows`. Bytes grow nearly linearly, so
    each try is where the line through the two nearest ones reaches `memory`.
    """
    known = {rows: first}
    for _ in range(6):
        low = max((n for n, (_, fits) in known.items() if fits), default=0)
        high = min((n for n, (_, fits) in known.items() if not fits), default=0)
        if high and high - low <= max(step, low // 16):
            break
        near = sorted((n for n, (size, _) in known.items() if size), key=lambda n: abs(known[n][0] - memory))[:2]
        if len(near) == 2 and known[near[0]][0] != known[near[1]][0]:
            (a, (size_a, _)), (b, (size_b, _)) = ((n, known[n]) for n in near)
            guess = a + (memory - size_a) * (b - a) / (size_b - size_a)
        else:
            guess = high / 2 if high else 2 * low
        guess = max(int(guess) // step * step, low + step)
        if high and guess >= high:  # the line does not bend with them
            guess = (low + high) // 2 // step * step
        if guess <= low:
            break
        known[guess] = needed(guess)
    low = max((n for n, (_, fits) in known.items() if fits), default=0)
    return low, min((n for n, (_, fits) in known.items() if not fits), default=0)


def save(program: Any, folder: Path) -> None:
    """Keeps a compiled step: its text, and the executable, which `deserialize_and_load` of the module below loads on a
    slice of this topology with the same jaxlib."""
    from jax.experimental import serialize_executable

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.hlo.txt").write_text(program.as_text(), encoding="utf-8")
    (folder / "step.executable").write_bytes(pickle.dumps(serialize_executable.serialize(program)))
    print(f"saved in {folder}")


def _cells(values: dict[str, float], unit: float) -> list[list[str]]:
    return [[name, f"{value / unit:,.1f}"] for name, value in values.items() if value]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table, the cells padded to read well in a terminal too."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    words = sum(not re.fullmatch(r"[\d.,]*", row[-1]) for row in cells[1:]) > len(rows) / 2

    def line(row: Sequence[str]) -> str:
        padded = [
            c.rjust(w) if i and (i == len(row) - 1 and not words) else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (w + 2) for w in widths)}|"
    return [line(cells[0]), rule, *map(line, cells[1:])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

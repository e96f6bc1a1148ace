"""The command line: which command, with which config, and what a person reads when it cannot be done.

    distil-jax COMMAND --config configs/NAME.py[:args] [--config.key=value ...]

Exit status: 0 done; 1 the program failed (its traceback is shown) or `doctor` found a fault; 2 something for the user
to mend, said in one line; others as errors.py lists them. `DISTIL_JAX_DEBUG=1` shows the traceback behind every line.
"""

import ast
import contextlib
import errno
import hashlib
import importlib
import inspect
import io
import os
import platform
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distil_jax
from distil_jax import arguments, hosts
from distil_jax.errors import FAILED, HOST_LOST, INPUT, INTERRUPTED, OUT_OF_MEMORY, STOPPED, UserError, nearest

# Command -> what runs, imported when it does, and the line of --help. In the order of a run.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("distil_jax.run:main", "every stage in order; skips what is there and still valid"),
    "data": (
        "distil_jax.data.command:main",
        "`data list`: the sources of the medical corpus, their licences, which are on",
    ),
    "prepare": ("distil_jax.prepare:main", "text to tokenizers, aligned and packed shards"),
    "inspect": ("distil_jax.look.command:main", "what both models read of a text: tokens, roles, masks, expectations"),
    "train": ("distil_jax.train:main", "train teacher and controls; once `project` has run, the distilled student"),
    "project": ("distil_jax.project:main", "build, fit and measure the vocabulary projection; `project inspect TEXT`"),
    "score": ("distil_jax.score:main", "what the teacher says of the training shards, once, for teacher.scores=stored"),
    "evaluate": (
        "distil_jax.evaluate:main",
        "held-out text and benchmarks for every model; `evaluate PATH --tasks ...` for any model",
    ),
    "export": ("distil_jax.export:main", "the distilled student as a Hugging Face directory"),
    "generate": ("distil_jax.generation.command:main", "ask a model, talk to it, or answer a file of prompts"),
    "compile": ("distil_jax.compile:main", "whether a step fits a TPU slice that is not there, and its least time"),
    "report": ("distil_jax.report:main", "summary.json and a page with plots; `report DIR DIR --out FILE` compares"),
    "speed": ("distil_jax.speed:main", "tokens per second of models side by side, under one protocol"),
    "probes": ("distil_jax.eval.probe_files:main", "of a file of questions: none of the above, false questions"),
    "doctor": ("distil_jax.doctor:main", "what this machine has, and the fix for each fault (--config is optional)"),
}
_CONFIG_OPTIONAL = ("doctor",)
_OWN_ARGUMENTS = (
    "data",
    "inspect",
    "generate",
    "compile",
    "speed",
    "probes",
)  # beside a config; generate works without one too, data takes none
# In the errors of collectives and of the coordination service when a process of the run has ended.
_OF_ANOTHER_HOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Gloo",
    "coordination service",
    "UNAVAILABLE:",
)
_STILL_USABLE = (
    "finished stages and the last whole checkpoint are still usable: free some space and give the same command again"
)


def main(argv: list[str] | None = None) -> int:
    """The console script `distil-jax`; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"distil-jax {distil_jax.__version__}")
        return 0
    return _guarded(lambda: _dispatch(argv[0], argv[1:]))


def stage_main(main_fn: Callable[[Any], Any], argv: list[str] | None = None) -> int:
    """For `python -m distil_jax.STAGE --config ...`: the same parsing and the same errors; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    module = inspect.getmodule(main_fn)
    name = getattr(getattr(module, "__spec__", None), "name", None) or main_fn.__module__
    return _guarded(lambda: _run_stage(main_fn, f"python -m {name}", argv, config_optional=False))


def _dispatch(command: str, argv: list[str]) -> int:
    if command not in COMMANDS:
        raise UserError(f"no command {command!r}{nearest(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
    from distil_jax.config import config_argument

    module, function = COMMANDS[command][0].split(":")
    use_compilation_cache()
    hosts.start()
    # transformers serves tokenizers here; that it finds no torch for its models is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    main_fn = getattr(importlib.import_module(module), function)
    if command == "project" and argv[:1] == ["inspect"]:
        return importlib.import_module("distil_jax.look.mapping").main(argv[1:])
    if command == "report" and config_argument(argv) is None:
        return importlib.import_module("distil_jax.page.command").main(argv)
    if command == "evaluate" and set(arguments.split(argv)[0]) - {"-h", "--help"}:
        return importlib.import_module("distil_jax.eval.command").main(argv)
    if command in _OWN_ARGUMENTS:
        return main_fn(argv)
    return _run_stage(main_fn, f"distil-jax {command}", argv, config_optional=command in _CONFIG_OPTIONAL)


def _run_stage(main_fn: Callable[[Any], Any], program: str, argv: list[str], *, config_optional: bool) -> int:
    """Parses, runs, and takes an int that `main_fn` returns for the exit status."""
    from distil_jax.config import config_argument, load_config

    if "-h" in argv or "--help" in argv:
        print(_stage_help(main_fn, program, config_argument(argv)))
        return 0
    use_compilation_cache()
    hosts.start()
    if config_optional and not argv:
        config = None
    else:
        config, leftover = load_config(argv)
        if leftover:
            raise UserError(f"{program} takes no {leftover[0]!r}: keys are set with --config.KEY=VALUE")
    result = main_fn(config)
    return result if type(result) is int else 0


def _guarded(action: Callable[[], int]) -> int:
    """Runs; what the user can mend becomes one line on standard error. In a run of several processes one that fails
    ends at once and takes the others with it."""
    debug = os.environ.get("DISTIL_JAX_DEBUG", "") not in ("", "0")
    try:
        status = action()
        if status == 0:
            hosts.leave()
        return status
    except SystemExit as end:
        if end.code == STOPPED:  # all of them at the same step
            with contextlib.suppress(Exception):  # the state is saved, whatever became of the others
                hosts.leave()
        raise
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last whole checkpoint", file=sys.stderr)
        hosts.failed(INTERRUPTED, "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        status, line = _told(error)
        if debug or line is None and hosts.count() > 1:
            traceback.print_exc()
        if line is not None:
            print("error: " + " ".join(line.split("\n")), file=sys.stderr)
        hosts.failed(status, line or repr(error))
        if line is None:
            raise
        return status


def _told(error: Exception) -> tuple[int, str | None]:
    """(exit status, what to say of the error; None where only its traceback will do)."""
    if isinstance(error, UserError):
        return error.status, str(error)
    if full := _disk_full(error):
        return INPUT, full
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return OUT_OF_MEMORY, (
            f"out of memory ({str(error).splitlines()[0][:300]}): raise training.accumulate or training.remat, lower "
            "training.batch_size, objective.block or the lengths of the data, or spread over more devices by "
            "config.mesh; `distil-jax compile` says what fits"
        )
    if hosts.count() > 1 and any(sign in str(error) for sign in _OF_ANOTHER_HOST):
        return HOST_LOST, f"another host is gone ({str(error).splitlines()[0][:300]})"
    return FAILED, None


def _disk_full(error: BaseException) -> str | None:
    """What to say if a full disk is behind the error; libraries in C++ and Rust only pass on its text."""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        texts = ("No space left on device", "Disk quota exceeded", "os error 28)", "File too large")
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or (
            number is None and any(t in str(cause) for t in texts)
        ):
            where = f" ({cause.filename})" if isinstance(cause, OSError) and cause.filename else ""
            return f"the disk is full{where}; {_STILL_USABLE}"
        cause = cause.__cause__ or cause.__context__
    return None


def use_compilation_cache() -> Path | None:
    """Keeps compiled programs between runs; returns the folder, or None where it is off.

    The folder is `$JAX_COMPILATION_CACHE_DIR`, else one under `~/.cache/distil_jax/xla`. JAX's own switch
    `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false", "no", "off"):
        return None
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        # A home folder may be shared by hosts with other CPUs, whose programs would end with an illegal instruction.
        host = hashlib.sha256(_processor().encode()).hexdigest()[:8]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(home) / "distil_jax" / "xla" / host)
    if "jax" in sys.modules:  # it has read the environment already
        sys.modules["jax"].config.update("jax_compilation_cache_dir", folder)
    return Path(folder)


def _processor() -> str:
    """What tells this host's instruction set from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return "\n".join([platform.machine(), *dict.fromkeys(x for x in lines if x.startswith(("model name", "flags")))])


# --- help -------------------------------------------------------------------------------------------------------------


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            (distil_jax.__doc__ or "").splitlines()[0],
            "",
            "usage: distil-jax COMMAND --config configs/NAME.py[:args] [--config.KEY=VALUE ...]",
            "",
            *(f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()),
            "",
            "distil-jax COMMAND --config FILE --help lists the keys of the config.",
        ]
    )


def _stage_help(main_fn: Callable[[Any], Any], program: str, argument: str | None) -> str:
    lines = [f"usage: {program} --config FILE[:args] [--config.KEY=VALUE ...]", "", inspect.getdoc(main_fn) or "", ""]
    if argument is None:
        return "\n".join([*lines, "Add --config FILE to see its keys, for example --config configs/tiny.py."])
    from distil_jax.config import flatten, load_config_file

    leaves = flatten(load_config_file(argument))
    comments = key_comments(Path(argument.split(":", 1)[0]).read_text(encoding="utf-8"))
    settings = [f"--config.{key}={value!r}" for key, value in leaves.items()]
    width = min(60, max(map(len, settings), default=0))
    lines.append(f"Keys of {argument} and their defaults:")
    for setting, key in zip(settings, leaves, strict=True):
        lines.append(f"  {setting:{width}}  {comments.get(key, '')}".rstrip())
    return "\n".join(lines)


def key_comments(source: str) -> dict[str, str]:
    """The comments in a config file's source by dotted key: at the end of the key's line, or on the lines above it.

    Follows `c.train.steps = 1`, `c.train = t = ConfigDict()`, dicts, keywords, and calls of functions in the same file.
    """
    trailing: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines = alone if token.line.lstrip().startswith("#") else trailing
            lines[token.start[0]] = token.string.lstrip("#").strip()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    comments: dict[str, str] = {}

    def above(line: int) -> str:
        text = ""
        while (line := line - 1) in alone:
            text = f"{alone[line]} {text}".rstrip()
        return text

    def members(value: ast.expr) -> Iterator[tuple[str, ast.expr, int]]:
        if isinstance(value, ast.Dict):
            for key, child in zip(value.keys, value.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield str(key.value), child, key.lineno
        elif isinstance(value, ast.Call):
            yield from ((kw.arg, kw.value, kw.value.lineno) for kw in value.keywords if kw.arg)
            for argument in value.args:
                yield from members(argument)

    def note(key: str, value: ast.expr, line: int) -> None:
        if text := trailing.get(value.end_lineno or line) or trailing.get(line) or above(line):
            comments[key] = text
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in functions:
            follow(functions[value.func.id], f"{key}.")
            return
        for name, child, child_line in members(value):
            note(f"{key}.{name}", child, child_line)

    def follow(function: ast.FunctionDef, prefix: str) -> None:
        sections: dict[str, str] = {}  # local name -> where in the config it stands
        assigns = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
        for assign in sorted(assigns, key=lambda node: node.lineno):
            targets = [ast.unparse(target).partition(".") for target in assign.targets]
            keys = [sections.get(root, prefix) + rest for root, _, rest in targets if rest]
            sections |= {root: f"{keys[0]}." if keys else prefix for root, _, rest in targets if not rest}
            for key in keys:
                note(key, assign.value, assign.lineno)

    if "get_config" in functions:
        follow(functions["get_config"], "")
    return comments


if __name__ == "__main__":
    sys.exit(main())

"""`distil-jax evaluate` with models of its own: benchmarks for Hugging Face directories and checkpoints.

distil-jax evaluate DIR_OR_HUB_ID [...] --tasks mmlu_medical,medmcqa --data FOLDER --shots 0,5 --out DIR
distil-jax evaluate --config FILE --run distilled [--step N] --tasks mmlu_medical   a checkpoint of a training run
distil-jax evaluate --config FILE                                                   the stage: every model of a config

Writes DIR/answers/MODEL.json (the log-likelihood of every choice), DIR/written/MODEL.jsonl (free answers) and
DIR/results.json (accuracies with intervals), and prints a table. Tasks, files and metrics: docs/evaluation.md.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from distil_jax import arguments, hosts, learners, sharding
from distil_jax.config import load_config
from distil_jax.errors import UserError
from distil_jax.eval import benchmarks, checkpointed, show, stage_tasks, tasks
from distil_jax.manifest import write_json_atomic
from distil_jax.models import hub
from distil_jax.workdir import Workdir, names_of, shots_of


def parser() -> arguments.Parser:
    """The arguments of the command."""
    p = arguments.Parser(
        prog="distil-jax evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("models", nargs="*", help="Hugging Face directories or hub ids (owner/name, owner/name@revision)")
    p.add_argument("--config", metavar="FILE", help="instead: a training run of this config, see --run")
    p.add_argument("--run", help="teacher, control, distilled or a variant, from its newest whole checkpoint")
    p.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step instead")
    p.add_argument(
        "--tasks",
        required=True,
        help=f"tasks, groups or files of your own, with commas: {', '.join((*tasks.TASKS, *tasks.GROUPS))}",
    )
    p.add_argument("--data", default="hub", metavar="FOLDER", help="local files of the tasks; default: the hub")
    p.add_argument("--shots", default="0", help="examples before each question, with commas: 0,5")
    p.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N items of each task")
    p.add_argument("--dtype", choices=hub.DTYPES, help="of the weights; default: bfloat16, float32 on CPU")
    p.add_argument("--mesh", default="", metavar="AXES", help='as config.mesh, "data:2,fsdp:4"; default: data over all')
    p.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="resamples behind each interval")
    p.add_argument("--out", metavar="DIR", help="keep answers and results there")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status. Raises UserError for what the user can mend."""
    ours, of_config = arguments.split(argv)
    args = parser().parse_args(ours)
    if bool(args.models) == bool(of_config) or bool(args.run) != bool(of_config):
        raise UserError("distil-jax evaluate: give models, or a --config with the --run whose checkpoint is meant")
    if args.step is not None and not args.run:
        raise UserError("--step goes with --config and --run")
    if args.limit < 0:
        raise UserError(f"--limit {args.limit}: a number of items, 0 for all")
    _tell_what_it_takes()
    names = names_of(args.tasks)
    exams = benchmarks.exams(names, stage_tasks.folder_of(args.data), shots_of("--shots", args.shots), args.limit)
    summaries: dict[str, Any] = {}
    for label, where, model, params, tokenizer, mesh in _models(args, of_config):
        with jax.set_mesh(mesh):
            results = benchmarks.answer(exams, model, params, tokenizer, mesh=mesh, label=label)
        del params
        summaries[label] = benchmarks.summary(results, names, args.bootstrap) | {"model": where}
        if args.out and hosts.is_first_process():
            benchmarks.keep(Path(args.out), label, results)
            write_json_atomic(Path(args.out) / "results.json", summaries)
    if hosts.is_first_process():
        show.table(summaries)
        if of_config:
            for line in stage_tasks.overlaps(Workdir(load_config(of_config)[0])):
                show.warn(line)
    return 0


def _models(args: argparse.Namespace, of_config: list[str]) -> Iterator[tuple]:
    """(label, where it is, model, params, tokenizer, mesh) of each model, one in memory at a time."""
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if of_config:
        config, leftover = load_config(of_config)
        if leftover:
            raise UserError(f"distil-jax evaluate takes no {leftover[0]!r}")
        work = Workdir(config)
        mesh = sharding.mesh_of(args.mesh or config.mesh)
        with jax.set_mesh(mesh):
            step, model, params = checkpointed.load(work, args.run, mesh, step=args.step, dtype=dtype)
        side = "teacher" if args.run == "teacher" else "student"
        yield f"{args.run}-{step}", str(work / args.run), model, params, learners.hf_tokenizer(work, side), mesh
        return
    mesh = sharding.mesh_of(args.mesh or "data:-1")
    labels = _labels(args.models)
    directories = [hub.resolve(name) for name in args.models]  # all of them before the first is read
    for label, name, directory in zip(labels, args.models, directories, strict=True):
        model, params = hub.load_pretrained(directory, dtype=dtype, mesh=mesh)
        yield label, name, model, params, tokenizer_of(directory), mesh


def tokenizer_of(directory: Path) -> Any:
    """The tokenizer of a model's directory, as transformers loads it. Raises UserError if it has none."""
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error


def _tell_what_it_takes() -> None:
    """The lines of this package's evaluation go to standard error, and no other library's."""
    logger = logging.getLogger(benchmarks.__name__)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of each name; all of the name where two would be alike."""
    short = [Path(name.partition("@")[0]).name or name for name in names]
    return [
        one if short.count(one) == 1 else name.strip("/").replace("/", "--")
        for one, name in zip(short, names, strict=True)
    ]

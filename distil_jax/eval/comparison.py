"""The answers of several models to the same tasks, side by side: what summary.json, the page and the model card say of
benchmarks."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distil_jax.eval import bootstrap, probes, statistics
from distil_jax.eval.answers import Answers, load

ALWAYS = ("student_before", "control", "teacher")  # a student is compared with these, as far as they answered
MMLU = "mmlu_"  # subjects of one benchmark: their mean is a number of its own
FAMILIES = ("mmlu", "medmcqa", "medqa", "pubmedqa", "headqa", "careqa")  # tasks whose names go on after it


def read(folder: Path, runs: Sequence[str]) -> dict[str, list[Answers]]:
    """The answers of every model that `evaluate` asked, from its folder: the teacher first, then the untouched student,
    the runs, and others. Nothing where it asked none; raises UserError for a file that is none of answers."""
    found = dict(load(file) for file in sorted((folder / "answers").glob("*.json")))
    known = [name for name in ("teacher", "student_before", *runs) if name in found]
    return {name: found[name] for name in (*known, *(n for n in found if n not in known))}


def compared(
    answers: Mapping[str, Sequence[Answers]], of: Sequence[str], samples: int = bootstrap.SAMPLES
) -> dict[str, Any]:
    """All scores of all models. answers: by model. of: the models that are tested against ALWAYS.

    {"tasks": [{"task", "shots", "items", "chance", "probe": bool,
                "models": {name: {"accuracy", "interval", "acc_bytes", "acc_bytes_interval", "ece", "ece_equal_mass",
                                  "brier", "abstention_area", and "points" of a probe}},
                "differences": {"other - name": what statistics.compare says of name less other}}],
     "means": [{"of", "shots", "tasks": [...], "models": {name: statistics.means}}]}

    Means are over the tasks that every model answered and that are no probes: of all of them, and of MMLU's subjects.
    Raises UserError where two models answered other items of a task.
    """
    by_task: dict[tuple[str, int], dict[str, Answers]] = {}
    for model, given in answers.items():
        for one in given:
            if one.ids:
                by_task.setdefault((one.task, one.shots), {})[model] = one
    tasks = [_task(models, of, samples) for models in by_task.values()]
    means = []
    for shots in sorted({shots for _, shots in by_task}):
        whole = {
            task: models
            for (task, n), models in by_task.items()
            if n == shots and len(models) == len(answers) and not probes.is_probe(task)
        }
        mmlu = {task: models for task, models in whole.items() if task.startswith(MMLU)}
        groups = {"all tasks": whole} | ({"MMLU subjects": mmlu} if len(mmlu) < len(whole) else {})
        for name, group in groups.items():
            if len(group) > 1:
                of_models = {m: statistics.means([t[m] for t in group.values()], samples=samples) for m in answers}
                means.append({"of": name, "shots": shots, "tasks": list(group), "models": of_models})
    return {"tasks": tasks, "means": means}


def _task(models: Mapping[str, Answers], of: Sequence[str], samples: int) -> dict[str, Any]:
    first = next(iter(models.values()))
    probe = probes.is_probe(first.task)
    measured = {}
    for name, one in models.items():
        normalised = statistics.accuracy(one, normalised=True, samples=samples)
        found = statistics.accuracy(one, samples=samples)
        found |= {"acc_bytes": normalised["accuracy"], "acc_bytes_interval": normalised["interval"]}
        found |= statistics.calibration(one)
        measured[name] = found | ({"points": probes.points(one.right().tolist())} if probe else {})
    differences = {
        f"{other} - {name}": statistics.compare(models[name], models[other], samples=samples)
        for name in of
        for other in ALWAYS
        if name in models and other in models and name != other
    }
    facts = {"task": first.task, "shots": first.shots, "items": len(first.ids), "chance": statistics.chance(first)}
    return facts | {"probe": probe, "models": measured, "differences": differences}


def overlap(corpus: Mapping[str, Any], searched: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """What a reader of accuracies has to know of the training text, in sentences.

    corpus: its manifest. searched: the benchmark files whose questions were taken out of it (config.data.benchmarks).
    """
    said = []
    names = sorted(set(tasks))
    missing = [task for task in names if not any(_same(task, file) for file in searched)]
    if missing:
        said.append(
            f"The training text was not searched for the questions of {', '.join(missing)}: config.data.benchmarks "
            "names no file of theirs. What was learned by heart counts as right here."
        )
    sources = corpus.get("sources", {}).get("train", {})
    for source, rows in sources.items():
        if held := [task for task in names if _same(task, source)]:
            said.append(
                f"{rows:,} training rows are of the source {source}, which {', '.join(held)} is drawn from too."
            )
    for source, found in corpus.get("contamination", {}).items():
        for benchmark, hits in found.items():
            said.append(
                f"{hits['rows']:,} rows of {source.rsplit('/', 1)[-1]} held questions of {benchmark} and were taken "
                "out before training; rows that say the same in other words are not found."
            )
    return said


def _same(task: str, name: str) -> bool:
    """Whether a task and a file or source have a benchmark in common, by their names."""
    squeezed = lambda words: re.sub(r"[^a-z0-9]", "", words.lower())  # noqa: E731
    family = next((f for f in FAMILIES if task.lower().startswith(f)), squeezed(task))
    return family in squeezed(name.rsplit("/", 1)[-1])

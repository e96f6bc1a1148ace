"""The benchmarks of a config's `evaluate` stage: what config.evaluation.tasks asks of every model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from distil_jax import hosts, learners
from distil_jax.errors import UserError
from distil_jax.eval import benchmarks, show
from distil_jax.workdir import Workdir, names_of, shots_of


class StageTasks:
    """Asks each model as it is loaded, and keeps what it answers in `folder`/answers. Without exams it does nothing."""

    def __init__(self, work: Workdir, mesh: Mesh, folder: Path, exams: list[benchmarks.Exam], names: list[str]):
        self._work, self._mesh, self._folder, self._exams, self._names = work, mesh, folder, exams, names
        self._summaries: dict[str, Any] = {}

    def answered_by(self, name: str, side: str, model: Any, params: Any) -> None:
        """The model's answers to every exam, saved as answers/NAME.json."""
        if not self._exams:
            return
        tokenizer = learners.hf_tokenizer(self._work, side)
        results = benchmarks.answer(self._exams, model, params, tokenizer, mesh=self._mesh, label=name)
        self._summaries[name] = benchmarks.summary(results, self._names, self._work.config.evaluation.bootstrap)
        if hosts.is_first_process():
            benchmarks.keep(self._folder, name, results)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it: {"benchmarks": {model: benchmarks.summary}}; nothing without exams."""
        if not self._exams:
            return {}
        if hosts.is_first_process():
            show.table(self._summaries)
            for line in overlaps(self._work):
                show.warn(line)
        return {"benchmarks": self._summaries}


def of(work: Workdir, mesh: Mesh, folder: Path) -> StageTasks:
    """The stage's benchmarks, read before any model is. Raises UserError as benchmarks.exams."""
    e = work.config.evaluation
    names, source = names_of(e.tasks), folder_of(e.task_data)
    shots, limit = shots_of("config.evaluation.shots", e.shots), e.limit
    if limit < 0:
        raise UserError(f"config.evaluation.limit={limit}: a number of items, 0 for all")
    exams = benchmarks.exams(names, source, shots, limit) if names else []
    return StageTasks(work, mesh, folder, exams, names)


def folder_of(data: str) -> str | None:
    """The local folder that holds benchmarks; None for the hub."""
    return None if data in ("", "hub") else data


def overlaps(work: Workdir) -> list[str]:
    """What the corpus knows of benchmarks in what the students learned, as warnings."""
    return told(work.config.data.benchmarks, work.require("corpus")["contamination"])


def told(searched: str, contamination: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """`overlaps`, from config.data.benchmarks and what was found: {source: {benchmark: {"rows": ...}}}."""
    if not searched:
        return [
            "the corpus was not searched for the questions of these benchmarks: name their files in "
            "config.data.benchmarks, or scores may be of memory (docs/prepare.md)"
        ]
    return [
        f"{rows['rows']} rows of {source} held questions of {benchmark} and were left out of the corpus; what a "
        "model had learned before that is not known"
        for source, found in contamination.items()
        for benchmark, rows in found.items()
    ]

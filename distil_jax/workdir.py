"""The folder of a run: where each stage writes, and whether what stands there is still what the config asks for.

    corpus/ tokenizers/   prepare       packed shards, documents, quarantine; both tokenizers
    teacher/              train         the made or adapted teacher: checkpoints, metrics.jsonl, model/
    scores/               score         what the teacher says of the training shards; only with teacher.scores=stored
    projection/           project       W, its fit and its measures
    control/ smoothing/ distilled/      train: a student each, as for the teacher, and one for each variant by its name
    evaluate/ export/ report/ summary.json
    alive/                prepare       on several hosts, while they work (alive.py)

A stage's key is a hash of the config that it reads and of the keys of the stages it builds on. Its `manifest.json` is
written last; a folder whose manifest carries the key is done and is not made again.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import distil_jax
from distil_jax import hosts, manifest, variants
from distil_jax.config import config_hash, flatten
from distil_jax.data import catalogue, reading
from distil_jax.errors import UserError
from distil_jax.eval import own, questions, records, tasks
from distil_jax.metrics import peak_memory_bytes
from distil_jax.variants import UNTAUGHT

STUDENT = ("seed", "student.shape", "student.training", "student.lora", "objective", "evaluation.curve_rows")
# The config that each stage reads (dotted; a whole subtree or one key), and the stages that it builds on.
READS: dict[str, tuple[str, ...]] = {
    "corpus": (
        *("data", "teacher.path", "teacher.vocab_size"),
        *("student.path", "student.vocab_size", "student.numerals"),
    ),
    "teacher": ("seed", "teacher.shape", "teacher.adapt", "teacher.training", "evaluation.curve_rows"),
    "scores": ("score", "teacher.dtype", "student.training.compute_dtype"),
    "projection": ("seed", "projection", "evaluation.bootstrap", "evaluation.rows"),
    **dict.fromkeys(UNTAUGHT, STUDENT),
    "distilled": (
        *STUDENT,
        "teacher.dtype",
        "teacher.scores",
    ),  # and every variant, with the objective as the variant changes it
    "evaluate": ("evaluation", "runs"),
    # Not where it is pushed to: that changes no file.
    "export": (
        *("export.run", "export.dtype", "export.name", "export.licence_files"),
        *("teacher.licence", "student.licence"),
    ),
    "report": ("report",),
}
# What a stage leaves unread of that. A key that is new stands in every key until it is named here.
TEACHING = (
    *("objective.kind", "objective.map_size", "objective.alpha", "objective.temperature", "objective.divergence"),
    *("objective.skew", "objective.top_k", "objective.positions"),
    *("objective.learn_projection", "objective.projection_learning_rate", "objective.projection_keep"),
    *("objective.beta", "objective.attention", "objective.hidden_states"),
)
UNREAD: dict[str, tuple[str, ...]] = {
    "corpus": ("data.processes",),
    "control": (*TEACHING, "objective.label_smoothing"),
    "smoothing": TEACHING,
    "distilled": ("objective.label_smoothing",),
}
# The command that makes a stage, where it has another name.
COMMAND = {"corpus": "prepare", "projection": "project", "scores": "score"}
COMMAND |= dict.fromkeys(("teacher", *UNTAUGHT, "distilled"), "train")


class Workdir:
    """Paths and keys of one config."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.root = Path(config.workdir)
        variants.check(config)

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def teacher_is_trained(self) -> bool:
        """Whether this run makes or adapts its teacher; otherwise the one at teacher.path is used as it is."""
        return self.config.teacher.adapt or not self.config.teacher.path

    def scores_are_stored(self) -> bool:
        """Whether the student learns from what the teacher was asked once, and not from a teacher in memory."""
        return self.config.teacher.scores == "stored"

    def inputs(self, stage: str) -> tuple[str, ...]:
        """The stages that `stage` builds on."""
        teacher = ("teacher",) if self.teacher_is_trained() else ()
        return {
            "corpus": (),
            "teacher": ("corpus",),
            "scores": ("corpus", *teacher),
            "projection": ("corpus", *teacher),
            "control": ("corpus",),
            "smoothing": ("corpus",),
            "distilled": ("projection", *(("scores",) if self.scores_are_stored() else ())),
            "evaluate": ("projection", *self.config.runs),
            "export": (self.config.export.run, "evaluate"),  # its card tells the results
            "report": ("evaluate", "export"),
        }[self._kind(stage)]

    def _kind(self, stage: str) -> str:
        """The stage as READS and `inputs` name it: a variant is made as distilled is."""
        return "distilled" if stage in self.config.variants else stage

    def key(self, stage: str) -> str:
        """What must not change for the folder of `stage` to stay valid."""
        kind = self._kind(stage)
        read, unread = READS[kind], UNREAD.get(kind, ())
        leaves = flatten(variants.applied(self.config, stage))
        config = {k: v for k, v in leaves.items() if _stands_in(k, read) and not _stands_in(k, unread)}
        facts = [self.key(other) for other in self.inputs(stage)]
        if stage == "corpus":
            facts += self.files_of_corpus()
        if stage == "evaluate" and self.config.evaluation.tasks:
            facts += self.files_of_tasks()
        if stage == "export":
            given = names_of(self.config.export.licence_files)
            facts += [_file_facts("config.export.licence_files", name) for name in given]
        return config_hash(stage, distil_jax.__version__, config, facts)

    def files_of_corpus(self) -> list[tuple[str, int, int]]:
        """(name, bytes, time of the last change) of each file that the corpus is made of, but for the hub's."""
        data = self.config.data
        facts = [_file_facts("config.data.files", name) for name in files_of(self.config)]
        benchmarks = questions.files(names_of(data.benchmarks), data.root)
        facts += [_file_facts("config.data.benchmarks", str(file)) for file in benchmarks]
        for source in catalogue.chosen(names_of(data.sources)) if data.sources else ():
            if reading.is_folder(data.root):
                facts += [_file_facts("config.data.root", unit.file) for unit in reading.units(source, data.root)]
        return facts

    def files_of_tasks(self) -> list[tuple[str, int, int]]:
        """(name, bytes, time of the last change) of each local file that benchmarks are read from."""
        e = self.config.evaluation
        folder = None if e.task_data in ("", "hub") else e.task_data
        facts = []
        chosen, _ = tasks.named(names_of(e.tasks), own.task_of)
        for task in chosen:
            if task.files is None and folder is None:
                continue  # of the hub
            splits = (task.split, *((task.shots_split,) if max(shots_of("config.evaluation.shots", e.shots)) else ()))
            for split in splits:
                facts += [_file_facts("config.evaluation.tasks", str(f)) for f in records.files(task, split, folder)]
        return facts

    def done(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a stage that is finished and still valid, else None."""
        found = manifest.read(self.root / stage)
        return found if found and found.get("key") == self.key(stage) else None

    def require(self, stage: str) -> dict[str, Any]:
        """The manifest of a stage that must be finished by now. Raises UserError otherwise."""
        found = self.done(stage)
        if found is None:
            command = COMMAND.get(self._kind(stage), stage)
            raise UserError(
                f"{self.root / stage} is missing or belongs to another config{self._other_tokenizers(stage)}: run "
                f"`distil-jax {command}` with this config first, or `distil-jax run`, which does every stage in order"
            )
        return found

    def _other_tokenizers(self, stage: str) -> str:
        """What to add if the folder is a corpus of models at other paths."""
        there = (manifest.read(self.root / stage) or {}).get("tokenizers", {})
        made = {side: tokenizer.get("path", "") for side, tokenizer in there.items()}
        asked = {side: self.config[side].path for side in made}
        if made == asked:
            return ""
        exchanged = list(made.values()) == list(asked.values())[::-1]
        other = {side: path for side, path in made.items() if path != asked[side]}
        paths = ", ".join(f"{side}.path={path!r} and not {asked[side]!r}" for side, path in other.items())
        return f" ({'teacher and student are exchanged: ' if exchanged else ''}it was made with {paths})"

    def begun(self, stage: str) -> bool:
        """Whether the folder of the stage is this config's: done, or under way."""
        mark = self.root / stage / "key"
        return mark.is_file() and mark.read_text() == self.key(stage)

    def begin(self, stage: str, together: bool = True) -> "Stage":
        """Starts a stage in its folder. What a run with another key left there is removed; what this key left (a run
        that was interrupted) stays, to be resumed.

        together: every process of the run begins and finishes it, and the first one writes; False: this one alone.
        Raises UserError if the folder holds something that no stage wrote.
        """
        folder, key = self.root / stage, self.key(stage)
        if hosts.is_first_process() or not together:
            self._clear(folder, key)
        if together:
            hosts.barrier(f"{stage} begun")
        return Stage(folder, key, together)

    def _clear(self, folder: Path, key: str) -> None:
        mark = folder / "key"
        if folder.exists() and any(folder.iterdir()):
            if not mark.is_file():
                raise UserError(f"{folder} holds files that are not ours: set config.workdir to another folder")
            if mark.read_text() != key:
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(key)


class Stage:
    """A stage under way; `finish` writes its manifest, which makes it done."""

    def __init__(self, folder: Path, key: str, together: bool = True):
        self.folder, self.key, self.together, self.started = folder, key, together, time.monotonic()

    def finish(self, **facts: Any) -> dict[str, Any]:
        facts["seconds"] = round(time.monotonic() - self.started, 2)
        facts["peak_memory_bytes"] = peak_memory_bytes()
        if hosts.is_first_process() or not self.together:
            manifest.write(self.folder, self.key, **facts)
        if self.together:
            hosts.barrier(f"{self.folder.name} finished")
        return facts | {"key": self.key}


def _stands_in(key: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `names`, or stands in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def files_of(config: ConfigDict) -> list[str]:
    """The user's data files, from the comma-separated `data.files`."""
    return names_of(config.data.files)


def names_of(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def shots_of(key: str, text: str) -> list[int]:
    """The numbers of examples in "0,5". Raises UserError naming the key."""
    found = []
    for part in names_of(text):
        if not part.isdigit():
            raise UserError(f"{key}={text!r}: {part!r} is no number of examples; write 0, or 0,5")
        found.append(int(part))
    if not found:
        raise UserError(f"{key} is empty: write 0, or 0,5")
    return list(dict.fromkeys(found))


def _file_facts(key: str, name: str) -> tuple[str, int, int]:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{key} names {name}, which is not a file")
    stat = path.stat()
    return name, stat.st_size, stat.st_mtime_ns

"""The questions of tasks, for `prepare` to keep out of a corpus: those that a model will be scored on (tasks.py), read
from where the corpus's sources are read."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from distil_jax.data import reading
from distil_jax.data.contamination import Item, item_of, read_items
from distil_jax.data.formats import READERS
from distil_jax.errors import UserError
from distil_jax.eval import records
from distil_jax.eval.tasks import CAREQA_LOST, Task, named


def questions(names: Sequence[str], root: str) -> list[Item]:
    """The questions of files (contamination.read_items) and of tasks or groups of tasks.

    root: "hub", or the folder with the files of the tasks (records.py). Raises UserError for what is not there.
    """
    found = [item for name in names if _is_file(name) for item in read_items(name)]
    for task in _tasks(names):
        for number, record in enumerate(records.load(task, task.split, _folder(root), 0), 1):
            columns = dict(record)
            if task.name == "careqa_en" and columns["question"] is None:  # tasks.py knows what was asked
                columns["question"] = CAREQA_LOST[0]
            found.append(item_of(columns, task.name, number, record.where))
    return found


def files(names: Sequence[str], root: str) -> list[Path]:
    """The local files that `questions` reads."""
    found = [Path(name) for name in names if _is_file(name)]
    if _folder(root) is not None:
        found += [file for task in _tasks(names) for file in records.files(task, task.split, root)]
    return found


def _tasks(names: Iterable[str]) -> list[Task]:
    return named([name for name in names if not _is_file(name)], _no_task)[0]


def _no_task(name: str) -> Task:
    raise UserError(f"config.data.benchmarks: {name} is no file of questions; it takes {', '.join(READERS)}")


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in READERS


def _folder(root: str) -> str | None:
    if root.startswith(reading.TFDS):
        raise UserError(
            f"config.data.benchmarks names tasks, and config.data.root={root!r} has no files of theirs: name files"
        )
    return root if reading.is_folder(root) else None

"""The records of a task: of the hub through `datasets`, or of a local folder that holds the same files.

A local folder may be a clone of the hub's repositories, or anything of this form:

    FOLDER/REPOSITORY[/CONFIG][/data]/SPLIT*.{jsonl,json,parquet,csv}

REPOSITORY: the dataset's name with or without its owner (cais/mmlu, mmlu; cais--mmlu too). CONFIG: where it has some
(anatomy); a file of that name holds its only split (CareQA_en.json). SPLIT: test, train, dev, validation, and what
follows it in names such as test-00000-of-00001.parquet.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distil_jax.data.contamination import Strict
from distil_jax.data.formats import READERS
from distil_jax.errors import UserError, nearest
from distil_jax.eval.tasks import Record, Task

SAME = {"validation": ("validation", "valid", "val", "dev"), "train": ("train", "training")}


class Checked(Mapping[str, Any]):
    """A record that knows where it stands: a column that it lacks is an error with file, row and column."""

    def __init__(self, record: Mapping[str, Any], where: str):
        self._record, self.where = record, where

    def __getitem__(self, column: str) -> Any:
        if column not in self._record:
            has = ", ".join(map(str, self._record)) or "nothing"
            raise UserError(f"{self.where}: no column {column!r}{nearest(column, self._record)}; it has {has}")
        return self._record[column]

    def __iter__(self):
        return iter(self._record)

    def __len__(self) -> int:
        return len(self._record)


def read(task: Task, folder: str | Path | None, *, limit: int = 0, shots: int = 0) -> tuple[list[Record], list[Record]]:
    """(items, examples) of a task, examples only if there are shots. folder: None for the hub. limit: of items, 0: all.

    Raises UserError for a file, a split or a column that is not there, and for a row that is no item.
    """
    records = load(task, task.split, folder, limit)
    if not records:
        raise UserError(f"{task.name}: its {task.split} split has no records")
    # Draws depend on how many examples there are, so all of them are read.
    examples = load(task, task.shots_split, folder, 0) if shots else []
    return records, examples


def load(task: Task, split: str, folder: str | Path | None, limit: int) -> list[Record]:
    """The records of one split, the first `limit` of them."""
    if task.files is not None or folder is not None:
        found = [row for file in files(task, split, folder) for row in _read_file(file, limit)]
        return found[:limit] if limit else found
    rows = _hub(task, split)
    return [Checked(row, f"{task.hub}, row {i}") for i, row in enumerate(islice(rows, limit or None))]


def files(task: Task, split: str, folder: str | Path | None) -> list[Path]:
    """The local files of a split. Raises UserError if there are none."""
    if task.files is not None:
        if split not in task.files:
            raise UserError(f"{task.name}: shots need examples; name their file as `shots_file` in the task's file")
        return [Path(task.files[split])]
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the one that holds the benchmark's files, or \"hub\"")
    owner, _, name = task.hub.partition("/")
    places = [root / name, root / owner / name, root / f"{owner}--{name}"]
    repository = next((place for place in places if place.is_dir()), None)
    if repository is None:
        raise UserError(
            f"{root} has no folder {name!r} for {task.name}: clone the dataset {task.hub} there, or put its files in "
            f"{places[0]}"
        )
    inside = [repository / task.config, repository / "data" / task.config] if task.config else []
    inside += [repository / "data", repository]
    others = {s for s in ("test", "dev", "train", "validation") if s != split}
    for place in filter(Path.is_dir, inside):
        found = [f for f in sorted(place.iterdir()) if f.suffix.lower() in READERS]
        for word in SAME.get(split, (split,)):
            if word != split and word in others and word in (task.split, task.shots_split):
                continue  # MMLU has both dev and validation
            if matching := [f for f in found if re.fullmatch(rf"{re.escape(word)}([-_.].*)?", f.stem)]:
                return matching
        if task.config and (matching := [f for f in found if f.stem == task.config]):
            return matching
    raise UserError(
        f"{repository} has no {split} split of {task.name}: a file {split}.jsonl, .json, .parquet or .csv in "
        f"{inside[0]}"
    )


def _read_file(file: Path, limit: int) -> list[Record]:
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    reader: Callable = READERS[file.suffix.lower()]
    if file.suffix.lower() == ".json" and _is_lines(file):
        reader = READERS[".jsonl"]
    _, records = reader(file, Strict())
    return [Checked(record, f"{file}, row {number}") for number, record in islice(records, limit or None)]


def _is_lines(file: Path) -> bool:
    """Whether a .json file has an object a line, as some of the hub's have."""
    with file.open("rb") as opened:
        return opened.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _hub(task: Task, split: str) -> Sequence[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError("benchmarks of the hub need `pip install 'distil-jax[eval]'`; or give local files") from error
    config = task.config or None
    try:
        try:
            return datasets.load_dataset(task.hub, config, split=split)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # The hub keeps a converted copy of datasets that are programs, which are not run.
            return datasets.load_dataset(task.hub, config, split=split, revision="refs/convert/parquet")
    except Exception as error:  # what the hub's client raises is of many kinds
        raise UserError(
            f"{task.name}: dataset {task.hub} cannot be had from the hub ({str(error).splitlines()[0][:200]}); give a "
            "folder with its files"
        ) from error

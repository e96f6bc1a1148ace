"""The records of a catalogued source, from a folder with the hub's files, the hub itself, or tfds; and their rows.

    ROOT/openlifescienceai/medmcqa/data/train-00000-of-00001.parquet

is how `hf download --repo-type dataset --local-dir ROOT/NAME NAME` lays the files out, in .parquet, .jsonl, .json (a
list of objects) or .csv.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distil_jax.data import sources
from distil_jax.data.adapters import Adapted, Unusable
from distil_jax.data.catalogue import Source
from distil_jax.data.sources import Row, split_of
from distil_jax.data.specialties import specialty_of
from distil_jax.errors import UserError, nearest

REMOTE = HUB, TFDS = "hub", "tfds"  # config.data.root, if it is no folder
VALIDATION, TEST = 0.005, 0.01  # of the documents of a source
_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|dev|test)(?![a-z])")
_SAME = {"valid": "validation", "val": "validation"}
_BUFFER = 1 << 20  # characters of a JSON list read at once


def rows_of(source: Source, root: str, quarantine: Any) -> Iterator[Row]:
    """The rows of a source, each with its specialty and its side of the held-out split.

    root: a folder, "hub" or "tfds". Records that cannot be used go to `quarantine` (whatever has its `add`).

    Raises UserError if the source is not there, lacks a column, or breaks off.
    """
    used = refused = 0
    for where, number, record in records(source, root, quarantine):
        try:
            adapted = source.adapt(record)
        except Unusable as unusable:
            quarantine.add(f"{source.name}: {where}", number, *unusable.args)
            refused += 1
            continue
        for one in adapted:
            used += 1
            yield _row(source, where, number, one)
    if not used:
        raise UserError(f"source {source.name} has no usable row ({refused} refused): see its files under {root}")


def _row(source: Source, where: str, number: int | str, one: Adapted) -> Row:
    identity = f"{source.name}:{Path(where).with_suffix('')}:{number}" + (f":{one.part}" if one.part else "")
    key = f"{source.name}\0{one.cluster or one.prompt + one.completion}"
    return Row(
        id=identity,
        source=source.name,
        split=split_of(key, validation=VALIDATION, test=TEST),
        licence=source.licence,
        specialty=specialty_of(source.name, one.label, one.prompt + one.completion),
        kind=one.kind,
        prompt=one.prompt,
        completion=one.completion,
        ended=one.ended,
        meta={"question": one.question, "answer": one.answer, "options": one.options, "label": one.label},
    )


def records(source: Source, root: str, quarantine: Any) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(file or configuration and split, number from 1, record) of every split of the source that is read."""
    if root in REMOTE:
        for config in source.configs:
            for split in source.splits:
                yield from _checked(source, f"{config or 'default'}/{split}", _remote(source, root, config, split))
        return
    for file in files(source, root):
        if file.suffix == ".json":
            found = _json_list(file)
        else:
            found = sources.read_records(file, quarantine)
        yield from _checked(source, str(file.relative_to(Path(root) / source.hub)), found)


def files(source: Source, root: str) -> list[Path]:
    """The files of the source's splits in `root`, in order of their names. Raises UserError if there are none."""
    folder = Path(root) / source.hub
    if not folder.is_dir():
        raise UserError(
            f"source {source.name} is not in config.data.root: no folder {folder}. Get it with `hf download "
            f"--repo-type dataset --local-dir {folder} {source.hub}`, set config.data.root=hub, or leave it out of "
            "config.data.sources"
        )
    present = sorted(file for file in folder.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    found = []
    for config in source.configs:
        of_config = [file for file in present if not config or config in file.relative_to(folder).parts[:-1]]
        by_split = {file: _split_of_file(file.relative_to(folder)) for file in of_config or present}
        for split in source.splits:
            named = [file for file, of in by_split.items() if of == split]
            # A dataset of one file is its training split, whatever it is called.
            found += named or [file for file, of in by_split.items() if of is None and split == "train"]
    if not found:
        wanted = " and ".join(source.splits)
        raise UserError(f"source {source.name}: no {', '.join(_SUFFIXES)} of the split {wanted} under {folder}")
    return list(dict.fromkeys(found))


def _split_of_file(path: Path) -> str | None:
    names = _SPLIT.findall(path.as_posix().lower().replace("_", " "))
    return _SAME.get(names[-1], names[-1]) if names else None


def _checked(
    source: Source, where: str, found: Iterable[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The records, after a look at the columns of the first; an error of the reader says how far it came."""
    number, first = 0, True
    try:
        for number, record in found:  # noqa: B007
            if first:
                _check_columns(source, where, record)
                first = False
            yield where, number, record
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, (Unusable, GeneratorExit)):
            raise
        raise UserError(
            f"source {source.name} breaks off in {where} after row {number} ({type(error).__name__}: {error}); give "
            "the same command again, or copy the file again"
        ) from error


def _check_columns(source: Source, where: str, record: dict[str, Any]) -> None:
    for name in source.columns:
        if name not in record:
            raise UserError(
                f"source {source.name}, {where}: no column {name!r}{nearest(name, record)}; it has "
                f"{', '.join(record)}. Its schema has changed: take an older revision, or mend data/adapters.py"
            )


def _remote(source: Source, root: str, config: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if root == HUB:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise UserError("config.data.root=hub needs datasets: pip install 'distil-jax[data]'") from error
        try:
            found = load_dataset(source.hub, config or None, split=split, streaming=True)
        except Exception as error:
            raise UserError(
                f"source {source.name}: {source.hub} cannot be read from the hub ({type(error).__name__}: {error})"
            ) from error
    else:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                "config.data.root=tfds needs the tensorflow-datasets package: pip install 'distil-jax[data]'"
            ) from error
        name = "huggingface:" + source.hub.replace("-", "_").lower().replace("/", "__")
        found = tfds.data_source(f"{name}/{config}" if config else name, split=split)
    yield from enumerate(map(dict, found), 1)


def _json_list(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON list, or of JSON lines under the name .json, one at a time."""
    decoder, number, ended = json.JSONDecoder(), 0, False
    with file.open(encoding="utf-8") as text:
        buffer = text.read(_BUFFER).lstrip("\ufeff \t\r\n")
        listed = buffer.startswith("[")
        buffer = buffer[1:] if listed else buffer
        while True:
            buffer = buffer.lstrip(", \t\r\n")
            if listed and buffer.startswith("]"):
                return
            if buffer:
                try:
                    record, end = decoder.raw_decode(buffer)
                except json.JSONDecodeError:
                    if ended:
                        raise
                else:
                    number += 1
                    if not isinstance(record, dict):
                        raise UserError(f"{file}: entry {number} is no object with named fields")
                    yield number, record
                    buffer = buffer[end:]
                    continue
            elif ended:
                if listed:
                    raise UserError(f"{file} breaks off after row {number}: copy it again")
                return
            more = text.read(_BUFFER)
            ended = not more
            buffer += more

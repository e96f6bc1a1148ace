"""A source of the catalogue to records and rows: from local copies, from the hub, or from tfds folders.

`root` says from where:
- a folder, which holds `<hub id>/[config/]*.{parquet,jsonl,json,csv}`, as `hf download --local-dir` writes them;
- "hub": streamed by the library `datasets` under the source's hub id;
- "tfds:FOLDER": folders `<hub id>/[config/]` made by a tfds builder (array_record), read as a data source.

Nothing is whole in memory. A unit, one file or one split, is read without regard to the others, so they can be read in
parallel. A source that breaks off raises UserError with the row reached, and can be read on from there (`after`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

from distil_jax.data import specialties
from distil_jax.data.adapters import Fields, Refused
from distil_jax.data.catalogue import Part, Source
from distil_jax.data.formats import READERS, Table, count, peeked
from distil_jax.data.rows import Quarantine, Row, split_of
from distil_jax.errors import UserError, nearest

HUB, TFDS = "hub", "tfds:"
_OPTIONAL = ("id",)  # taken along where a source has it


@dataclass(frozen=True)
class Unit:
    """What is read in one go: a file of a source's part, or, from the hub and tfds, the part."""

    source: Source
    part: Part
    root: str
    file: str

    @property
    def stem(self) -> str:
        """Unique in the source, and the same on every machine: the config and the file's name, without extension."""
        file = Path(self.file)
        name = f"{file.parent.name}-{file.stem}" if file.stem.isdigit() else file.stem  # an export: train/0000.parquet
        return f"{self.part.config}/{name}" if self.part.config else name


def is_folder(root: str) -> bool:
    """Whether a root is local copies."""
    return root != HUB and not root.startswith(TFDS)


def units(source: Source, root: str) -> list[Unit]:
    """The units of a source, in an order that does not depend on the machine. Raises UserError where a part has no
    file, or the same file in two formats."""
    if not is_folder(root):
        return [Unit(source, part, root, part.split) for part in source.parts]
    return [Unit(source, part, root, str(file)) for part in source.parts for file in _files(source, part, Path(root))]


def expected(source: Source, root: str) -> int:
    """About how many rows a source has, those that will be refused too: from the files, or from the source's card. 0
    where neither says it. Raises UserError as `units`."""
    found = []
    for unit in units(source, root):
        card = unit.part.rows or (source.rows if len(source.parts) == 1 else 0)
        found.append((count(Path(unit.file)) if is_folder(root) else card) * unit.part.makes)
    return sum(found) if all(found) else 0


def records(source: Source, root: str, quarantine: Quarantine) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(file, row number, record) of a source; see `unit_records`."""
    for unit in units(source, root):
        for number, record in unit_records(unit, quarantine):
            yield unit.file, number, record


def rows(source: Source, root: str, quarantine: Quarantine, **how: Any) -> Iterator[Row]:
    """The rows of a source; see `unit_rows` for `how` and the errors."""
    for unit in units(source, root):
        yield from unit_rows(unit, quarantine, **how)


def unit_records(unit: Unit, quarantine: Quarantine, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, record) of a unit, after the row `after`; a record has the columns that the source needs.

    Raises UserError, with the source, for a column that is missing and for a unit that breaks off.
    """
    source, columns = unit.source, unit.source.columns_of(unit.part)
    reached = after
    try:
        present, found = _table(unit, {*columns, *_OPTIONAL}, quarantine, after)
        if present:
            _check_columns(unit, columns, present)
        for reached, record in found:
            yield reached, {n: record.get(n) for n in columns} | {n: record[n] for n in _OPTIONAL if record.get(n)}
    except UserError as error:
        raise UserError(f"source {source.name}: {error}") from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"source {source.name}: reading from {unit.root} needs {error.name}; pip install 'distil-jax[data]'"
        ) from error
    except Exception as error:  # of the network and the libraries that read over it, whatever they raise
        if is_folder(unit.root):
            raise
        raise UserError(
            f"source {source.name} ({source.hub_id}, {unit.part.name}, {unit.root}) breaks off after row {reached}: "
            f"{type(error).__name__}: {error}; check the connection, the name and your access, and try again"
        ) from error


def unit_rows(
    unit: Unit,
    quarantine: Quarantine,
    *,
    after: int = 0,
    explanations: bool = False,
    split_seed: int = 0,
    validation: float = 0.04,
    test: float = 0.08,
) -> Iterator[Row]:
    """Rows of a unit, after the row `after`.

    explanations: let the source's explanation of an answer follow it in the completion. The split is a hash of the
    row's cluster, or of its text where it has none. The specialty is that of the source's labels, else the
    classifier's. Raises UserError as `unit_records`, and where the whole unit has no usable row. Refused records go to
    `quarantine`.
    """
    used, before = 0, quarantine.total
    for number, record in unit_records(unit, quarantine, after):
        try:
            found = unit.source.adapter(record)
        except Refused as refused:
            quarantine.add(f"{unit.source.name}: {unit.file}", number, refused.reason, refused.detail)
            continue
        for place, fields in enumerate(found):
            used += 1
            completion = fields.completion
            if explanations and fields.explanation:
                completion += f"\n{fields.explanation}"
            key = fields.meta.get("cluster") or sha256(f"{fields.prompt}\0{completion}".encode()).hexdigest()
            yield Row(
                id=_id(unit, number, place, fields),
                source=unit.source.name,
                split=split_of(key, seed=split_seed, validation=validation, test=test),
                licence=unit.source.licence,
                specialty=fields.specialty or specialties.classify(fields.prompt + completion),
                kind=fields.kind,
                prompt=fields.prompt,
                completion=completion,
                messages=fields.messages,
                meta={**fields.meta, "labelled": bool(fields.specialty)},
            )
    refused = quarantine.total - before
    if not used and not after:
        raise UserError(
            f"source {unit.source.name}: {unit.file} has no usable row ({refused} refused, see {quarantine.path}); "
            "check that it is what the source's page describes"
        )


def _id(unit: Unit, number: int, place: int, fields: Fields) -> str:
    if fields.id:
        return f"{unit.source.name}:{fields.id}"
    return f"{unit.source.name}:{unit.stem}:{number}" + (f".{place}" if place else "")


def _files(source: Source, part: Part, root: Path) -> list[Path]:
    folder = root / source.hub_id / part.config
    if not folder.is_dir():
        raise UserError(
            f"source {source.name}: there is no folder {folder}; copy the files of {source.hub_id} there, leave the "
            "source out, or read it from the hub"
        )
    files = [
        f
        for f in folder.rglob("*")
        if f.suffix.lower() in READERS and fnmatch(f.relative_to(folder).as_posix(), part.files)
    ]
    # A hidden folder (.cache of a download) is no part of the data; some dumps keep their card as JSON beside it.
    files = [f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts)]
    files = sorted((f for f in files if f.name != "dataset_infos.json"), key=lambda f: f.relative_to(folder).as_posix())
    if not files:
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:5]) or "nothing"
        raise UserError(
            f"source {source.name}: {folder} has no file {part.files} of {', '.join(READERS)}; it has {there}"
        )
    stems: dict[Path, Path] = {}
    for file in files:
        other = stems.setdefault(file.with_suffix(""), file)
        if other != file:
            raise UserError(f"source {source.name}: {other} and {file.name} look like the same rows twice; keep one")
    return files


def _table(unit: Unit, wanted: set[str], quarantine: Quarantine, after: int) -> Table:
    source, part = unit.source, unit.part
    if unit.root == HUB:
        return hub_table(source.hub_id, part, after)
    if unit.root.startswith(TFDS):
        folder = Path(unit.root.removeprefix(TFDS)) / source.hub_id / part.config
        return tfds_table(folder, part.split, after)
    return READERS[Path(unit.file).suffix.lower()](Path(unit.file), quarantine, wanted, after)


def hub_table(hub_id: str, part: Part, after: int = 0) -> Table:
    """A part as `datasets` streams it: (column names, iterator of (row number, record)); the first records are fetched
    here."""
    import datasets

    if part.export:
        where = {"revision": "refs/convert/parquet", "data_files": {part.split: part.export}}
    else:
        where = {"name": part.config or None}
    stream = datasets.load_dataset(hub_id, split=part.split, streaming=True, **where)
    return peeked(enumerate(stream.skip(after), after + 1))


def tfds_table(folder: Path, split: str, after: int = 0) -> Table:
    """A split of a tfds builder's folder: as `hub_table`, with texts decoded and arrays as lists. No TensorFlow."""
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(folder)).as_data_source(split=split)
    read = ((number + 1, _plain(source[number])) for number in range(after, len(source)))
    return list(source.dataset_info.features), read


def _plain(value: Any) -> Any:
    """A tfds value as JSON would have it; a sequence of records, which tfds holds as a record of lists, stays one."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_columns(unit: Unit, needed: Sequence[str], present: Sequence[str]) -> None:
    for name in needed:
        if name not in present:
            raise UserError(
                f"{unit.file} has no column {name!r}{nearest(name, present)}; it has {', '.join(present)}: the source "
                "has changed, or this is another file"
            )

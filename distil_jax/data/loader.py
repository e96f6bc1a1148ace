"""Packed rows on disk, and batches that are a pure function of (seed, step).

A shard is an ArrayRecord file whose records have one size: the int32 values of every field of one row, field after
field in the order of their names, little-endian. The manifest part that `write_shards` returns says which fields, how
long, and what each file holds; the stage that writes the shards puts it into its manifest.json.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int32

from distil_jax.errors import UserError

BatchField = Int32[np.ndarray, "B L"]
Batch = dict[str, BatchField]
Manifest = dict[str, Any]

# One record per chunk: reading a single row at random decompresses that row alone.
_WRITER_OPTIONS = "group_size:1,zstd:3"
_AGAIN = "delete the folder and run the stage that wrote it again"


def write_shards(
    rows: Mapping[str, np.ndarray], directory: str | Path, prefix: str, rows_per_shard: int = 4096
) -> Manifest:
    """Write rows (field -> integers [R, L_field]) as `prefix`-00000-of-0000N.arrayrecord files.

    A file appears under its name only when it is whole, and the same rows always give the same bytes.

    Returns the manifest part: {"fields": {name: L}, "records": R, "files": [{"name", "records", "bytes", "sha256"}]}.
    Raises UserError for no rows, unequal numbers of rows, or values outside int32.
    """
    columns = {name: _as_int32(name, np.asarray(values)) for name, values in sorted(rows.items())}
    counts = {name: len(column) for name, column in columns.items()}
    if not counts or min(counts.values()) == 0:
        raise UserError(
            f"no rows to write to {directory}/{prefix}: all of them were filtered out or the source is empty"
        )
    if len(set(counts.values())) > 1:
        raise UserError(f"fields of {directory}/{prefix} have unequal numbers of rows: {counts}")
    if rows_per_shard < 1:
        raise UserError(f"rows_per_shard={rows_per_shard} must be at least 1")
    count = len(next(iter(columns.values())))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = [range(start, min(start + rows_per_shard, count)) for start in range(0, count, rows_per_shard)]
    names = [f"{prefix}-{n:05d}-of-{len(shards):05d}.arrayrecord" for n in range(len(shards))]
    return {
        "fields": {name: column.shape[1] for name, column in columns.items()},
        "records": count,
        "files": [
            write_file(directory / name, (b"".join(c[row].tobytes() for c in columns.values()) for row in shard))
            for name, shard in zip(names, shards, strict=True)
        ],
    }


def _as_int32(name: str, values: np.ndarray) -> np.ndarray:
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise UserError(f"field {name} must be integers [rows, length], not {values.dtype} {list(values.shape)}")
    if values.size and not (-(2**31) <= values.min() and values.max() < 2**31):
        raise UserError(f"field {name} reaches from {values.min()} to {values.max()}, outside int32")
    return values.astype("<i4", copy=False)


def write_file(path: Path, records: Iterable[bytes]) -> dict[str, Any]:
    """Write one ArrayRecord file, which appears under its name only when it is whole; returns its manifest entry."""
    partial = path.with_name(f".{path.name}.partial")
    writer = ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    number = 0
    for record in records:
        writer.write(record)
        number += 1
    writer.close()
    entry = {"name": path.name, "records": number, "bytes": partial.stat().st_size, "sha256": _sha256(partial)}
    os.replace(partial, path)
    return entry


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Joined(Protocol):
    """What a loader adds to a row: more fields of fixed shape, of any type."""

    records: int

    def fields(self, number: int, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


class Loader:
    """Batches of packed rows for one process.

    The global batch of a step depends on (shards, seed, batch_size, step) alone: every epoch is a shuffle of all rows,
    epochs follow each other without a gap, and a batch may hold the end of one and the beginning of the next. A process
    reads the `places` of it that its devices hold, so a run can go on with other processes or another mesh.

    Attributes: fields (name -> length), records (rows of all shards), batch_size (global), places.
    """

    def __init__(
        self,
        directory: str | Path,
        manifest_part: Manifest,
        batch_size: int,
        seed: int,
        *,
        places: Sequence[int] | None = None,
        joined: Joined | None = None,
        verify: bool = True,
    ):
        """Open the shards of `manifest_part` in `directory`.

        places: rows of a global batch, counted from 0, that `batch` gives (sharding.places); None: all.
        joined: adds fields to each row by its number (data/scores.py).
        verify: read every file once and compare checksums; sizes and record counts are always compared.

        Raises UserError naming the file that is missing or not as the manifest says.
        """
        self.fields: dict[str, int] = dict(sorted(manifest_part["fields"].items()))
        self.records: int = manifest_part["records"]
        self.batch_size = batch_size
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        self.places = np.arange(batch_size) if places is None else np.asarray(places)
        files = manifest_part["files"]
        for entry in files:
            check_file(Path(directory) / entry["name"], entry, verify, _AGAIN)
            _check_records(Path(directory) / entry["name"], entry, 4 * sum(self.fields.values()))
        if sum(entry["records"] for entry in files) != self.records or not self.records:
            raise UserError(
                f"the manifest of {directory} says {self.records} records, its files hold others: write it again"
            )
        if joined is not None and joined.records != self.records:
            raise UserError(
                f"{joined.records} records were made for the {self.records} of {directory}: make them again"
            )
        import grain  # with JAX it takes 150 MB, and the processes that only write shards do without

        paths = [str(Path(directory) / entry["name"]) for entry in files]
        self._rows = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths)).map(self._decode)
        if joined is not None:
            # grain numbers the rows of a second epoch on from the first.
            self._rows = self._rows.map_with_index(lambda n, row: row | joined.fields(n % self.records, row))
        # grain shuffles epoch e with seed + e, so neighbouring seeds would share orders: spread them first.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = self._rows.shuffle(seed=spread).repeat()

    def _decode(self, record: bytes) -> dict[str, np.ndarray]:
        values = np.frombuffer(record, "<i4")
        ends = np.cumsum(list(self.fields.values()))
        return dict(zip(self.fields, np.split(values, ends[:-1]), strict=True))

    def batch(self, step: int) -> Batch:
        """This process's rows of the global batch of `step` (0, 1, ...): field -> int32[places, L]. No state."""
        if step < 0:
            raise ValueError(f"step {step} is negative: steps count from 0")
        rows = [self._order[step * self.batch_size + int(place)] for place in self.places]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def iterate(self, start_step: int = 0, prefetch: int = 2) -> Iterator[Batch]:
        """batch(start_step), batch(start_step + 1), ... for ever; a thread reads ahead and ends with the iterator."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            ahead = deque(pool.submit(self.batch, start_step + n) for n in range(prefetch))
            for step in count(start_step + prefetch):
                ahead.append(pool.submit(self.batch, step))
                yield ahead.popleft().result()

    def spread(self, rows: int) -> np.ndarray:
        """Indices of `rows` rows spread evenly over the shards; of all rows where 0 or more than there are is asked."""
        wanted = self.records if rows == 0 else min(rows, self.records)
        return np.arange(wanted) * self.records // wanted

    def sweep(self, batch_size: int | None = None, rows: int = 0) -> Iterator[Batch]:
        """The rows of `spread` (default: every row), each once and in order, in global batches of `batch_size`
        (default: the loader's own).

        The last batch is filled up with rows of zeros: their segment ids are 0, so they count for nothing. Whatever
        `places` are, these batches are whole.
        """
        batch_size = batch_size or self.batch_size
        chosen, like = self.spread(rows), self._rows[0]
        for start in range(0, len(chosen), batch_size):
            members = [self._rows[int(n)] for n in chosen[start : start + batch_size]]
            batch = {name: np.zeros((batch_size, *values.shape), values.dtype) for name, values in like.items()}
            for n, row in enumerate(members):
                for name, values in row.items():
                    batch[name][n] = values
            yield batch


def check_file(path: Path, entry: Mapping[str, Any], verify: bool, again: str) -> None:
    """UserError, which ends with what to do (`again`), unless the file is as its manifest entry says."""
    if not path.is_file():
        raise UserError(f"shard {path} is missing: {again}")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(f"shard {path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: {again}")
    if verify and _sha256(path) != entry["sha256"]:
        raise UserError(f"shard {path} does not have the checksum of the manifest: {again}")


def _check_records(path: Path, entry: Mapping[str, Any], record_bytes: int) -> None:
    """UserError unless the file has as many records as its manifest entry says, of `record_bytes` bytes."""
    reader = ArrayRecordReader(str(path))
    found, length = reader.num_records(), len(reader.read([0])[0]) if reader.num_records() else 0
    reader.close()
    if (found, length) != (entry["records"], record_bytes):
        raise UserError(
            f"shard {path} has {found} records of {length} bytes, the manifest says {entry['records']} of "
            f"{record_bytes}: {_AGAIN}"
        )

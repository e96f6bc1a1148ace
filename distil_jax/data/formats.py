"""The formats that rows are read from, a record at a time: JSON lines, a JSON array, CSV and Parquet.

Each reader returns (column names, iterator of (number, record)). `number` is the 1-based line of a text file (in CSV
the first line of the record), the 1-based row of a Parquet file or of an array; records up to number `after` are passed
over. `wanted`: columns that are worth decoding, where the format can leave the others alone; by default all. What is
malformed goes to the quarantine; a file that breaks off raises UserError with the row reached.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from distil_jax.data.rows import Quarantine
from distil_jax.errors import UserError

Table = tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]
_PEEK_ROWS = 100  # JSON has no header: the keys of the first rows stand for one


def read_jsonl(path: Path, quarantine: Quarantine, wanted: Collection[str] | None = None, after: int = 0) -> Table:
    """One object a line."""
    _check_encoding(path)

    def records():
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number <= after:
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    record = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    quarantine.add(path, number, "not UTF-8", str(error))
                except (ValueError, RecursionError) as error:  # also a number of more than 4,300 digits
                    reason = "malformed JSON" if line.strip() else "empty line"
                    quarantine.add(path, number, reason, str(error))
                else:
                    if isinstance(record, dict):
                        yield number, record
                    else:
                        quarantine.add(path, number, "malformed JSON", "not an object with named fields")

    return peeked(_guarded(path, records()))


def _check_encoding(path: Path) -> None:
    """Raises UserError for a file that cannot be read or that is not written in bytes of text, as UTF-16 is not."""
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check that it is there, and start again") from error
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(0) > len(head) / 4:
        raise UserError(f"{path} is no UTF-8 text: it begins as UTF-16, UTF-32 or binary data do; write it as UTF-8")


def _guarded(path: Path, records: Iterator[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
    """The records; a disk or a mount that fails is told with the row reached."""
    number = 0
    try:
        for number, record in records:
            yield number, record
    except OSError as error:
        text = f"{path} breaks off after row {number} ({error.strerror}); check that it is there, and start again"
        raise UserError(text) from error


def count_jsonl(path: Path) -> int:
    """Lines."""
    with open(path, "rb") as file:
        count, last = 0, b"\n"
        while piece := file.read(1 << 20):
            count, last = count + piece.count(b"\n"), piece[-1:]
    return count + (last != b"\n")


def read_json(path: Path, quarantine: Quarantine, wanted: Collection[str] | None = None, after: int = 0) -> Table:
    """One array of objects, decoded one object at a time: a corpus of gigabytes needs no memory of its own size."""
    _check_encoding(path)

    def records():
        number = 0
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            if (first := _Stream(file)).take() != "[":
                raise UserError(f"{path} is no JSON array; if it has one JSON object a line, name it .jsonl")
            while (mark := first.take()) != "]":
                if mark != ",":
                    first.back()
                try:
                    record = first.value()
                except (ValueError, RecursionError) as error:
                    text = f"{path} breaks off after row {number} ({error}); copy or write it again"
                    raise UserError(text) from error
                number += 1
                if number <= after:
                    continue
                if isinstance(record, dict):
                    yield number, record
                else:
                    quarantine.add(path, number, "malformed JSON", "not an object with named fields")

    return peeked(_guarded(path, records()))


class _Stream:
    """JSON values of a text file, one after another; holds one piece of the file, longer only for a longer value."""

    def __init__(self, file: TextIO, piece: int = 1 << 20):
        self.file, self.piece, self.buffer, self.at, self.ended = file, piece, "", 0, False
        self.decoder = json.JSONDecoder()

    def take(self) -> str:
        """The next character that is not white space, or an empty string at the end of the file."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at].isspace():
                self.at += 1
            if self.at < len(self.buffer):
                self.at += 1
                return self.buffer[self.at - 1]
            if self.ended:
                return ""
            self._more()

    def back(self) -> None:
        self.at = max(0, self.at - 1)

    def value(self) -> Any:
        self.take()
        self.back()
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.buffer, self.at)
                return value
            except json.JSONDecodeError:
                if self.ended:
                    raise
                self._more()

    def _more(self) -> None:
        # As much again as there is: a value that is longer than a piece costs a few attempts and not one a piece.
        text = self.file.read(max(self.piece, len(self.buffer) - self.at))
        self.buffer, self.at, self.ended = self.buffer[self.at :] + text, 0, not text


def peeked(records: Iterator[tuple[int, dict]]) -> Table:
    """With the keys of the first records for columns."""
    head = list(islice(records, _PEEK_ROWS))
    columns = list(dict.fromkeys(name for _, record in head for name in record))
    return columns or ["(no fields)"] * bool(head), chain(head, records)


def read_csv(path: Path, quarantine: Quarantine, wanted: Collection[str] | None = None, after: int = 0) -> Table:
    """Commas and double quotes, and a line of column names; every value is text."""
    _check_encoding(path)
    csv.field_size_limit(2**31 - 1)  # the default, 131072 characters, is less than one long document

    def lines():
        # Undecodable bytes become surrogates, so that they cost their row and not the file.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from file

    try:
        columns = [name.strip() for name in next(csv.reader(lines(), strict=True), [])]
    except csv.Error as error:
        raise UserError(f"{path}: the header is not CSV ({error}); write one line of column names") from error

    def records():
        reader = csv.reader(lines(), strict=True)
        next(reader, None)
        while True:
            number = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if number <= after:
                    continue
                quarantine.add(path, number, "malformed CSV", f"to line {reader.line_num}: {error}")
                continue
            if number <= after:
                continue
            if not values:
                quarantine.add(path, number, "empty line")
            elif len(values) != len(columns):
                quarantine.add(path, number, "malformed CSV", f"{len(values)} fields under {len(columns)} columns")
            else:
                yield number, dict(zip(columns, values, strict=True))

    return columns, _guarded(path, records())


def read_parquet(path: Path, quarantine: Quarantine, wanted: Collection[str] | None = None, after: int = 0) -> Table:
    """Row groups before `after` are not decoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file ({error}); copy or write it again") from error
    schema = parquet.schema_arrow
    present = [name for name in schema.names if wanted is None or name in wanted]

    def records():
        groups, number = list(range(parquet.num_row_groups)), 0
        while groups and number + (size := parquet.metadata.row_group(groups[0]).num_rows) <= after:
            number += size
            groups.pop(0)
        try:
            for batch in parquet.iter_batches(batch_size=1024, row_groups=groups, columns=present):
                columns = [_values(batch.column(name)) for name in present]
                for values in zip(*columns, strict=True):
                    number += 1
                    if number > after:
                        yield number, dict(zip(present, values, strict=True))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} breaks off after row {number} ({error}); copy or write it again") from error
        finally:
            parquet.close()

    def _values(column: pa.Array) -> list:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
        if not any(kind(column.type) for kind in kinds):
            return [_value(scalar) for scalar in column]
        return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]

    return list(schema.names), records()


def _value(scalar: Any) -> Any:
    """What an Arrow scalar holds; bytes where a text in it (in a list of messages) is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)


def _decoded(value: bytes | None) -> str | bytes | None:
    """Text of UTF-8 bytes; bytes that are not stay bytes, for the quarantine to name their row."""
    try:
        return value if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def count_parquet(path: Path) -> int:
    """Rows, as the file says; 0 where it cannot be read, which reading it will tell."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError):
        return 0


def count(path: Path) -> int:
    """How many records a file has, bad ones too; 0 where that takes as long as reading it."""
    counters = {".jsonl": count_jsonl, ".parquet": count_parquet}
    counter = counters.get(path.suffix.lower())
    return counter(path) if counter else 0


READERS: dict[str, Callable[..., Table]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}

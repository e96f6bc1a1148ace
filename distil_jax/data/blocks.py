"""The rows of a corpus on disk, in blocks that are worked on one at a time.

Block n of a folder is `n.parquet` (the rows), `n.quarantine.jsonl` (what was refused while it was read) and `n.json`,
written last: without it the block is not there. So a corpus is never whole in memory, and work on it goes on after the
last whole block.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distil_jax.data.rows import Row
from distil_jax.errors import UserError
from distil_jax.manifest import write_json_atomic

CHARACTERS = 4_000_000  # of text in a block: some million tokens, 150 MB while they are packed
_COLUMNS = {
    **dict.fromkeys(("id", "source", "split", "licence", "specialty", "kind", "prompt", "completion"), pa.string()),
    "messages": pa.string(),  # JSON; empty for none
    "ended": pa.bool_(),
}
_SCHEMA = pa.schema(list(_COLUMNS.items()))


def size_of(row: Row) -> int:
    """Characters that are tokenised."""
    return len(row.prompt) + len(row.completion)


def write(folder: Path, number: int, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Writes the rows of a block and then its facts. Its quarantine, if any, is there already."""
    table = pa.Table.from_pylist([_record(row) for row in rows], schema=_SCHEMA)
    partial = folder / f".{number:05d}.parquet.partial"
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, folder / f"{number:05d}.parquet")
    write_json_atomic(folder / f"{number:05d}.json", dict(facts))


def facts(folder: Path) -> list[dict[str, Any]]:
    """Of the blocks that are there, from the first to the last before one is missing."""
    found: list[dict[str, Any]] = []
    while (file := folder / f"{len(found):05d}.json").is_file():
        found.append(json.loads(file.read_text(encoding="utf-8")))
    return found


def read(folder: Path, number: int) -> list[Row]:
    """The rows of a block. Raises UserError if its file is missing or damaged."""
    file = folder / f"{number:05d}.parquet"
    try:
        records = pq.read_table(file, schema=_SCHEMA).to_pylist()
    except (pa.ArrowException, OSError) as error:
        text = f"{file} cannot be read ({str(error).splitlines()[0]}): delete {folder.parent} and prepare it again"
        raise UserError(text) from error
    return [_row(record) for record in records]


def quarantine_file(folder: Path, number: int) -> Path:
    """What was refused while the block was read."""
    return folder / f"{number:05d}.quarantine.jsonl"


def texts(folder: Path, numbers: Sequence[int], split: str) -> Iterator[str]:
    """The texts of a split, block after block."""
    for number in numbers:
        yield from (row.prompt + row.completion for row in read(folder, number) if row.split == split)


def _record(row: Row) -> dict[str, Any]:
    record = {name: getattr(row, name) for name in _COLUMNS}
    return record | {"messages": json.dumps(row.messages, ensure_ascii=False) if row.messages else ""}


def _row(record: dict[str, Any]) -> Row:
    messages = tuple(json.loads(record["messages"])) if record["messages"] else ()
    return Row(**(record | {"messages": messages}))

"""The reader of the user's own files: .jsonl, .csv and .parquet to rows, and what cannot be one to the quarantine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from distil_jax import conversation
from distil_jax.conversation import Message
from distil_jax.data.formats import READERS
from distil_jax.data.rows import SPLITS, Quarantine, Row, as_text, encodable, split_of
from distil_jax.errors import UserError, nearest

_SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}
_OPTIONAL_COLUMNS = ("id", "source", "licence", "specialty", "split", "stopped")
_TRUTH = {"true": True, "false": False}
_EXTENSIONS = (".jsonl", ".csv", ".parquet")
_COLUMNS = {"prompt", "completion", "text", "messages", "license", *_OPTIONAL_COLUMNS}


def read_files(
    files: Iterable[str | os.PathLike] | str | os.PathLike,
    quarantine: Quarantine,
    *,
    split_seed: int = 0,
    validation: float = 0.04,
    test: float = 0.08,
) -> Iterator[Row]:
    """Rows of .jsonl, .csv and .parquet files with the columns `prompt` and `completion`, `text`, or `messages`.

    `messages`: a list of {"role": system, user or assistant, "content": text}, in CSV as JSON. Beside it a `completion`
    is the assistant's answer to the last message: the file that `distil-jax generate` writes can be learned from.

    Optional columns: `id`, `specialty`, `source`, `licence` (or `license`), `split` (train, validation, test) and
    `stopped` (false: the completion, or the last message, was cut short, and its end is not learned); all others are
    ignored. Without `split` a row is placed by a hash of its text, so equal texts never stand on two sides.

    Raises UserError at the call for a missing file or an unknown extension, and while reading for a missing column, a
    file with no usable row, or a broken Parquet file. Malformed lines, undecodable bytes, values that are not text,
    empty text and messages that are no conversation go to `quarantine`.
    """
    paths = [Path(f) for f in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    for path in paths:
        if path.suffix.lower() not in _EXTENSIONS:
            hint = "; if it has one JSON object a line, name it .jsonl" if path.suffix.lower() == ".json" else ""
            raise UserError(f"{path}: data.files takes .jsonl, .csv and .parquet, not {path.suffix!r}{hint}")
        if not path.is_file():
            what = "is a directory; name the files in it" if path.is_dir() else "does not exist; check data.files"
            raise UserError(f"{path} {what}")

    def rows() -> Iterator[Row]:
        for path in paths:
            before, used = quarantine.total, 0
            for row in _rows_of_file(path, quarantine, split_seed, validation, test):
                used += 1
                yield row
            if not used:
                refused = quarantine.total - before
                raise UserError(f"{path} has no usable row ({refused} refused, see {quarantine.path}); mend the file")

    return rows()


def _rows_of_file(path: Path, quarantine: Quarantine, seed: int, validation: float, test: float) -> Iterator[Row]:
    columns, records = READERS[path.suffix.lower()](path, quarantine, _COLUMNS)
    if columns:  # no columns at all: nothing could be read, and the caller says so
        _check_columns(path, columns)
    for number, record in records:
        fields = _text_fields(record)
        if isinstance(fields, str):
            quarantine.add(path, number, *fields.split(": ", 1))
            continue
        kind, prompt, completion, messages = fields
        given = {name: record.get(name) for name in _OPTIONAL_COLUMNS}
        given["licence"] = given["licence"] or record.get("license")
        given = {name: value for name, value in given.items() if value not in (None, "")}
        if problem := _problem(prompt, completion, given):
            quarantine.add(path, number, problem)
            continue
        given = {name: str(value).strip() for name, value in given.items()}
        if (ended := _TRUTH.get(given.pop("stopped", "true").lower())) is None:
            quarantine.add(path, number, "not true or false", f"stopped is {record['stopped']!r}")
            continue
        key = hashlib.sha256(f"{prompt}\0{completion}".encode()).hexdigest()
        split = given.get("split") or split_of(key, seed=seed, validation=validation, test=test)
        split = _SPLIT_ALIASES.get(split.lower(), split.lower())
        if split not in SPLITS:
            quarantine.add(path, number, "unknown split", f"{split!r} is none of {', '.join(SPLITS)}")
            continue
        yield Row(
            id=given.get("id", f"{path}:{number}"),
            source=given.get("source", path.stem),
            split=split,
            licence=given.get("licence", "unknown"),
            specialty=given.get("specialty", "other"),
            kind=kind,
            prompt=prompt,
            completion=completion,
            messages=messages,
            ended=ended,
        )


def _text_fields(record: dict) -> tuple[str, str, str, tuple[Message, ...]] | str:
    """(kind, prompt, completion, messages) of a record, or "reason: detail" where it has none of the three forms."""
    prompt, completion, text, messages = (record.get(name) for name in ("prompt", "completion", "text", "messages"))
    if messages not in (None, ""):
        return _conversation(messages, completion)
    if completion is not None and prompt is not None:
        return ("QA" if prompt != "" else "TEXT"), prompt, completion, ()
    if text is not None:
        return "TEXT", "", text, ()
    present = ", ".join(name for name, value in record.items() if value is not None) or "nothing"
    return f"missing field: the row has {present}; it needs prompt and completion, text, or messages"


def _conversation(messages: object, completion: object) -> tuple[str, str, str, tuple[Message, ...]] | str:
    """`_text_fields` of a record with messages."""
    if isinstance(messages, bytes):
        return "not UTF-8: in messages"
    try:
        given = json.loads(messages) if isinstance(messages, str) else messages
        if completion not in (None, "") and isinstance(given, list):
            given = [*given, {"role": "assistant", "content": completion}]
        found = conversation.checked(given)
    except (json.JSONDecodeError, RecursionError) as error:
        return f"malformed JSON: in messages: {error}"
    except UserError as error:
        return f"not a conversation: {error}"
    return "DIALOGUE", *as_text(found), found


def _problem(prompt: object, completion: object, given: dict) -> str | None:
    values = (prompt, completion, *given.values())
    if not all(encodable(value) for value in values):
        return "not UTF-8"
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        return "not a string"
    return None if completion.strip() else "empty text"


def _check_columns(path: Path, columns: list[str]) -> None:
    if {"prompt", "completion"} <= set(columns) or {"text", "messages"} & set(columns):
        return
    half = {"prompt", "completion"} & set(columns)
    wanted = sorted({"prompt", "completion"} - half) if half else ["text", "prompt", "completion", "messages"]
    others = [column for column in columns if column not in half]
    guess = next((g for name in wanted if (g := nearest(name, others))), "")
    missing = (
        f"no column {wanted[0]!r} beside {half.pop()!r}"
        if half
        else "no columns 'prompt' and 'completion', or 'text', or 'messages'"
    )
    raise UserError(f"{path}: {missing}; it has {', '.join(columns)}{guess}; rename the columns in the file")

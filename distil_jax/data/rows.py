"""A row of text: the one schema that every source yields; its split, and the quarantine of those that cannot be used.

A row's text is `prompt + completion`, with nothing put between them; only the completion is learned from. A row may be
a conversation instead, which each model then reads in its own format (tokens/chat.py). A row that cannot be used is
never dropped silently: it goes to `quarantine.jsonl` with its file, line and reason, and is counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distil_jax import conversation
from distil_jax.conversation import Message

SPLITS = ("train", "validation", "test")
KINDS = ("MCQ", "QA", "CASE", "TEXT", "DIALOGUE")


@dataclass(frozen=True)
class Row:
    """One document. `kind` is one of KINDS: "MCQ" (a question with choices), "QA" (a prompt and its completion), "CASE"
    (a patient's record), "TEXT" (empty prompt, all of it learned) or "DIALOGUE".

    A dialogue that has `messages` (conversation.checked) has as completion the content of the last message and as
    prompt those before it, as plain text with an empty line between them. `ended`: whether the text is whole; the end
    of a text that was cut short is not learned.

    `meta`: what a source says of the row, beside its text. Where it has them: `question` (bare), `answer` (text of the
    right answer), `options` (list of texts), `topic`, `context`, and `cluster`: rows of equal clusters must stand on
    the same side of the held-out split. `labelled`: the specialty is what the source states and not a guess from the
    words; `tells_label`: the beginning of the prompt, where it states it in words.
    """

    id: str
    source: str
    split: str
    licence: str
    specialty: str
    kind: str
    prompt: str
    completion: str
    messages: tuple[Message, ...] = ()
    ended: bool = True
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)


def as_conversation(row: Row) -> Row:
    """A prompt and its completion as a conversation: the user's and the assistant's. Rows without a prompt, and those
    that are conversations, as they are."""
    if row.messages or not row.prompt.strip():
        return row
    messages = conversation.of_pair(row.prompt, row.completion)
    prompt, completion = as_text(messages)
    return replace(row, kind="DIALOGUE", prompt=prompt, completion=completion, messages=messages)


def as_text(messages: tuple[Message, ...]) -> tuple[str, str]:
    """Prompt and completion of a conversation in plain text."""
    *before, last = [message["content"] for message in messages]
    return "\n\n".join(before), last


class Quarantine:
    """Collects unusable rows in a JSON-lines file (`file`, `row`, `reason`, `detail`) and counts them by reason.

    `row` is the 1-based line of a text file, the 1-based row of a Parquet file, or the name of a term. The file is
    started afresh, so a file of zero length means that nothing was refused. Use it as a context manager, or `close()`.
    `counts` (reason -> rows) belongs in the manifest; keep `reason` to a few fixed phrases, the rest goes to `detail`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.counts: Counter[str] = Counter()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "w", encoding="utf-8")

    def add(self, file: str | os.PathLike, row: int | str, reason: str, detail: str = "") -> None:
        record = {"file": str(file), "row": row, "reason": reason, "detail": detail}
        self._file.write(json.dumps(record) + "\n")  # ASCII: a detail may hold what UTF-8 cannot
        self.counts[reason] += 1

    @property
    def total(self) -> int:
        return self.counts.total()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def encodable(value: object) -> bool:
    """False for bytes and for text with lone surrogates: undecodable bytes of a file, or \\udXXX written in JSON."""
    if not isinstance(value, str):
        return not isinstance(value, bytes)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def stable_fraction(key: str, seed: int | str = 0) -> float:
    """A number in [0, 1) that depends on `key` and `seed` alone: not on the process, the machine or the order."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(key: str, *, seed: int | str = 0, validation: float = 0.04, test: float = 0.08) -> str:
    """The split of a document by a hash of `key`: the same key is always on the same side."""
    u = stable_fraction(key, seed)
    return "test" if u < test else "validation" if u < test + validation else "train"

"""The shards of all blocks as one corpus: what its manifest says of them."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from distil_jax.data.rows import SPLITS
from distil_jax.errors import UserError
from distil_jax.shard import Sharding, part_file


def together(s: Sharding, count: int) -> dict[str, Any]:
    """The parts of all blocks as one corpus: what the manifest says; documents, refusals and token counts as files."""
    parts = [json.loads(part_file(s.folder, n).read_text(encoding="utf-8")) for n in range(count)]
    _check_tokenizers(parts, s)
    shards, rows, chat, alignment = {}, {}, {}, {}
    for split in SPLITS:
        rows[split] = sum(part["rows"][split] for part in parts)
        shards[split] = _joined([part["shards"].get(split) for part in parts], s)
        if not rows[split] or not shards[split]:
            raise UserError(
                f"no row of the {split} split is left: see quarantine.jsonl in {s.folder}; a row longer than a packed "
                "one needs a larger config.data.student_length and config.data.teacher_length"
            )
        chats, tokens, supervised = np.sum([part["chat"][split] for part in parts], axis=0).tolist()
        share = round(supervised / tokens, 5) if tokens else 0.0
        chat[split] = {"rows": chats, "tokens": tokens, "supervised": share}
        alignment[split] = _shares([part["alignment"][split] for part in parts if split in part["alignment"]])
    # Add one.
    counts = 1.0 + sum(np.load(part_file(s.folder, number).with_suffix(".npy")) for number in range(count))
    np.save(s.folder / "student_unigram.npy", counts / counts.sum())
    return {
        "tokenizers": parts[0]["tokenizers"],
        "shards": shards,
        "rows": rows,
        "chat": chat,
        "supervised_tokens": np.sum([part["supervised_tokens"] for part in parts], axis=0).tolist(),
        "alignment": alignment,
        "refused": [part["refused"] for part in parts],
    }


def _check_tokenizers(parts: Sequence[dict[str, Any]], s: Sharding) -> None:
    for number, part in enumerate(parts):
        for side, tokenizer in part["tokenizers"].items():
            if tokenizer != parts[0]["tokenizers"][side]:
                raise UserError(
                    f"block {number} of {s.folder} was made with another {side} tokenizer than block 0: all hosts need "
                    f"the same files at {side}.path. Put them there, delete {s.folder} and run this again"
                )


def _joined(parts: Sequence[dict[str, Any] | None], s: Sharding) -> dict[str, Any]:
    """The shards of a split over all blocks."""
    written = [part for part in parts if part]
    if not written:
        return {}
    records = sum(part["records"] for part in written)
    filled = np.sum([part["placed"] for part in written], axis=0) / records
    return {
        "fields": written[0]["fields"],
        "records": records,
        "examples": sum(part["examples"] for part in written),
        "files": [file for part in written for file in part["files"]],
        "student_fill": round(float(filled[0]) / s.student_length, 4),
        "teacher_fill": round(float(filled[1]) / s.teacher_length, 4),
    }


def _shares(counted: Sequence[dict[str, dict[str, int]]]) -> dict[str, Any]:
    """Counts of align.coverage as shares: of all tokens, and `by_class`."""
    summed: dict[str, Counter] = defaultdict(Counter)
    for one in counted:
        for name, counts in one.items():
            summed[name].update(counts)
    by_class = {
        name: {"tokens": counts["tokens"]}
        | {role: round(n / counts["tokens"], 5) for role, n in counts.items() if role != "tokens"}
        for name, counts in summed.items()
        if counts["tokens"]
    }
    return by_class.pop("all") | {"by_class": by_class}

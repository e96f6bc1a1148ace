"""The second half of `prepare`: each block of rows tokenised twice, aligned, packed and written as shards.

Blocks do not depend on each other, so they are shared out over processes and hosts, and the shards are the same for any
number of both. What is counted of a block is written last, as `parts/n.json`: a run that was killed makes the others.
"""

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distil_jax.data import blocks, mixture
from distil_jax.data.loader import write_shards
from distil_jax.data.pool import ordered, release_memory
from distil_jax.data.rows import SPLITS, Quarantine, Row
from distil_jax.manifest import write_json_atomic
from distil_jax.metrics import Progress
from distil_jax.tokens import align
from distil_jax.tokens.align import NONE, Alignment
from distil_jax.tokens.bytes import ByteTable, RoundTripError
from distil_jax.tokens.pack import Example, make_examples, pack

HELD_OUT = ("validation", "test")
_ENCODED = 512  # rows encoded at a time: what the encoder returns takes 100 bytes a token until it is read


class Sharding(NamedTuple):
    """What every block is made with."""

    folder: Path  # of the corpus; blocks in rows/, what is counted in parts/
    student_tokenizer: str  # folders
    teacher_tokenizer: str
    specialties: tuple[str, ...]
    student_length: int
    teacher_length: int
    rows_per_shard: int
    copies: dict[str, float]  # source -> how often a training row is read

    @property
    def student(self) -> ByteTable:
        return table(self.student_tokenizer)

    @property
    def teacher(self) -> ByteTable:
        return table(self.teacher_tokenizer)


@functools.lru_cache(maxsize=2)
def table(folder: str) -> ByteTable:
    """The byte table of a tokenizer, once in each process that makes shards."""
    made = ByteTable.from_tokenizer(folder)
    release_memory()  # that parsing took
    return made


class Block(NamedTuple):
    """A block of rows, and the number of documents of each split before it."""

    number: int
    before: dict[str, int]


def blocks_of(facts: Sequence[dict[str, Any]]) -> list[Block]:
    """The blocks of a corpus, from their facts (gather.py)."""
    before: Counter = Counter()
    found = []
    for number, one in enumerate(facts):
        found.append(Block(number, dict(before)))
        before.update({split: sum(sources.values()) for split, sources in one["rows"].items()})
    return found


def make_parts(sharding: Sharding, wanted: Iterable[Block], processes: int) -> None:
    """Makes the shards of these blocks, but for those that are there."""
    table.cache_clear()  # the folder of an earlier run may hold another tokenizer now
    (sharding.folder / "parts").mkdir(exist_ok=True)
    wanted = list(wanted)
    missing = [block for block in wanted if not part_file(sharding.folder, block.number).is_file()]
    start = len(wanted) - len(missing)
    release_memory()  # that reading and cleaning took
    with Progress(len(wanted), "prepare, blocks of shards", start=start) as progress:
        made = ordered(make_part, sharding, missing, min(processes, len(missing)))
        for done, _ in enumerate(made, start + 1):
            progress.update(done)


def part_file(folder: Path, number: int) -> Path:
    """What was counted of a block, written when its shards are whole."""
    return folder / "parts" / f"{number:05d}.json"


def make_part(sharding: Sharding, block: Block) -> int:
    """The shards of a block, its held-out documents, its refusals, its student tokens by id; returns its number."""
    s = sharding
    place = part_file(s.folder, block.number)
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in blocks.read(s.folder / "rows", block.number):
        rows[row.split].append(row)
    refused: dict[str, Counter] = defaultdict(Counter)
    shards, examples = {}, {}
    with Quarantine(place.with_suffix(".quarantine.jsonl")) as quarantine:
        for split, members in rows.items():
            before = block.before.get(split, 0)
            examples[split], rejected = align_rows(members, before, s)
            kept, over_long = _fitting(examples[split], s)
            examples[split] = kept
            for document, reason, detail in [*rejected, *over_long]:
                row = members[document - before]
                quarantine.add(row.source, row.id, reason, detail)
                refused[row.source][reason] += 1
            if kept:
                shards[split] = _write(s, f"{split}-block{block.number:05d}", split, members, before, kept)
    with place.with_suffix(".documents.jsonl").open("w", encoding="utf-8") as out:
        for split in HELD_OUT:
            _write_documents(out, split, rows[split], block.before.get(split, 0), examples[split])
    np.save(place.with_suffix(".npy"), _token_counts(examples["train"], s.student.vocab_size))
    write_json_atomic(
        place,
        {
            "tokenizers": {
                side: {"vocab_size": t.vocab_size, "hash": t.hash, "kind": t.kind}
                for side, t in (("teacher", s.teacher), ("student", s.student))
            },
            "shards": shards,
            "rows": {split: len(members) for split, members in examples.items()},
            "chat": {split: _chat(examples[split], rows[split], block.before.get(split, 0)) for split in rows},
            "supervised_tokens": _by_specialty(examples["train"], len(s.specialties)),
            "alignment": {split: _coverage(members, s.student) for split, members in examples.items() if members},
            "refused": {source: dict(reasons) for source, reasons in refused.items()},
        },
    )
    return block.number


def align_rows(rows: Sequence[Row], first: int, sharding: Sharding) -> tuple[list[Example], list[tuple[int, str, str]]]:
    """Examples of the usable rows, `document` counted from `first`; (document, reason, detail) of the others."""
    named = {name: i for i, name in enumerate(sharding.specialties)}
    examples: list[Example] = []
    rejected: list[tuple[int, str, str]] = []
    for start in range(0, len(rows), _ENCODED):
        fields = [
            {"prompt": r.prompt, "completion": r.completion, "messages": r.messages, "append_eos": r.ended}
            | {"specialty": named[r.specialty], "document": first + start + n}
            for n, r in enumerate(rows[start : start + _ENCODED])
        ]
        found, refused = make_examples(fields, sharding.student, sharding.teacher)
        examples.extend(found)
        for index, error in refused:
            reason = "does not round-trip" if isinstance(error, RoundTripError) else "nothing to learn"
            rejected.append((first + start + index, reason, str(error)))
    return examples, rejected


def _fitting(examples: Sequence[Example], s: Sharding) -> tuple[list[Example], list[tuple[int, str, str]]]:
    """The examples that fit in a packed row, and (document, reason, detail) of the others."""
    kept: list[Example] = []
    over_long = []
    for example in examples:
        lengths = len(example["student_tokens"]), len(example["teacher_tokens"])
        if lengths[0] <= s.student_length and lengths[1] <= s.teacher_length:
            kept.append(example)
        else:
            said = f"{lengths[0]} student and {lengths[1]} teacher tokens, config.data allows"
            over_long.append((example["document"], "too long", f"{said} {s.student_length} and {s.teacher_length}"))
    return kept, over_long


def _write(
    s: Sharding, prefix: str, split: str, rows: Sequence[Row], before: int, examples: list[Example]
) -> dict[str, Any]:
    """Packs and writes a split of a block; {} where the mixture leaves nothing of it."""
    if split == "train":
        times = [_times(rows[e["document"] - before], s) for e in examples]
        examples = [e for e, n in zip(examples, times, strict=True) for _ in range(n)]
        if not examples:
            return {}
    packed = pack(examples, s.student_length, s.teacher_length)
    written = write_shards(packed.rows, s.folder, prefix, s.rows_per_shard)
    placed = [sum(len(e[f"{side}_tokens"]) for e in examples) for side in ("student", "teacher")]
    return written | {"placed": placed, "examples": len(examples)}


def _times(row: Row, s: Sharding) -> int:
    return mixture.copies_of_row(row.id, s.copies.get(row.source, 1.0))


def _write_documents(out: Any, split: str, rows: Sequence[Row], before: int, examples: list[Example]) -> None:
    """The held-out documents in words, under the numbers that the shards' `document` field holds."""
    for number in sorted(e["document"] for e in examples):
        row = rows[number - before]
        record = {"split": split, "document": number, "id": row.id, "specialty": row.specialty}
        record |= {"prompt": row.prompt, "completion": row.completion}
        record |= {"messages": row.messages} if row.messages else {}
        out.write(json.dumps(record, ensure_ascii=False) + "\n")


def _chat(examples: list[Example], rows: Sequence[Row], before: int) -> list[int]:
    """How many examples are conversations, the student tokens of their messages with the ends of their turns, and how
    many of these are supervised; what the templates add is not counted."""
    chats = [e for e in examples if rows[e["document"] - before].messages]
    supervised = sum(int(e["student_supervised"].sum()) for e in chats)
    tokens = sum(int(((e["role"] != NONE) | e["student_supervised"]).sum()) for e in chats)
    return [len(chats), tokens, supervised]


def _token_counts(examples: list[Example], vocab_size: int) -> np.ndarray:
    """int64[Vs]: supervised student tokens by id."""
    counts = np.zeros(vocab_size, np.int64)
    for e in examples:
        np.add.at(counts, e["student_tokens"][e["student_supervised"]], 1)
    return counts


def _by_specialty(examples: list[Example], count: int) -> list[int]:
    """Supervised student tokens of each specialty."""
    tokens = np.zeros(count, np.int64)
    for e in examples:
        tokens[e["specialty"]] += int(e["student_supervised"].sum())
    return tokens.tolist()


def _coverage(examples: list[Example], student: ByteTable) -> dict[str, dict[str, int]]:
    """Supervised text tokens of the student by role, overall and by class of token (align.coverage)."""
    tokens = np.concatenate([e["student_tokens"] for e in examples])
    supervised = np.concatenate([e["student_supervised"] for e in examples]) & student.is_text[tokens]
    teacher_starts = np.cumsum([0] + [len(e["teacher_tokens"]) for e in examples])
    whole = Alignment(
        role=np.where(supervised, np.concatenate([e["role"] for e in examples]), NONE),
        teacher_index=np.concatenate(
            [e["teacher_index"] + at for e, at in zip(examples, teacher_starts, strict=False)]
        ),
        offset=np.concatenate([e["offset"] for e in examples]),
        student_ids=tokens,
        teacher_ids=np.concatenate([e["teacher_tokens"] for e in examples]),
    )
    return align.coverage([whole], student)

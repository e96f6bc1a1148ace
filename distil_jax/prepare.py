"""Stage 1: text to packed shards. Reads rows, makes both tokenizations, aligns them by bytes, packs, writes.

    distil-jax prepare --config configs/tiny.py

Writes corpus/ (shards of each split, documents.jsonl, quarantine.jsonl, manifest.json) and, where a model brings no
tokenizer, tokenizers/teacher and tokenizers/student.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from distil_jax import learners
from distil_jax.data import frequencies, hpo
from distil_jax.data.files import read_files
from distil_jax.data.loader import write_shards
from distil_jax.data.rows import Quarantine, Row, as_conversation
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError, nearest
from distil_jax.metrics import is_first_process
from distil_jax.models import hub
from distil_jax.tokens import align
from distil_jax.tokens.align import NONE, Alignment
from distil_jax.tokens.bytes import ByteTable, RoundTripError
from distil_jax.tokens.pack import Example, pack
from distil_jax.tokens.parallel import examples_of
from distil_jax.workdir import Workdir, files_of

EMBEDDED = {"definitions": hpo.load_corpus, "frequencies": frequencies.load_corpus}  # data.corpus
HELD_OUT = ("validation", "test")
CHAT = ("off", "on")  # config.data.chat


def main(config: ConfigDict) -> dict[str, Any]:
    """Makes the corpus unless it is there already; returns its manifest."""
    work = Workdir(config)
    if found := work.done("corpus"):
        return found
    stage = work.begin("corpus")

    # Rows, by split.
    with Quarantine(stage.folder / "quarantine.jsonl") as quarantine:
        rows, provenance = read_rows(config, quarantine)
        check_chat(config, rows)
        by_split = {split: [row for row in rows if row.split == split] for split in ("train", *HELD_OUT)}
        for split, members in by_split.items():
            if not members:
                raise UserError(
                    f"the {split} split is empty: give more rows, or a `split` column with train, validation and test"
                )

        # Tokenizers: the models' own, or trained on the training text.
        texts = [row.prompt + row.completion for row in by_split["train"]]
        tables = {side: tokenizer_of(work, side, texts) for side in ("teacher", "student")}

        # Examples, aligned by bytes, and packed.
        specialties = sorted({row.specialty for row in rows})
        shards, examples = {}, {}
        for split, members in by_split.items():
            examples[split] = align_rows(members, specialties, tables, quarantine, config.data.processes)
            if not examples[split]:
                raise UserError(f"no usable row in the {split} split: see {quarantine.path}")
            shards[split] = pack_split(config, stage.folder, split, members, examples[split], quarantine)
        write_documents(stage.folder / "documents.jsonl", {s: by_split[s] for s in HELD_OUT}, examples)
    # Student tokens by id over the supervised training text: the unigram that the projection is measured against.
    np.save(stage.folder / "student_unigram.npy", unigram(examples["train"], tables["student"].vocab_size))
    made = stage.finish(
        provenance=provenance,
        specialties=specialties,
        shards=shards,
        rows={split: len(members) for split, members in examples.items()},
        chat={split: chat_share(examples[split], by_split[split]) for split in by_split},
        supervised_tokens=supervised_by_specialty(examples["train"], len(specialties)),
        alignment={split: coverage(examples[split], tables["student"]) for split in examples},
        quarantined=dict(quarantine.counts),
        tokenizers={side: {"vocab_size": t.vocab_size, "hash": t.hash, "kind": t.kind} for side, t in tables.items()},
    )
    if is_first_process():
        print(describe(made), flush=True)
    return made


def describe(corpus: dict[str, Any]) -> str:
    """What the user should know of a corpus: rows used and refused, and what the teacher can say of its tokens."""
    lines = ["rows: " + ", ".join(f"{split} {n:,}" for split, n in corpus["rows"].items())]
    refused = ", ".join(f"{reason} {n:,}" for reason, n in corpus["quarantined"].items())
    lines.append(f"refused: {refused}, in quarantine.jsonl" if refused else "refused: none")
    for split, found in corpus["alignment"].items():
        parts = {"": found, "digits: ": found["by_class"].get("digit")}
        lines.append(
            f"student tokens of {split}: "
            + "; ".join(
                f"{name}root {c['root']:.1%}, interior {c['interior']:.1%}, crossing {c['crossing']:.1%} "
                f"({c['crossing_at_boundary']:.1%} from a boundary of both)"
                for name, c in parts.items()
                if c
            )
        )
    return "\n".join(lines)


def read_rows(config: ConfigDict, quarantine: Quarantine) -> tuple[list[Row], dict[str, Any]]:
    """(rows of all splits, what the manifest says about where they come from). With config.data.chat "on" pairs of
    prompt and completion are conversations."""
    if config.data.chat not in CHAT:
        raise UserError(f"config.data.chat is {config.data.chat!r}; use one of {', '.join(map(repr, CHAT))}")
    name = config.data.corpus
    if name not in EMBEDDED:
        raise UserError(f"config.data.corpus is {name!r}: it is {' or '.join(EMBEDDED)}{nearest(name, EMBEDDED)}")
    files = files_of(config)
    if files:
        rows = list(read_files(files, quarantine))
        licences = Counter(f"{row.source}: {row.licence or 'not stated'}" for row in rows)
        provenance = {"files": files, "licences": dict(licences)}
    else:
        corpus = EMBEDDED[name](quarantine)
        rows, provenance = corpus.rows, corpus.manifest
    return [as_conversation(row) for row in rows] if config.data.chat == "on" else rows, provenance


def check_chat(config: ConfigDict, rows: Sequence[Row]) -> None:
    """Raises UserError if the training conversations hold nothing that the assistant says, or nothing else: a sign of
    roles that were mixed up. Counted in bytes of the messages, so before anything is tokenised."""
    messages = [m for row in rows if row.split == "train" for m in row.messages]
    total = sum(len(m["content"].encode()) for m in messages)
    learned = sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
    allowed = config.data.chat_any_share
    if messages and learned in (0, total) and not allowed:
        says = ", ".join(f"{n} {role}" for role, n in Counter(m["role"] for m in messages).items())
        raise UserError(
            f"{learned / total:.0%} of the training conversations would be learned ({learned:,} of {total:,} bytes, in "
            f"{len(messages):,} messages: {says}): check their roles, or set config.data.chat_any_share=True if it is "
            "meant so"
        )


def tokenizer_of(work: Workdir, side: str, texts: Sequence[str]) -> ByteTable:
    """The byte table of the side's tokenizer; a side without a model path gets one trained on `texts`."""
    where = learners.tokenizer_directory(work, side)
    if work.config[side].path:
        hub.load_model(where)  # a model that we do not have should be refused now, not after the corpus is made
    else:
        train_tokenizer(work.config, side, texts, where)
    return ByteTable.from_tokenizer(where)


def train_tokenizer(config: ConfigDict, side: str, texts: Sequence[str], where: str | Path) -> None:
    """Trains the tokenizer of a side on `texts` and saves it in the folder `where`."""
    if side == "teacher":
        train_gemma_style(texts, config.teacher.vocab_size, where)
    else:
        train_llama_style(texts, config.student.vocab_size, where, numerals=config.student.numerals)


def align_rows(
    rows: Sequence[Row],
    specialties: Sequence[str],
    tables: dict[str, ByteTable],
    quarantine: Quarantine,
    processes: int = 1,
) -> list[Example]:
    """Examples of the usable rows; `document` is the row's index. The others go to the quarantine.

    processes: config.data.processes, which changes no result.
    """
    named = {name: i for i, name in enumerate(specialties)}
    fields = [
        {"prompt": r.prompt, "completion": r.completion, "messages": r.messages, "append_eos": r.ended}
        | {"specialty": named[r.specialty], "document": i}
        for i, r in enumerate(rows)
    ]
    examples, rejected = examples_of(fields, tables["student"], tables["teacher"], processes)
    for index, error in rejected:
        reason = "does not round-trip" if isinstance(error, RoundTripError) else "nothing to learn"
        quarantine.add(rows[index].source, rows[index].id, reason, str(error))
    return examples


def pack_split(
    config: ConfigDict, folder: Path, split: str, rows: Sequence[Row], examples: list[Example], quarantine: Quarantine
) -> dict[str, Any]:
    """Packs and writes one split; drops over-long examples from `examples` into the quarantine."""
    packed = pack(examples, config.data.student_length, config.data.teacher_length)
    for index in sorted(packed.over_long, reverse=True):
        example = examples.pop(index)
        row = rows[example["document"]]
        lengths = f"{len(example['student_tokens'])} student and {len(example['teacher_tokens'])} teacher tokens"
        limits = f"{config.data.student_length} and {config.data.teacher_length}"
        quarantine.add(row.source, row.id, "too long", f"{lengths}, config.data allows {limits}")
    if not examples:
        raise UserError(
            f"every row of the {split} split is longer than a packed row: raise config.data.student_length and "
            "config.data.teacher_length"
        )
    shards = write_shards(packed.rows, folder, split, config.data.rows_per_shard)
    return shards | {"student_fill": round(packed.student_fill, 4), "teacher_fill": round(packed.teacher_fill, 4)}


def write_documents(file: Path, rows: dict[str, list[Row]], examples: dict[str, list[Example]]) -> None:
    """The held-out documents in words, under the numbers that the shards' `document` field holds."""
    with file.open("w", encoding="utf-8") as out:
        for split, members in rows.items():
            for number in sorted(e["document"] for e in examples[split]):
                row = members[number]
                record = {"split": split, "document": number, "id": row.id, "specialty": row.specialty}
                record |= {"prompt": row.prompt, "completion": row.completion}
                record |= {"messages": row.messages} if row.messages else {}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")


def chat_share(examples: list[Example], rows: Sequence[Row]) -> dict[str, Any]:
    """How many examples are conversations, the student tokens of their messages with the ends of their turns, and the
    share of these that is supervised; what the templates add is not counted."""
    chats = [e for e in examples if rows[e["document"]].messages]
    supervised = sum(int(e["student_supervised"].sum()) for e in chats)
    tokens = sum(int(((e["role"] != NONE) | e["student_supervised"]).sum()) for e in chats)
    return {"rows": len(chats), "tokens": tokens, "supervised": round(supervised / tokens, 5) if tokens else 0.0}


def unigram(examples: list[Example], vocab_size: int) -> np.ndarray:
    """float64[Vs]: add-one smoothed shares of the supervised student tokens."""
    counts = np.ones(vocab_size)
    for e in examples:
        np.add.at(counts, e["student_tokens"][e["student_supervised"]], 1)
    return counts / counts.sum()


def supervised_by_specialty(examples: list[Example], count: int) -> list[int]:
    """Supervised student tokens of each specialty."""
    tokens = np.zeros(count, np.int64)
    for e in examples:
        tokens[e["specialty"]] += int(e["student_supervised"].sum())
    return tokens.tolist()


def coverage(examples: list[Example], student: ByteTable) -> dict[str, Any]:
    """Supervised text tokens of the student by role, as shares, overall and by class of token."""
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

    def shares(counts: dict[str, int]) -> dict[str, float]:
        return {"tokens": counts["tokens"]} | {
            role: round(n / counts["tokens"], 5) for role, n in counts.items() if role != "tokens"
        }

    by_class = {name: shares(counts) for name, counts in align.coverage([whole], student).items() if counts["tokens"]}
    return by_class.pop("all") | {"by_class": by_class}

"""Stage 1: text to packed shards. Reads and cleans rows, makes both tokenizations, aligns them by bytes, packs.

    distil-jax prepare --config configs/tiny.py

Writes corpus/ (rows/ in blocks, shards of each split, documents.jsonl, quarantine.jsonl, manifest.json) and, where a
model brings no tokenizer, tokenizers/teacher and tokenizers/student. A run that was killed goes on after the last whole
block, and any number of processes (config.data.processes) or hosts that share the folder writes the same bytes.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from distil_jax import alive, hosts, joined, learners, shard
from distil_jax.config import numbers_by_name
from distil_jax.data import blocks, catalogue, contamination, files, formats, frequencies, hpo, labels, mixture, reading
from distil_jax.data.cleaner import CONTAMINATED, PERSONAL, RowCleaner
from distil_jax.data.duplicates import Seen
from distil_jax.data.pool import processes_of
from distil_jax.data.rows import SPLITS, Row, as_conversation
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError, nearest
from distil_jax.eval import questions
from distil_jax.gather import Refusals, gather, rows_of, total, total_by_source
from distil_jax.models import hub
from distil_jax.shard import Sharding
from distil_jax.workdir import Workdir, files_of, names_of

_GATHERED = "rows/gathered"  # written when every block is there
EMBEDDED = {"definitions": hpo.load_corpus, "frequencies": frequencies.load_corpus}  # data.corpus
CHAT = ("off", "on")  # config.data.chat
HELD_OUT = {"validation": 0.005, "test": 0.01}  # of the documents of each source of the catalogue
DUPLICATES = ("keep", "exact", "near")  # config.data.duplicates
BLOCK_CHARACTERS = blocks.CHARACTERS
_TOKENIZER_ROWS = 200_000  # training rows that a tokenizer of our own is trained on


def main(config: ConfigDict) -> dict[str, Any]:
    """Makes the corpus unless it is there already; returns its manifest."""
    return prepare(config, hosts.index(), hosts.count())


def prepare(
    config: ConfigDict, process_index: int, process_count: int, *, silence: float = alive.SILENCE
) -> dict[str, Any]:
    """`main` of one of several hosts with one folder: the first reads and cleans, all make shards, the first ends.

    Raises UserError also if a host that is waited for shows no sign of life for `silence` seconds (alive.py).
    """
    work = Workdir(config)
    if found := work.done("corpus"):
        return found
    if process_count == 1:
        return _prepare(work, 0, 1, silence)
    with alive.Alive(work.root, process_index, silence):
        return _prepare(work, process_index, process_count, silence)


def _prepare(work: Workdir, process_index: int, process_count: int, silence: float) -> dict[str, Any]:
    config, folder, processes = work.config, work / "corpus", processes_of(work.config.data.processes)

    def wait(until: Callable[[], Any], what: str, missing: Callable[[], Collection[int]] = lambda: (0,)) -> Any:
        return alive.wait(until, what, work.root, missing, silence)

    if process_index:
        wait(lambda: work.done("corpus") or work.begun("corpus") and _is_gathered(folder), "the rows of the first host")
        if found := work.done("corpus"):
            return found
        facts = blocks.facts(folder / "rows")
    else:
        stage = work.begin("corpus", together=False)
        read_rows, provenance, expected = rows_to_read(config)
        before = work.files_of_corpus()
        duplicates = config.data.duplicates
        facts = gather(
            read_rows,
            folder / "rows",
            folder / "quarantine.jsonl",
            cleaner=cleaner_of(config),
            seen=None if duplicates == "keep" else Seen(near=duplicates == "near"),
            processes=processes,
            characters=BLOCK_CHARACTERS,
            expected=expected,
        )
        check_unchanged(work, before)
        check(config, facts)
        make_tokenizers(work, facts)
        (folder / _GATHERED).touch()

    sharding = sharding_of(work, facts)
    shard.make_parts(sharding, shard.blocks_of(facts)[process_index::process_count], processes)
    if process_index:
        return wait(lambda: work.done("corpus"), "the first host to end the corpus")
    parts = [shard.part_file(folder, n) for n in range(len(facts))]

    def late() -> set[int]:
        return {n % process_count for n, part in enumerate(parts) if not part.is_file()}

    wait(lambda: not late(), "the shards of the other hosts", late)

    _join(folder / "documents.jsonl", [part.with_suffix(".documents.jsonl") for part in parts])
    refusals = [blocks.quarantine_file(folder / "rows", n) for n in range(len(facts))]
    _join(folder / "quarantine.jsonl", [*refusals, *(part.with_suffix(".quarantine.jsonl") for part in parts)])
    with (folder / "quarantine.jsonl").open(encoding="utf-8") as lines:
        found = contamination.report(record for record in map(json.loads, lines) if record["reason"] == CONTAMINATED)
    made = joined.together(sharding, len(facts))
    for side, tokenizer in made["tokenizers"].items():
        tokenizer["path"] = config[side].path
    by_source = total_by_source([*(one["refused"] for one in facts), *made.pop("refused")])
    licences = {"licences": total(facts, "licences")}
    corpus = stage.finish(
        provenance=provenance | (licences if files_of(config) or config.data.sources else {}),
        specialties=list(sharding.specialties),
        specialties_by_source=total_by_source(one["specialties"] for one in facts),
        specialties_agreed=total_by_source(one["labels"] for one in facts),
        sources={split: rows_of(facts, split) for split in SPLITS},
        copies={name: round(n, 4) for name, n in sharding.copies.items()},
        mended=total(facts, "mended"),
        contamination=found,
        quarantined=_sum(by_source.values()),
        quarantined_by_source=by_source,
        **made,
    )
    shutil.rmtree(folder / "parts")
    if hosts.is_first_process():
        print(describe(corpus), flush=True)
    return corpus


def _is_gathered(folder: Path) -> bool:
    return (folder / _GATHERED).is_file()


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    summed: Counter = Counter()
    for one in counts:
        summed.update(one)
    return dict(summed)


def _join(target: Path, files: Sequence[Path]) -> None:
    """The lines of several files as one file."""
    with target.open("wb") as out:
        for file in files:
            with file.open("rb") as lines:
                shutil.copyfileobj(lines, out)


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
    return "\n".join(lines + labels.describe(corpus["specialties_agreed"]))


def rows_to_read(config: ConfigDict) -> tuple[Callable[[Refusals], Iterable[Row]], dict[str, Any], int]:
    """(the rows of all splits, given something to tell refusals to; what the manifest says about where they come from;
    about how many there are, or 0). With config.data.chat "on" pairs of prompt and completion are conversations."""
    if config.data.chat not in CHAT:
        raise UserError(f"config.data.chat is {config.data.chat!r}; use one of {', '.join(map(repr, CHAT))}")
    name = config.data.corpus
    if name not in EMBEDDED:
        raise UserError(f"config.data.corpus is {name!r}: it is {' or '.join(EMBEDDED)}{nearest(name, EMBEDDED)}")
    chat = as_conversation if config.data.chat == "on" else lambda row: row
    root, explanations = config.data.root, config.data.explanations
    if named := names_of(config.data.sources):
        if files_of(config):
            raise UserError("config.data.files and config.data.sources are both set: empty one of them")
        chosen, how = catalogue.chosen(named), {"explanations": explanations, **HELD_OUT}

        def catalogued(refusals: Refusals) -> Iterable[Row]:
            for source in chosen:
                yield from map(chat, reading.rows(source, root, refusals, **how))

        told = {s.name: {"hub": s.hub_id, "licence": s.licence, "parts": [p.name for p in s.parts]} for s in chosen}
        return catalogued, {"sources": told}, _known(reading.expected(source, root) for source in chosen)
    if given := files_of(config):
        expected = _known(formats.count(Path(file)) if Path(file).is_file() else 0 for file in given)
        return lambda refusals: map(chat, files.read_files(given, refusals)), {"files": given}, expected
    refused = Refusals(Path("quarantine.jsonl"))
    corpus = EMBEDDED[name](refused)

    def rows(refusals: Refusals) -> Iterable[Row]:
        for refusal in refused.taken():
            refusals.add(*refusal)
        yield from map(chat, corpus.rows)

    return rows, corpus.manifest, len(corpus.rows) + refused.total


def _known(counts: Iterable[int]) -> int:
    """The sum, or 0 where one of them is not known."""
    found = list(counts)
    return sum(found) if all(found) else 0


def cleaner_of(config: ConfigDict) -> RowCleaner | None:
    """What is done to each row; None if nothing is."""
    data = config.data
    for key, known in (("duplicates", DUPLICATES), ("personal", PERSONAL)):
        if data[key] not in known:
            raise UserError(f"config.data.{key} is {data[key]!r}; use one of {', '.join(map(repr, known))}")
    items = questions.questions(names_of(data.benchmarks), data.root)
    if not (data.mend or items or data.duplicates != "keep" or data.personal != "keep"):
        return None
    return RowCleaner(
        mend=data.mend,
        prints=data.duplicates != "keep",
        personal=data.personal,
        forums=frozenset(source.name for source in catalogue.SOURCES if source.forum),
        benchmarks=contamination.Index(items) if items else None,
    )


def check_unchanged(work: Workdir, before: Sequence[tuple[str, int, int]]) -> None:
    """Raises UserError if a file was written while it was read: its rows may be of the one state or the other."""
    for name, *_ in sorted(set(before) ^ set(work.files_of_corpus())):
        raise UserError(f"{name} was changed while it was read: run this again when it is whole")


def check(config: ConfigDict, facts: Sequence[dict[str, Any]]) -> None:
    """Raises UserError if a split is empty, or if the training conversations hold nothing that the assistant says, or
    nothing else: a sign of roles that were mixed up. Counted in bytes of the messages, before anything is tokenised."""
    for split in SPLITS:
        if not rows_of(facts, split):
            raise UserError(
                f"the {split} split is empty: give more rows, or a `split` column with train, validation and test"
            )
    said: dict[str, tuple[int, int]] = {}
    for role, (messages, size) in (pair for one in facts for pair in one["said"].items()):
        said[role] = said.get(role, (0, 0))[0] + messages, said.get(role, (0, 0))[1] + size
    whole = sum(size for _, size in said.values())
    learned = said.get("assistant", (0, 0))[1]
    allowed = config.data.chat_any_share
    if said and learned in (0, whole) and not allowed:
        counts = ", ".join(f"{n} {role}" for role, (n, _) in said.items())
        raise UserError(
            f"{learned / whole:.0%} of the training conversations would be learned ({learned:,} of {whole:,} bytes, in "
            f"{sum(n for n, _ in said.values()):,} messages: {counts}): check their roles, or set "
            "config.data.chat_any_share=True if it is meant so"
        )


def make_tokenizers(work: Workdir, facts: Sequence[dict[str, Any]]) -> None:
    """Trains the tokenizer of each side that has no model path; refuses a model that we do not have, before an hour of
    work rather than after it."""
    for side in ("teacher", "student"):
        where = learners.tokenizer_directory(work, side)
        if work.config[side].path:
            hub.load_model(where)
        else:
            texts = blocks.texts(work / "corpus" / "rows", range(len(facts)), "train")
            train_tokenizer(work.config, side, list(islice(texts, _TOKENIZER_ROWS)), where)


def train_tokenizer(config: ConfigDict, side: str, texts: Sequence[str], where: str | Path) -> None:
    """Trains the tokenizer of a side on `texts` and saves it in the folder `where`."""
    if side == "teacher":
        train_gemma_style(texts, config.teacher.vocab_size, where)
    else:
        train_llama_style(texts, config.student.vocab_size, where, numerals=config.student.numerals)


def sharding_of(work: Workdir, facts: Sequence[dict[str, Any]]) -> Sharding:
    """How the blocks of these facts become shards."""
    data = work.config.data
    return Sharding(
        folder=work / "corpus",
        student_tokenizer=str(learners.tokenizer_directory(work, "student")),
        teacher_tokenizer=str(learners.tokenizer_directory(work, "teacher")),
        specialties=tuple(sorted({name for one in facts for named in one["specialties"].values() for name in named})),
        student_length=data.student_length,
        teacher_length=data.teacher_length,
        rows_per_shard=data.rows_per_shard,
        copies=mixture.copies(
            rows_of(facts, "train"),
            weights=numbers_by_name("data.weights", data.weights),
            temperature=data.temperature,
            cap=data.cap,
        ),
    )

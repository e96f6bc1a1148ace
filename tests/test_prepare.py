"""Promises: blocks, processes, hosts and a kill change no byte of a corpus; nothing is lost between rows and shards."""

import json
import os
import platform
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from test_reading import CASES, UNLABELLED, put

from distil_jax import alive, gather, prepare, shard
from distil_jax.config import load_config, numbers_by_name
from distil_jax.data import blocks, cleaner, mixture, pool
from distil_jax.data.cleaner import Cleaned
from distil_jax.data.duplicates import Seen
from distil_jax.data.loader import Loader
from distil_jax.data.rows import Row
from distil_jax.errors import UserError
from distil_jax.tokens.pack import unpack

PROJECT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "train", "train", "validation", "test")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """1,500 rows of five splits' turns, some of them unusable, of each reason, in every block."""
    rng = np.random.default_rng(0)
    words = ["dose", "naïve", "β-blocker", "12.5", "心房", "\r\n", "🧬", "of the", "patient", string.punctuation]
    words += "renal hepatic acute chronic bilateral atrophy seizure anaemia tachycardia oedema ataxia".split()
    bad = {7: "\u2581", 400: "\u2581", 512: "long " * 300, 900: "x \u2581", 1498: "\u2581"}
    return [
        Row(
            id=f"r{n}",
            source=("notes", "letters")[n % 3 == 0],
            split=SPLITS[n % 5],
            licence="CC0",
            specialty=("heart", "lung")[n % 2],
            kind="QA",
            prompt=" ".join(rng.choice(words, 3)),
            completion=bad.get(n, "hypertension " + " ".join(rng.choice(words, rng.integers(1, 30)))),
        )
        for n in range(1500)
    ]


@pytest.fixture(scope="module")
def file(rows, tmp_path_factory) -> Path:
    """The rows as a user's file, with lines that cannot be read between them."""
    target = tmp_path_factory.mktemp("file") / "rows.jsonl"
    with target.open("w", encoding="utf-8") as out:
        for n, row in enumerate(rows):
            fields = ("id", "source", "split", "licence", "specialty", "prompt", "completion")
            out.write(json.dumps({name: getattr(row, name) for name in fields}) + "\n")
            if n % 400 == 3:
                out.write('{"prompt": "broken\n')
    return target


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a small corpus."""
    monkeypatch.setattr(prepare, "BLOCK_CHARACTERS", 40_000)
    monkeypatch.setattr(alive, "POLL", 0.02)
    monkeypatch.setattr(gather, "_CHUNK", 100)


def config_of(work: Path, file: Path, *more: str):
    values = {"workdir": work, "data.files": file, "teacher.vocab_size": 420, "student.vocab_size": 380}
    flags = [f"--config.{key}={value}" for key, value in (values | {"data.rows_per_shard": 20}).items()]
    return load_config(["--config", str(PROJECT / "configs" / "tiny.py"), *flags, *more])[0]


def files_in(work: Path) -> dict[str, bytes]:
    """What a corpus is, by file; the manifest without what differs between runs."""
    found = {}
    for path in sorted((work / "corpus").rglob("*")):
        if path.is_file() and path.name != "key":
            found[str(path.relative_to(work))] = path.read_bytes()
    manifest = json.loads(found.pop("corpus/manifest.json"))
    changing = {name: manifest.pop(name) for name in ("key", "seconds", "peak_memory_bytes")}
    assert changing["seconds"] > 0
    found["manifest"] = json.dumps(manifest).encode()
    return found


@pytest.fixture(scope="module")
def one(file, tmp_path_factory):
    """The corpus of one process, in one go."""
    work = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BLOCK_CHARACTERS", 40_000)
        patch.setattr(gather, "_CHUNK", 100)
        manifest = prepare.main(config_of(work, file, "--config.data.processes=1"))
    return work, manifest, files_in(work)


def test_a_corpus_of_several_blocks_is_whole(one, rows):
    work, manifest, found = one
    facts = blocks.facts(work / "corpus" / "rows")
    assert len(facts) >= 4 and sum(f["read"] for f in facts) == 1500
    assert manifest["quarantined"] == {"malformed JSON": 4, "does not round-trip": 4, "too long": 1}
    lines = found["corpus/quarantine.jsonl"].decode().splitlines()
    assert Counter(json.loads(line)["reason"] for line in lines) == Counter(manifest["quarantined"])
    assert (
        manifest["quarantined_by_source"]["letters"] == {"does not round-trip": 1} or manifest["quarantined_by_source"]
    )
    assert sum(manifest["rows"].values()) == 1500 - 5
    for split in ("train", "validation", "test"):
        members = [row for row in rows if row.split == split]
        loader = Loader(work / "corpus", manifest["shards"][split], 1, 0)
        documents = [d for n in range(loader.records) for d in unpack({k: v[None] for k, v in loader._rows[n].items()})]
        numbers = sorted(d["document"] for d in documents)
        assert len(set(numbers)) == len(numbers) == manifest["rows"][split]
        specialty = {d["document"]: manifest["specialties"][d["specialty"]] for d in documents}
        assert all(members[n].specialty == name for n, name in specialty.items()), "numbers are those of the split"
    told = [json.loads(line) for line in found["corpus/documents.jsonl"].decode().splitlines()]
    assert len(told) == manifest["rows"]["validation"] + manifest["rows"]["test"]
    by_id = {row.id: row for row in rows}
    assert all((by_id[t["id"]].prompt, by_id[t["id"]].split) == (t["prompt"], t["split"]) for t in told)
    assert np.load(work / "corpus" / "student_unigram.npy").sum() == pytest.approx(1, abs=1e-12)
    assert not (work / "corpus" / "parts").exists()


def test_two_processes_write_the_same_bytes(one, file, tmp_path):
    prepare.main(config_of(tmp_path, file, "--config.data.processes=2"))
    assert files_in(tmp_path) == one[2]


def test_two_hosts_write_the_same_bytes(one, file, tmp_path):
    config, found = config_of(tmp_path, file, "--config.data.processes=1"), {}
    hosts = [threading.Thread(target=lambda n=n: found.update({n: prepare.prepare(config, n, 2)})) for n in (1, 0)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join()
    assert found[0]["key"] == found[1]["key"] and files_in(tmp_path) == one[2]


HOST = """
import json, sys, time
from distil_jax import gather, prepare
from distil_jax.config import load_config
prepare.BLOCK_CHARACTERS, gather._CHUNK = 40_000, 100
host, silence, slow, flags = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
read = prepare.files.read_files
def slowly(*args, **options):
    for n, row in enumerate(read(*args, **options)):
        if n == 700:
            print("reading", flush=True)
            time.sleep(60)
        yield row
make = prepare.shard.make_parts
def late(*args):
    print("making", flush=True)
    time.sleep(60)
if slow == "reads":
    prepare.files.read_files = slowly
if slow == "makes":
    prepare.shard.make_parts = late
print("ready", flush=True)
prepare.prepare(load_config(flags)[0], host, 2, silence=silence)
"""


def flags_of(work: Path, file: Path) -> list[str]:
    values = {"workdir": work, "data.files": file, "teacher.vocab_size": 420, "student.vocab_size": 380}
    values |= {"data.rows_per_shard": 20, "data.processes": 1}
    tiny = ["--config", str(PROJECT / "configs" / "tiny.py")]
    return tiny + [f"--config.{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize(("dead", "where", "said"), [(0, "reads", "reading"), (1, "makes", "making")])
def test_a_host_that_is_killed_is_named_and_the_others_do_not_wait_for_ever(one, file, tmp_path, dead, where, said):
    arguments = [str(dead), "1.5", where, json.dumps(flags_of(tmp_path, file))]
    process = subprocess.Popen([sys.executable, "-c", HOST, *arguments], stdout=subprocess.PIPE, text=True)
    silent, found = load_config(flags_of(tmp_path, file))[0], []

    def other():
        try:
            prepare.prepare(silent, 1 - dead, 2, silence=1.5)
        except UserError as error:
            found.append(str(error))

    waiting = threading.Thread(target=other)
    try:
        assert process.stdout.readline() == "ready\n"
        waiting.start()
        assert any(line.strip() == said for line in process.stdout)
        waiting.join(1.8)
        assert waiting.is_alive() and not found, "a host that is slow is waited for"
        process.send_signal(signal.SIGKILL)
        start = time.monotonic()
        waiting.join(30)
        assert found and time.monotonic() - start < 10
    finally:
        process.kill()
        process.wait()
    name = f"host {dead} ({socket.gethostname()}, process {process.pid}) shows no sign of life"
    assert name in found[0] and str(alive.file_of(tmp_path, dead)) in found[0]
    assert "not been touched for 1.5 seconds" in found[0] and "start this command again on all hosts" in found[0]
    assert [path.name for path in (tmp_path / "alive").iterdir()] == [f"host-{dead}"]
    results = {}
    again = [threading.Thread(target=lambda n=n: results.update({n: prepare.prepare(silent, n, 2)})) for n in (0, 1)]
    for host in again:
        host.start()
    for host in again:
        host.join()
    assert files_in(tmp_path) == one[2] and not list((tmp_path / "alive").iterdir()), "what was whole is gone on with"


def test_a_host_that_never_comes_is_told(file, tmp_path):
    with pytest.raises(UserError, match="the rows of the first host: host 0 .it has ended or did not start.*host-0 is"):
        prepare.prepare(config_of(tmp_path, file), 1, 2, silence=0.2)


class Killed(BaseException):
    """Ends a run where it stands, as a signal would."""


@pytest.mark.parametrize("at", [150, 700, 1499])
def test_a_run_killed_while_it_reads_goes_on(one, file, tmp_path, at, monkeypatch):
    config = config_of(tmp_path, file, "--config.data.processes=1")
    read = prepare.files.read_files

    def breaks_off(*args, **options):
        yield from islice(read(*args, **options), at)
        raise Killed

    monkeypatch.setattr(prepare.files, "read_files", breaks_off)
    with pytest.raises(Killed):
        prepare.main(config)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "corpus" / "rows").glob("*.parquet")}
    monkeypatch.setattr(prepare.files, "read_files", read)
    prepare.main(config)
    assert files_in(tmp_path) == one[2]
    for name, written in before.items():
        assert (tmp_path / "corpus" / "rows" / name).stat().st_mtime_ns == written, "a whole block is not written again"
    assert bool(before) == (at > 150)


def test_a_run_killed_while_it_writes_shards_goes_on(one, file, tmp_path, monkeypatch):
    config = config_of(tmp_path, file, "--config.data.processes=1")
    write = shard.write_shards

    def breaks_off(rows, folder, prefix, size):
        if prefix == "validation-block00002":
            raise Killed
        return write(rows, folder, prefix, size)

    monkeypatch.setattr(shard, "write_shards", breaks_off)
    with pytest.raises(Killed):
        prepare.main(config)
    assert len(list((tmp_path / "corpus" / "parts").glob("*.json"))) == 2
    seen = []
    monkeypatch.setattr(shard, "write_shards", lambda *args: seen.append(args[2]) or write(*args))
    prepare.main(config)
    assert files_in(tmp_path) == one[2]
    assert not [prefix for prefix in seen if prefix.endswith(("block00000", "block00001"))]


def test_blocks_that_hosts_made_with_different_tokenizers_are_refused(file, tmp_path, monkeypatch):
    config = config_of(tmp_path, file, "--config.data.processes=1")
    of_one_host = shard.make_parts

    def another_hosts(sharding, wanted, processes):
        """The later blocks with the tokenizer that stands in the place of the student's on another machine."""
        of_one_host(sharding, wanted[:2], processes)
        of_one_host(sharding._replace(student_tokenizer=sharding.teacher_tokenizer), wanted[2:], processes)

    monkeypatch.setattr(shard, "make_parts", another_hosts)
    with pytest.raises(
        UserError, match="block 2 of .*corpus was made with another student tokenizer than block 0: all"
    ):
        prepare.main(config)


def test_what_was_seen_before_a_kill_is_known_after_it(rows, tmp_path, monkeypatch):
    """A text that repeats one of a finished block is refused, with a memory that is made again from the blocks."""

    class Prints:
        def __call__(self, chunk):
            prints = np.array([[len(row.completion)] for row in chunk], np.uint64).reshape(-1, 1)
            return Cleaned(list(chunk), prints, Counter(chunk=1))

    class Memory:
        def __init__(self):
            self.first, self.count = {}, 0

        def admit(self, prints, stays):
            found = []
            for n, value in enumerate(prints[:, 0].tolist()):
                found.append(self.first.get(value, -1))
                if value not in self.first and stays(n):
                    self.first[value] = self.count
                self.count += 1
            return np.array(found)

    def made(folder, stops=None):
        def read(refusals):
            yield from rows if stops is None else rows[:stops]
            if stops is not None:
                raise Killed

        options = {"cleaner": Prints(), "seen": Memory(), "characters": 3000}
        return gather.gather(read, folder, tmp_path / "quarantine.jsonl", **options)

    whole = made(tmp_path / "whole")
    with pytest.raises(Killed):
        made(tmp_path / "killed", 1000)
    assert len(blocks.facts(tmp_path / "killed")) > 1
    assert made(tmp_path / "killed") == whole
    kept = [row for n in range(len(whole)) for row in blocks.read(tmp_path / "whole", n)]
    lengths = {len(row.completion) for row in rows}
    assert len(kept) == len(lengths) == len({len(row.completion) for row in kept})
    assert sum(gather.total(whole, "mended").values()) == 15
    assert sum(sum(f["refused"][s].values()) for f in whole for s in f["refused"]) == 1500 - len(kept)


def test_the_second_row_with_an_id_is_refused_in_a_later_block_and_after_a_kill_too(rows, tmp_path):
    other = replace(rows[3], source="another file")  # which may count its rows in the same way
    again = [*rows[:300], rows[7], rows[299], *rows[300:400], other, rows[0]]
    for folder, stops in (("whole", [len(again)]), ("killed", [350, len(again)])):
        for stop in stops:

            def read(refusals, stop=stop):
                yield from again[:stop]
                if stop < len(again):
                    raise Killed

            try:
                facts = gather.gather(read, tmp_path / folder, tmp_path / "quarantine.jsonl", characters=4000)
            except Killed:
                continue
        kept = [row.id for n in range(len(facts)) for row in blocks.read(tmp_path / folder, n)]
        assert len(facts) > 2 and kept == [row.id for row in [*rows[:400], other]]
        refused = [f["refused"][source] for f in facts for source in f["refused"]]
        assert sum((Counter(reasons) for reasons in refused), Counter()) == {"duplicate id": 3}


@pytest.mark.parametrize("stop", [None, 250, 420])
def test_a_text_that_its_id_keeps_out_may_come_again_under_another_id(rows, tmp_path, monkeypatch, stop):
    """And a text that is in keeps its near doubles out, whatever its id."""
    monkeypatch.setattr(gather, "_CHUNK", 50)
    long = [replace(row, completion=f"{row.id} " + " ".join(f"{row.id}w{n}" for n in range(60))) for row in rows[:500]]

    def near(row, id_):
        return replace(row, id=id_, completion=row.completion + " again")

    lost = replace(long[20], id=long[10].id, completion="lost " + " ".join(f"lost{n}" for n in range(60)))
    shown = long[:100] + [lost, near(lost, "r-new")]  # in one chunk
    shown += long[100:300] + [near(lost, "r-late"), near(long[5], "r-double"), replace(long[7], id="r7")]
    shown += long[300:] + [replace(lost, id=long[11].id), near(lost, "r-later")]
    options = {"cleaner": cleaner.RowCleaner(mend=False, personal="keep"), "characters": 20_000}

    def made(stop):
        def read(refusals):
            yield from shown[:stop]
            if stop is not None:
                raise Killed

        return gather.gather(read, tmp_path, tmp_path / "quarantine.jsonl", seen=Seen(), **options)

    if stop is not None:
        with pytest.raises(Killed):
            made(stop)
        assert blocks.facts(tmp_path)
    facts = made(None)
    kept = [row.id for n in range(len(facts)) for row in blocks.read(tmp_path, n)]
    assert kept == [row.id for row in [*long[:100], near(lost, "r-new"), *long[100:]]]
    refused = [json.loads(line) for n in range(len(facts)) for line in blocks.quarantine_file(tmp_path, n).open()]
    assert [(one["row"], one["reason"]) for one in refused] == [
        ("r10", "duplicate id"),
        ("r-late", "duplicate"),
        ("r-double", "duplicate"),
        ("r7", "duplicate"),
        ("r11", "duplicate"),
        ("r-later", "duplicate"),
    ]
    assert refused[1]["detail"].endswith("as row 101 of those cleaned"), "rows that an id keeps out are counted too"


def test_processes_that_make_blocks_and_shards_do_without_jax():
    """It takes 150 MB in each of them; and what is freed can be given back."""
    code = "import sys, distil_jax.shard, distil_jax.gather, distil_jax.data.cleaner as c; c.duplicates.prints([])"
    code += "; print([name for name in ('jax', 'grain') if name in sys.modules])"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert made.stdout == "[]\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library here has no malloc_trim")
def test_freed_memory_is_given_back():
    code = """if True:
        import os
        from distil_jax.data.pool import release_memory
        def held():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        pieces = [bytes(2000) for _ in range(50_000)]
        kept = pieces[::1000]  # between the others, so that the top of the heap is not free
        del pieces
        freed = held()
        release_memory()
        print(freed - held())
    """
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert int(made.stdout) > 50e6, "of 100 MB"


def _square(context, n):
    if n is None:
        signal.raise_signal(signal.SIGKILL)
    return context + n * n


def test_a_pool_keeps_the_order_and_reads_no_further_than_it_must():
    taken = []
    items = (taken.append(n) or n for n in range(50))
    results = pool.ordered(_square, 1, items, 2)
    assert next(results) == 1 and len(taken) <= 4
    assert list(results) == [1 + n * n for n in range(1, 50)]


def test_a_process_that_dies_is_told():
    with pytest.raises(UserError, match="2 processes that prepare the text died.*config.data.processes=1"):
        list(pool.ordered(_square, 0, [1, None, 2], 2))


def test_a_negative_number_of_processes_is_refused():
    with pytest.raises(UserError, match="config.data.processes is -1"):
        pool.processes_of(-1)


# ---- the mixture -----------------------------------------------------------------------------------------------------


def test_copies_follow_weights_temperature_and_cap():
    rows = {"large": 8000, "small": 500, "empty": 0}
    assert mixture.copies(rows, weights={}) == {"large": 1.0, "small": 1.0, "empty": 0.0}
    evened = mixture.copies(rows, weights={"large": 0.5}, temperature=2.0)
    assert evened["small"] == pytest.approx(4.0) and evened["large"] == 0.5, "(500 / 8000) ** -0.5 is 4"
    assert mixture.copies(rows, weights={}, temperature=2.0, most=3)["small"] == 3
    capped = mixture.copies(rows, weights={}, cap=1000)
    assert capped["large"] == 0.125 and capped["small"] == 1
    with pytest.raises(UserError, match=r"names 'smal' \(did you mean 'small'\?\); the corpus has empty, large, small"):
        mixture.copies(rows, weights={"smal": 1.0})
    with pytest.raises(UserError, match="temperature is 0.5"):
        mixture.copies(rows, weights={}, temperature=0.5)


def test_weights_are_read_or_refused():
    assert numbers_by_name("data.weights", " a=2, b=0.25 ,") == {"a": 2.0, "b": 0.25}
    for text in ("a", "a=x", "a=-1", "a=inf", "a=nan"):
        with pytest.raises(UserError, match="config.data.weights"):
            numbers_by_name("data.weights", text)


def test_the_rows_of_a_share_are_the_same_everywhere():
    times = [mixture.copies_of_row(f"r{n}", 1.25) for n in range(4000)]
    assert set(times) == {1, 2} and sum(times) == pytest.approx(5000, rel=0.03)
    assert times[:8] == [mixture.copies_of_row(f"r{n}", 1.25) for n in range(8)]
    assert {mixture.copies_of_row("x", n) for n in (0.0, 1.0, 3.0)} == {0, 1, 3}


def test_a_source_is_read_as_often_as_the_mixture_says(one, file, rows, tmp_path):
    made = prepare.main(config_of(tmp_path, file, "--config.data.weights=letters=2,notes=0"))
    loader = Loader(tmp_path / "corpus", made["shards"]["train"], 1, 0)
    documents = [d for n in range(loader.records) for d in unpack({k: v[None] for k, v in loader._rows[n].items()})]
    train = [row for row in rows if row.split == "train"]
    counts = Counter(d["document"] for d in documents)
    assert set(counts.values()) == {2} and {train[n].source for n in counts} == {"letters"}
    assert made["copies"] == {"letters": 2.0, "notes": 0.0} and made["shards"]["train"]["examples"] == 2 * len(counts)
    assert made["rows"]["test"] == one[1]["rows"]["test"], "held-out rows are neither repeated nor left out"


def test_prepare_tells_what_the_teacher_can_say_of_every_split(file, tmp_path, capsys):
    config = config_of(tmp_path, file)
    made = prepare.main(config)
    said, told = capsys.readouterr()
    assert "prepare, rows read: 1504/1504 " in told, "1,500 rows and four lines that are none"
    assert re.search(r"^prepare, blocks of shards: (\d+)/\1 ", told, re.MULTILINE)
    for split in ("train", "validation", "test"):
        found = made["alignment"][split]
        assert found["root"] + found["interior"] + found["crossing"] == pytest.approx(1, abs=2e-5)
        assert 0 < found["crossing_at_boundary"] <= found["crossing"]
        at = f"crossing {found['crossing']:.1%} ({found['crossing_at_boundary']:.1%} from a boundary of both)"
        assert re.search(rf"^student tokens of {split}: .*{re.escape(at)}.*; digits: root", said, re.MULTILINE)
    assert "does not round-trip 4, too long 1, in quarantine.jsonl" in said
    again = prepare.main(config_of(tmp_path, file, "--config.data.processes=2"))
    assert again["key"] == made["key"], "another number of processes is the same corpus"
    assert capsys.readouterr().out == ""


# ---- the medical corpus ----------------------------------------------------------------------------------------------

CHOSEN = "all,healthcaremagic"


@pytest.fixture(scope="module")
def medical(rows, tmp_path_factory) -> Path:
    """Files of the sources that are on, and of the forum, with texts that repeat, are broken, foreign, or in a
    benchmark."""
    root = tmp_path_factory.mktemp("medical")
    texts = [row.completion.replace("\u2581", "") for row in rows if len(row.completion.split()) > 12][:240]
    for at, source in enumerate(prepare.catalogue.chosen(CHOSEN.split(","))):
        record, made = CASES[source.name][0], []
        column = "input" if "input" in record else "question"
        for n, text in enumerate(texts[at % 7 :: 7]):
            made.append(
                record | {column: f"{source.name} {n}: {text}?"} | {key: n for key in ("pubid", "id") if key in record}
            )
        made.append(made[0])
        for part in source.parts:
            put(root, source, part, made if part.name != "pqa_unlabeled/train" else [UNLABELLED], suffix=".jsonl")
    forum = root / "lavita" / "ChatDoctor-HealthCareMagic-100k" / "data" / "train-00000-of-00001.jsonl"
    said = {"instruction": "i", "input": "My name is Ann Lee, ann@x.org. Itâ€™s my knee.", "output": "Rest it."}
    foreign = "Le patient se plaint depuis trois jours de fortes douleurs thoraciques vers le bras gauche. " * 3
    known = "Which artery supplies the inferior wall of the left ventricle in most people with a dominant right artery?"
    others = [said, said | {"input": foreign}, said | {"input": known, "output": "The right coronary artery."}]
    with forum.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in others)
    (root / "exam.jsonl").write_text(json.dumps({"question": known, "id": "e1"}) + "\n")
    task = root / "cais" / "mmlu" / "virology"  # a benchmark lies where the sources do
    task.mkdir(parents=True, exist_ok=True)
    item = {"question": "Which virus?", "subject": "virology", "choices": ["a", "b", "c", "d"], "answer": 0}
    (task / "test.jsonl").write_text(json.dumps(item) + "\n")
    return root


def medical_config(work: Path, root: Path, *more: str):
    values = {"workdir": work, "data.sources": CHOSEN, "data.root": root, "data.mend": True, "data.duplicates": "near"}
    values |= {"data.personal": "report", "data.benchmarks": f"{root / 'exam.jsonl'},mmlu_virology"}
    values |= {"data.rows_per_shard": 20}
    values |= {"teacher.vocab_size": 480, "student.vocab_size": 440}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return load_config(["--config", str(PROJECT / "configs" / "tiny.py"), *flags, *more])[0]


@pytest.fixture(scope="module")
def medical_corpus(medical, tmp_path_factory):
    work = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BLOCK_CHARACTERS", 6_000)
        patch.setattr(gather, "_CHUNK", 20)
        patch.setattr(prepare, "HELD_OUT", {"validation": 0.1, "test": 0.1})
        made = prepare.main(medical_config(work, medical, "--config.data.processes=1"))
    return work, made, files_in(work)


def test_the_medical_corpus_is_cleaned_counted_and_told(medical_corpus):
    work, made, found = medical_corpus
    chosen = prepare.catalogue.chosen(CHOSEN.split(","))
    assert set(made["provenance"]["sources"]) == {source.name for source in chosen}
    there = {name for rows in made["sources"].values() for name in rows}  # one paper of covid_qa stands on one side
    assert there == {source.name for source in chosen}
    assert made["mended"]["mended"] >= 1 and made["mended"]["personal data replaced, email"] == 1
    assert made["quarantined"]["another language"] == 1 and made["quarantined"]["duplicate"] >= len(chosen)
    assert all(made["quarantined_by_source"][source.name]["duplicate"] >= 1 for source in chosen)
    assert made["contamination"]["healthcaremagic"]["exam"]["rows"] == 1
    assert "exam e1" in made["contamination"]["healthcaremagic"]["exam"]["examples"][0]["item"]
    kept = [
        row
        for n in range(len(blocks.facts(work / "corpus" / "rows")))
        for row in blocks.read(work / "corpus" / "rows", n)
    ]
    facts = blocks.facts(work / "corpus" / "rows")
    told = [row for row in kept if row.source == "healthcaremagic" and "knee" in row.prompt]
    assert told[0].prompt == "My name is [NAME], [EMAIL]. It\u2019s my knee."
    assert len({row.id for row in kept}) == len(kept) == sum(sum(s.values()) for s in made["sources"].values())
    assert len(kept) + made["quarantined"]["duplicate"] + 2 == sum(f["read"] for f in facts)
    assert {"cardiology", "anatomy", "infectious_diseases"} <= set(made["specialties"])
    counted = Counter((row.source, row.specialty) for row in kept)
    assert counted == {(s, n): c for s, by in made["specialties_by_source"].items() for n, c in by.items()}
    stated = {"medmcqa", "pubmedqa", "covid_qa"}  # MedQuAD's "Disease" names none
    assert set(made["specialties_agreed"]) == stated
    for name in stated:
        agreed = made["specialties_agreed"][name]
        assert agreed["labelled"] == sum(row.source == name for row in kept) >= agreed["compared"] >= agreed["decided"]
        assert f"specialties of {name}: {agreed['labelled']} rows have a label" in prepare.describe(made)


def test_two_processes_and_a_kill_make_the_same_medical_corpus(medical_corpus, medical, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_CHARACTERS", 6_000)
    monkeypatch.setattr(gather, "_CHUNK", 20)
    monkeypatch.setattr(prepare, "HELD_OUT", {"validation": 0.1, "test": 0.1})
    read = prepare.reading.rows

    def breaks_off(source, *args, **how):
        if source.name == "cord19":
            raise Killed
        return read(source, *args, **how)

    config = medical_config(tmp_path, medical, "--config.data.processes=2")
    monkeypatch.setattr(prepare.reading, "rows", breaks_off)
    with pytest.raises(Killed):
        prepare.main(config)
    assert blocks.facts(tmp_path / "corpus" / "rows")
    monkeypatch.setattr(prepare.reading, "rows", read)
    prepare.main(config)
    assert files_in(tmp_path) == medical_corpus[2]


@pytest.mark.parametrize(("mend", "reason"), [(False, "too long"), (True, "gigantic")])
def test_a_gigantic_row_is_refused_by_its_name(rows, tmp_path, mend, reason):
    file = tmp_path / "rows.jsonl"
    sentences = "The patient was seen again after a week and was well. " * 40_000  # two megabytes
    with file.open("w") as out:
        for row in [*rows[:40], replace(rows[40], completion=sentences), *rows[41:80]]:
            out.write(json.dumps({"id": row.id, "text": row.completion, "split": row.split}) + "\n")
    config = config_of(tmp_path, file, f"--config.data.mend={mend}", "--config.student.vocab_size=330")
    made = prepare.main(config)
    refused = [json.loads(line) for line in (tmp_path / "corpus" / "quarantine.jsonl").read_text().splitlines()]
    assert ("r40", reason) in [(one["row"], one["reason"]) for one in refused] and made["quarantined"][reason] == 1
    assert sum(made["rows"].values()) + len(refused) == 80


def test_a_file_that_is_cut_short_while_it_is_read_is_told(file, tmp_path, monkeypatch):
    mine = tmp_path / "rows.jsonl"
    shutil.copy(file, mine)
    read = prepare.files.read_files

    def cut(*args, **options):
        for n, row in enumerate(read(*args, **options)):
            if n == 500:
                os.truncate(mine, mine.stat().st_size * 3 // 4)
            yield row

    monkeypatch.setattr(prepare.files, "read_files", cut)
    with pytest.raises(UserError, match="rows.jsonl was changed while it was read"):
        prepare.main(config_of(tmp_path / "work", mine))


def test_a_damaged_block_of_rows_is_named(file, tmp_path, monkeypatch):
    config = config_of(tmp_path, file, "--config.data.processes=1")

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shard, "make_parts", killed)
        with pytest.raises(Killed):
            prepare.main(config)
    block = tmp_path / "corpus" / "rows" / "00001.parquet"
    block.write_bytes(block.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rows/00001.parquet cannot be read \(.*delete .*corpus and prepare it again"):
        prepare.main(config)


def test_how_many_rows_there_will_be_is_known_before(medical, tmp_path, file):
    assert prepare.rows_to_read(config_of(tmp_path, file))[2] == 1504
    read, _, expected = prepare.rows_to_read(medical_config(tmp_path, medical))
    refusals = gather.Refusals(tmp_path / "q.jsonl")
    assert sum(1 for _ in read(refusals)) + refusals.total == expected
    hub = prepare.rows_to_read(medical_config(tmp_path, medical, "--config.data.root=hub"))[2]
    rows = {source.name: source.rows for source in prepare.catalogue.chosen(CHOSEN.split(","))}
    assert hub == sum(rows.values()) + 211_269 - 1_000, "two rows of a record, and the labelled part is off"
    (tmp_path / "more.csv").write_text("text\nx\n")
    assert prepare.rows_to_read(config_of(tmp_path, f"{file},{tmp_path / 'more.csv'}"))[2] == 0, "not counted"


def test_settings_of_the_data_that_are_none_are_refused(file, medical, tmp_path):
    for more, said in (
        ("data.duplicates=fuzzy", "config.data.duplicates is 'fuzzy'; use one of 'keep', 'exact', 'near'"),
        ("data.personal=hide", "config.data.personal is 'hide'"),
        ("data.sources=medmqa", "no source 'medmqa' \\(did you mean"),
        (f"data.files={file}", "config.data.files and config.data.sources are both set"),
        ("data.benchmarks=gone.jsonl", "gone.jsonl"),
    ):
        with pytest.raises(UserError, match=said):
            prepare.main(medical_config(tmp_path, medical, f"--config.{more}"))


def test_another_file_of_a_source_is_another_corpus(medical, tmp_path):
    before = prepare.Workdir(medical_config(tmp_path, medical)).key("corpus")
    assert prepare.Workdir(medical_config(tmp_path, medical)).key("corpus") == before
    other = tmp_path / "root"
    shutil.copytree(medical, other)
    assert prepare.Workdir(medical_config(tmp_path, other)).key("corpus") != before

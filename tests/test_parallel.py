"""Promise: the number of processes that align the text changes no byte of the shards and no line of the quarantine."""

import json
import re
import signal
import string
from pathlib import Path

import numpy as np
import pytest

from distil_jax import prepare
from distil_jax.config import load_config
from distil_jax.data.rows import Quarantine, Row
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError
from distil_jax.tokens import parallel
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.pack import make_examples

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """1,300 rows: in three chunks, some of them unusable, of each reason, in each chunk."""
    rng = np.random.default_rng(0)
    words = ["dose", "naïve", "β-blocker", "12.5", "心房", "\r\n", "🧬", "of the", "patient", string.punctuation]
    bad = {7: "\u2581", 400: "", 511: "a\ud800", 512: "", 900: "x \u2581", 1299: ""}
    return [
        Row(
            id=f"r{n}",
            source="rows.jsonl",
            split="train",
            licence="",
            specialty=("heart", "lung")[n % 2],
            kind="QA",
            prompt=" ".join(rng.choice(words, 3)),
            completion=bad.get(n, " ".join(rng.choice(words, rng.integers(1, 30)))),
        )
        for n in range(1300)
    ]


@pytest.fixture(scope="module")
def tables(rows, tmp_path_factory) -> dict[str, ByteTable]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [r.prompt + r.completion for r in rows if r.completion and "\ud800" not in r.completion]
    train_gemma_style(texts, 420, folder / "teacher")
    train_llama_style(texts, 380, folder / "student")
    return {side: ByteTable.from_tokenizer(folder / side) for side in ("teacher", "student")}


def made(folder, rows, tables, processes: int) -> dict[str, bytes]:
    """The files that `prepare` writes of these rows, by name."""
    config, _ = load_config(["--config", str(PROJECT / "configs" / "tiny.py"), "--config.data.rows_per_shard=50"])
    folder.mkdir()
    with Quarantine(folder / "quarantine.jsonl") as quarantine:
        examples = prepare.align_rows(rows, ["heart", "lung"], tables, quarantine, processes)
        prepare.pack_split(config, folder, "train", rows, examples, quarantine)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_shards_and_quarantine_are_the_same_bytes_for_any_number_of_processes(rows, tables, tmp_path):
    one = made(tmp_path / "one", rows, tables, 1)
    assert len(one) > 3 and one["quarantine.jsonl"].count(b"\n") >= 6
    for processes in (2, 3):
        assert made(tmp_path / str(processes), rows, tables, processes) == one


def test_rows_without_a_number_get_their_own(rows, tables):
    plain = [{"prompt": r.prompt, "completion": r.completion} for r in rows]
    expected = make_examples(plain, tables["student"], tables["teacher"])
    found = parallel.examples_of(plain, tables["student"], tables["teacher"], 2)
    assert [e["document"] for e in found[0]] == [e["document"] for e in expected[0]]
    assert [(n, type(e), str(e)) for n, e in found[1]] == [(n, type(e), str(e)) for n, e in expected[1]]
    for a, b in zip(*(side[0] for side in (found, expected)), strict=True):
        assert a.keys() == b.keys()
        for field in a:
            assert np.array_equal(a[field], b[field]) and np.asarray(a[field]).dtype == np.asarray(b[field]).dtype


def test_as_many_processes_as_cores_where_that_pays(rows, tables, monkeypatch):
    asked = []

    class Pool(parallel.ProcessPoolExecutor):
        def __init__(self, processes, *args, **kwargs):
            asked.append(processes)
            super().__init__(processes, *args, **kwargs)

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", Pool)
    cores = {0, 1, 2}
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: cores)
    plain = [{"prompt": r.prompt, "completion": r.completion} for r in rows[:600]]
    parallel.examples_of(plain, tables["student"], tables["teacher"], 0)
    assert asked == [], "a small corpus stays in this process"
    monkeypatch.setattr(parallel, "POOL_PAYS", 1000)
    parallel.examples_of(plain, tables["student"], tables["teacher"], 0)
    assert asked == [2], "as many as there are cores, but no more than chunks"
    cores.remove(2)
    parallel.examples_of(plain, tables["student"], tables["teacher"], 0)
    assert asked == [2], "two cores are as busy with the threads of one process"


class Killer:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


def test_a_process_that_dies_is_told(rows, tables):
    fields = [{"prompt": r.prompt, "completion": r.completion} for r in rows]
    fields[600] = {"prompt": Killer(), "completion": "x"}
    with pytest.raises(UserError, match="processes that align the text died.*config.data.processes=1"):
        parallel.examples_of(fields, tables["student"], tables["teacher"], 2)


def test_a_negative_number_of_processes_is_refused(rows, tables):
    with pytest.raises(UserError, match="config.data.processes is -1"):
        parallel.examples_of([], tables["student"], tables["teacher"], -1)


def test_prepare_tells_what_the_teacher_can_say_of_every_split(rows, tmp_path, capsys):
    usable = [r for r in rows if r.completion and "\ud800" not in r.completion][:400]
    splits = ("train", "train", "validation", "test")
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as out:
        for n, r in enumerate(usable):
            out.write(json.dumps({"text": r.prompt + r.completion, "split": splits[n % 4]}) + "\n")
    values = {"workdir": tmp_path / "work", "data.files": tmp_path / "rows.jsonl", "teacher.vocab_size": 400}
    flags = [f"--config.{key}={value}" for key, value in {**values, "student.vocab_size": 360}.items()]

    def prepared(*more: str) -> dict:
        return prepare.main(load_config(["--config", str(PROJECT / "configs" / "tiny.py"), *flags, *more])[0])

    made = prepared()
    said = capsys.readouterr().out
    for split in ("train", "validation", "test"):
        found = made["alignment"][split]
        assert found["root"] + found["interior"] + found["crossing"] == pytest.approx(1, abs=2e-5)
        assert 0 < found["crossing_at_boundary"] <= found["crossing"]
        at = f"crossing {found['crossing']:.1%} ({found['crossing_at_boundary']:.1%} from a boundary of both)"
        assert re.search(rf"^student tokens of {split}: .*{re.escape(at)}.*; digits: root", said, re.MULTILINE)
    assert "does not round-trip 1, in quarantine.jsonl" in said, "one literal space mark is among these rows"

    assert prepared("--config.data.processes=2")["key"] == made["key"], "another number of processes is the same corpus"
    assert capsys.readouterr().out == ""

"""The 18 sources in their true schemas: what each gives, what is refused, what stops, and where reading goes on."""

import errno
import io
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distil_jax.data import adapters, formats, reading, specialties
from distil_jax.data.catalogue import SOURCES, chosen, named
from distil_jax.data.rows import KINDS, Quarantine
from distil_jax.errors import UserError

ALPACA = {"instruction": "Answer this question truthfully", "input": "What is α?", "output": " A letter. "}
MCQ = {"question": "Which drug?", "options": {"A": "aspirin", "B": "heparin"}, "answer_idx": "B"}
MEDQA = {"question": "Which drug?", "answer": "heparin", "options": MCQ["options"], "meta_info": "step1"}
MEDMCQA = {
    **{"id": "e9ad", "question": "Which nerve?", "opa": "ulnar", "opb": "radial", "opc": "median", "opd": "vagus"},
    **{"cop": 2, "choice_type": "single", "exp": "Ans. C", "subject_name": "Anatomy", "topic_name": "Upper limb"},
}
PUBMED = {
    "pubid": 21645374,
    "question": "Do mitochondria matter?",
    "context": {
        "contexts": ["First part.", "Second part."],
        "labels": ["BACKGROUND", "RESULTS"],
        "meshes": ["Heart Failure", "Myocardium", "Humans"],
    },
    "long_answer": "They do.",
    "final_decision": "yes",
}
UNLABELLED = {name: value for name, value in PUBMED.items() if name != "final_decision"}
COVID = {
    "document_id": 630,
    "context": "\nA paper on spread. Masks help a lot. More text.",
    "question": "What helps?",
    "is_impossible": False,
    "id": 262,
    "answers": {"text": ["Masks help"], "answer_start": [20]},
}
MEDQUAD = {
    **{"document_id": "1", "document_source": "NHLBI", "category": "Disease", "umls_cui": None},
    **{"question_focus": "Angina", "question_type": "symptoms", "question": "What is angina?", "answer": "Chest pain."},
}
MMLU = {"question": "Where?", "subject": "medical_genetics", "choices": ["a", "b", "c", "d"], "answer": 3}
TEXT = {"text": "A text."}

# source -> (record, prompt and completion of the first row, kind)
Q = "Question: What is α?\nAnswer:"
TASK = "Answer this question truthfully\n\nWhat is α?\nAnswer:"
CASES = {
    "mediqa": (ALPACA, TASK, " A letter.", "QA"),
    "flashcards": (ALPACA, Q, " A letter.", "QA"),
    "wikidoc": (ALPACA, Q, " A letter.", "QA"),
    "mmlu": (
        MMLU,
        "The following are multiple choice questions (with answers) about medical genetics.\n\n"
        "Where?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        " D. d",
        "MCQ",
    ),
    "medmcqa": (
        MEDMCQA,
        "Question: Which nerve?\nChoices:\nA. ulnar\nB. radial\nC. median\nD. vagus\nAnswer:",
        " C. median",
        "MCQ",
    ),
    "medqa_bigbio": (
        MCQ | {"options": [{"key": "A", "value": "aspirin"}, {"key": "B", "value": "heparin"}]},
        "Question: Which drug?\nA. aspirin\nB. heparin\nAnswer:",
        " B. heparin",
        "MCQ",
    ),
    "medqa": (
        MEDQA | {"answer_idx": "B"},
        "Question: Which drug?\nA. aspirin\nB. heparin\nAnswer:",
        " B. heparin",
        "MCQ",
    ),
    "mmmlu": (ALPACA, TASK, " A letter.", "MCQ"),
    "wikidoc_patient": (ALPACA, Q, " A letter.", "QA"),
    "medqa_meadow": (ALPACA, TASK, " A letter.", "MCQ"),
    "pubmedqa": (
        PUBMED,
        "Abstract: First part.\nSecond part.\nQuestion: Do mitochondria matter?\nAnswer:",
        " yes",
        "MCQ",
    ),
    "covid_qa": (
        COVID,
        "Context: A paper on spread. Masks help a lot. More text.\nQuestion: What helps?\nAnswer:",
        " Masks help",
        "QA",
    ),
    "cord19": (ALPACA, TASK, " A letter.", "QA"),
    "pubmed_causal": (ALPACA, TASK, " A letter.", "QA"),
    "medquad": (MEDQUAD, "Question: What is angina?\nAnswer:", " Chest pain.", "QA"),
    "healthcaremagic": (ALPACA, "What is α?", "A letter.", "DIALOGUE"),
    "mimic": (TEXT, "", "A text.", "CASE"),
    "textbooks": (TEXT, "", "A text.", "TEXT"),
}


def put(root, source, part, records, name=None, suffix=".parquet"):
    """A file of a source's part, where and as a download has it."""
    folder = root / source.hub_id / part.config / "data"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name or part.split + '-00000-of-00001'}{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), file, row_group_size=2)
    elif suffix == ".json":
        file.write_text(json.dumps(records, indent=1), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return file


def read(source, root, tmp_path, **how):
    with Quarantine(tmp_path / "quarantine.jsonl") as quarantine:
        rows = list(reading.rows(source, str(root), quarantine, **how))
    refused = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    return rows, [(r["row"], r["reason"]) for r in refused]


def test_every_source_is_tested_and_has_a_reason():
    assert [s.name for s in SOURCES] == list(CASES) and len(SOURCES) == 18
    assert len({s.hub_id for s in SOURCES}) == 18 and all(s.why and s.licence for s in SOURCES)
    off = {"mimic", "textbooks", "healthcaremagic", "medqa_bigbio", "medqa_meadow", "mmmlu", "mmlu"}
    assert {s.name for s in SOURCES if not s.on} == off


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("name", CASES)
def test_each_source_in_its_true_schema(name, suffix, tmp_path):
    record, prompt, completion, kind = CASES[name]
    source = named(name)
    source = replace(source, parts=source.parts[:1])
    file = put(tmp_path, source, source.parts[0], [record], suffix=suffix)
    rows, refused = read(source, tmp_path, tmp_path)
    assert (rows[0].prompt, rows[0].completion, rows[0].kind) == (prompt, completion, kind) and not refused
    assert kind in KINDS and rows[0].source == name and rows[0].licence == source.licence
    assert rows[0].specialty in specialties.SPECIALTIES
    if name not in ("medmcqa", "pubmedqa"):
        stem = f"{source.parts[0].config}/{file.stem}" if source.parts[0].config else file.stem
        assert rows[0].id == f"{name}:{stem}:1"
    assert len(rows) == (2 if name == "pubmedqa" else 1)


def test_pubmedqa_gives_decision_and_conclusion_of_one_cluster_and_the_unlabelled_the_conclusion(tmp_path):
    source = named("pubmedqa")
    for part in source.parts:
        put(tmp_path, source, part, [UNLABELLED if part.config == "pqa_unlabeled" else PUBMED])
    rows, _ = read(source, tmp_path, tmp_path)
    assert [r.completion for r in rows] == [" yes", " They do.", " They do.", " yes", " They do."]
    assert {r.meta["cluster"] for r in rows} == {"pubmed:21645374"} and len({r.split for r in rows}) == 1
    assert rows[1].prompt.endswith("\nQuestion: Do mitochondria matter?\nConclusion:")
    assert {r.specialty for r in rows} == {"cardiology"}
    assert [p.config for p in chosen(["pubmedqa"])[0].parts] == ["pqa_artificial", "pqa_unlabeled"]


def test_an_explanation_follows_the_answer_when_asked_and_is_never_in_the_prompt(tmp_path):
    source = chosen(["medmcqa"])[0]
    put(tmp_path, source, source.parts[0], [MEDMCQA])
    (plain,), _ = read(source, tmp_path, tmp_path)
    (explained,), _ = read(source, tmp_path, tmp_path, explanations=True)
    assert explained.completion == " C. median\nAns. C" and explained.prompt == plain.prompt
    assert "Ans." not in plain.prompt + plain.completion and plain.id == "medmcqa:e9ad"
    assert plain.meta["answer"] == "median" and plain.meta["options"] == ["ulnar", "radial", "median", "vagus"]


BROKEN = [
    ("medmcqa", {"cop": -1}, "answer outside the options"),
    ("medmcqa", {"cop": 4}, "answer outside the options"),
    ("medmcqa", {"cop": None}, "null answer"),
    ("medmcqa", {"cop": "two"}, "wrong type"),
    ("medmcqa", {"cop": True}, "wrong type"),
    ("medmcqa", {"opb": None}, "empty option"),
    ("medmcqa", {"opb": " "}, "empty option"),
    ("medmcqa", {"question": "\n"}, "empty question"),
    ("medmcqa", {"question": None}, "empty question"),
    ("medmcqa", {"question": 7}, "wrong type"),
    ("medmcqa", {"question": "\ud800"}, "not UTF-8"),
    ("medqa", {"answer_idx": "E"}, "answer outside the options"),
    ("medqa", {"answer_idx": None}, "null answer"),
    ("medqa", {"options": "{}"}, "wrong type"),
    ("medqa", {"options": {"A": "one"}}, "wrong type"),
    ("medqa_bigbio", {"options": ["a", "b"]}, "wrong type"),
    ("mmlu", {"choices": None}, "wrong type"),
    ("mmlu", {"choices": ["a", "b", "", "d"]}, "empty option"),
    ("pubmedqa", {"final_decision": "unsure"}, "answer outside the options"),
    ("pubmedqa", {"final_decision": None}, "null answer"),
    ("pubmedqa", {"long_answer": None}, "null answer"),
    ("pubmedqa", {"context": "text"}, "wrong type"),
    ("pubmedqa", {"context": {"contexts": [], "meshes": []}}, "empty text"),
    ("covid_qa", {"answers": {"text": [], "answer_start": []}}, "null answer"),
    ("covid_qa", {"answers": {"text": ["Masks help"], "answer_start": [3]}}, "answer not in the context"),
    ("medquad", {"answer": None}, "null answer"),
    ("medquad", {"answer": ""}, "empty answer"),
    ("flashcards", {"input": ""}, "empty question"),
    ("healthcaremagic", {"output": None}, "null answer"),
    ("textbooks", {"text": "  "}, "empty text"),
]


@pytest.mark.parametrize(("name", "broken", "reason"), BROKEN)
def test_a_broken_value_is_refused_with_its_row_and_the_rest_is_kept(name, broken, reason, tmp_path):
    good, source = CASES[name][0], replace(named(name), parts=named(name).parts[:1])
    put(tmp_path, source, source.parts[0], [good, good | broken, good], suffix=".jsonl")
    rows, refused = read(source, tmp_path, tmp_path)
    assert refused == [(2, reason)] and reason in adapters.REASONS
    assert {row.prompt for row in rows} <= {rows[0].prompt, rows[-1].prompt}
    assert len(rows) == (4 if name == "pubmedqa" else 2)


@pytest.mark.parametrize("name", CASES)
def test_a_changed_schema_stops_with_source_column_and_nearest_name(name, tmp_path):
    source = replace(named(name), parts=named(name).parts[:1])
    column = source.columns[-1]
    record = {f"{key}s" if key == column else key: value for key, value in CASES[name][0].items()}
    put(tmp_path, source, source.parts[0], [record])
    with pytest.raises(UserError) as error:
        read(source, tmp_path, tmp_path)
    said = [f"source {name}", f"no column {column!r}", f"did you mean '{column}s'?", "it has "]
    assert all(part in str(error.value) for part in said), str(error.value)


def test_what_is_not_there_is_told(tmp_path):
    source = chosen(["medquad"])[0]
    with pytest.raises(UserError, match="source medquad: there is no folder .*lavita/MedQuAD"):
        reading.units(source, str(tmp_path))
    put(tmp_path, source, source.parts[0], [MEDQUAD | {"answer": None}])
    with pytest.raises(UserError, match=r"source medquad: .*parquet has no usable row \(1 refused"):
        read(source, tmp_path, tmp_path)
    put(tmp_path, source, source.parts[0], [MEDQUAD], suffix=".jsonl")
    with pytest.raises(UserError, match="the same rows twice"):
        reading.units(source, str(tmp_path))
    medmcqa = chosen(["medmcqa"])[0]
    put(tmp_path, medmcqa, medmcqa.parts[0], [MEDMCQA], name="validation-0")
    with pytest.raises(UserError, match=r"has no file \*train\*"):
        reading.units(medmcqa, str(tmp_path))


def test_names_choose_sources_and_parts():
    assert [s.name for s in chosen()] == [s.name for s in SOURCES if s.on]
    assert [s.name for s in chosen(["mimic", "medmcqa"])] == ["mimic", "medmcqa"]
    (both,) = chosen(["medmcqa", "medmcqa:validation"])
    assert [p.split for p in both.parts] == ["train", "validation"]
    for names, said in {
        ("medmqa",): "no source 'medmqa' (did you mean 'medmcqa'?)",
        ("medmcqa:valid",): "medmcqa has no part 'valid' (did you mean 'validation'?)",
        ("mimic", "mimic"): "'mimic' is named twice",
    }.items():
        with pytest.raises(UserError) as error:
            chosen(names)
        assert said in str(error.value)


@pytest.mark.parametrize(
    "line", [b'{"question": ' + b"[" * 10**5, b'{"cop": ' + b"9" * 5000 + b"}", b"[1]", b"null", b'{"a']
)
def test_a_line_that_is_no_record_costs_itself_alone(line, tmp_path):
    source = chosen(["medmcqa"])[0]
    file = put(tmp_path, source, source.parts[0], [MEDMCQA, MEDMCQA], suffix=".jsonl")
    first, second = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, line, second]))
    rows, refused = read(source, tmp_path, tmp_path)
    assert len(rows) == 2 and refused == [(2, "malformed JSON")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "utf-16", "utf-16-le", "utf-32"])
def test_a_file_in_another_encoding_is_told_or_its_rows_refused(encoding, suffix, tmp_path):
    source = chosen(["flashcards"])[0]
    file = put(tmp_path, source, source.parts[0], [ALPACA], suffix=suffix)
    records = [ALPACA | {"input": "naïve?"}, ALPACA | {"input": "What is a?"}]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if suffix == ".json":
        text = json.dumps(records, ensure_ascii=False)
    if suffix == ".csv":
        text = "".join(",".join(row) + "\r\n" for row in [ALPACA.keys(), *(record.values() for record in records)])
    file.write_bytes(text.encode(encoding))
    if encoding.startswith(("utf-16", "utf-32")):
        with pytest.raises(UserError, match=f"source flashcards: .*{suffix} is no UTF-8 text.*write it as UTF-8"):
            read(source, tmp_path, tmp_path)
        return
    rows, refused = read(source, tmp_path, tmp_path)
    asked = [row.meta["question"] for row in rows]
    assert asked == (["What is a?"] if encoding == "latin-1" else ["naïve?", "What is a?"])
    assert refused == ([(2 if suffix == ".csv" else 1, "not UTF-8")] if encoding == "latin-1" else [])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_a_source_that_vanishes_half_way_is_told(suffix, tmp_path):
    source = chosen(["flashcards"])[0]
    for shard in range(2):
        file = put(tmp_path, source, source.parts[0], [ALPACA], name=f"train-{shard}", suffix=suffix)
        if suffix == ".csv":
            file.write_text("instruction,input,output\ndo,this,that\n")
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        rows = reading.rows(source, str(tmp_path), quarantine)
        next(rows)
        file.unlink()
        with pytest.raises(
            UserError, match=f"source flashcards: .*train-1{suffix} (cannot be read|is not a whole).*No such"
        ):
            list(rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_a_disk_that_fails_is_told_with_the_row_reached(suffix, tmp_path):
    """A file whose second half cannot be read, as a mount that has gone gives an error and no end."""
    records = "".join(json.dumps({"text": f"{n} " + "x" * 300}) + "\n" for n in range(100))
    if suffix == ".csv":
        records = "text\n" + "".join(f"{n} {'x' * 300}\n" for n in range(100))
    if suffix == ".json":
        records = f"[{records.strip().replace(chr(10), ',')}]"

    class Broken(io.FileIO):
        def readinto(self, buffer):
            if self.tell() >= 16384:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(memoryview(buffer)[: 16384 - self.tell()])

    (tmp_path / f"a{suffix}").write_text(records)

    def opened(path, mode="r", **how):
        raw = io.BufferedReader(Broken(path))
        return raw if mode == "rb" else io.TextIOWrapper(raw, **how)

    with pytest.MonkeyPatch.context() as patch, Quarantine(tmp_path / "q.jsonl") as quarantine:
        patch.setattr(formats, "open", opened, raising=False)
        patch.setattr(formats, "_PEEK_ROWS", 1)
        with pytest.raises(UserError, match=rf"a\{suffix} breaks off after row \d+ \(Input/output error\); check that"):
            _, found = formats.READERS[suffix](tmp_path / f"a{suffix}", quarantine)
            list(found)


def test_a_file_that_breaks_off_says_how_far_it_was_read(tmp_path):
    source = chosen(["flashcards"])[0]
    many = [ALPACA | {"input": f"What is {n}?", "output": "x" * 400 + str(n)} for n in range(3000)]
    file = put(tmp_path, source, source.parts[0], many)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="source flashcards: .* is not a whole Parquet file"):
        read(source, tmp_path, tmp_path)
    pq.write_table(pa.Table.from_pylist(many), file, row_group_size=1000, compression="zstd")
    damaged = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(2).column(1).data_page_offset
    damaged[start : start + 40] = b"\xff" * 40
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="source flashcards: .* breaks off after row 1024 "):
        read(source, tmp_path, tmp_path)
    file.unlink()
    file = put(tmp_path, source, source.parts[0], many, suffix=".json")
    file.write_text(file.read_text()[:-1000])
    with pytest.raises(UserError, match="source flashcards: .* breaks off after row 299[78] "):
        read(source, tmp_path, tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_reading_goes_on_after_a_row_and_units_are_independent(suffix, tmp_path):
    source = chosen(["flashcards"])[0]
    for shard in range(2):
        records = [ALPACA | {"input": f"What is {shard} {n}?"} for n in range(7)]
        put(tmp_path, source, source.parts[0], records, name=f"train-{shard}", suffix=suffix)
    whole, _ = read(source, tmp_path, tmp_path)
    first, second = reading.units(source, str(tmp_path))
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        assert [*reading.unit_rows(second, quarantine)] == whole[7:]
        for after in (0, 1, 4, 6, 7):
            assert [*reading.unit_rows(first, quarantine, after=after)] == whole[after:7]
        numbered = [*reading.records(source, str(tmp_path), quarantine)]
    assert [(n, record["input"]) for _, n, record in numbered[6:8]] == [(7, "What is 0 6?"), (1, "What is 1 0?")]
    assert len({row.id for row in whole}) == 14


def test_an_array_longer_than_a_piece_is_read_object_by_object(tmp_path):
    records = [{"text": "é" * n, "n": [n, {"deep": "]},{["}]} for n in (0, 5, 3000, 1)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    for piece in (1, 2, 7, 100, 10_000):
        with open(file, encoding="utf-8") as opened:
            stream = formats._Stream(opened, piece)
            assert stream.take() == "["
            found = [stream.value()]
            while stream.take() == ",":
                found.append(stream.value())
        assert found == records


def test_the_hub_streams_the_same_rows_and_a_failure_names_source_and_row(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    source = chosen(["pubmedqa"])[0]
    source = replace(source, parts=source.parts[:1])
    file = put(tmp_path, source, source.parts[0], [PUBMED | {"pubid": n} for n in range(5)])
    load, asked = datasets.load_dataset, []

    def from_file(hub_id, *, split, streaming, **where):
        asked.append((hub_id, split, where))
        return load("parquet", data_files=str(file), split=split, streaming=streaming)

    on_disk, _ = read(source, tmp_path, tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", from_file)
    streamed, _ = read(source, reading.HUB, tmp_path)
    assert streamed == on_disk and asked == [("qiaojin/PubMedQA", "train", {"name": "pqa_artificial"})]
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        (unit,) = reading.units(source, reading.HUB)
        assert [*reading.unit_rows(unit, quarantine, after=3)] == on_disk[6:]

    def failing(*args):
        def found():
            yield 1, PUBMED
            raise ConnectionError("gone")

        return list(PUBMED), found()

    monkeypatch.setattr(reading, "hub_table", failing)
    with pytest.raises(UserError, match=r"source pubmedqa \(qiaojin/PubMedQA, .*breaks off after row 1: .*gone"):
        read(source, reading.HUB, tmp_path)


def test_a_tfds_folder_gives_the_rows_of_the_hubs_files_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    source = chosen(["pubmedqa"])[0]
    source = replace(source, parts=source.parts[:1])
    (part,) = source.parts
    text = tfds.features.Text()
    of_context = dict.fromkeys(("contexts", "labels", "meshes"), tfds.features.Sequence(text))
    features = tfds.features.FeaturesDict(
        {"pubid": np.int32, "context": of_context} | dict.fromkeys(("question", "long_answer", "final_decision"), text)
    )
    found = [PUBMED | {"pubid": n, "question": f"Is it {n} \N{GREEK SMALL LETTER ALPHA}?"} for n in range(4)]
    records = [features.serialize_example(features.encode_example(record)) for record in found]
    folder = tmp_path / "tfds" / source.hub_id / part.config
    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(str(folder / f"pubmed-{part.split}.array_record-00000-of-00001"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    name = tfds.core.ShardedFileTemplate(
        data_dir=folder, template=template, dataset_name="pubmed", split=part.split, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=part.split, shard_lengths=[len(records)], num_bytes=sum(map(len, records)), filename_template=name
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], filename_template=template, check_data=False
    )

    put(tmp_path, source, part, found)
    on_disk, _ = read(source, tmp_path, tmp_path)
    rows, _ = read(source, f"{reading.TFDS}{tmp_path / 'tfds'}", tmp_path)
    assert len(rows) == 8
    assert [replace(row, id="") for row in rows] == [replace(row, id="") for row in on_disk]
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        (unit,) = reading.units(source, f"{reading.TFDS}{tmp_path / 'tfds'}")
        assert [*reading.unit_rows(unit, quarantine, after=3)] == rows[6:]
    assert "tensorflow" not in sys.modules


def test_without_the_extra_the_user_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"source mediqa: reading from hub needs datasets; pip install"):
        read(chosen(["mediqa"])[0], reading.HUB, tmp_path)


def test_a_repository_with_a_script_is_read_from_the_hubs_export(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    asked = {}

    def load(hub_id, **where):
        asked.update(where, hub_id=hub_id)
        raise FileNotFoundError("no such branch")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"source covid_qa .* breaks off after row 0: .*no such branch"):
        read(chosen(["covid_qa"])[0], reading.HUB, tmp_path)
    assert (asked["hub_id"], asked["revision"]) == ("deepset/covid_qa_deepset", "refs/convert/parquet")
    assert asked["data_files"] == {"train": "*/train/*.parquet"}


def test_files_of_an_export_have_ids_of_their_own(tmp_path):
    source = named("mmlu")
    source = replace(source, parts=source.parts[:2])
    for split in ("dev", "validation"):
        folder = tmp_path / source.hub_id / "anatomy" / split
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([MMLU]), folder / "0000.parquet")
    rows, _ = read(source, tmp_path, tmp_path)
    assert [row.id for row in rows] == ["mmlu:anatomy/dev-0000:1", "mmlu:anatomy/validation-0000:1"]


def test_a_paper_is_cut_to_the_words_around_its_answer():
    words = [f"w{n}" for n in range(3000)]
    paper = " ".join(words)
    start = paper.index(" w1500 ") + 1
    record = COVID | {"context": paper, "answers": {"text": ["w1500 w1501"], "answer_start": [start]}}
    (fields,) = adapters.covid_qa(record)
    kept = fields.meta["context"].split()
    first = words.index(kept[0])
    assert kept == words[first : first + len(kept)] and "w1500" in kept and fields.completion == " w1500 w1501"
    before, after = fields.meta["context"].split("w1500 w1501")
    assert (
        adapters.WINDOW - 10 < len(before) <= adapters.WINDOW and adapters.WINDOW - 10 < len(after) <= adapters.WINDOW
    )
    whole = adapters.covid_qa(COVID)[0].meta
    assert whole["context"] == COVID["context"].strip() and whole["cluster"] != fields.meta["cluster"]

"""Rows of the user's files: what is read, what is refused with its line, and what stops with one clear sentence."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distil_jax.data.files import read_files
from distil_jax.data.rows import Quarantine
from distil_jax.errors import UserError


def read(path, tmp_path, **kwargs):
    with Quarantine(tmp_path / "quarantine.jsonl") as quarantine:
        rows = list(read_files(path, quarantine, **kwargs))
    refused = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert len(refused) == quarantine.total
    return rows, [(r["row"], r["reason"]) for r in refused]


def test_the_three_formats_give_the_same_rows(tmp_path):
    records = [
        {"prompt": "Q: α?\nA:", "completion": ' "quoted", and\na second line', "specialty": "eye", "licence": "CC0"},
        {"prompt": "", "completion": "plain text 🧬", "specialty": "", "licence": ""},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    seen = []
    for extension in ("jsonl", "parquet", "csv"):
        rows, refused = read(tmp_path / f"a.{extension}", tmp_path)
        assert not refused
        seen.append([(r.kind, r.prompt, r.completion, r.specialty, r.licence, r.source, r.split) for r in rows])
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0][:6] == ("QA", "Q: α?\nA:", ' "quoted", and\na second line', "eye", "CC0", "a")
    assert seen[0][1][:6] == ("TEXT", "", "plain text 🧬", "other", "unknown", "a")


def test_jsonl_refuses_rows_by_line_and_keeps_the_rest(tmp_path):
    lines = [
        b'{"text": "one", "split": "dev", "source": "s", "id": 7, "license": "MIT"}',
        b'{"text": "two"',
        b"",
        b'{"text": "bad \xff byte"}',
        b'{"text": 3}',
        b'{"text": "  \\n"}',
        b'["text"]',
        b'{"other": "x"}',
        b'{"text": "lone \\ud800 surrogate"}',
        b'{"text": "x", "split": "holdout"}',
        b'{"text": null, "prompt": "p", "completion": "<bos> stays text"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows, refused = read(path, tmp_path)
    assert [(r.completion, r.id) for r in rows] == [("one", "7"), ("<bos> stays text", f"{path}:11")]
    assert (rows[0].split, rows[0].source, rows[0].licence) == ("validation", "s", "MIT")
    assert refused == [
        (2, "malformed JSON"),
        (3, "empty line"),
        (4, "not UTF-8"),
        (7, "malformed JSON"),
        (5, "not a string"),
        (6, "empty text"),
        (8, "missing field"),
        (9, "not UTF-8"),
        (10, "unknown split"),
    ]


def test_csv_names_the_first_line_of_a_refused_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'text,specialty\r\n"two\r\nlines",eye\r\nbad \xff,ear\r\na,b,c\r\n,ear\r\nfine,\r\n"no end,ear\r\n'
    )
    rows, refused = read(path, tmp_path)
    assert [(r.completion, r.specialty) for r in rows] == [("two\r\nlines", "eye"), ("fine", "other")]
    assert refused == [(4, "not UTF-8"), (5, "malformed CSV"), (6, "empty text"), (8, "malformed CSV")]


def test_parquet_refuses_undecodable_and_missing_values_by_row(tmp_path):
    text = pa.array([b"good", b"bad \xff", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text, "unused": [1, 2, 3]}), tmp_path / "rows.parquet")
    rows, refused = read(tmp_path / "rows.parquet", tmp_path)
    assert [r.completion for r in rows] == ["good"]
    assert refused == [(2, "not UTF-8"), (3, "missing field")]


def test_files_that_cannot_be_used_stop_with_what_where_and_what_to_do(tmp_path):
    (tmp_path / "near.jsonl").write_text('{"promt": "a", "completion": "b"}\n')
    (tmp_path / "none.csv").write_text("question;answer\nx;y\n")
    (tmp_path / "broken.jsonl").write_text("{\n{\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "rows.json").write_text("[]")
    for name, parts in {
        "near.jsonl": ["near.jsonl", "no column 'prompt' beside 'completion'", "it has promt", "did you mean 'promt'"],
        "none.csv": ["none.csv", "no columns 'prompt' and 'completion', or 'text'", "question;answer"],
        "broken.jsonl": ["broken.jsonl has no usable row (2 refused", "quarantine.jsonl"],
        "cut.parquet": ["cut.parquet is not a whole Parquet file"],
        "rows.json": ["takes .jsonl, .csv and .parquet", "name it .jsonl"],
        "absent.csv": ["absent.csv does not exist"],
    }.items():
        with pytest.raises(UserError) as error:
            read(tmp_path / name, tmp_path)
        assert all(part in str(error.value) for part in parts), str(error.value)
        assert "\n" not in str(error.value)


def test_missing_file_is_told_before_any_row_is_read(tmp_path):
    with Quarantine(tmp_path / "q.jsonl") as quarantine, pytest.raises(UserError, match="does not exist"):
        read_files([tmp_path / "absent.jsonl"], quarantine)


def test_split_depends_on_the_text_alone_and_keeps_equal_texts_together(tmp_path):
    for name, order in (("a", range(300)), ("b", reversed(range(300)))):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "note {i}"}}\n' for i in order))
    a, b = (read(tmp_path / f"{name}.jsonl", tmp_path)[0] for name in "ab")
    assert {r.completion: r.split for r in a} == {r.completion: r.split for r in b}
    assert {r.split for r in a} == {"train", "validation", "test"}

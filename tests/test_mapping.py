"""`distil-jax project inspect`: what W says of single tokens, from both sides."""

import numpy as np
import pytest

from distil_jax import cli
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.look.mapping import comes_from, goes_to
from distil_jax.losses.kd import EMPTY, REST
from distil_jax.projection import Projection
from distil_jax.tokens.bytes import ByteTable

TEXTS = [f"hypertension {n} mg, hypotension {n % 7} mg" for n in range(100, 200)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_gemma_style(TEXTS, 300, folder / "teacher")
    train_llama_style(TEXTS, 280, folder / "student")
    return {side: folder / side for side in ("teacher", "student")}


def test_both_directions_say_what_the_rows_say(folders):
    tables = {side: ByteTable.from_tokenizer(folder) for side, folder in folders.items()}
    teacher, student = tables["teacher"], tables["student"]
    ids = np.full((teacher.vocab_size, 3), EMPTY, np.int32)
    one, seven, mg = teacher.id_of(b"1"), teacher.id_of(b"7"), student.id_of(b"m")
    ids[one] = student.id_of(b"1"), mg, REST
    ids[seven, 0] = mg
    logits = np.log(np.float32([[6, 3, 1]])).repeat(len(ids), axis=0)
    W = Projection(ids, logits, logits, student.vocab_size, teacher.hash, student.hash)
    row = [("1", pytest.approx(0.6)), ("m", pytest.approx(0.3)), ("(others)", pytest.approx(0.1))]
    assert goes_to(W, tables, one) == row
    assert comes_from(W, tables, mg) == [("7", pytest.approx(1)), ("1", pytest.approx(0.3))]
    assert comes_from(W, tables, student.id_of(b"z")) == []


def test_the_command_needs_two_tokenizers_and_no_more(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    paths = [f"--config.{side}.path={folder}" for side, folder in folders.items()]
    command = ["project", "inspect", "hypertension", "--config", "configs/tiny.py", *paths]
    command.append(f"--config.workdir={tmp_path}")
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "W from bytes alone" in shown and "teacher token" in shown and "1.000" in shown
    assert cli.main([*command, "--least=3"]) == 2
    assert "--least" in capsys.readouterr().err

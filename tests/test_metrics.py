"""Metrics and manifests: the file is the truth, a killed run leaves it usable, a resumed run continues it."""

import io
import json
import math
import os
import pty
import socket
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from distil_jax import manifest
from distil_jax.errors import UserError
from distil_jax.metrics import MetricsWriter, Progress, is_first_process, peak_memory_bytes, read_metrics


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(0, loss=jnp.float32(1.5), ids=np.arange(2), split="held out")
        writer.write(np.int64(1), loss=math.nan, other=math.inf, list=[-math.inf, 1])
        first, second = read_metrics(path)  # each line is there at once
    assert first == {"step": 0, "time": first["time"], "loss": 1.5, "ids": [0, 1], "split": "held out"}
    assert math.isnan(second["loss"]) and second["other"] == math.inf and second["list"] == [-math.inf, 1]
    for line in path.read_text().splitlines():  # strict JSON, as a browser wants it
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_sync_puts_every_line_on_the_disk(tmp_path, monkeypatch):
    """What a power cut leaves cannot be seen here; that the system is asked, with all lines in the file, can."""
    path, asked, fsync = tmp_path / "metrics.jsonl", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (asked.append(path.read_bytes()), fsync(file))[1])
    with MetricsWriter(path) as writer:
        writer.write(0, loss=1.0)
        writer.write(1, loss=0.5)
        writer.sync()
    assert asked == [path.read_bytes()] and asked[0].count(b"\n") == 2


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(6):
            writer.write(step, loss=step)
            writer.write(step, held_out=step)
    with MetricsWriter(path, resume_step=3) as writer:
        assert steps(path) == [0, 0, 1, 1, 2, 2]
        writer.write(3, loss=-3)
    assert steps(path) == [0, 0, 1, 1, 2, 2, 3] and read_metrics(path)[-1]["loss"] == -3
    MetricsWriter(path).close()
    assert read_metrics(path) == []
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_torn_last_line_is_dropped_and_a_broken_line_within_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n{"step": 1, "lo')
    assert steps(path) == [0]
    with MetricsWriter(path, resume_step=9) as writer:
        writer.write(1, loss=2)
    assert steps(path) == [0, 1]
    path.write_text('{"step": 0}\nnot json\n{"step": 2}\n')
    for reader in (read_metrics, lambda p: MetricsWriter(p, resume_step=1)):
        with pytest.raises(UserError, match="line 2"):
            reader(path)
    with pytest.raises(UserError, match="no metrics at"):
        read_metrics(tmp_path / "none.jsonl")


def test_progress_prints_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with Progress(10, "teacher", every_seconds=0, file=out, start=2) as progress:
        for step in range(3, 11):
            progress.update(step, tokens=2000, loss=jnp.float32(1 / step))
    lines = out.getvalue().splitlines()
    assert len(lines) == 8 and all(line.startswith("teacher: ") for line in lines)
    assert "3/10" in lines[0] and "loss 0.3333" in lines[0] and "ETA" not in lines[0]
    for fact in ("10/10", "loss 0.1", "tokens/s", "ETA 0:00", "GiB"):
        assert fact in lines[-1]


def test_progress_without_a_known_end_has_no_time_left_and_one_that_was_guessed_too_low_none_below_zero():
    out = io.StringIO()
    with Progress(0, "read", every_seconds=0, file=out) as progress:
        progress.update(3)
        progress.update(6)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["3", "6"] and "ETA" not in out.getvalue()
    out = io.StringIO()
    with Progress(5, "read", every_seconds=0, file=out) as progress:
        progress.update(3)
        progress.update(8)
    assert "8/5  ETA 0:00" in out.getvalue()


def test_progress_is_quiet_between_its_lines():
    out = io.StringIO()
    with Progress(1000, "teacher", every_seconds=3600, file=out) as progress:
        for step in range(1, 1001):
            progress.update(step, loss=1.0)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/1000", "1000/1000"]


def test_progress_on_a_terminal_is_a_live_bar():
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        with Progress(4, "student", file=terminal) as progress:
            for step in range(1, 5):
                progress.update(step, tokens=100, loss=0.5)
        os.write(follower, b"END")
        shown = ""
        while not shown.endswith("END"):
            shown += os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert "student" in shown and "4/4" in shown and "loss 0.5" in shown and "\x1b[" in shown


def test_this_process_is_the_first_and_has_memory():
    assert is_first_process()
    block = np.ones(2**22)
    assert peak_memory_bytes() > block.nbytes


SECOND_PROCESS = """
    import sys
    import jax
    from distil_jax.metrics import MetricsWriter, Progress, is_first_process
    index, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    assert is_first_process() == (index == 0)
    with MetricsWriter(path) as writer, Progress(1, "run", every_seconds=0) as progress:
        writer.write(0, process=index)
        progress.update(1)
    jax.distributed.shutdown()
"""


def test_only_the_first_of_two_processes_writes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(SECOND_PROCESS)]
    processes = [
        subprocess.Popen([*command, str(i), port, str(path)], stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert [row["process"] for row in read_metrics(path)] == [0]
    assert "run: 1/1" in errors[0] and "run: 1/1" not in errors[1]


def test_a_manifest_is_whole_or_absent(tmp_path):
    assert manifest.read(tmp_path) is None and manifest.read(tmp_path / "none") is None
    manifest.write(tmp_path, "k1", rows=3, source={"name": "HPO"})
    assert manifest.read(tmp_path) == {"key": "k1", "rows": 3, "source": {"name": "HPO"}}
    assert manifest.read(tmp_path)["key"] == "k1"
    with pytest.raises(ValueError):
        manifest.write(tmp_path, "k2", loss=math.nan)
    with pytest.raises(TypeError):
        manifest.write(tmp_path, "k2", odd=object())
    assert manifest.read(tmp_path)["key"] == "k1" and os.listdir(tmp_path) == ["manifest.json"]
    for broken in ("", "{", "[]", '{"rows": 3}'):
        (tmp_path / "manifest.json").write_text(broken)
        assert manifest.read(tmp_path) is None

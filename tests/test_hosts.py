"""Several processes are one run: the same numbers on any mesh, one log, and a loss that ends all of them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import faults
import numpy as np
import pytest
from faults import RUN
from test_faults import corpus  # noqa: F401
from test_run import definitions  # noqa: F401

from distil_jax import cli, hosts, sharding
from distil_jax.errors import HOST_LOST, INPUT, STOPPED, UserError


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(corpus, processes, devices, mesh, more=()):  # noqa: F811
    """`processes` processes of one run, each with so many devices, under way."""
    arguments, work = corpus
    arguments = [*arguments, f"--config.mesh={mesh}", *more]
    address = f"127.0.0.1:{port()}"
    started = []
    for index in range(processes):
        environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        if processes > 1:
            environment[hosts.VARIABLE] = f"{address},{processes},{index}"
        log = work / f"log{index}.txt"
        log.unlink(missing_ok=True)
        process = faults.context().Process(target=faults.train_once, args=(arguments, str(log), "", environment))
        process.start()
        started.append(process)
    return started


def lines(work: Path) -> list[dict]:
    return [json.loads(line) for line in (work / RUN / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(corpus):  # noqa: F811
    """The metrics of one process with one device."""
    shutil.rmtree(corpus[1] / RUN, ignore_errors=True)
    (process,) = start(corpus, 1, 1, "data:-1")
    process.join(300)
    assert process.exitcode == 0, (corpus[1] / "log0.txt").read_text()
    return lines(corpus[1])


@pytest.mark.parametrize(
    "processes, devices, mesh",
    [
        (1, 8, "fsdp:8"),
        (1, 8, "data:2,fsdp:2,tensor:2"),
        (2, 1, "data:2"),
        (4, 2, "data:2,fsdp:2,tensor:2"),
        (4, 1, "tensor:4"),  # every process has every row
    ],
)
def test_any_mesh_and_number_of_processes_give_the_same_run(corpus, alone, processes, devices, mesh):  # noqa: F811
    shutil.rmtree(corpus[1] / RUN, ignore_errors=True)
    for n, process in enumerate(start(corpus, processes, devices, mesh)):
        process.join(300)
        assert process.exitcode == 0, (corpus[1] / f"log{n}.txt").read_text()
    found = lines(corpus[1])
    assert [line["step"] for line in found] == [line["step"] for line in alone] and len(found) > 20
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.keys() == theirs.keys() and ours.get("tokens") == theirs.get("tokens")
        for key in ours.keys() - {"time"}:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-5, err_msg=key)


def steps_reported(work: Path, wanted: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and faults.reported(work / RUN) < wanted:
        time.sleep(0.02)
    assert faults.reported(work / RUN) >= wanted


def test_a_run_goes_on_on_other_devices_and_hosts_with_the_same_data(corpus, alone):  # noqa: F811
    """Stopped on one device, taken on by two processes of two, and ended by one of eight."""
    arguments, work = corpus
    shutil.rmtree(work / RUN, ignore_errors=True)
    for processes, devices, mesh, until in ((1, 1, "data:1", 5), (2, 2, "fsdp:4", 12), (1, 8, "data:4,tensor:2", 0)):
        started = start(corpus, processes, devices, mesh)
        if until:
            steps_reported(work, until)
            os.kill(started[-1].pid, signal.SIGTERM)
        for process in started:
            process.join(120)
            assert process.exitcode == (STOPPED if until else 0), (work / "log0.txt").read_text()
    found = lines(work)
    assert [line["step"] for line in found] == [line["step"] for line in alone]
    for ours, theirs in zip(found, alone, strict=True):
        for key in ("loss", "validation_bits_per_byte"):
            np.testing.assert_allclose(ours.get(key, 0), theirs.get(key, 0), rtol=1e-5, err_msg=key)


LONG = ("--config.student.training.steps=100000", "--config.student.training.checkpoint_every=100000")


def test_sigterm_on_any_host_saves_one_step_for_all(corpus, alone):  # noqa: F811
    shutil.rmtree(corpus[1] / RUN, ignore_errors=True)
    processes = start(corpus, 2, 1, "data:2", LONG)
    steps_reported(corpus[1], 5)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(120)
        assert process.exitcode == STOPPED
    said = (corpus[1] / "log0.txt").read_text()
    assert f"stopped at step {faults.saved(corpus[1] / RUN)}" in said
    assert "stopped at step" not in (corpus[1] / "log1.txt").read_text()  # one log
    shutil.rmtree(corpus[1] / RUN)


def test_a_killed_host_ends_the_others_within_a_minute(corpus, alone):  # noqa: F811
    shutil.rmtree(corpus[1] / RUN, ignore_errors=True)
    processes = start(corpus, 2, 1, "data:2", LONG)
    steps_reported(corpus[1], 3)
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[0].join(60)
    assert processes[0].exitcode == HOST_LOST
    assert "host" in (corpus[1] / "log0.txt").read_text()
    shutil.rmtree(corpus[1] / RUN)


def test_what_is_wrong_for_one_host_is_told_to_all(corpus, alone):  # noqa: F811
    """The second process alone has a config that cannot be."""
    shutil.rmtree(corpus[1] / RUN, ignore_errors=True)
    arguments, work = corpus
    address, started = f"127.0.0.1:{port()}", []
    for index in range(2):
        environment = {"XLA_FLAGS": "", hosts.VARIABLE: f"{address},2,{index}"}
        mine = [*arguments, *(["--config.objective.dro_rate=-1"] if index else [])]
        process = faults.context().Process(
            target=faults.train_once, args=(mine, str(work / f"log{index}.txt"), "", environment)
        )
        process.start()
        started.append(process)
    for process in started:
        process.join(60)
        assert process.exitcode == INPUT


def slow_to_leave(address: str, index: int) -> None:
    """The whole of a process that has nothing to do; the second one goes on from every barrier a second late."""
    os.environ |= {"XLA_FLAGS": "", hosts.VARIABLE: f"{address},2,{index}"}
    wait = hosts.barrier
    hosts.barrier = lambda name: (wait(name), time.sleep(index))

    def action() -> int:
        hosts.start()
        return 0

    os._exit(cli._guarded(action))


def test_the_first_host_waits_until_the_others_know_that_all_is_done():
    """It holds the coordination service: a host that is late would abort when that is gone."""
    address = f"127.0.0.1:{port()}"
    started = [faults.context().Process(target=slow_to_leave, args=(address, index)) for index in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]


@pytest.mark.parametrize(
    "text, message",
    [("nowhere", "it is 'auto' or"), ("10.0.0.1:80,2", "it is 'auto' or"), ("10.0.0.1:80,2,2", "no process 2 of 2")],
)
def test_a_variable_that_names_no_host_is_refused(monkeypatch, text, message):
    monkeypatch.setenv(hosts.VARIABLE, text)
    with pytest.raises(UserError, match=message):
        hosts.start()


@pytest.mark.parametrize(
    "text, message",
    [
        ("data:2,fsdp:3", "do not fit 8 devices"),
        ("data:2,model:4", "'model:4' is not one of slices, data"),
        ("data:2,data:4", "'data:4' is not one of"),
        ("data:two", "'data:two' is not one of"),
        ("data:-1,fsdp:-1", "at most one -1"),
        ("slices:3,data:-1", "slices:3 does not divide 8 devices"),
        ("slices:2,data:-1", "do not say that they are of 2 slices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        sharding.mesh_of(text)


def test_a_mesh_is_described_in_one_line():
    shape = lambda text: tuple(sharding.mesh_of(text).shape.values())  # noqa: E731
    assert shape("data:-1") == shape("") == (8, 1, 1) and shape("fsdp:4") == (2, 4, 1)
    assert shape("fsdp:-1,tensor:2") == (1, 4, 2) and shape("data:2,fsdp:2,tensor:2") == (2, 2, 2)


def test_each_row_of_a_batch_is_read_where_its_devices_are():
    mesh = sharding.mesh_of("data:2,fsdp:2,tensor:2")
    assert sharding.places(mesh, 8).tolist() == list(range(8))
    with pytest.raises(UserError, match="does not divide among data x fsdp = 4"):
        sharding.places(mesh, 6)
    whole = {"a": np.arange(24, dtype=np.int32).reshape(8, 3)}
    assert np.array_equal(np.asarray(sharding.put_batch(whole, mesh)["a"]), whole["a"])


SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "local_processes.sh"


def local(*arguments):
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60)


def test_the_script_starts_processes_that_find_each_other_and_marks_what_they_say():
    done = local("3", "--devices", "2", "bash", "-c", 'echo "$DISTIL_JAX_HOSTS $XLA_FLAGS $JAX_PLATFORMS"')
    assert done.returncode == 0
    lines = sorted(done.stdout.splitlines())
    address = lines[0].split()[1].split(",")[0]
    flags = "--xla_force_host_platform_device_count=2 cpu"
    assert lines == [f"[{n}] {address},3,{n} {flags}" for n in range(3)]


def test_the_script_ends_with_the_status_of_the_first_that_failed():
    assert local("2", "bash", "-c", "[[ $DISTIL_JAX_HOSTS == *,1 ]] && exit 71; sleep 0.5; exit 73").returncode == 71
    assert local("2", "true").returncode == 0
    for arguments in (("0", "true"), ("2",), ("two", "true")):
        done = local(*arguments)
        assert done.returncode == 2 and "launch/local_processes.sh COUNT" in done.stderr

"""The launch scripts against a cloud of folders: every step, its repetition, what fails, and what must not be seen."""

import fcntl
import hashlib
import json
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cloud import PROJECT, Cloud

from distil_jax import errors

SECRET = "hf_a$secret 'that nobody sees"
RUN = ("--", "run", "--config", "configs/tiny.py")
CAPACITY = (1, "ERROR: There is no more capacity in the zone; code 8 RESOURCE_EXHAUSTED")


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    made.close()


@pytest.fixture
def place(cloud):
    two_hosts = ("--topology", "v4:2x2x2")
    return ("--zone", "us-west4-a", *two_hosts, "--shared", "10.0.0.2:/share", "--mount", str(cloud.share))


def well(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ended(cloud: Cloud, place) -> list[str]:
    """The lines of `status` once no worker runs any more."""
    for _ in range(100):
        lines = well(cloud.run("tpu_pod.sh", "status", *place)).splitlines()
        if not any("running" in line for line in lines):
            return sorted(lines)
    raise AssertionError(lines)


def test_the_scripts_are_clean_for_shellcheck():
    scripts = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "launch").glob("*.sh"))
    command = [Path(sys.executable).with_name("shellcheck"), *scripts]
    found = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# --- a slice of TPU VMs -----------------------------------------------------------------------------------------------


def test_from_nothing_to_results_and_away_again(cloud, place, tmp_path):
    for command in ("create", "wait", "install"):
        well(cloud.run("tpu_pod.sh", command, *place))
    well(cloud.run("tpu_pod.sh", "run", *place, *RUN, "--config.data.root=a b"))
    assert ended(cloud, place) == ["slice ready", "worker 0 ended 0", "worker 1 ended 0"]
    work = cloud.share / "distil-jax" / "work"
    words = f"auto run --config configs/tiny.py --config.data.root=a b --config.workdir={work}"
    assert sorted(cloud.runs()) == [f"0 {words}", f"1 {words}"]
    assert "noac" in (cloud.root / "mounts").read_text()
    assert "doing: done" in well(cloud.run("tpu_pod.sh", "logs", *place, "1"))
    (tmp_path / "mine.jsonl").write_text("{}")
    well(cloud.run("tpu_pod.sh", "put", *place, str(tmp_path / "mine.jsonl")))
    assert (cloud.share / "distil-jax" / "data" / "mine.jsonl").exists()
    well(cloud.run("tpu_pod.sh", "fetch", *place, str(tmp_path / "out")))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["export", "summary.json"]
    well(cloud.run("tpu_pod.sh", "delete", *place))
    assert well(cloud.run("tpu_pod.sh", "status", *place)) == "slice none\n"
    assert work.is_dir()


def test_every_step_may_be_repeated(cloud, place):
    cloud.plan("hang", "done")
    for command in ("create", "create", "wait", "install", "install"):
        well(cloud.run("tpu_pod.sh", command, *place))
    assert len(cloud.made("tpu-vm", "create")) == 1
    for _ in range(2):
        well(cloud.run("tpu_pod.sh", "run", *place, *RUN))
    refused = cloud.run("tpu_pod.sh", "install", *place)
    assert refused.returncode == 2 and "stop it before you install" in refused.stderr
    assert len(cloud.runs()) == 2
    for _ in range(2):
        well(cloud.run("tpu_pod.sh", "stop", *place))
        assert ended(cloud, place)[1:] == ["worker 0 ended 143", "worker 1 ended 143"]
    for _ in range(2):
        well(cloud.run("tpu_pod.sh", "delete", *place))


def test_secrets_arrive_and_are_seen_nowhere(cloud, place, tmp_path):
    said = ""
    for command in ("create", "install"):
        done = cloud.run("tpu_pod.sh", command, *place, HF_TOKEN=SECRET)
        said += well(done) + done.stderr
    done = cloud.run("tpu_pod.sh", "run", *place, *RUN, HF_TOKEN=SECRET)
    said += well(done) + done.stderr + str(ended(cloud, place))
    for worker in (0, 1):
        arrived = (cloud.root / f"token-{worker}").read_text().split()[0]
        assert arrived == hashlib.sha256(SECRET.encode()).hexdigest()
    part = "nobody"  # however it is quoted
    assert part not in said
    holders = [p for p in tmp_path.rglob("*") if p.is_file() and part in p.read_text(errors="replace")]
    assert sorted(holders) == [cloud.root / "workers" / str(i) / ".distil_jax" / "secrets" for i in (0, 1)]
    for file in holders:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("command", ["create", "wait", "install", "put F", "run", "status", "logs", "stop", "fetch D", "delete"])
def test_a_dry_run_shows_every_command_and_runs_none(cloud, place, command):
    verb, *more = command.split()
    words = (verb, *place, "--queued", "--dry-run", *(RUN if verb == "run" else more))
    shown = well(cloud.run("tpu_pod.sh", *words, HF_TOKEN=SECRET))
    assert "gcloud compute tpus" in shown and "hf_a" not in shown
    assert not cloud.calls() and not list((cloud.root / "here").iterdir())


def test_a_dry_run_shows_what_is_run(cloud, place):
    shown = well(cloud.run("tpu_pod.sh", "create", *place, "--spot", "--dry-run")).splitlines()
    well(cloud.run("tpu_pod.sh", "create", *place, "--spot"))
    assert [shlex.split(line) for line in shown if line.startswith("gcloud")] == cloud.calls()


@pytest.mark.parametrize(
    "topology, accelerator, version",
    [
        ("v4:2x2x4", "v4-32", "tpu-ubuntu2204-base"),
        ("v5e:4x4", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p:2x2x1", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e:2x4", "v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_a_topology_as_compile_takes_it_is_what_gcloud_makes(cloud, place, topology, accelerator, version):
    words = (*place, "--topology", topology, "--dry-run")
    plain = well(cloud.run("tpu_pod.sh", "create", *words))
    assert f"--accelerator-type={accelerator} --version={version}\n" in plain
    queued = well(cloud.run("tpu_pod.sh", "create", *words, "--queued"))
    assert "queued-resources create distil-jax --node-id=distil-jax" in queued
    assert f"--accelerator-type={accelerator} --runtime-version={version}\n" in queued


def test_what_is_left_of_a_preempted_slice_is_removed_first(cloud, place):
    well(cloud.run("tpu_pod.sh", "create", *place))
    (cloud.root / "tpu-vm.state").write_text("PREEMPTED")
    well(cloud.run("tpu_pod.sh", "create", *place))
    assert [call[4] for call in cloud.calls() if call[4] != "describe"] == ["create", "delete", "create"]


def test_a_queued_slice_is_waited_for(cloud, place):
    queued = (*place, "--queued")
    well(cloud.run("tpu_pod.sh", "create", *queued))
    assert "waiting" in well(cloud.run("tpu_pod.sh", "wait", *queued))
    assert well(cloud.run("tpu_pod.sh", "status", *queued)).startswith("slice ready")
    well(cloud.run("tpu_pod.sh", "delete", *queued))
    assert cloud.made("queued-resources", "delete")[0][-2:] == ["--force", "--quiet"]


@pytest.mark.parametrize("message, status", [(CAPACITY[1], 75), ("ERROR: PERMISSION_DENIED: tpu.nodes.create", 2)])
def test_a_failed_creation_says_whether_it_may_go_better_later(cloud, place, message, status):
    cloud.fail("create", (1, message))
    done = cloud.run("tpu_pod.sh", "create", *place)
    assert done.returncode == status and message in done.stderr


def test_a_connection_that_fails_is_tried_again_and_a_fault_is_not(cloud, place):
    well(cloud.run("tpu_pod.sh", "create", *place))
    cloud.fail("ssh", (255, "ssh: connection reset"), (255, "ssh: connection reset"))
    well(cloud.run("tpu_pod.sh", "install", *place))
    before = len(cloud.made("tpu-vm", "ssh"))
    done = cloud.run("tpu_pod.sh", "fetch", *place, "out")
    assert done.returncode == 2 and "there is no" in done.stderr
    assert len(cloud.made("tpu-vm", "ssh")) == before + 1


def test_a_worker_with_an_old_python_gets_a_newer_one(cloud, place):
    (cloud.root / "old_python").touch()
    for command in ("create", "install"):
        well(cloud.run("tpu_pod.sh", command, *place))
    assert (cloud.root / "workers" / "1" / "distil_jax" / ".venv" / "bin" / "distil-jax").exists()
    assert (cloud.root / "workers" / "1" / ".local" / "bin" / "python3.12").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--shared", "gs://bucket"], "renames a folder"),
        (["--shared", "none"], "they need one folder"),
        (["--topology", "v7:4x4"], "launch/gke.sh"),
        (["--zone", ""], "us-west4-a"),
        (["--zon", "x"], "there is no setting zon"),
        (["--settings", "missing"], "no such file"),
        (["--settings", "bad"], "bad, line 2: there is no setting colour"),
    ],
)
def test_settings_that_cannot_be_are_said(cloud, place, words, said):
    (cloud.root / "here" / "bad").write_text("zone = us-west4-a  # a comment\ncolour = red\n")
    done = cloud.run("tpu_pod.sh", "create", *place, *words)
    assert done.returncode == 2 and said in done.stderr
    assert not cloud.calls()


def test_flags_win_over_the_settings_file(cloud, place):
    (cloud.root / "here" / "pod.conf").write_text("zone = elsewhere\nspot = yes\nname = mine\n")
    shown = well(cloud.run("tpu_pod.sh", "create", *place, "--settings", "pod.conf", "--dry-run"))
    assert "tpu-vm create mine --zone=us-west4-a" in shown and "--spot" in shown


# --- what an exit status asks for -------------------------------------------------------------------------------------


def shell(line: str) -> str:
    script = f"source {PROJECT}/launch/statuses.sh; {line}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_what_a_status_asks_for_is_what_training_says():
    wanted = {0: "done", errors.FAILED: "few", errors.INPUT: "mend", errors.OUT_OF_MEMORY: "mend"}
    wanted |= {errors.DIVERGED: "mend", errors.INTERRUPTED: "mend", 139: "few"}
    wanted |= dict.fromkeys((errors.HUNG, errors.HOST_LOST, 134, 137, errors.STOPPED), "again")
    answers = shell("; ".join(f"what_next {status}" for status in wanted)).split()
    assert dict(zip(wanted, answers, strict=True)) == wanted


@pytest.mark.parametrize("of_processes, of_the_run", [("0 0", "0"), ("73 71 134", "71"), ("143 1 73", "1"), ("134 73", "134")])
def test_the_process_that_failed_speaks_for_the_run(of_processes, of_the_run):
    assert shell(f"run_status {of_processes}") == of_the_run


# --- a run that is brought to its end ---------------------------------------------------------------------------------


def babysit(cloud, place, *own, **environment) -> tuple[int, str]:
    done = cloud.run("tpu_babysit.sh", *place, *own, *RUN, **environment)
    return done.returncode, done.stdout + done.stderr


def verbs(cloud) -> list[str]:
    return [call[4] for call in cloud.calls() if call[4] in ("create", "delete")]


def test_a_slice_that_is_not_to_be_had_yet_is_asked_for_again(cloud, place):
    quota = (1, "ERROR: Quota limit 'TPUV4sPreemptiblePodPerProjectPerZone' has been exceeded")
    cloud.fail("create", quota, CAPACITY)
    status, said = babysit(cloud, place, "--spot", "--fetch", "out", "--delete", HF_TOKEN=SECRET)
    assert status == 0, said
    assert verbs(cloud) == ["create", "create", "create", "delete"]
    assert (cloud.root / "here" / "out" / "export" / "model.safetensors").exists()
    log = (cloud.root / "here" / "distil-jax.babysit.log").read_text()
    assert log == said and "the end, exit status 0" in log and "nobody" not in log


@pytest.mark.parametrize("queued, state", [((), "PREEMPTED"), (("--queued",), "SUSPENDED"), ((), "SILENT")])
def test_a_slice_that_is_lost_is_made_anew_and_the_run_goes_on(cloud, place, queued, state):
    cloud.plan("hang", "done")
    cloud.lose(at=3, state=state)
    status, said = babysit(cloud, (*place, *queued))
    assert status == 0, said
    assert verbs(cloud) == ["create", "delete", "create"]
    assert len(cloud.runs()) == 4 and len(set(cloud.runs())) == 2  # the same command in the same folder


@pytest.mark.parametrize("ending", [2, 70, 71])
def test_a_run_that_a_person_must_mend_is_not_started_again(cloud, place, ending):
    cloud.plan(f"exit {ending}", "done")
    status, said = babysit(cloud, place)
    assert status == ending and f"doing: exit {ending}" in said  # the end of the worker's log
    assert len(cloud.runs()) == 2 and verbs(cloud) == ["create"]


def test_a_run_that_may_go_on_is_started_again_on_its_slice(cloud, place):
    cloud.plan("exit 72", "exit 143", "only 1 73", "done")
    status, said = babysit(cloud, place)
    assert status == 0, said
    assert "1 of 2 workers run, and the others have ended" in said
    assert len(cloud.runs()) == 8 and verbs(cloud) == ["create"]


def test_faults_of_the_program_are_tried_a_few_times(cloud, place):
    cloud.plan(*["exit 1"] * 9)
    status, said = babysit(cloud, place, "--faults", "1")
    assert status == 1 and len(cloud.runs()) == 4, said


def test_restarts_are_bounded(cloud, place):
    cloud.plan(*["exit 73"] * 9)
    status, said = babysit(cloud, place, "--restarts", "1")
    assert status == 75 and len(cloud.runs()) == 4, said


def test_a_run_that_goes_on_is_taken_over(cloud, place):
    cloud.plan("hang", "done")
    for command in ("create", "install"):
        well(cloud.run("tpu_pod.sh", command, *place))
    well(cloud.run("tpu_pod.sh", "run", *place, *RUN))
    cloud.lose(at=2)
    status, said = babysit(cloud, place)
    assert status == 0 and "the run goes on already" in said


def test_two_do_not_take_care_of_one_run(cloud, place):
    with (cloud.root / "here" / "distil-jax.babysit.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        status, said = babysit(cloud, place)
    assert status == 2 and "another tpu_babysit.sh" in said and not cloud.calls()


def test_what_it_would_do_is_shown(cloud, place):
    status, said = babysit(cloud, place, "--dry-run", "--fetch", "out", "--delete")
    assert status == 0 and not cloud.calls()
    for verb in ("create", "ssh", "scp", "delete"):
        assert f"gcloud compute tpus tpu-vm {verb} distil-jax" in said or verb == "scp" and "tpu-vm scp" in said

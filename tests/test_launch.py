"""The launch scripts against a cloud of folders: every step, its repetition, what fails, and what must not be seen."""

import fcntl
import hashlib
import http.server
import os
import shlex
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from fake_cloud import PROJECT, Cloud, make_checkout

from distil_jax import errors

SECRET = "hf_a$secret 'that nobody sees"
RUN = ("--", "run", "--config", "configs/tiny.py")
CAPACITY = (1, "ERROR: There is no more capacity in the zone; code 8 RESOURCE_EXHAUSTED")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def cloud(tmp_path, checkout):
    made = Cloud(tmp_path, checkout)
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


@pytest.mark.parametrize("script", ["tpu_pod.sh", "tpu_babysit.sh", "gke.sh", "slurm_gpu.sh"])
def test_a_script_without_arguments_says_what_it_does(cloud, script):
    done = cloud.run(script)
    header = (PROJECT / "launch" / script).read_text().split("\nset -e")[0].splitlines()[1:]
    assert done.returncode == 2 and done.stderr.splitlines() == [line[2:] for line in header]


# --- a slice of TPU VMs -----------------------------------------------------------------------------------------------


def test_from_nothing_to_results_and_away_again(cloud, place, tmp_path):
    for command in ("create", "wait", "install"):
        well(cloud.run("tpu_pod.sh", command, *place))
    well(cloud.run("tpu_pod.sh", "run", *place, *RUN, "--config.data.root=a b"))
    assert ended(cloud, place) == ["slice ready", "worker 0 ended 0", "worker 1 ended 0"]
    work = cloud.share / "distil-jax"
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
    assert (work / "export").is_dir()


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


def test_a_dry_run_shows_every_command_and_runs_none(cloud, place):
    every = ["create", "wait", "install", "put F", "run", "status", "logs", "stop", "fetch D", "delete"]
    for verb, *more in map(str.split, every):
        words = (verb, *more, *place, "--queued", "--dry-run", *(RUN if verb == "run" else ()))
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
    assert done.returncode == 2 and "there are: data launch xla" in done.stderr
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


# --- how the processes of each launcher find each other ---------------------------------------------------------------

JOIN = """
import functools, os, sys, jax
from distil_jax import cli, hosts
if "TPU_WORKER_HOSTNAMES" not in os.environ:  # GKE sets it too, JAX where it sees no chips
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)
from jax._src.clusters import ClusterEnv
print(next((c.__name__ for c in ClusterEnv._cluster_types if not c.opt_in_only_method and c.is_env_present()), "none"))
if "HASTE" in os.environ:
    jax.distributed.initialize = functools.partial(jax.distributed.initialize, initialization_timeout=1)
def action():
    hosts.start()
    print(hosts.index(), "of", hosts.count(), flush=True)
    return 0
if status := cli._guarded(action):
    os._exit(status)
"""


def joined(*environments: dict[str, str]) -> list[tuple[int, str]]:
    """Processes with DISTIL_JAX_HOSTS=auto, each with an environment: (exit status, what it said)."""
    shared = {"JAX_PLATFORMS": "cpu", "DISTIL_JAX_HOSTS": "auto", "JAX_COORDINATOR_PORT": str(free_port())}
    command = [sys.executable, "-c", JOIN]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, env={**os.environ, **shared, **own}, **pipe) for own in environments]
    said = [process.communicate(timeout=120)[0] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def metadata():
    """Starts a metadata server, as Google's machines have one, for a worker of two; returns its address."""
    servers = []

    def start(worker: int) -> str:
        answers = {"agent-worker-number": str(worker), "worker-network-endpoints": "127.0.0.1,127.0.0.1"}

        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answers.get(self.path.rsplit("/", 1)[1], "").encode())

            def log_message(self, *args):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("launcher", ["SLURM", "TPU VMs", "GKE"])
def test_auto_finds_the_processes_of_every_launcher(launcher, metadata):
    """JAX's own detection, with what each launcher gives a process; only the chips are missing."""
    kind = {"SLURM": "SlurmCluster", "TPU VMs": "GceTpuCluster", "GKE": "GkeTpuCluster"}[launcher]

    def given(index: int) -> dict[str, str]:
        if launcher == "SLURM":
            job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
            return job | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
        tpu = {"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": metadata(index)}
        if launcher == "GKE":
            tpu |= {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(index)}
        return tpu

    assert joined(given(0), given(1)) == [(0, f"{kind}\n0 of 2\n"), (0, f"{kind}\n1 of 2\n")]


def test_a_host_without_an_address_is_worth_another_start_and_no_cluster_is_not(metadata):
    tpu = {"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": metadata(1), "HASTE": "1", "TPU_WORKER_ID": "1"}
    (lost, said), (nowhere, _) = joined({**tpu, "TPU_WORKER_HOSTNAMES": "nowhere.invalid,localhost"}, {})
    assert (lost, nowhere) == (errors.HOST_LOST, errors.INPUT), said
    assert "did not find each other" in said


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


def test_the_process_that_failed_speaks_for_the_run():
    for of_all, of_the_run in {"0 0": "0", "73 71 134": "71", "143 1 73": "1", "134 73": "134", "0 137": "137"}.items():
        assert shell(f"run_status {of_all}") == of_the_run


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


@pytest.mark.parametrize("ending", [2, 71])
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


def test_a_cloud_that_says_nothing_is_no_lost_slice(cloud, place):
    cloud.plan("done")
    silent = (1, "ERROR: network is unreachable")
    cloud.fail("describe", silent, *[(0, "")] * 3, *[silent] * 12)  # asked by create, twice, wait, and from then on
    status, said = babysit(cloud, place)
    assert status == 0 and "the slice is unknown" in said, said
    assert verbs(cloud) == ["create"]


def test_a_babysitter_that_is_stopped_leaves_the_run(cloud, place):
    cloud.plan("hang")
    process = cloud.start("tpu_babysit.sh", *place, *RUN)
    log = cloud.root / "here" / "distil-jax.babysit.log"
    for _ in range(600):
        if log.exists() and "the slice is ready" in log.read_text():
            break
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "and its run go on and cost" in said
    assert said == log.read_text() and verbs(cloud) == ["create"]
    assert well(cloud.run("tpu_pod.sh", "status", *place)).count("running") == 2


def test_two_do_not_take_care_of_one_run(cloud, place):
    with (cloud.root / "here" / "distil-jax.babysit.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        status, said = babysit(cloud, place)
    assert status == 2 and "another tpu_babysit.sh" in said and not cloud.calls()


def test_what_it_would_do_is_shown(cloud, place):
    status, said = babysit(cloud, place, "--dry-run", "--fetch", "out", "--delete")
    assert status == 0 and not cloud.calls()
    for verb in ("create", "describe", "ssh", "scp", "delete"):
        assert f"gcloud compute tpus tpu-vm {verb} " in said


# --- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes(cloud):
    """A cloud whose checkout has a .venv, as on a cluster's shared disk."""
    (cloud.checkout / ".venv" / "bin").mkdir(parents=True)
    (cloud.checkout / ".venv" / "bin" / "distil-jax").symlink_to(cloud.root / "bin" / "distil-jax")
    return cloud


def job(nodes, *, restarts=20, faults=3, restarted=0, **environment):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": str(restarted), **environment}
    words = ("in-job", str(restarts), str(faults), *RUN[1:])
    return nodes.run("slurm_gpu.sh", *words, cwd="checkout", **slurm)


def test_slurm_gets_a_job_that_saves_before_its_time_is_over(nodes):
    well(nodes.run("slurm_gpu.sh", "--nodes", "2", "--gpus", "4", "--partition=a", *RUN, HF_TOKEN=SECRET))
    (call,) = nodes.calls()
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=TERM@300", "--requeue"} < set(call)
    assert call[-7:] == ["launch/slurm_gpu.sh", "in-job", "20", "3", *RUN[1:]] and "--partition=a" in call
    assert "nobody" not in str(call)


def test_slurm_does_not_bind_gpus_to_processes(nodes):
    refused = nodes.run("slurm_gpu.sh", "--gpus-per-task=1", *RUN)
    assert refused.returncode == 2 and "all GPUs of its node" in refused.stderr
    assert not nodes.calls()


def test_slurm_in_a_dry_run_shows_its_commands(nodes):
    shown = well(nodes.run("slurm_gpu.sh", "--dry-run", *RUN))
    assert [line.split()[0] for line in shown.splitlines() if line[0] != "#"] == ["sbatch", "srun", "scontrol"]
    assert not nodes.calls()


@pytest.mark.parametrize(
    "life, status, again",
    [
        ("done", 0, False),
        ("exit 71", 71, False),
        ("exit 143", 143, True),
        ("exit 1", 1, True),
        ("each 134 71", 71, False),  # srun's own is 134
        ("each 73 137", 137, True),
    ],
)
def test_slurm_queues_again_what_is_worth_it(nodes, life, status, again):
    nodes.plan(life)
    done = job(nodes)
    assert done.returncode == status, done.stdout + done.stderr
    assert nodes.made("scontrol", "requeue", "7") == [["scontrol", "requeue", "7"]] * again
    assert all(line[2:].startswith("auto run --config configs/tiny.py") for line in nodes.runs())
    assert "--gpu-bind=none" in nodes.made("srun")[0]


def test_slurm_queues_again_so_often_and_no_cancelled_job(nodes):
    nodes.plan(*["exit 1"] * 2, *["exit 143"] * 2)
    assert [job(nodes, faults=1).returncode for _ in range(2)] == [1, 1]
    assert len(nodes.made("scontrol")) == 1  # of two faults the first
    assert job(nodes, restarted=20).returncode == 143
    assert job(nodes, CANCEL="1").returncode == 143
    assert len(nodes.made("scontrol")) == 1
    assert not list(nodes.checkout.glob(".slurm-*"))


# --- GKE --------------------------------------------------------------------------------------------------------------

CLUSTER = ("--image", "registry/distil-jax:1", "--shared", "10.0.0.2:/share")


def jobset(cloud, *options, words=RUN, **environment) -> dict:
    well(cloud.run("gke.sh", "run", *CLUSTER, *options, *words, **environment))
    return cloud.manifests()[-1]


def keys(value, path=()) -> set:
    """Every path of keys in a manifest; lists count as their items."""
    if isinstance(value, dict):
        return {path, *(p for k, v in value.items() for p in keys(v, (*path, k)))}
    return {p for v in value for p in keys(v, path)} if isinstance(value, list) else {path}


def test_the_jobset_has_what_jobset_and_gke_need(cloud):
    words = (*RUN, "--config.data.sources=a, b", '--config.name="\\&"')
    made = jobset(cloud, "--spot", "--slices", "2", "--restarts", "9", words=words)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy, (slices,) = made["spec"]["failurePolicy"], made["spec"]["replicatedJobs"]
    assert policy["maxRestarts"] == 9 and slices["replicas"] == 2
    assert policy["rules"] == [{"name": "mend", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    of_job = slices["template"]["spec"]
    assert (of_job["completions"], of_job["parallelism"], of_job["backoffLimit"]) == (4, 4, 0)
    of_pod = of_job["template"]["spec"]
    (container,) = of_pod["containers"]
    # Kubernetes takes a podFailurePolicy with restartPolicy Never alone, and of a container that is there.
    assert of_pod["restartPolicy"] == "Never"
    (rule,) = of_job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["containerName"]) == ("FailJob", "In", container["name"])
    assert {status for status in range(1, 256) if status in codes["values"]} == {
        int(status) for status in shell("for s in {1..255}; do [[ $(what_next $s) != mend ]] || echo $s; done").split()
    }
    assert of_pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["resources"] == {kind: {"google.com/tpu": 4} for kind in ("requests", "limits")}
    assert container["args"] == [*words[1:], "--config.workdir=/mnt/distil_jax/distil-jax"]
    assert {"name": "DISTIL_JAX_HOSTS", "value": "auto"} in container["env"]
    volume, claim = cloud.manifests()[:2]
    assert volume["spec"]["nfs"] == {"server": "10.0.0.2", "path": "/share"}
    assert "noac" in volume["spec"]["mountOptions"]
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    (mounted,) = of_pod["volumes"]
    assert mounted["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    # A key that JobSet does not know is dropped without a word by some servers: these are all there are.
    job, pod = ("spec", "replicatedJobs", "template", "spec"), ("template", "spec", "containers")
    known = {("spec", "failurePolicy", k) for k in ("maxRestarts", "rules")}
    known |= {("spec", "replicatedJobs", k) for k in ("name", "replicas", "template")}
    known |= {(*job, k) for k in ("backoffLimit", "completionMode", "completions", "parallelism", "podFailurePolicy")}
    known |= {(*job, "template")}
    of_container = ("name", "image", "args", "env", "envFrom", "ports", "resources", "volumeMounts")
    known |= {(*job, *pod, k) for k in of_container}
    parents = {path[:-1] for path in known}
    assert {path for path in keys(made) if path[:-1] in parents} == known


@pytest.mark.parametrize(
    "topology, accelerator, hosts, chips",
    [("v4:2x2x2", "tpu-v4-podslice", 2, 4), ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8), ("tpu7x:2x2x2", "tpu7x", 2, 4)],
)
def test_a_topology_is_hosts_and_chips_of_gke(cloud, topology, accelerator, hosts, chips):
    of_job = jobset(cloud, "--topology", topology)["spec"]["replicatedJobs"][0]["template"]["spec"]
    of_pod = of_job["template"]["spec"]
    assert of_pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert "cloud.google.com/gke-spot" not in of_pod["nodeSelector"]
    assert (of_job["completions"], of_pod["containers"][0]["resources"]["limits"]["google.com/tpu"]) == (hosts, chips)


def test_secrets_become_a_secret_of_kubernetes(cloud):
    done = cloud.run("gke.sh", "run", *CLUSTER, *RUN, HF_TOKEN=SECRET)
    assert "nobody" not in well(done) + done.stderr + str(cloud.calls())
    given = [c for c in (cloud.root / "calls.jsonl").read_text().splitlines() if "nobody" in c]
    assert len(given) == 1 and "mode 0o600" in given[0]  # by a pipe, out of a file of its own
    (call,) = cloud.made("create", "secret")
    (file,) = (word.partition("=")[2] for word in call if word.startswith("--from-env-file"))
    assert not Path(file).exists()


def test_a_jobset_that_has_ended_makes_room_for_the_next(cloud):
    (cloud.root / "terminal").write_text("Failed")
    jobset(cloud)
    assert cloud.calls()[-2][2:5] == ["delete", "jobset", "distil-jax"]


def test_results_come_out_of_the_cluster(cloud, tmp_path):
    work = cloud.share / "distil-jax"
    (work / "export").mkdir(parents=True)
    (work / "export" / "model.safetensors").write_text("weights")
    well(cloud.run("gke.sh", "fetch", *CLUSTER, str(tmp_path / "out")))
    assert (tmp_path / "out" / "export" / "model.safetensors").read_text() == "weights"
    cloud.fail("exec", (1, "error: unable to upgrade connection"))
    assert cloud.run("gke.sh", "fetch", *CLUSTER, str(tmp_path / "out")).returncode == 1
    assert len(cloud.made("delete", "pod", "distil-jax-reader")) == 2


def test_gke_in_a_dry_run_shows_its_commands(cloud):
    for verb, *more in map(str.split, ("run", "status", "logs", "put F", "fetch D", "stop", "delete")):
        words = (verb, *more, *CLUSTER, "--dry-run", *(RUN if verb == "run" else ()))
        shown = well(cloud.run("gke.sh", *words, HF_TOKEN=SECRET))
        assert "kubectl --namespace=default" in shown and "hf_a" not in shown
    assert not cloud.calls()


# --- SkyPilot ---------------------------------------------------------------------------------------------------------


def test_skypilot_runs_what_a_worker_runs(cloud):
    task = yaml.safe_load((PROJECT / "launch" / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    again = shell("for s in {1..255}; do [[ $(what_next $s) != again ]] || echo $s; done").split()
    assert recovery["recover_on_exit_codes"] == [int(status) for status in again if status != "137"]
    assert set(task["secrets"]) == {"HF_TOKEN", "WANDB_API_KEY"} and not any(task["secrets"].values())
    cloud.plan("exit 73")
    (home := cloud.root / "workers" / "0").mkdir()
    given = {"NAME": "mine", "SHARED": "10.0.0.2:/share", "ARGUMENTS": "run --config configs/tiny.py"}
    assert set(given) == set(task["envs"])
    path = f"{cloud.root}/bin:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(home), "FAKE": str(cloud.root), "WORKER": "0", **given}
    text = (task["setup"] + task["run"]).replace("/mnt/distil_jax", str(cloud.share))
    done = subprocess.run(["bash", "-c", text], cwd=cloud.checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 73, done.stdout + done.stderr
    assert cloud.runs() == [f"0 auto run --config configs/tiny.py --config.workdir={cloud.share}/mine"]

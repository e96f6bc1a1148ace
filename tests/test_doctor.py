"""The doctor: each fault is found from its facts and comes with a fix; on this machine it runs for real."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from distil_jax import doctor
from distil_jax.doctor import GIB, Devices, Finding, Hub


def one(findings: list[Finding]) -> Finding:
    """The only finding; a fault always carries its fix."""
    (finding,) = findings
    assert bool(finding.fix) == (finding.level != "ok"), finding
    return finding


def test_python():
    assert one(doctor.check_python((3, 11, 0), "Linux")).level == "ok"
    assert one(doctor.check_python((3, 10, 9), "Linux")).level == "FAIL"


def test_packages():
    requirements = ["jax>=0.10", "numpy", 'torch>=2; extra == "test"']
    assert "2 requirements met" in one(doctor.check_packages(requirements, {"jax": "0.10.2", "numpy": "2.0"})).message
    old = one(doctor.check_packages(requirements, {"jax": "0.4.30", "numpy": "2.0"}))
    assert (old.level, old.fix) == ("warn", 'pip install -U "jax>=0.10"') and "jax 0.4.30" in old.message
    missing = one(doctor.check_packages(requirements, {"jax": "0.10.2"}))
    assert missing.level == "FAIL" and "numpy is missing" in missing.message
    assert "pip install -e" in one(doctor.check_packages(None, {})).fix


CPU = {"backend": "cpu", "count": 2, "kind": "cpu"}


@pytest.mark.parametrize(
    ("facts", "level", "said", "fix"),
    [
        (Devices(**CPU), "ok", "no accelerator", ""),
        (Devices(backend="tpu", count=4, kind="TPU v5e", tpu=True), "ok", "tpu x 4 (TPU v5e)", ""),
        (Devices(**CPU, nvidia=True, driver="580.1"), "FAIL", "although an NVIDIA GPU is there", '".[cuda]"'),
        (
            Devices(**CPU, nvidia=True, driver="580.1", plugins=("jax-cuda13-plugin",), error="no cuDNN"),
            "FAIL",
            "no cuDNN",
            "one version",
        ),
        (Devices(**CPU, tpu=True), "FAIL", "although a TPU is there", '".[tpu]"'),
        (Devices(**CPU, tpu=True, plugins=("libtpu",), error="busy"), "FAIL", "busy", "other process"),
        (Devices(**CPU, tpu=True, platforms="cpu"), "warn", "a TPU is there", "unset JAX_PLATFORMS"),
        (Devices(**CPU, platforms="cpu"), "ok", "as JAX_PLATFORMS asks", ""),
        (Devices(**CPU, plugins=("jax-cuda13-plugin",)), "warn", "no accelerator is visible", "--gpus all"),
        (Devices(error="no such platform", platforms="cuda"), "FAIL", "no such platform", "unset JAX_PLATFORMS"),
        (Devices(error="status -11"), "FAIL", "status -11", "JAX_PLATFORMS=cpu"),
    ],
)
def test_devices(facts, level, said, fix):
    finding = one([f for f in doctor.check_devices(facts) if f.topic == "devices"])
    assert finding.level == level and said in finding.message and fix in finding.fix


@pytest.mark.parametrize(
    ("driver", "plugin", "level", "fix"),
    [
        ("580.65.06", "jax-cuda13-plugin", "ok", ""),
        ("550.54.15", "jax-cuda13-plugin", "FAIL", "jax[cuda12]"),
        ("470.1", "jax-cuda13-plugin", "FAIL", "580 or newer"),
        ("550.54.15", "jax-cuda12-plugin", "ok", ""),
        ("", "jax-cuda12-plugin", "warn", "driver"),
    ],
)
def test_driver(driver, plugin, level, fix):
    facts = Devices(backend="gpu", count=1, kind="H100", nvidia=True, driver=driver, plugins=(plugin,))
    finding = one([f for f in doctor.check_devices(facts) if f.topic == "driver"])
    assert finding.level == level and fix in finding.fix


def test_memory_and_disk(tmp_path):
    assert one(doctor.check_memory(16 * GIB, 8 * GIB)).level == "ok"
    assert one(doctor.check_memory(16 * GIB, 3 * GIB)).level == "warn"
    assert one(doctor.check_disk(tmp_path, 50 * GIB, True)).level == "ok"
    assert one(doctor.check_disk(tmp_path, 2 * GIB, True)).level == "warn"
    assert one(doctor.check_disk(tmp_path, GIB // 4, True)).level == "FAIL"
    assert one(doctor.check_disk(tmp_path, 50 * GIB, False)).level == "FAIL"
    folder, free, writable = doctor.probe_folder(tmp_path / "not" / "yet")
    assert (folder, writable) == (tmp_path, True) and free > 0
    assert doctor.probe_folder(Path("/proc"))[2] is False
    total, available = doctor.probe_memory()
    assert 0 < available <= total


def test_compilation_cache(tmp_path):
    assert one(doctor.check_cache(tmp_path / "xla")).level == "ok"
    assert "JAX_COMPILATION_CACHE_DIR" in one(doctor.check_cache(Path("/proc/xla"))).fix
    assert one(doctor.check_cache(None)).level == "warn"


@pytest.mark.parametrize(
    ("facts", "level", "said"),
    [
        (Hub("https://hub", token=True), "ok", "answers"),
        (Hub("https://hub"), "warn", "without a token"),
        (Hub("https://hub", error="ConnectError"), "warn", "does not answer (ConnectError)"),
        (Hub("https://hub", offline=True), "ok", "HF_HUB_OFFLINE"),
    ],
)
def test_hub(facts, level, said):
    finding = one(doctor.check_hub(facts))
    assert finding.level == level and said in finding.message


def test_the_hub_is_asked_once_and_not_at_all_when_offline(monkeypatch):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            del args

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        assert doctor.probe_hub(endpoint).offline and asked == []  # the tests run with HF_HUB_OFFLINE=1
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert doctor.probe_hub(endpoint).error == "" and len(asked) == 1
        server.shutdown()
    assert doctor.probe_hub(endpoint).error  # nothing listens there now


def doctor_says(tmp_path, **environment) -> tuple[int, str]:
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")} | environment
    command = [sys.executable, "-m", "distil_jax", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(doctor.__file__).parents[1])
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_the_doctor_on_this_machine(tmp_path):
    status, said = doctor_says(tmp_path)
    lines = [line for line in said.splitlines() if not line.startswith(" ")]
    assert {line.split()[1] for line in lines} >= {"python", "packages", "devices", "memory", "disk", "cache", "hub"}
    assert "cpu x 8" in said and "off by HF_HUB_OFFLINE" in said and f"kept in {tmp_path / 'xla'}" in said
    assert status == (1 if any(line.startswith("FAIL") for line in lines) else 0)


def test_a_platform_that_cannot_start_is_a_fault(tmp_path):
    status, said = doctor_says(tmp_path, JAX_PLATFORMS="cuda")
    assert status == 1
    assert "FAIL  devices" in said and "fix: unset JAX_PLATFORMS" in said

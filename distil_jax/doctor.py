"""`distil-jax doctor`: what this machine has, and the fix for each fault.

    distil-jax doctor [--config configs/NAME.py]

Each part is a pair: `probe_*` asks the machine and returns facts, `check_*` is a pure function from facts to findings.
Ends with exit status 1 if a finding is a FAIL; a warning is something that a small run can live with.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from distil_jax import cli

GIB = 2**30
PACKAGE = "distil-jax"
# What the CUDA plugins' wheels ask of the driver (NVIDIA, CUDA compatibility).
MINIMUM_DRIVER = {"jax-cuda12-plugin": 525, "jax-cuda13-plugin": 580}
GOOGLE_PCI_VENDOR, GOOGLE_NETWORK_CARD = "0x1ae0", "0x0042"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report, with what to do about it unless it is ok."""

    level: Literal["ok", "warn", "FAIL"]
    topic: str
    message: str
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What the machine shows and what JAX makes of it."""

    backend: str = ""  # jax.default_backend(), "" if JAX could not start
    count: int = 0
    kind: str = ""
    error: str = ""  # why JAX could not start, or what it said as it fell back
    platforms: str = ""  # $JAX_PLATFORMS
    nvidia: bool = False  # an NVIDIA device is visible
    driver: str = ""  # version of the NVIDIA driver
    tpu: bool = False
    plugins: tuple[str, ...] = ()  # installed: jax-cuda12-plugin, jax-cuda13-plugin, libtpu


@dataclasses.dataclass(frozen=True)
class Hub:
    """How the Hugging Face hub answers."""

    endpoint: str
    offline: bool = False
    error: str = ""
    token: bool = False


def main(config: Any = None) -> int:
    """Prints what this machine has, a line each, and the fix for what is wrong. Returns the exit status."""
    workdir = Path(config.workdir if config is not None else ".")
    steps: tuple[Callable[[], list[Finding]], ...] = (  # each printed as soon as it is known
        lambda: check_python(sys.version_info[:3], platform.platform()),
        lambda: check_packages(*probe_packages()),
        lambda: check_devices(probe_devices()),
        lambda: check_memory(*probe_memory()),
        lambda: check_disk(*probe_folder(workdir)),
        lambda: check_cache(cli.use_compilation_cache()),
        lambda: check_hub(probe_hub()),
    )
    failed = False
    for step in steps:
        for finding in step():
            print(render(finding), flush=True)
            failed |= finding.level == "FAIL"
    return int(failed)


def render(finding: Finding) -> str:
    """The finding as aligned text."""
    fix = f"\n{'':16}fix: {finding.fix}" if finding.fix else ""
    return f"{finding.level:4}  {finding.topic:8}  {finding.message}{fix}"


# --- versions ---------------------------------------------------------------------------------------------------------


def check_python(version: tuple[int, int, int], system: str) -> list[Finding]:
    shown = f"{'.'.join(map(str, version))} on {system}"
    if version < (3, 11):
        return [Finding("FAIL", "python", shown, "install Python 3.11 or newer, delete .venv and install again")]
    return [Finding("ok", "python", shown)]


def probe_packages() -> tuple[list[str] | None, dict[str, str]]:
    """`(requirements of this package, installed versions)`; no requirements where the package is not installed."""
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    try:
        return importlib.metadata.requires(PACKAGE) or [], installed
    except importlib.metadata.PackageNotFoundError:
        return None, installed


def check_packages(requirements: list[str] | None, installed: Mapping[str, str]) -> list[Finding]:
    """One line for all that is well, one for each requirement that is not met."""
    from packaging.requirements import Requirement

    if requirements is None:
        return [Finding("FAIL", "packages", f"{PACKAGE} is not installed here", 'pip install -e ".[demo]"')]
    needed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = []
    for requirement in needed:
        version = installed.get(requirement.name.lower().replace("_", "-"))
        if version is None:
            found.append(Finding("FAIL", "packages", f"{requirement.name} is missing", f'pip install "{requirement}"'))
        elif not requirement.specifier.contains(version, prereleases=True):
            text = f"{requirement.name} {version}, needed is {requirement.specifier}"
            found.append(Finding("warn", "packages", text, f'pip install -U "{requirement}"'))
    shown = " ".join(f"{n} {installed[n]}" for n in ("jax", "jaxlib", "flax", "orbax-checkpoint") if n in installed)
    return found or [Finding("ok", "packages", f"{len(needed)} requirements met: {shown}")]


# --- devices ----------------------------------------------------------------------------------------------------------


def probe_devices() -> Devices:
    """Starts JAX in a process of its own: a broken driver or plugin may hang or end the process that asks."""
    code = "import jax, json; d = jax.devices(); print(json.dumps([d[0].platform, len(d), d[0].device_kind]))"
    backend, count, kind, error = "", 0, "", ""
    try:
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        error = _last_line(answer.stderr)
        if answer.returncode == 0:
            backend, count, kind = json.loads(answer.stdout.splitlines()[-1])
        elif not error:
            error = f"the process ended with status {answer.returncode}"
    except subprocess.TimeoutExpired:
        error = "no answer within two minutes (does another process hold the device?)"
    installed = [d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()]
    return Devices(
        backend=backend,
        count=count,
        kind=kind,
        error=error,
        platforms=os.environ.get("JAX_PLATFORMS", ""),
        nvidia=any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists(),
        driver=_nvidia_driver(),
        tpu=_has_tpu(),
        plugins=tuple(sorted({"jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"} & set(installed))),
    )


def check_devices(facts: Devices) -> list[Finding]:
    """Above all: an accelerator that is there and not used, while JAX computes on the CPU without a word."""
    plugin = "libtpu" if facts.tpu else "cuda"
    shown = f"{facts.backend} x {facts.count} ({facts.kind})"
    there = "a TPU" if facts.tpu else "an NVIDIA GPU" if facts.nvidia else ""
    if not facts.backend:
        fix = "unset JAX_PLATFORMS" if facts.platforms else "mend what it says; JAX_PLATFORMS=cpu runs without it"
        found = Finding("FAIL", "devices", f"JAX finds no device: {facts.error}", fix)
    elif facts.backend != "cpu":
        found = Finding("ok", "devices", shown)
    elif facts.platforms.startswith("cpu"):
        text = f"{shown}, as JAX_PLATFORMS asks"
        found = Finding("ok", "devices", text)
        if there:
            found = Finding("warn", "devices", f"{text}; {there} is there", "unset JAX_PLATFORMS")
    elif there:
        if not any(plugin in name for name in facts.plugins):
            fix = f'pip install -e ".[{"tpu" if facts.tpu else "cuda"}]"'
        elif facts.tpu:
            fix = "end the other process that holds it: fuser -v /dev/accel* /dev/vfio/*"
        else:
            fix = 'pip install -U -e ".[cuda]", so that the plugin and jaxlib are of one version'
        said = f": {facts.error}" if facts.error else ""
        found = Finding("FAIL", "devices", f"{shown}, although {there} is there{said}", fix)
    elif facts.plugins:
        text = f"{shown}; {', '.join(facts.plugins)} is installed, but no accelerator is visible"
        found = Finding("warn", "devices", text, "start the container with --gpus all (GPU) or --privileged (TPU)")
    else:
        found = Finding("ok", "devices", f"{shown}; no accelerator, enough for configs/tiny.py")
    return [found, *_check_driver(facts, [name for name in facts.plugins if "cuda" in name])]


def _check_driver(facts: Devices, cuda: list[str]) -> list[Finding]:
    if not facts.driver:
        if facts.nvidia:
            return [
                Finding(
                    "warn", "driver", "an NVIDIA device without a driver", "install NVIDIA's driver for this system"
                )
            ]
        return []
    major = int(re.match(r"\d+", facts.driver)[0])
    for plugin in cuda:
        if major < (wanted := MINIMUM_DRIVER[plugin]):
            fix = f"update the driver to {wanted} or newer"
            if plugin == "jax-cuda13-plugin" and major >= MINIMUM_DRIVER["jax-cuda12-plugin"]:
                fix += f', or: pip uninstall -y {plugin} jax-cuda13-pjrt && pip install "jax[cuda12]"'
            return [Finding("FAIL", "driver", f"NVIDIA {facts.driver}, {plugin} needs {wanted}", fix)]
    return [Finding("ok", "driver", f"NVIDIA {facts.driver}")]


def _nvidia_driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else ""


def _has_tpu() -> bool:
    if any(Path("/dev").glob("accel[0-9]*")):
        return True
    # vfio also passes GPUs and network cards through; only Google's chips behind it are TPUs.
    cards = []
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        if vendor.read_text().strip() == GOOGLE_PCI_VENDOR:
            cards.append((vendor.parent / "device").read_text().strip())
    return any(Path("/dev/vfio").glob("[0-9]*")) and any(card != GOOGLE_NETWORK_CARD for card in cards)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# --- memory, disk, cache, hub -----------------------------------------------------------------------------------------


def probe_memory() -> tuple[int, int]:
    """`(total, available)` bytes, no more than a container's limit."""
    total, available = (os.sysconf(n) * os.sysconf("SC_PAGE_SIZE") for n in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists() and (match := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        available = int(match[1]) * 1024
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int(limit.with_name("memory.current").read_text())
        total, available = min(total, int(text)), min(available, int(text) - used)
    return total, available


def check_memory(total: int, available: int) -> list[Finding]:
    shown = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    if available < 4 * GIB:
        return [Finding("warn", "memory", shown, "end other programs: configs/tiny.py wants 4 GiB")]
    return [Finding("ok", "memory", shown)]


def probe_folder(folder: Path) -> tuple[Path, int, bool]:
    """`(the folder or its nearest parent that exists, free bytes, whether it can be written)`."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
        writable = True
    except OSError:
        writable = False
    return folder, shutil.disk_usage(folder).free, writable


def check_disk(folder: Path, free: int, writable: bool) -> list[Finding]:
    shown = f"{free / GIB:.1f} GiB free at {folder}"
    if not writable:
        return [Finding("FAIL", "disk", f"{shown}, which cannot be written", "--config.workdir=DIR, a folder of yours")]
    if free < GIB // 2:
        return [Finding("FAIL", "disk", shown, "free some space, or --config.workdir=DIR on another disk")]
    if free < 5 * GIB:
        return [
            Finding("warn", "disk", f"{shown}: enough for configs/tiny.py", "a larger model's checkpoints need more")
        ]
    return [Finding("ok", "disk", shown)]


def check_cache(folder: Path | None) -> list[Finding]:
    if folder is None:
        fix = "unset JAX_ENABLE_COMPILATION_CACHE: runs then start faster from the second on"
        return [Finding("warn", "cache", "the compilation cache is off", fix)]
    nearest, _, writable = probe_folder(folder)
    if not writable:
        fix = "set JAX_COMPILATION_CACHE_DIR to a folder of yours"
        return [Finding("warn", "cache", f"compiled programs cannot be kept in {nearest}", fix)]
    return [Finding("ok", "cache", f"compiled programs are kept in {folder}")]


def probe_hub(endpoint: str | None = None) -> Hub:
    """One HEAD request of at most three seconds, none if `HF_HUB_OFFLINE` is set."""
    import huggingface_hub
    from huggingface_hub import constants

    endpoint = endpoint or constants.ENDPOINT
    token = huggingface_hub.get_token() is not None
    if constants.is_offline_mode():
        return Hub(endpoint, offline=True, token=token)
    try:
        huggingface_hub.get_session().head(endpoint, timeout=3)
    except Exception as error:  # a client's own kinds, of two libraries by version: any of them means no answer
        return Hub(endpoint, error=f"{type(error).__name__}: {_last_line(str(error))}", token=token)
    return Hub(endpoint, token=token)


def check_hub(facts: Hub) -> list[Finding]:
    if facts.offline:
        return [Finding("ok", "hub", "off by HF_HUB_OFFLINE: models come from local directories")]
    if facts.error:
        fix = "name local directories (--config.teacher.path=DIR), or set HTTPS_PROXY or HF_ENDPOINT"
        return [Finding("warn", "hub", f"{facts.endpoint} does not answer ({facts.error})", fix)]
    if not facts.token:
        fix = "for gated models (Gemma, Llama): accept the licence on the model's page, then `hf auth login`"
        return [Finding("warn", "hub", f"{facts.endpoint} answers, without a token", fix)]
    return [Finding("ok", "hub", f"{facts.endpoint} answers, with a token")]


if __name__ == "__main__":
    sys.exit(main())

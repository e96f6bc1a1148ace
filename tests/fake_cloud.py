"""A cloud for the launch scripts in a folder: `gcloud` and its like as small programs that write down what they are
asked, refuse flags that the real ones do not have, and fail when they are told to. The workers of a slice are folders
that are their homes, and what is sent to them by `gcloud ... ssh` runs there; what stands in `share` is the disk that
outlives them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parent.parent

_RECORD = """#!{python} -SE
import json, os, sys
from pathlib import Path
FAKE = Path(os.environ["FAKE"])
def record(stdin=None):
    call = dict(argv=[Path(sys.argv[0]).name, *sys.argv[1:]])
    if stdin is not None:
        call["stdin"] = stdin
    with open(FAKE / "calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")
def told(verb):
    # The next thing that `verb` has to do, as Cloud.fail said: (exit status, message).
    path = FAKE / "failures" / verb
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return
    path.write_text("".join(line + "\\n" for line in lines[1:]))
    status, message = json.loads(lines[0])
    if status:
        print(message, file=sys.stderr)
        sys.exit(status)
"""

_GCLOUD = """
import shutil, signal, subprocess
record()
words = [w for w in sys.argv[1:] if not w.startswith("-")]
flags = dict(w[2:].partition("=")[::2] for w in sys.argv[1:] if w.startswith("--"))
kind, verb, name = words[2], words[3], words[4]
place, create = {"zone", "project"}, {"accelerator-type", "spot", "reserved", "internal-ips", "network", "subnetwork"}
create |= {"service-account"}
known = {
    ("tpu-vm", "create"): create | {"version"},
    ("queued-resources", "create"): create | {"runtime-version", "node-id"},
    ("tpu-vm", "ssh"): {"worker", "command", "internal-ip", "quiet"},
    ("tpu-vm", "scp"): {"worker", "recurse", "internal-ip", "quiet"},
    ("tpu-vm", "delete"): {"quiet"},
    ("queued-resources", "delete"): {"quiet", "force"},
    ("tpu-vm", "describe"): {"format"},
    ("queued-resources", "describe"): {"format"},
}
if words[:2] != ["compute", "tpus"] or (wrong := set(flags) - known[kind, verb] - place):
    print("unrecognized arguments:", wrong, file=sys.stderr)
    sys.exit(2)
state_file = FAKE / (kind + ".state")
workers = FAKE / "workers"
def home(index):
    return workers / str(index)
def end_workers():
    for pid in workers.glob("*/.distil_jax/*.pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass
    shutil.rmtree(workers, ignore_errors=True)
def new_slice():
    for index in range(int((FAKE / "hosts").read_text())):
        home(index).mkdir(parents=True, exist_ok=True)
    (FAKE / "tpu-vm.state").write_text("READY")
if verb not in ("ssh",):
    told(verb)
if verb == "create":
    if state_file.exists():
        sys.exit("ERROR: ALREADY_EXISTS")
    if kind == "queued-resources":
        state_file.write_text("WAITING_FOR_RESOURCES")
    else:
        new_slice()
elif verb == "describe":
    if not state_file.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    state = state_file.read_text()
    print(state)
    if state == "WAITING_FOR_RESOURCES":
        state_file.write_text("ACTIVE")
        new_slice()
elif verb == "delete":
    if not state_file.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    for file in FAKE.glob("*.state"):
        file.unlink()
    end_workers()
else:
    if not (FAKE / "tpu-vm.state").exists() or (FAKE / "tpu-vm.state").read_text() != "READY":
        sys.exit("ERROR: the TPU VM is in a state in which it cannot be reached")
    all_of_them = sorted(int(p.name) for p in workers.iterdir())
    if not all_of_them:
        sys.exit("ERROR: ssh: connection timed out")
    chosen = all_of_them if flags["worker"] == "all" else [int(flags["worker"])]
    if verb == "scp":
        *sources, target = words[4:]
        if target.startswith(name_of := target.split(":")[0] + ":"):
            for index in chosen:
                for source in sources:
                    where = home(index) / target[len(name_of):]
                    if where.is_dir():
                        where = where / Path(source).name
                    shutil.copyfile(source, where)
                    where.chmod(0o644)  # the worst that a server may make of it
        else:
            shutil.copyfile(home(chosen[0]) / sources[0].split(":")[1], target)
    else:
        if "tpu_worker.sh status" in flags["command"]:
            looks = FAKE / "looks"
            number = int(looks.read_text()) + 1 if looks.exists() else 1
            looks.write_text(str(number))
            events = json.loads((FAKE / "events.json").read_text()) if (FAKE / "events.json").exists() else {}
            if str(number) in events:
                end_workers()
                workers.mkdir()
                if events[str(number)] != "SILENT":  # a slice that is said to be ready, and does not answer
                    of = "queued-resources" if events[str(number)] == "SUSPENDED" else "tpu-vm"
                    (FAKE / f"{of}.state").write_text(events[str(number)])
            if str(number) in events:
                sys.exit("ERROR: ssh: connection closed")
        told("ssh")
        running = []
        for index in chosen:
            path = f"{FAKE}/bin:/usr/bin:/bin"
            environment = dict(PATH=path, HOME=str(home(index)), FAKE=str(FAKE), WORKER=str(index))
            running.append(subprocess.Popen(["bash", "-c", flags["command"]], cwd=home(index), env=environment))
        sys.exit(next((s for s in [p.wait() for p in running] if s), 0))
"""

_KUBECTL = """
import stat, subprocess
words = [w for w in sys.argv[1:] if not w.startswith("-")]
record(sys.stdin.read() if words[0] == "apply" else None)
told(words[0])
if words[:2] == ["create", "secret"]:
    (file,) = (w.partition("=")[2] for w in sys.argv if w.startswith("--from-env-file="))
    print("mode", oct(stat.S_IMODE(os.stat(file).st_mode)), "of", Path(file).read_text())
elif words[:2] == ["get", "jobset"] and (FAKE / "terminal").exists():
    print((FAKE / "terminal").read_text())
elif words[0] == "exec" and "tar" in words:
    command = sys.argv[sys.argv.index("--") + 1 :]
    sys.exit(subprocess.run([w.replace("/mnt/distil_jax", str(FAKE / "share")) for w in command]).returncode)
"""

# SLURM's: every task here, and the highest exit status. With CANCEL the batch script is told to end, as by scancel.
_SRUN = """
import signal, subprocess
record()
command = sys.argv[next(i for i, w in enumerate(sys.argv) if i and not w.startswith("-")) :]
tasks = range(int(os.environ["SLURM_NTASKS"]))
running = [subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(i), "WORKER": str(i)}) for i in tasks]
if "CANCEL" in os.environ:
    os.kill(os.getppid(), signal.SIGTERM)
sys.exit(max(p.wait() for p in running))
"""

# Of a worker. distil-jax does what the next line of `plan` says: "exit N", "done", "hang", "only WORKER N", or
# "each N M ..." by the worker.
_WORKER = {
    "sudo": 'exec "$@"',
    "apt-get": ":",
    "mountpoint": "[[ -e $HOME/mounted ]]",
    "mount": 'echo "$*" >>"$FAKE/mounts"; touch "$HOME/mounted"',
    "mount.nfs": ":",
    "curl": 'echo "$WORKER"',
    "sleep": "exec /bin/sleep 0.03",
    "python3": """
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip install"*uv) mkdir -p "$HOME/.local/bin"; cp "$FAKE/bin/uv.py" "$HOME/.local/bin/uv" ;;
  "-m pip install"*) cp "$FAKE/bin/distil-jax" "$(dirname "$0")/distil-jax" ;;
  -c*version_info*) [[ $0 != "$FAKE"/bin/* || ! -e $FAKE/old_python ]] ;;
esac""",
    "uv.py": '[[ $* != "python find"* ]] || { cp "$FAKE/bin/python3" "$HOME/python3.12"; echo "$HOME/python3.12"; }',
    "distil-jax": """
[[ -z ${HF_TOKEN:-} ]] || printf %s "$HF_TOKEN" | sha256sum >"$FAKE/token-$WORKER"
echo "$WORKER $DISTIL_JAX_HOSTS $*" >>"$FAKE/runs"
echo >>"$FAKE/starts-$WORKER"
line=$(sed -n "$(wc -l <"$FAKE/starts-$WORKER")p" "$FAKE/plan")
for work in "$@"; do [[ $work != --config.workdir=* ]] || work=${work#*=}; done
echo "doing: $line"
case $line in
  exit*) exit "${line#exit }" ;;
  each*) read -r -a each <<<"$line"; exit "${each[WORKER + 1]}" ;;
  done) mkdir -p "$work/export"; echo weights >"$work/export/model.safetensors"; echo {} >"$work/summary.json" ;;
  only*) read -r _ which status <<<"$line"; [[ $WORKER != "$which" ]] || exit "$status" ;;&
  only* | hang) trap 'kill %1; exit 143' TERM; /bin/sleep 60 & wait ;;
esac""",
}
_OLDER_NAMES = ("python3.14", "python3.13", "python3.12", "python3.11")


def make_checkout(folder: Path) -> Path:
    """A repository with a commit of the scripts as they are now, and of what setup_venv.sh reads."""
    shutil.copytree(PROJECT / "launch", folder / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(PROJECT / name, folder)
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    return folder


class Cloud:
    """The folder, and a copy of a checkout in it, whose scripts run there."""

    def __init__(self, root: Path, checkout: Path, hosts: int = 2):
        self.root, self.checkout, self.share = root, root / "checkout", root / "share"
        for folder in ("bin", "failures", "workers", "share", "here", "checkout"):
            (root / folder).mkdir()
        (root / "hosts").write_text(str(hosts))
        self.plan("done")
        record = _RECORD.format(python=sys.executable)
        self.program("gcloud", record + _GCLOUD)
        for name, text in _WORKER.items():
            self.program(name, f"#!/bin/bash\n{text}\n")
        for name in _OLDER_NAMES:
            shutil.copy(root / "bin" / "python3", root / "bin" / name)
        self.program("kubectl", record + _KUBECTL)
        self.program("srun", record + _SRUN)
        for name in ("sbatch", "scontrol"):
            self.program(name, record + "record()\n")
        shutil.copytree(checkout, self.checkout, dirs_exist_ok=True)

    def program(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def plan(self, *lives: str) -> None:
        """What distil-jax does at its first start, at its second, and so on."""
        (self.root / "plan").write_text("".join(f"{life}\n" for life in lives))

    def fail(self, verb: str, *times: tuple[int, str]) -> None:
        """What `verb` does at its next calls: (0, "") is as usual."""
        (self.root / "failures" / verb).write_text("".join(json.dumps(t) + "\n" for t in times))

    def lose(self, at: int, state: str = "PREEMPTED") -> None:
        """The slice is gone when somebody looks at its workers for the `at`-th time."""
        path = self.root / "events.json"
        events = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**events, str(at): state}))

    def start(self, script: str, *words: str, cwd: str = "here", **environment: str) -> subprocess.Popen:
        """A launch script under way."""
        path = f"{self.root}/bin:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.root / "here"), "FAKE": str(self.root), **environment}
        command = ["bash", str(self.checkout / "launch" / script), *words]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.root / cwd, env=environment, **pipe)

    def run(self, script: str, *words: str, cwd: str = "here", **environment: str) -> subprocess.CompletedProcess:
        """A launch script to its end."""
        process = self.start(script, *words, cwd=cwd, **environment)
        try:
            said, complained = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, said, complained)

    def calls(self) -> list[list[str]]:
        path = self.root / "calls.jsonl"
        return [json.loads(line)["argv"] for line in path.read_text().splitlines()] if path.exists() else []

    def manifests(self) -> list[dict]:
        """What kubectl was given, in order."""
        lines = (self.root / "calls.jsonl").read_text().splitlines()
        given = [json.loads(line).get("stdin", "") for line in lines]
        return [document for text in given for document in yaml.safe_load_all(text) if isinstance(document, dict)]

    def made(self, *words: str) -> list[list[str]]:
        """The calls that have these words beside each other."""
        n = len(words)
        return [c for c in self.calls() if any(tuple(c[i : i + n]) == words for i in range(len(c)))]

    def runs(self) -> list[str]:
        path = self.root / "runs"
        return path.read_text().splitlines() if path.exists() else []

    def close(self) -> None:
        for file in self.root.glob("workers/*/.distil_jax/*.pid"):
            try:
                os.killpg(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue

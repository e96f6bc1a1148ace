"""The package and its command line: a quick import, every command real, every fault one line, two scripts to start."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import distil_jax
from distil_jax import cli

PROJECT = Path(__file__).resolve().parent.parent
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.seed = 0  # of everything
    # Where a run writes,
    # all of it.
    c.workdir = "runs"
    c.train = t = ConfigDict(dict(steps=3))  # how long
    t.rate = 0.5
    c.mesh = ConfigDict({
        "data": -1,  # what is left
    })
    c.teacher = ConfigDict()
    c.teacher.training = training(9)
    return c

def training(steps):
    t = ConfigDict()
    t.steps = steps  # updates
    return t
"""
STAGE = '''
import errno, os, signal, sys, time
from distil_jax.errors import UserError

def main(config):
    """Does what its seed says."""
    match config.seed:
        case 0: print("did", config.train.steps)
        case 1: raise UserError("rows.jsonl, line 3:\\nno column 'text'")
        case 2: raise RuntimeError("a fault of ours")
        case 3:
            with open("/dev/full", "w") as full:
                full.write("x")
        case 4: raise ValueError("write failed") from RuntimeError("tensorstore: No space left on device")
        case 5:
            print("ready", flush=True)
            time.sleep(60)
        case 6: return 7

if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))
'''


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A command `stage` with a config of its own; returns the config's path."""
    (tmp_path / "my_stage.py").write_text(STAGE)
    (tmp_path / "small.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "stage", ("my_stage:main", "does what its seed says"))
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    monkeypatch.delenv("DISTIL_JAX_DEBUG", raising=False)
    return str(tmp_path / "small.py")


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def test_importing_the_package_or_its_command_line_starts_nothing():
    heavy = "{'jax', 'numpy', 'flax', 'transformers', 'orbax', 'ml_collections', 'absl'}"
    for module in ("distil_jax", "distil_jax.cli"):
        done = python(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))")
        assert done.stdout.strip() == "[]", done.stderr


def test_the_face_is_there_by_name():
    for name in distil_jax.__all__:
        assert getattr(distil_jax, name) is not None
        assert name in dir(distil_jax)
    from distil_jax import losses
    from distil_jax.tokens.bytes import ByteTable

    assert distil_jax.ByteTable is ByteTable and distil_jax.losses is losses
    with pytest.raises(AttributeError, match="no_such_name"):
        distil_jax.no_such_name  # noqa: B018


def test_the_installed_metadata_is_this_package():
    assert importlib.metadata.version("distil-jax") == distil_jax.__version__
    scripts = importlib.metadata.entry_points(group="console_scripts", name="distil-jax")
    assert [script.value for script in scripts] == ["distil_jax.cli:main"]


def test_every_import_is_a_declared_requirement():
    required = importlib.metadata.requires("distil-jax")
    declared = {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in required if "extra == 'test'" not in r}
    distributions = importlib.metadata.packages_distributions()
    for file in (PROJECT / "distil_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for root in {name.split(".")[0] for name in names} - {"distil_jax"} - sys.stdlib_module_names:
                owners = {owner.lower().replace("_", "-") for owner in distributions.get(root, [root])}
                assert owners & declared, f"{file.relative_to(PROJECT)} imports {root}: add it to setup.cfg"


def test_every_room_is_packaged():
    for file in (PROJECT / "distil_jax").rglob("*.py"):
        assert (file.parent / "__init__.py").is_file(), f"{file.parent} needs an __init__.py, or a wheel leaves it out"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_is_real(command):
    module, function = cli.COMMANDS[command][0].split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} does not exist"
    body = ast.parse(Path(spec.origin).read_text()).body
    assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in body)


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, (_, line) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", said, re.MULTILINE)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert distil_jax.__version__ in capsys.readouterr().out


def test_help_of_a_command_lists_the_keys_with_their_comments(stage, capsys):
    assert cli.main(["stage", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: distil-jax stage" in said and "Does what its seed says." in said and "Add --config" in said
    assert cli.main(["stage", "--config", stage, "-h"]) == 0
    said = capsys.readouterr().out
    for key, comment in {
        "seed=0": "of everything",
        "workdir='runs'": "Where a run writes, all of it.",
        "mesh.data=-1": "what is left",
        "teacher.training.steps=9": "updates",
    }.items():
        assert re.search(rf"--config\.{re.escape(key)} +{re.escape(comment)}$", said, re.MULTILINE), key
    assert re.search(r"--config\.train\.rate=0\.5$", said, re.MULTILINE)


def test_a_command_runs_with_its_overrides(stage, capsys):
    assert cli.main(["stage", "--config", stage, "--config.train.steps=8"]) == 0
    assert capsys.readouterr().out == "did 8\n"
    assert cli.main(["stage", "--config", stage, "--config.seed=6"]) == 7


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "no command 'trian' (did you mean 'train'?)"),
        (["stage"], "no config file: add --config FILE"),
        (["stage", "--config", "CONFIG", "--config.sede=1"], "did you mean '--config.seed'"),
        (["stage", "--config", "CONFIG", "train.steps=1"], "takes no 'train.steps=1'"),
        (["stage", "--config", "CONFIG", "--config.seed=1"], "rows.jsonl, line 3: no column 'text'"),
        (["stage", "--config", "CONFIG", "--config.seed=3"], "the disk is full"),
        (["stage", "--config", "CONFIG", "--config.seed=4"], "last whole checkpoint are still usable"),
    ],
)
def test_what_the_user_can_mend_is_one_line(stage, capsys, argv, said):
    assert cli.main([stage if word == "CONFIG" else word for word in argv]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert said in error


def test_a_fault_of_ours_keeps_its_traceback(stage):
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["stage", "--config", stage, "--config.seed=2"])


def test_debug_shows_the_traceback_behind_the_line(stage, capsys, monkeypatch):
    monkeypatch.setenv("DISTIL_JAX_DEBUG", "1")
    assert cli.main(["stage", "--config", stage, "--config.seed=1"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: rows.jsonl")


def start_stage(stage: str, *argv: str) -> subprocess.Popen:
    folder = str(Path(stage).parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(PROJECT)])}
    # A suite that a shell runs in the background ignores Ctrl-C, and so would what it starts.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "my_stage", *argv]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_stage_run_as_a_module_takes_the_same_command_line(stage):
    out, error = start_stage(stage, "--config", stage, "--config.train.steps=5").communicate(timeout=60)
    assert (out, error) == ("did 5\n", "")
    process = start_stage(stage, "--config", stage, "--config.seed=1")
    assert process.communicate(timeout=60)[1].startswith("error: rows.jsonl") and process.returncode == 2
    assert "usage: python -m my_stage" in start_stage(stage, "--help").communicate(timeout=60)[0]


def test_an_interrupted_command_says_so_and_exits_130(stage):
    process = start_stage(stage, "--config", stage, "--config.seed=5")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in error and "Traceback" not in error


def test_compiled_programs_are_kept_unless_told_otherwise(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        folder = cli.use_compilation_cache()
        assert folder.parent == tmp_path / "distil_jax" / "xla"
        assert jax.config.jax_compilation_cache_dir == str(folder) == os.environ["JAX_COMPILATION_CACHE_DIR"]
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
        assert cli.use_compilation_cache() == tmp_path / "mine"
        monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
        assert cli.use_compilation_cache() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def checkout(tmp_path: Path) -> Path:
    """What the scripts need of a checkout."""
    folder = tmp_path / "checkout"
    shutil.copytree(PROJECT / "launch", folder / "launch")
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(PROJECT / name, folder / name)
    return folder


def only(tmp_path: Path, *programs: str) -> dict[str, str]:
    """An environment in which only these programs exist."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in programs:
        (folder / program).symlink_to(shutil.which(program))
    return {"PATH": str(folder), "HOME": str(tmp_path)}


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_a_machine_without_python_is_told_what_to_install(tmp_path, script):
    command = ["bash", str(checkout(tmp_path) / "launch" / script)]
    done = subprocess.run(command, env=only(tmp_path, "bash", "dirname", "cat"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.11 or newer") and "apt-get install python3" in done.stderr


def test_a_python_without_venv_is_told_what_to_install(tmp_path):
    env = only(tmp_path, "bash", "dirname", "cat")
    stub = tmp_path / "bin" / "python3"
    stub.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    stub.chmod(0o755)
    command = ["bash", str(checkout(tmp_path) / "launch" / "quickstart.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "apt-get install python3-venv" in done.stderr


def test_what_is_installed_is_not_installed_again(tmp_path):
    """With the stamp of a finished install in place, the scripts go straight to the command; a changed setup.cfg, or
    other extras, install again. The stub stands for a pip that has nothing to fetch."""
    folder = checkout(tmp_path)
    script = f"""
        set -euo pipefail
        cd {folder}
        source launch/setup_venv.sh
        mkdir -p .venv/bin
        printf '#!/bin/sh\\ncase "$*" in *install*) echo "pip $*";; esac\\n' > .venv/bin/python
        chmod +x .venv/bin/python
        for extras in demo demo demo,test demo; do setup_venv $extras; done
        echo "# changed" >> setup.cfg
        setup_venv demo
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    installs = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("pip ")]
    assert installs == [".[demo]", ".[demo,test]", ".[demo]"]
    assert done.stdout.count("is installed in .venv already") == 2

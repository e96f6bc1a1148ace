"""Configs: every key known, every override typed, every fault one line that names the nearest thing that exists."""

import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from distil_jax.config import config_hash, flatten, load_config, load_config_file, track_reads
from distil_jax.errors import UserError, nearest

CONFIG = '''
"""A small config."""
from ml_collections import ConfigDict, config_dict

def get_config(arg=""):
    c = ConfigDict()
    c.seed = 0
    c.workdir = "runs/small"
    c.teacher = ConfigDict(dict(path=config_dict.placeholder(str), layers=6))
    c.train = train = ConfigDict()
    train.steps = 10 if arg == "smoke" else 100
    train.learning_rate = 1e-3
    train.remat = False
    train.betas = (0.9, 0.95)
    train.nothing = None
    c.data = ConfigDict(dict(files=(), kinds=("root", "interior")))
    return c
'''


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(CONFIG)
    return str(file)


def load(path, *overrides):
    config, leftover = load_config(["--config", path, *overrides])
    assert leftover == []
    return config


def fault(*argv) -> str:
    with pytest.raises(UserError) as caught:
        load_config(list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_overrides_and_arguments(path):
    assert load(path).train.steps == 100
    assert load(f"{path}:smoke").train.steps == 10
    config, leftover = load_config(
        ["first", f"--config={path}:smoke", "--config.train.steps=7", "--config.teacher.layers", "3", "--", "--last"]
    )
    assert (config.train.steps, config.teacher.layers, config.seed) == (7, 3, 0)
    assert leftover == ["first", "--last"]


def test_the_last_config_and_the_last_value_win(path, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(CONFIG.replace("c.seed = 0", "c.seed = 5"))
    config, _ = load_config(
        ["--config", path, "--config", str(other), "--config.train.steps=1", "--config.train.steps=2"]
    )
    assert (config.seed, config.train.steps) == (5, 2)


def test_values_take_the_type_of_their_default(path):
    config = load(
        path,
        "--config.teacher.path=/models/gemma",
        "--config.train.learning_rate=1",
        "--config.train.remat",
        "--config.train.betas=(1, 0.5)",
        "--config.workdir=1",
    )
    assert config.teacher.path == "/models/gemma"
    assert config.train.learning_rate == 1.0 and isinstance(config.train.learning_rate, float)
    assert config.train.remat is True
    assert config.train.betas == (1.0, 0.5) and isinstance(config.train.betas[0], float)
    assert config.workdir == "1"
    assert load(path, "--config.train.remat=true", "--noconfig.train.remat").train.remat is False
    assert load(path).teacher.path is None


@pytest.mark.parametrize(
    ("given", "files"),
    [
        (["a.jsonl"], ("a.jsonl",)),
        (["a.jsonl,b.csv"], ("a.jsonl", "b.csv")),
        (["my notes/a.jsonl, b.csv"], ("my notes/a.jsonl", "b.csv")),
        (["('a,b.jsonl', 'c.csv')"], ("a,b.jsonl", "c.csv")),
        (["a.jsonl", "b.csv"], ("a.jsonl", "b.csv")),
        (["/data/2024-01/a.jsonl"], ("/data/2024-01/a.jsonl",)),
        (["()"], ()),
    ],
)
def test_a_tuple_is_written_as_a_person_would(path, given, files):
    assert load(path, *(f"--config.data.files={text}" for text in given)).data.files == files


def test_the_config_is_locked(path):
    config = load(path)
    with pytest.raises(AttributeError):
        config.train.stepz = 1
    with pytest.raises(TypeError):
        config.train.steps = "many"


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--config.train.stpes=5", "--config.train.steps"),
        ("--config.learning_rate=5", "--config.train.learning_rate"),
        ("--config.teacher.lr=5", "--config.teacher.layers"),
        ("--config.trian.steps", "--config.train.steps"),
        ("--train.steps=5", "--config.train.steps"),
        ("--noconfig.train.remta", "--config.train.remat"),
    ],
)
def test_an_unknown_key_names_the_nearest(path, argument, named):
    message = fault("--config", path, argument)
    assert argument.split("=")[0].removeprefix("--no").lstrip("-") in message
    assert named in message


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.train.steps=many", "expected int, like the default 100"),
        ("--config.train.steps=1.5", "expected int"),
        ("--config.train.learning_rate=fast", "expected float"),
        ("--config.train.remat=perhaps", "expected bool"),
        ("--config.train.betas=a,b", "expected a tuple of float"),
        ("--config.data.kinds=[root", "expected tuple"),
        ("--config.train={}", "is a section"),
        ("--config.train.nothing=1", "placeholder"),
        ("--config.train.steps", "has no value"),
        ("--noconfig.train.steps", "on/off"),
    ],
)
def test_a_wrong_type_says_what_was_expected(path, argument, expected):
    message = fault("--config", path, argument)
    assert expected in message
    assert argument.split("=")[0].removeprefix("--no").lstrip("-") in message


def test_no_config_and_a_missing_file(path, tmp_path):
    assert "--config FILE" in fault("--config.seed=1")
    assert "--config FILE" in fault("--config")
    assert f"did you mean '{path}'?" in fault("--config", str(tmp_path / "smal.py"))
    assert "no config file" in fault("--config", str(tmp_path / "nowhere" / "x.py"))
    (tmp_path / "notes.txt").write_text("")
    assert "end in .py" in fault("--config", str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def get_config(:\n", "line 1"),
        ("x = 1\n", "defines no get_config()"),
        ("def get_config():\n    return 3\n", "must return"),
        ("def get_config():\n    x = 1\n    return undefined\n", "line 3: NameError"),
        ("def get_config():\n    return open('/no/such/file')\n", "line 2: FileNotFoundError"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError"),
        ("def get_config():\n    raise TypeError('deep')\n", "line 2: TypeError: deep"),
        ("def get_config(size):\n    return size\n", "needs an argument"),
    ],
)
def test_a_broken_config_file_names_its_line(tmp_path, source, said):
    file = tmp_path / "broken.py"
    file.write_text(source)
    message = fault("--config", str(file))
    assert str(file) in message and said in message


def test_an_argument_for_a_config_that_takes_none(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n")
    assert "takes no argument" in fault("--config", f"{file}:smoke")


def test_flatten_and_hash(path):
    config = load(path)
    leaves = flatten(config)
    assert leaves["train.steps"] == 100 and leaves["teacher.path"] is None and leaves["data.files"] == ()
    assert list(leaves) == sorted(leaves)
    assert config_hash(config) == config_hash(load(path))
    assert config_hash(config.train) != config_hash(load(path, "--config.train.steps=101").train)
    assert config_hash({"b": 1, "a": (1, 2)}, "x") == config_hash({"a": [1, 2], "b": 1}, "x")
    with pytest.raises(TypeError):
        config_hash(object())


def test_the_hash_is_the_same_in_another_process(path):
    code = f"from distil_jax.config import *; print(config_hash(load_config_file({path!r})))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == config_hash(load_config_file(path))


def test_reads_are_tracked_key_by_key(path):
    config = track_reads(load(path))
    everything = config.unread()
    assert everything == sorted(flatten(config))
    str(config), repr(config), config.to_dict(), config_hash(config), flatten(config), config.train, "seed" in config
    assert config.unread() == everything
    assert config.train.steps == 100 and config["seed"] == 0 and config.teacher.get("layers") == 6
    assert dict(**config.data) == {"files": (), "kinds": ("root", "interior")}
    assert config["train.learning_rate"] == 1e-3
    assert config.unread() == [
        "teacher.path", "train.betas", "train.nothing", "train.remat", "workdir"
    ]  # fmt: skip
    with pytest.raises(AttributeError):
        config.train.stepz = 1


def test_nearest_compares_whole_names_and_their_last_parts():
    assert nearest("lr", []) == ""
    assert nearest("xyz", ["train", "run"]) == ""
    assert nearest("xyz", ["train"], cutoff=0) == " (did you mean 'train'?)"
    assert nearest("steps", ["seed", "train.steps", "export.path"]) == " (did you mean 'train.steps'?)"
    assert nearest("trian", ["run", "train", "evaluate"]) == " (did you mean 'train'?)"


def test_a_section_may_be_handed_on(path):
    assert isinstance(track_reads(load(path)).train, ConfigDict)

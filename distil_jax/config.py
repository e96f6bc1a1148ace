"""Config files: one Python function, every key known, every override checked.

A config file defines ``get_config()`` (or ``get_config(arg)``), which returns an ``ml_collections.ConfigDict``. The
command line names it and overrides its keys::

    --config configs/tiny.py:smoke --config.train.steps=100 --config.data.files=a.jsonl,b.jsonl

The library's own ``config_flags`` load the file and parse each value by the type of its default. What stands around it
here is for the person at the keyboard: an unknown key, a wrong type or a broken file becomes one `UserError` that names
the file, the key and the nearest thing that exists. How this looks from outside is in docs/configuration.md.
"""

import ast
import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from distil_jax.errors import UserError, nearest

_FILE_FLAG = re.compile(r"--?config(?:=(.*))?", re.DOTALL)
_KEY_FLAG = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)


def load_config(argv: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """Reads ``--config FILE[:ARG]`` and its ``--config.key=value`` overrides.

    Args:
      argv: the arguments after the command's name.

    Returns:
      ``(config, leftover)``: the locked config, and the positional arguments in their order.

    Raises:
      UserError: no ``--config``; no such file; a file that fails; an unknown key or flag; a value of the wrong type.
    """
    config = load_config_file(config_argument(argv))
    known = flatten(config)
    overrides, leftover = _split(list(argv), config, known)
    for key, values in overrides.items():
        _override(config, key, values)
    return config, leftover


def config_argument(argv: Sequence[str]) -> str | None:
    """The last ``FILE[:ARG]`` that ``--config FILE`` or ``--config=FILE`` names in ``argv``, or None."""
    found = None
    for i, arg in enumerate(argv):
        if match := _FILE_FLAG.fullmatch(arg):
            found = match[1] if match[1] is not None else (argv[i + 1] if i + 1 < len(argv) else "")
    return found


def load_config_file(argument: str | None) -> ConfigDict:
    """Loads ``FILE[:ARG]`` and locks the result. Raises `UserError` as `load_config` does."""
    if not argument:
        raise UserError("no config file: add --config FILE, for example --config configs/tiny.py")
    path = argument.split(":", 1)[0]
    if not Path(path).is_file():
        beside = Path(path).parent
        candidates = [str(p) for folder in {beside, Path("configs")} if folder.is_dir() for p in folder.glob("*.py")]
        raise UserError(f"no config file {path}{nearest(path, candidates)}")
    if not path.endswith(".py"):
        raise UserError(f"config file {path} is no Python file: it must define get_config() and end in .py")
    values = flags.FlagValues()
    # config_flags would run this file in the module of the one before, and find that one's get_config().
    sys.modules.pop("config_config", None)
    try:
        holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[])
        values(["distil-jax", f"--config={argument}"])
        config = holder.value
        if not isinstance(config, ConfigDict):
            # config_flags hands out a stand-in for a file that failed with an OSError; any touch raises the cause.
            config.lock  # noqa: B018
    except (Exception, SystemExit) as error:
        raise UserError(_config_file_fault(argument, path, error)) from error
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """All leaf values by dotted key, sorted by key; does not count as reading them (see `track_reads`)."""
    leaves = {}
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, FieldReference):
            value = value.get()
        if isinstance(value, ConfigDict):
            leaves.update({f"{key}.{rest}": leaf for rest, leaf in flatten(value).items()})
        else:
            leaves[str(key)] = value
    return leaves


def config_hash(*parts: Any) -> str:
    """A stable sha256 (hex) of config subtrees and plain values: the key that says whether a stage is still valid.

    Takes any mix of ConfigDict, dict, list, tuple, str, int, float, bool, None and paths. The order of keys does not
    matter; a tuple and a list of the same values are the same. Does not count as reading (see `track_reads`).
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class TrackedConfig(ConfigDict):
    """A config that remembers which of its leaf keys were read; made by `track_reads`.

    origin: the keys that stand for others, whose reading counts as that of the other (see `overlaid`).
    """

    def __init__(
        self,
        config: ConfigDict,
        prefix: str = "",
        read: set[str] | None = None,
        origin: Mapping[str, str] | None = None,
    ):
        super().__init__(type_safe=config.is_type_safe)
        # ConfigDict takes every plain assignment for a config key.
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "_read", set() if read is None else read)
        object.__setattr__(self, "_origin", origin or {})
        for key, value in config.items(preserve_field_references=True):
            if isinstance(value, ConfigDict):
                value = TrackedConfig(value, f"{prefix}{key}.", self._read, self._origin)
            self._fields[key] = value
        if config.is_locked:
            self.lock()

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if key in self._fields and not isinstance(value, ConfigDict):
            name = f"{self._prefix}{key}"
            self._read.add(self._origin.get(name, name))
        return value

    def to_dict(self, *args, **kwargs):
        # Printing or dumping a config is no use of its values.
        before = set(self._read)
        result = super().to_dict(*args, **kwargs)
        self._read.intersection_update(before)
        return result

    def unread(self) -> list[str]:
        """Dotted leaf keys (from the root) that nothing has read yet, sorted."""
        return sorted({self._prefix + key for key in flatten(self)} - self._read)


def track_reads(config: ConfigDict) -> TrackedConfig:
    """A copy of ``config`` that records reads, for ``.unread()``.

    Attribute, item, ``get`` and ``**section`` count; printing, ``to_dict``, `flatten` and `config_hash` do not.
    """
    return TrackedConfig(config)


def overlaid(config: ConfigDict, section: str, source: str) -> ConfigDict:
    """A locked copy of ``config`` in which each value under ``source`` replaces its namesake in ``section``.

    ``overlaid(c, "objective", "variants.kd")`` has the ``objective.temperature.start`` that ``variants.kd`` gives, and
    the rest of the objective as it was. In a tracked config the copy records into the same reads, and a value counts as
    read where it stands. Raises `UserError` for a key that ``section`` does not have, and for a value of another type
    than the one that it replaces.
    """
    known, given = flatten(config[section]), flatten(config[source])
    copy = ConfigDict(config.to_dict())
    for key, value in given.items():
        if key not in known:
            inside = [k for k in known if k.startswith(f"{key}.")]
            hint = f": it is a section, give keys such as {inside[0]!r}" if inside else nearest(key, known, cutoff=0)
            raise UserError(f"config.{source}.{key}: config.{section} has no key {key!r}{hint}")
        kind = type(known[key])
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise UserError(
                f"config.{source}.{key} is {value!r}: expected {kind.__name__}, like config.{section}.{key} "
                f"({known[key]!r})"
            )
        place, last = _section(copy, f"{section}.{key}")
        place[last] = value
    if isinstance(config, TrackedConfig):
        origin = {f"{section}.{key}": f"{source}.{key}" for key in given}
        copy = TrackedConfig(copy, read=config._read, origin=origin)
    return copy.lock()


# --- the command line -------------------------------------------------------------------------------------------------


def _split(argv: list[str], config: ConfigDict, known: dict[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """Sorts arguments into overrides (key -> the values given, in order) and positional leftovers."""
    overrides: dict[str, list[str]] = {}
    leftover: list[str] = []
    rest = argv.copy()
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            leftover += rest
            break
        if match := _FILE_FLAG.fullmatch(arg):
            if match[1] is None:
                rest.pop(0)
        elif match := _KEY_FLAG.fullmatch(arg):
            negated, key, value = match.groups()
            kind = _kind(config, key, known)
            if negated and (kind is not bool or value is not None):
                raise UserError(f"{arg}: only an on/off key can be negated like this; write --config.{key}=VALUE")
            if negated:
                value = "false"
            elif value is None and kind is bool:
                value = "true"
            elif value is None:
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"{arg} has no value: write --config.{key}=VALUE (default {known[key]!r})")
                value = rest.pop(0)
            overrides.setdefault(key, []).append(value)
        elif arg.startswith("-") and len(arg) > 1:
            name = arg.split("=", 1)[0]
            raise UserError(f"unknown flag {name}{nearest(name, [f'--config.{k}' for k in known], cutoff=0)}")
        else:
            leftover.append(arg)
    return overrides, leftover


def _kind(config: ConfigDict, key: str, known: dict[str, Any]) -> type:
    """The type an override of ``key`` must have. Raises `UserError` for a key that does not exist or is a section."""
    if key not in known:
        inside = [k for k in known if k.startswith(key + ".")]
        if inside:
            raise UserError(f"--config.{key} is a section, set its keys one by one, for example --config.{inside[0]}=")
        raise UserError(f"unknown key --config.{key}{nearest(key, [f'--config.{k}' for k in known], cutoff=0)}")
    section, last = _section(config, key)
    return section.get_type(last)


def _section(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The section that holds a dotted key, and the key's last part."""
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
    return config, last


def _override(config: ConfigDict, key: str, values: list[str]) -> None:
    """Sets one key from the texts given for it. Raises `UserError` for a text that is not of the default's type."""
    default = flatten(config)[key]
    kind = _kind(config, key, {key: default})
    shown = f"--config.{key}={','.join(values)}"
    if kind is type(None):
        raise UserError(
            f"{shown}: this key has no type; in the config file write config_dict.placeholder(TYPE), not None"
        )
    parsed = flags.FlagValues()
    try:
        overrides = [f"--config.{key}={_tuple_text(value) if kind is tuple else value}" for value in values]
        config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=["distil-jax", *overrides])
        parsed(["distil-jax", *overrides])
    except (flags.Error, TypeError, ValueError, SyntaxError) as error:
        raise UserError(f"{shown}: expected {kind.__name__}, like the default {default!r}") from error
    if kind is tuple:
        _check_elements(*_section(config, key), shown, default)


def _tuple_text(text: str) -> str:
    """``a.jsonl,b.jsonl`` is a tuple of two texts; what reads as Python is left to config_flags."""
    try:
        ast.literal_eval(text)
        return text
    except (ValueError, SyntaxError):
        if text[:1] in ("(", "["):
            raise
        return repr(tuple(part.strip() for part in text.split(",")))


def _check_elements(section: ConfigDict, key: str, shown: str, default: tuple) -> None:
    """A tuple whose default has elements of one type takes only that type (an int where floats stand is one)."""
    kinds = {type(element) for element in default or ()}
    if len(kinds) != 1:
        return
    kind = kinds.pop()
    value = section[key]
    if kind is float:
        value = tuple(float(v) if type(v) is int else v for v in value)
    elif kind is str:
        value = tuple(str(v) if isinstance(v, (int, float)) else v for v in value)
    if any(type(element) is not kind for element in value):
        raise UserError(f"{shown}: expected a tuple of {kind.__name__}, like the default {default!r}")
    section[key] = value


# --- the config file --------------------------------------------------------------------------------------------------


def _config_file_fault(argument: str, path: str, error: BaseException) -> str:
    """One line: which line of the config file failed, and how."""
    cause = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    if isinstance(cause, SyntaxError):
        return f"config file {cause.filename or path}, line {cause.lineno}: {cause.msg}"
    frames = traceback.extract_tb(cause.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
    where = f"config file {path}" + (f", line {lines[-1]}" if lines else "")
    if isinstance(cause, UserError):
        return f"{where}: {cause}"
    if isinstance(cause, AttributeError) and not lines:
        if "get_config" in str(cause):
            return f"{where} defines no get_config()"
        return f"{where}: get_config() must return an ml_collections.ConfigDict"
    if isinstance(cause, TypeError) and not lines and "positional argument" in str(cause):
        if ":" in argument:
            return f"{where}: its get_config() takes no argument, but {argument} passes one after the colon"
        return f"{where}: its get_config() needs an argument: --config {path}:ARGUMENT"
    return f"{where}: {type(cause).__name__}: {cause}"


def _plain(value: Any) -> Any:
    """The value as JSON types."""
    if isinstance(value, FieldReference):
        value = value.get()
    if isinstance(value, ConfigDict):
        return {str(k): _plain(v) for k, v in value.items(preserve_field_references=True)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"cannot hash a {type(value).__name__} in a config: {value!r}")


def numbers_by_name(key: str, text: str) -> dict[str, float]:
    """The value `text` of a config key, "medmcqa=2, cord19=0.25", as a dict. Raises UserError naming the key and the
    part that is no name with a number of 0 or more."""
    numbers: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not name.strip() or not 0 <= value < float("inf"):
            raise UserError(f"config.{key}: {part!r} is not NAME=NUMBER, a number of 0 or more, as in one=1.2,two=1")
        numbers[name.strip()] = value
    return numbers

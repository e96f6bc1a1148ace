"""The safetensors files of a model directory: read part by part, written in shards with an index."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from distil_jax.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "BF16", "F16")
# The text tower under its historical names; the first prefix that matches is replaced.
PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.", ""))
NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
BUFFER = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # in old Llama files; recomputed from config


def read_json(path: Path, need: str) -> dict:
    """The object in a JSON file. Raises UserError if there is none; `need` says why it is needed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {need}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where an object is expected; fetch the file again")
    return value


def write_json(path: Path, value: dict):
    """Sorted keys and a final newline, so that equal values are equal files."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: str
    name: str  # in the file
    dtype: str  # safetensors' word for it
    shape: tuple[int, ...]


class TensorFiles:
    """The text tower's tensors of a directory under their canonical names ("model.layers.0.mlp.up_proj.weight").

    Iterating gives the names file by file, in the order in which they lie. A file is open only while something is read
    from it, because the pages of a mapped file count as this process' memory until it is closed. Vision weights are
    passed over. Raises UserError, naming the file, for weights that are missing, pickled or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.places: dict[str, Stored] = {}
        for file, listed in self._files():
            with self._open(file) as handle:
                lying = handle.offset_keys()
                if lost := sorted(set(listed or ()) - set(lying)):
                    raise UserError(
                        f"{directory / file}: tensor {lost[0]!r} is listed in {INDEX} but not in the file; "
                        "fetch both again"
                    )
                for name in lying if listed is None else sorted(listed, key=lying.index):
                    tensor = handle.get_slice(name)
                    self._place(Stored(file, name, tensor.get_dtype(), tuple(tensor.get_shape())))

    def _files(self) -> list[tuple[str, list[str] | None]]:
        """The weight files, each with the names that the index expects in it (None: no index)."""
        if (self.directory / INDEX).exists():
            weight_map = read_json(self.directory / INDEX, "it lists the tensors").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{self.directory / INDEX} has no weight_map; fetch the file again")
            by_file: dict[str, list[str]] = {}
            for name, file in weight_map.items():
                by_file.setdefault(str(file), []).append(name)
            for file in sorted(by_file):
                if Path(file).name != file or not (self.directory / file).is_file():
                    raise UserError(f"{self.directory / INDEX} names {file!r}, which is not there; fetch that file")
            return sorted(by_file.items())
        if (self.directory / SINGLE).exists():
            return [(SINGLE, None)]
        pickles = sorted(p.name for p in self.directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise UserError(
                f"{self.directory} holds its weights only as a pickle ({pickles[0]}), which can run code and is never "
                "opened; save it as safetensors with transformers first, or use a release that has them"
            )
        raise UserError(f"{self.directory} holds no {SINGLE} and no {INDEX}; fetch the weights")

    @contextlib.contextmanager
    def _open(self, file: str):
        try:
            with safetensors.safe_open(self.directory / file, framework="numpy") as handle:
                yield handle
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{self.directory / file} is no whole safetensors file ({error}): a broken download or a Git LFS "
                "pointer; fetch it again"
            ) from error

    def _place(self, stored: Stored):
        canonical = stored.name
        for prefix, replacement in PREFIXES:
            if canonical.startswith(prefix):
                canonical = replacement + canonical.removeprefix(prefix)
                break
        if NOT_TEXT.match(stored.name) or BUFFER.fullmatch(canonical):
            return
        if canonical in self.places:
            raise UserError(
                f"{self.directory}: {stored.name!r} and {self.places[canonical].name!r} are the same tensor under two "
                "names; keep the files of one export only"
            )
        self.places[canonical] = stored

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def where(self, name: str) -> str:
        """File and stored name of a tensor, for an error."""
        return f"{self.directory / self.places[name].file}: tensor {self.places[name].name!r}"

    def drop(self, name: str):
        """Forgets a tensor."""
        del self.places[name]

    def rename(self, name: str, to: str):
        """Lets a tensor serve under another canonical name."""
        self.places[to] = self.places.pop(name)

    def read(self, name: str, parts: Iterable[tuple[slice, ...]]) -> list[np.ndarray]:
        """Parts of a tensor, each copied to host memory in the stored dtype; nothing else is."""
        stored = self.places[name]
        with self._open(stored.file) as handle:
            tensor = handle.get_slice(stored.name)
            return [tensor[part] for part in parts]

    def equal(self, one: str, other: str, rows: int = 2048) -> bool:
        """Whether two matrices hold the same numbers, compared a block of rows at a time."""
        shape = self.places[one].shape
        if shape != self.places[other].shape:
            return False
        blocks = ((slice(start, min(start + rows, shape[0])),) for start in range(0, shape[0], rows))
        return all(np.array_equal(*(self.read(name, [block])[0] for name in (one, other))) for block in blocks)

    def check(self, expected: dict[str, tuple[int, ...]]):
        """Raises UserError unless the tensors are exactly those expected, by name and shape, in a float dtype."""
        if missing := [name for name in expected if name not in self.places]:
            raise UserError(
                f"{self.directory}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} tensors are); "
                "the files are incomplete or do not belong to this config.json"
            )
        if unexpected := sorted(set(self.places) - set(expected)):
            raise UserError(
                f"{self.where(unexpected[0])} has no place in the model of this config.json "
                f"({len(unexpected)} such tensors); check model_type and num_hidden_layers"
            )
        for name, shape in expected.items():
            stored = self.places[name]
            if stored.shape != tuple(shape):
                raise UserError(
                    f"{self.where(name)} has shape {list(stored.shape)}, config.json asks for {list(shape)}; the files "
                    "do not belong together"
                )
            if stored.dtype not in FLOATS:
                raise UserError(
                    f"{self.where(name)} is stored as {stored.dtype}; quantised weights are not supported, use the "
                    "float release"
                )


def write_tensors(tensors: Iterable[tuple[str, np.ndarray]], directory: Path, shard_bytes: int):
    """Writes one file, or several of at most `shard_bytes` with an index, holding one file's tensors at a time.

    Raises OSError, as for a full disk.
    """
    files: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    pending_bytes = total = 0

    def flush():
        try:
            safetensors.numpy.save_file(pending, directory / f"part-{len(files)}", metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from error
        files.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        # safetensors writes memory as it lies and ignores strides: a transposed view must be copied first
        pending[name] = _contiguous(tensor)
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (directory / "part-0").rename(directory / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (directory / f"part-{i}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _contiguous(tensor: np.ndarray) -> np.ndarray:
    """The tensor in C order. A transposed matrix is copied 16 columns at a time, in steps that the caches hold: four
    times faster than numpy's own copy."""
    if tensor.ndim != 2 or not tensor.flags.f_contiguous:
        return np.ascontiguousarray(tensor)
    copy = np.empty(tensor.shape, tensor.dtype)
    words = f"u{tensor.itemsize}"  # numpy copies bfloat16 one number at a time
    into, of = copy.view(words), tensor.T.view(words).T
    for start in range(0, tensor.shape[1], 16):
        into[:, start : start + 16] = of[:, start : start + 16]
    return copy

"""Models from and to Hugging Face directories, which transformers, vLLM and the llama.cpp converter load.

Reading goes parameter by parameter: the tensors of all layers fill one stacked host array, which moves to its device
shards before the next is touched, so peak host memory is the largest stacked parameter. Pickles are never opened and no
remote code runs. The name table of the family (`Model.names`) serves both directions.
"""

import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from distil_jax.errors import UserError
from distil_jax.models.config import DecoderConfig
from distil_jax.models.decoder import Model, Params, Weight
from distil_jax.models.gemma3 import Gemma3, Gemma3Config
from distil_jax.models.llama import Llama, LlamaConfig
from distil_jax.models.tensors import TensorFiles, read_json, write_json, write_tensors

FAMILIES = {
    "llama": (Llama, LlamaConfig),
    "gemma3_text": (Gemma3, Gemma3Config),
    "gemma3": (Gemma3, Gemma3Config),  # the vision wrapper; its text tower is read
}
DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5_000_000_000
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

log = logging.getLogger(__name__)


def model_from_config(config: Mapping | DecoderConfig) -> Model:
    """A model from a config dataclass or from the dict of a config.json ("model_type" chooses the family).

    Raises UserError for an architecture or an option that is not supported.
    """
    for model, dataclass in FAMILIES.values():
        if isinstance(config, dataclass):
            return model(config)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"config.json: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise UserError("config.json: the weights are quantised (quantization_config); use the float release")
    model, dataclass = FAMILIES[kind]
    return model(dataclass.from_hf(config))


def load_model(path_or_id: str | os.PathLike) -> Model:
    """The model that a directory (or hub id) describes, without its weights. Raises UserError as `load_pretrained`."""
    directory = resolve(path_or_id)
    return model_from_config(read_json(directory / "config.json", "a model directory needs it, fetch it too"))


def load_pretrained(path_or_id: str | os.PathLike, dtype="float32", mesh=None) -> tuple[Model, Params]:
    """Reads a model from a local directory or, by "owner/name", from the Hugging Face hub.

    dtype: of the parameters in memory, "float32", "bfloat16" or "float16", whatever is stored.
    mesh: places every parameter by `distil_jax.sharding.param_shardings(model, mesh)`; None: the default device.
    Returns (model, params). Raises UserError if the directory, its config or a tensor cannot be used, naming it.
    """
    dtype = _float_dtype(dtype)
    directory = resolve(path_or_id)
    model = load_model(directory)
    with TensorFiles(directory) as files:
        model = _settle_head(model, files)
        files.check(
            {name: weight.hf_shape(shape) for weight, leaf in _leaves(model) for name, shape in _names(weight, leaf)}
        )
        return model, _read_params(model, files, dtype, mesh)


def save_pretrained(
    model: Model,
    params: Params,
    directory: str | os.PathLike,
    tokenizer=None,
    dtype=None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a Hugging Face directory: config.json, generation_config.json, safetensors, and the tokenizer if given.

    tokenizer: anything with transformers' `save_pretrained`; its bos, eos and pad ids go into both configs.
    dtype: of the stored weights (None: that of the parameters). shard_bytes: largest weight file, in bytes.
    All is written beside `directory` and renamed into place, so the final name never holds half a model; a model that
    was there before is replaced. In a run of several processes all must call it; the first one writes.
    Raises UserError if the directory holds something that is no model, or the tokenizer has ids beyond the vocabulary.
    """
    target = Path(directory).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not (target / "config.json").is_file():
        raise UserError(f"{target} exists and is no model directory; choose another name or remove it")
    # Not len(tokenizer): Gemma's has an image token beyond the rows of the text models.
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{target}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size} rows; "
            "save the tokenizer that the model was trained with"
        )
    dtype = _float_dtype(dtype or params["embedding"].dtype)
    tensors = _hf_tensors(model, params, dtype)
    if jax.process_index() == 0:
        ids = _special_ids(model.config, tokenizer)
        config = {"architectures": [model.config.architecture], "model_type": model.config.model_type}
        config |= model.config.to_hf() | ids | {"dtype": dtype.name, "use_cache": True}
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        try:
            write_tensors(tensors, partial, shard_bytes)
            write_json(partial / "config.json", config)
            write_json(partial / "generation_config.json", {"_from_model_config": True} | ids)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            _replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    else:
        for _ in tensors:  # take part in gathering the shards
            pass
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"saved {target}")
    return target


def _float_dtype(dtype) -> np.dtype:
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} cannot hold weights here; choose one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def resolve(path_or_id: str | os.PathLike) -> Path:
    """The local directory of a model, downloaded if it is a hub id."""
    path, name = Path(path_or_id).expanduser(), os.fspath(path_or_id)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file; give the directory that holds config.json and the safetensors files")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(f"{name}: no such directory, and no hub id (owner/name) either; check the path")
    import huggingface_hub  # a local directory needs no network and no client

    try:
        patterns = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]  # no pickles
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the client raises its own errors, its HTTP library's, ValueError and OSError alike
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(
            f"{name}: no local directory, and the hub did not give it ({type(error).__name__}: {reason}); check the "
            "name, accept the model's licence on the hub and set HF_TOKEN, or give a local directory"
        ) from error


def _settle_head(model: Model, files: TensorFiles) -> Model:
    """Drops the duplicate head of a tied model; a head that differs is kept, untied, as transformers does."""
    if not model.config.tie_word_embeddings or HEAD not in files:
        return model
    if EMBEDDING not in files:
        files.rename(HEAD, EMBEDDING)
    elif files.equal(HEAD, EMBEDDING):
        files.drop(HEAD)
    else:
        log.warning(
            "%s: config.json ties the head to the embedding, but the stored %s differs from it; it is used, untied. "
            'Set "tie_word_embeddings" to false in config.json if that is meant.',
            files.directory,
            HEAD,
        )
        return type(model)(dataclasses.replace(model.config, tie_word_embeddings=False))
    return model


def _leaves(model: Model) -> list[tuple[Weight, jax.ShapeDtypeStruct]]:
    """Each row of the name table with the parameter that it fills."""
    abstract = model.abstract_params()
    return [(weight, _get(abstract, weight.path)) for weight in model.weights]


def _names(weight: Weight, leaf) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of one parameter in layer order, each with its shape on our side."""
    if not weight.stacked:
        return [(weight.name, leaf.shape)]
    return [(weight.name.format(layer), leaf.shape[1:]) for layer in range(leaf.shape[0])]


def _get(tree: Params, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Params, path: tuple[str, ...], value):
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _read_params(model: Model, files: TensorFiles, dtype: np.dtype, mesh) -> Params:
    shardings = None
    if mesh is not None:
        from distil_jax.sharding import param_shardings  # a room above this one; only a mesh needs it

        shardings = param_shardings(model, mesh)
    params: Params = {}
    for weight, leaf in _leaves(model):
        host = np.empty(leaf.shape, dtype)
        for layer, (name, shape) in enumerate(_names(weight, leaf)):
            into = host[layer] if weight.stacked else host
            into[...] = weight.read(files.read(name), shape)
        if shardings is None:
            value = jnp.asarray(host)
        else:  # each process cuts out the shards of its own devices; nothing is sent between processes
            sharding = _get(shardings, weight.path)
            value = jax.make_array_from_callback(leaf.shape, sharding, lambda index, host=host: host[index])
        _put(params, weight.path, value)
    return params


def _hf_tensors(model: Model, params: Params, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a Hugging Face file in the order of the name table; one parameter at a time is on the host."""
    for weight, leaf in _leaves(model):
        value = _get(params, weight.path)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            from jax.experimental import multihost_utils

            value = multihost_utils.process_allgather(value, tiled=True)
        host = np.asarray(value)
        for layer, (name, _) in enumerate(_names(weight, leaf)):
            yield name, weight.write(host[layer] if weight.stacked else host).astype(dtype)


def _special_ids(config: DecoderConfig, tokenizer) -> dict:
    """bos, eos and pad ids: the tokenizer's where it has them, but a config's list of eos ids that holds it stays."""
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(config, key), getattr(tokenizer, key, None)
        keep = theirs is None or (isinstance(ours, tuple) and theirs in ours)
        ids[key] = (list(ours) if isinstance(ours, tuple) else ours) if keep else int(theirs)
    return ids


def _replace(partial: Path, target: Path):
    """Renames `partial` to `target`; an earlier model steps aside first and is removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)

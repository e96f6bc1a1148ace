"""Models from and to Hugging Face directories, which transformers, vLLM and the llama.cpp converter load.

The name table of the family (`Model.names`) serves both directions. Pickles are never opened and no remote code runs.
"""

import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from distil_jax import hosts
from distil_jax.errors import UserError
from distil_jax.manifest import replace_folder
from distil_jax.models import shards
from distil_jax.models.config import DecoderConfig
from distil_jax.models.decoder import Model, Params
from distil_jax.models.download import config_file, resolve
from distil_jax.models.gemma3 import Gemma3, Gemma3Config
from distil_jax.models.llama import Llama, LlamaConfig
from distil_jax.models.lora import dense
from distil_jax.models.tensors import TensorFiles, read_json, write_json, write_tensors
from distil_jax.sharding import Rules, param_shardings, to_host

FAMILIES = {
    "llama": (Llama, LlamaConfig),
    "mistral": (Llama, LlamaConfig),  # where its window hides nothing; written as "llama"
    "gemma3_text": (Gemma3, Gemma3Config),
    "gemma3": (Gemma3, Gemma3Config),  # the vision wrapper; its text tower is read
}
# Near relatives, and what sets them apart.
OTHERS = {
    "gemma": "Gemma 1 has no head norms and another order of norms",
    "gemma2": "Gemma 2 caps its logits and has no head norms",
    "gemma3n": "Gemma 3n has per-layer embeddings",
    "granite": "Granite multiplies residuals, embedding and logits by factors",
    "llama4": "Llama 4 is a mixture of experts",
    "ministral": "Ministral mixes sliding and full layers",
    "mixtral": "Mixtral is a mixture of experts",
    "mllama": "its layers cross-attend to images",
    "phi3": "Phi 3 fuses its projections",
    "qwen2": "Qwen 2 has biases on q, k and v but not on o",
    "qwen3": "Qwen 3 has head norms in a Llama block",
    "smollm3": "SmolLM 3 has layers without rotary positions; SmolLM 1 and 2 are of type 'llama' and are read",
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
        why = f" ({OTHERS[kind]})" if kind in OTHERS else ""
        raise UserError(f"config.json: model_type {kind!r} is not supported{why}; supported are {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise UserError("config.json: the weights are quantised (quantization_config); use the float release")
    model, dataclass = FAMILIES[kind]
    return model(dataclass.from_hf(config))


def load_model(path_or_id: str | os.PathLike, revision: str | None = None) -> Model:
    """The model that a directory (or hub id) describes, without its weights. Raises UserError as `load_pretrained`.

    Its eos_token_id is that of generation_config.json where this file has one: what stops generation in transformers.
    """
    directory = resolve(path_or_id, revision)
    raw = read_json(directory / "config.json", "a model directory needs it, fetch it too")
    try:
        model = model_from_config(raw)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    if "auto_map" in raw:
        log.warning("%s: auto_map in config.json names code of the repository; it is not run", directory)
    generation = directory / "generation_config.json"
    stops = read_json(generation, "").get("eos_token_id") if generation.exists() else None
    if stops is None:
        return model
    return type(model)(dataclasses.replace(model.config, eos_token_id=stops))


def published_config(hub_id: str) -> dict:
    """The config.json of a repository on the hub, fetched alone. Raises UserError if it cannot be had."""
    return read_json(config_file(hub_id), "fetch it again")


def load_pretrained(
    path_or_id: str | os.PathLike, dtype="float32", mesh=None, revision: str | None = None, rules: Rules | None = None
) -> tuple[Model, Params]:
    """Reads a model from a local directory or, by "owner/name" or "owner/name@revision", from the Hugging Face hub.

    dtype: of the parameters in memory, "float32", "bfloat16" or "float16", whatever is stored.
    mesh: places every parameter by `distil_jax.sharding.param_shardings(model, mesh, rules)`; None: the default device.
    revision: branch, tag or commit of the hub's repository, in place of @revision.
    Returns (model, params). Raises UserError if the directory, its config or a tensor cannot be used, naming it.
    """
    dtype = _float_dtype(dtype)
    directory = resolve(path_or_id, revision)
    model = load_model(directory)
    files = TensorFiles(directory)
    model = _settle_head(model, files)
    files.check(
        {
            name: weight.hf_shape(shards.layer_shape(weight, leaf.shape))
            for weight, leaf in shards.leaves(model)
            for name in shards.names(weight, leaf.shape)
        }
    )
    shardings = None
    if mesh is not None:
        shardings = param_shardings(model, mesh, rules)
    return model, shards.read_params(model, files, dtype, shardings)


def save_pretrained(
    model: Model,
    params: Params,
    directory: str | os.PathLike,
    tokenizer=None,
    dtype=None,
    shard_bytes: int = SHARD_BYTES,
    generation_config: Mapping | None = None,
) -> Path:
    """Writes a Hugging Face directory: config.json, generation_config.json, safetensors, and the tokenizer if given.

    tokenizer: anything with transformers' `save_pretrained`; its bos, eos and pad ids go into both configs.
    params: kernels in 8 bits or with an adapter are spelled out, one at a time.
    dtype: of the stored weights (None: that of the parameters). shard_bytes: largest weight file, in bytes.
    generation_config: sampling options to keep, such as those of the model it was trained from; our special ids win.
    All is written beside `directory` and renamed into place, so the final name never holds half a model; a model that
    was there before is replaced. In a run of several processes all must call it; the first one writes.
    Raises UserError if the directory holds something that is no model, the tokenizer has ids beyond the vocabulary, or
    the disk is full; the directory is then as it was before.
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
    if hosts.is_first_process():
        ids = _special_ids(model.config, tokenizer)
        config = {"architectures": [model.config.architecture], "model_type": model.config.model_type}
        config |= model.config.to_hf() | ids | {"dtype": dtype.name, "use_cache": True}
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        try:
            write_tensors(tensors, partial, shard_bytes)
            write_json(partial / "config.json", config)
            write_json(partial / "generation_config.json", _generation(ids, generation_config))
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            replace_folder(partial, target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"{target}: no room to write the model ({error.strerror}); nothing was kept") from error
            raise
    else:
        for _ in tensors:  # take part in gathering the shards
            pass
    hosts.barrier(f"saved {target}")
    return target


def _float_dtype(dtype) -> np.dtype:
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} cannot hold weights here; choose one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def _settle_head(model: Model, files: TensorFiles) -> Model:
    """Drops the duplicate head of a tied model; a head that differs is kept, untied, as transformers does."""
    if not model.config.tie_word_embeddings and HEAD not in files and EMBEDDING in files:
        raise UserError(
            f"{files.directory}: tensor {HEAD!r} is missing and config.json does not tie it to the embedding; fetch "
            'all files, or set "tie_word_embeddings" to true if the head is the embedding'
        )
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


def _hf_tensors(model: Model, params: Params, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a Hugging Face file in the order of the name table; one parameter at a time is on the host."""
    for weight, leaf in shards.leaves(model):
        value = dense(shards.get(params, weight.path))
        host = to_host(value)
        for layer, name in enumerate(shards.names(weight, leaf.shape)):
            yield name, weight.write(host[layer] if weight.stacked else host).astype(dtype, copy=False)


def _special_ids(config: DecoderConfig, tokenizer) -> dict:
    """bos, eos and pad ids: the tokenizer's where it has them, but a config's list of eos ids that holds it stays."""
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(config, key), getattr(tokenizer, key, None)
        keep = theirs is None or (isinstance(ours, tuple) and theirs in ours)
        ids[key] = (list(ours) if isinstance(ours, tuple) else ours) if keep else int(theirs)
    return ids


def _generation(ids: dict, source: Mapping | None) -> dict:
    """generation_config.json: the settings of `source` under our special ids. A list of end tokens of its own that
    holds ours is kept: an instruct model ends its turn with another token than its text."""
    ids = {key: value for key, value in ids.items() if value is not None}
    if source is None:
        return {"_from_model_config": True} | ids
    ends = source.get("eos_token_id")
    if isinstance(ends, list) and ids.get("eos_token_id") in ends:
        ids["eos_token_id"] = ends
    # With the first of these transformers would derive all of it anew.
    dropped = ("_from_model_config", "transformers_version")
    return {key: value for key, value in source.items() if key not in dropped} | ids

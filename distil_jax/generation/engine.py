"""Batches of prompts through prefill and decode, on one device or a mesh.

The host sees one array of tokens per step. It asks for step n + 1 before it reads step n, so that the device does not
wait for it; what a finished prompt is given after its stop token is thrown away.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distil_jax import sharding
from distil_jax.generation.sampling import Sampling, choose
from distil_jax.losses.vocabulary import text_rows
from distil_jax.models import cache
from distil_jax.models.layers import unembed


def steps(
    model: Any,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    places: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """The next token of every prompt, int32 [B], `max_new_tokens` times; close the iterator when enough is seen.

    model: ids from its `text_vocab_size` on are never chosen (`Model.with_tokenizer` tells it where they end).
    prompts: token ids, of any lengths from 1. places: what distinguishes the random draws of the prompts (None: their
    order).
    """
    params = jax.tree.map(jnp.asarray, params)  # arrays of the host too are placed once
    mesh = _mesh_of(params)
    rows = _bucket(len(prompts))
    parts = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
    rows = -(-rows // parts) * parts
    columns = _bucket(max(map(len, prompts)))
    tokens = np.zeros((rows, columns), np.int32)
    start = np.full(rows, columns - 1, np.int32)  # rows that only fill the batch read one token
    keys = np.zeros(rows, np.uint32)
    for row, ids in enumerate(prompts):
        start[row] = columns - len(ids)
        tokens[row, start[row] :] = ids
        keys[row] = places[row] if places is not None else row
    tokens, start, keys = _place((tokens, start, keys), mesh)
    # Seed and step are arrays, the rest of the sampling shapes the program.
    seed, how = np.uint32(sampling.seed % 2**32), _unseeded(sampling)
    capacity = _bucket(columns + max_new_tokens)
    token_B, stored = _first(model, how, capacity, mesh, params, tokens, start, keys, seed)
    yield np.asarray(token_B)[: len(prompts)]  # at once, before anything of the decoding is traced or compiled
    if mesh is None and jax.tree.leaves(params)[0].devices().pop().platform == "cpu":
        params = cache.layer_views(params)
    before = None
    for step in range(1, max_new_tokens):
        token_B, stored = _next(model, how, mesh, params, stored, token_B, keys, seed, np.int32(step))
        if before is not None:
            yield np.asarray(before)[: len(prompts)]
        before = token_B
    if before is not None:
        yield np.asarray(before)[: len(prompts)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _first(model, sampling, capacity, mesh, params, tokens_BxL, start_B, keys_B, seed):
    hidden_BxD, stored = cache.prefill(model, params, tokens_BxL, start_B, capacity)
    return _choose(model, sampling, mesh, params, hidden_BxD, keys_B, seed, 0), stored


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _next(model, sampling, mesh, params, stored, token_B, keys_B, seed, step):
    hidden_BxD, stored = cache.decode(model, params, stored, token_B)
    return _choose(model, sampling, mesh, params, hidden_BxD, keys_B, seed, step), stored


def _choose(model, sampling, mesh, params, hidden_BxD, keys_B, seed, step):
    logits_VxB = text_rows(unembed(model.unembedding(params), hidden_BxD), model.config.text_vocab_size)
    keys_B = jax.vmap(lambda key: jax.random.fold_in(jax.random.key(seed), key))(keys_B)
    token_B = choose(logits_VxB, sampling, keys_B, step)
    # Whole on every device, so that each host of several can read it.
    return token_B if mesh is None else jax.lax.with_sharding_constraint(token_B, sharding.replicated(mesh))


def _unseeded(sampling: Sampling) -> Sampling:
    return Sampling(sampling.temperature, sampling.top_k, sampling.top_p)


def _bucket(size: int) -> int:
    """The next power of two, above 256 the next multiple of 256: few shapes to compile, little to compute in vain."""
    return 1 << (size - 1).bit_length() if size <= 256 else -(-size // 256) * 256


def _mesh_of(params: Any) -> Mesh | None:
    """The mesh that the parameters lie on, if they lie on one."""
    placed = jax.tree.leaves(params)[0].sharding
    return placed.mesh if isinstance(placed, NamedSharding) else None


def _place(arrays, mesh: Mesh | None):
    return jax.device_put(arrays, sharding.batch_sharding(mesh) if mesh else None)

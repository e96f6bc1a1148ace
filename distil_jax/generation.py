"""Greedy continuation of prompts, one jitted loop for a whole batch.

Every step runs the model over the whole buffer of prompt and answer, so it is exact and simple and right for short
answers; a key/value cache is the next step for this room.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distil_jax.errors import UserError
from distil_jax.losses.kd import mask_rows
from distil_jax.tokens.bytes import ByteTable


def generate(model: Any, params: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
    """The most likely continuation of each prompt, up to end of sequence or `max_new_tokens`.

    tokenizer: a ByteTable, or what `ByteTable.from_tokenizer` takes. Prompts are text: a control token's name in them
    stays text; the beginning-of-sequence token is put before them if the vocabulary has one. Bytes that are no UTF-8
    (an answer cut in the middle of a character) show as U+FFFD.

    Raises UserError for an empty list, or a prompt that leaves no room in the model's context.
    """
    table = tokenizer if isinstance(tokenizer, ByteTable) else ByteTable.from_tokenizer(tokenizer)
    if not prompts:
        raise UserError("no prompt to continue")
    bos = [table.roles["bos"]] if "bos" in table.roles else []
    encoded = [np.concatenate([np.array(bos, np.int32), ids]) for ids in table.encode_batch(list(prompts))]
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    room = model.config.max_position_embeddings
    for prompt, length in zip(prompts, lengths, strict=True):
        if length == 0 or length + max_new_tokens > room:
            raise UserError(
                f"prompt {prompt[:40]!r} has {length} tokens; it needs at least 1 and, with {max_new_tokens} new ones, "
                f"at most the context of {room}"
            )
    tokens = np.zeros((len(encoded), int(lengths.max()) + max_new_tokens), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    eos = model.config.eos_token_id
    stops = jnp.asarray([eos] if isinstance(eos, int) else list(eos or [-1]), jnp.int32)
    text_vocab = min(model.config.text_vocab_size, table.vocab_size)
    out, ends = _continue(model, text_vocab, max_new_tokens, params, jnp.asarray(tokens), jnp.asarray(lengths), stops)
    out, ends = np.asarray(out), np.asarray(ends)
    return [
        table.decode_bytes(row[start:end][table.is_text[row[start:end]]]).decode("utf-8", errors="replace")
        for row, start, end in zip(out, lengths, ends, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _continue(model, text_vocab, max_new_tokens, params, tokens_BxL, lengths_B, stops):
    """Returns the filled buffer and where each row ends (before its stop token)."""
    unembedding = model.unembedding(params)
    rows = jnp.arange(tokens_BxL.shape[0])

    def unfinished(carry):
        _, _, stopped_B, step = carry
        return (step < max_new_tokens) & ~jnp.all(stopped_B)

    def body(carry):
        tokens_BxL, ends_B, stopped_B, step = carry
        segment_ids = (jnp.arange(tokens_BxL.shape[1])[None] < ends_B[:, None]).astype(jnp.int32)
        hidden_BxD = model.hidden(params, tokens_BxL, segment_ids=segment_ids)[rows, ends_B - 1]
        logits_VxB = jnp.einsum("vd,bd->vb", unembedding, hidden_BxD, preferred_element_type=jnp.float32)
        chosen_B = jnp.argmax(mask_rows(logits_VxB, text_vocab), axis=0).astype(tokens_BxL.dtype)
        stopped_B = stopped_B | jnp.any(chosen_B[:, None] == stops[None], axis=1)
        at = jnp.where(stopped_B, tokens_BxL.shape[1], ends_B)  # out of bounds: dropped
        tokens_BxL = tokens_BxL.at[rows, at].set(chosen_B, mode="drop")
        return tokens_BxL, ends_B + jnp.where(stopped_B, 0, 1), stopped_B, step + 1

    stopped = jnp.zeros(tokens_BxL.shape[0], bool)
    tokens_BxL, ends_B, _, _ = jax.lax.while_loop(unfinished, body, (tokens_BxL, lengths_B, stopped, 0))
    return tokens_BxL, ends_B

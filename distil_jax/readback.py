"""Whether a Hugging Face directory is the model that was trained: weights, token ids and logits, read back.

Token ids are compared between three encoders: transformers with the tokenizer that was trained with, transformers with
the written one, and the byte table that made the training shards.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distil_jax.errors import UserError, nearest
from distil_jax.models import hub
from distil_jax.tokens.bytes import ByteTable, RoundTripError
from distil_jax.tokens.pipeline import ROLES

SCORED_DOCUMENTS = 8
ENCODED_DOCUMENTS = 1000
# What tokenizers get wrong: every Latin-1 character, forms that normalisation changes, joiners, directions, line ends,
# runs, and the names of control tokens as text.
AWKWARD_TEXTS = (
    "",
    "".join(map(chr, range(256))),
    *map(chr, range(256)),
    "e\u0301 \u00e9 A\u030a\u0323 \u1e69 s\u0323\u0307 \u0928\u093f \u0e19\u0e49\u0e33 \u1100\u1161\u11a8"
    " \ufb01 \u212b \u2126",
    "\U0001f469\u200d\u2695\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd "
    "\U0001f1e8\U0001f1ed 1\ufe0f\u20e3",
    "\u0645\u0631\u0636 \u0627\u0644\u0633\u064f\u0651\u0643\u0651\u0631\u064a "
    "\u202eabc\u202c \u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u200f(12)",
    "one\r\ntwo\rthree\n\nfour\n\n\n\n\tfive\t\t six\x0b\x0cseven\u0085\u2028eight",
    "3.14159265358979323846264338327950288 0000000 1,000,000.50 12:34:56 2024-09-25 ٣٧٫٥",
    *(" " * n for n in (1, 2, 3, 4, 7, 8, 16, 31, 64, 100)),
    "a b  c   d    e\u00a0f\u2003g\u3000h\u200bi\u2060j\ufeffk\u00adl ",
    "37.5 °C, 5 µg/mL (≥ 2×10⁻³ mol·L⁻¹), pH 7,4 ± 0.1; α₁-antitrypsin; β‐blocker — “q.d.” ½ tab…",
    "糖尿病の診断。高血压病史。당뇨병",
    "▁marks▁of▁SentencePiece ## Ġ Ċ <0x41> <b>bold</b> <br/> &amp; \\n {{ x }} {% if %}",
    "a" * 1000 + "-" * 300 + "ab" * 200,
    "\U0010ffff\ufffd\ufffe\u0000\ud7ff\ue000",
    *(f"said {name}, {name}{name}\n{name}" for name in itertools.chain.from_iterable(ROLES.values())),
)

_WIDER = "export it with config.export.dtype bfloat16 or float32; if it is not finite there, its training failed"


def compare(
    model: Any,
    params: Any,
    directory: Path,
    *,
    tokenizer: Any,
    documents: Sequence[tuple[str, str]],
    dtype: str,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Reads `directory` back and returns how it compares with what was trained.

    model, params: what was trained. tokenizer: the transformers tokenizer that was saved. documents: held-out (prompt,
    completion) pairs. dtype: the stored one.
    Returns dtype, parameters, texts and ids (compared by the tokenizers), bos (the token that training text begins with
    and that transformers would not put in front of a text, else None), documents (scored), largest_logit_difference
    (of the stored model, computed in `dtype`, from the trained one in its own), bits_per_byte_trained and
    bits_per_byte_stored (completions of those documents).
    Raises UserError if a weight is not the trained one cast to `dtype`, bit for bit, if a text gets other ids, or if
    logits are not finite in `dtype`.
    """
    again, stored = hub.load_pretrained(directory, dtype=dtype, mesh=mesh)
    again = again.with_tokenizer(model.config.tokenizer_size)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, a), b in zip(leaves, jax.tree.leaves(stored), strict=True):
        if a.shape != b.shape or not bool(_same_bits(a, b)):
            raise _failed(directory, f"{jax.tree_util.keystr(path)} does not read back as it was written")
    texts = [prompt + completion for prompt, completion in documents[:ENCODED_DOCUMENTS]]
    table, ids = compare_tokenizers(tokenizer, directory, [*texts, *AWKWARD_TEXTS])
    bos = table.roles.get("bos")
    added = bos is None or tokenizer("a")["input_ids"][0] == bos
    scores = _score(model, params, again, stored, table, documents[:SCORED_DOCUMENTS])
    if not np.isfinite(list(scores.values())).all():
        raise UserError(f"the model gives logits that are not finite in {dtype}: {_WIDER}")
    counts = {"parameters": sum(leaf.size for _, leaf in leaves), "texts": len(texts) + len(AWKWARD_TEXTS), "ids": ids}
    return {"dtype": dtype} | counts | {"bos": None if added else tokenizer.convert_ids_to_tokens(bos)} | scores


def check_finite(params: Any, dtype: str) -> None:
    """Raises UserError if `dtype` is no float type, or for the first parameter that is not finite in it, naming it."""
    if dtype not in hub.DTYPES:
        raise UserError(f"config.export.dtype is {dtype!r}{nearest(dtype, hub.DTYPES)}; it is {', '.join(hub.DTYPES)}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not bool(_finite(leaf, dtype)):
            raise UserError(f"{jax.tree_util.keystr(path)} is not finite in {dtype}: {_WIDER}")


@functools.partial(jax.jit, static_argnums=1)
def _finite(leaf: jax.Array, dtype: str) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf.astype(dtype)))


@jax.jit
def _same_bits(trained: jax.Array, stored: jax.Array) -> jax.Array:
    """Whether `stored` is `trained` cast to its type, bit for bit."""
    bits = {2: jnp.uint16, 4: jnp.uint32}[stored.dtype.itemsize]
    a, b = (jax.lax.bitcast_convert_type(x, bits) for x in (trained.astype(stored.dtype), stored))
    return jnp.all(a == b)


def compare_tokenizers(tokenizer: Any, directory: Path, texts: Sequence[str]) -> tuple[ByteTable, int]:
    """(byte table of the written tokenizer, ids compared). Raises UserError for the first text with other ids, with or
    without what the tokenizer puts around a text, or if the chat template is not the same."""
    from transformers import AutoTokenizer

    written = AutoTokenizer.from_pretrained(directory)
    table, trained_table = ByteTable.from_tokenizer(directory), ByteTable.from_tokenizer(tokenizer)
    if table.hash != trained_table.hash:
        raise _failed(directory, "the bytes of its tokens are not those of the tokenizer that was trained with")
    if written.chat_template != tokenizer.chat_template:
        raise _failed(directory, "its chat template is not the one that its tokenizer came with")
    count = 0
    encodings = zip(table.try_encode_batch(texts), trained_table.try_encode_batch(texts), strict=True)
    for text, (a, b) in zip(texts, encodings, strict=True):
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = written(text, add_special_tokens=False)["input_ids"]
        same = before == after and tokenizer(text)["input_ids"] == written(text)["input_ids"]
        if isinstance(a, RoundTripError):  # text that training quarantines, and would again
            same &= isinstance(b, RoundTripError)
        else:
            same &= not isinstance(b, RoundTripError) and np.array_equal(a, b)
            # Where the text holds the name of a control token, transformers reads it as that token. We do not.
            if same and table.is_text[np.asarray(after, np.int64)].all():
                same = after == a.tolist()
        if not same:
            raise _failed(directory, f"its tokenizer gives other ids than training's for {text[:40]!r}")
        count += len(after)
    return table, count


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens_1xL, segment_ids):
    return model.apply(params, tokens_1xL, segment_ids)


def _score(model, params, again, stored, table: ByteTable, documents) -> dict[str, Any]:
    """Logits and bits per byte of both models, one document at a time: whole logits of a batch may not fit."""
    start = [table.roles["bos"]] if "bos" in table.roles else []
    longest = min(model.config.max_position_embeddings, again.config.max_position_embeddings)
    encoded = []
    for prompt, completion in documents:
        a, b = table.encode_batch([prompt, completion])
        encoded.append((len(start) + len(a), np.concatenate([start, a, b]).astype(np.int32)[:longest]))
    if not encoded:
        return {"documents": 0}
    length = max(len(ids) for _, ids in encoded)
    worst, nats, size = 0.0, np.zeros(2), 0
    for first, ids in encoded:
        tokens_1xL = np.pad(ids, (0, length - len(ids)))[None]
        segment_ids = (np.arange(length) < len(ids)).astype(np.int32)[None]
        logits = [
            np.asarray(_logits(m, p, tokens_1xL, segment_ids)[0, : len(ids)], np.float32)
            for m, p in ((model, params), (again, stored))
        ]
        worst = max(worst, float(np.max(np.abs(logits[0] - logits[1]))))
        learned = np.arange(max(first, 1), len(ids))  # each is predicted at the position before it
        for n, logits_LxV in enumerate(logits):
            log_p = _log_softmax(logits_LxV[learned - 1])
            nats[n] -= float(np.take_along_axis(log_p, ids[learned, None], 1).sum())
        size += int(table.lengths[ids[learned]].sum())
    trained, as_stored = (nats / np.log(2) / max(size, 1)).tolist()
    return {
        "documents": len(encoded),
        "largest_logit_difference": worst,
        "bits_per_byte_trained": trained,
        "bits_per_byte_stored": as_stored,
    }


def _log_softmax(logits_LxV: np.ndarray) -> np.ndarray:
    shifted = logits_LxV - logits_LxV.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def read_documents(file: Path) -> list[tuple[str, str]]:
    """The first held-out documents of a corpus (its documents.jsonl) as (prompt, completion)."""
    with file.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in itertools.islice(lines, ENCODED_DOCUMENTS)]
    return [(record["prompt"], record["completion"]) for record in records]


def _failed(directory: Path, what: str) -> UserError:
    return UserError(f"export to {directory} failed: {what}; nothing was put in its place, report this as a fault")

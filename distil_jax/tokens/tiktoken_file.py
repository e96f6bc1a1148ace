"""Tiktoken files (base64 of a token, a space, its rank; a line each) as a byte-level tokenizer.json.

Such a file holds the vocabulary alone: how text is split before BPE, and the control tokens, are in the code of the
model that came with it. Both are known here for a few families; for others they must be given.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distil_jax.errors import UserError, nearest

# As published in tiktoken's openai_public.py and llama-models' tokenizer.py, with plain quantifiers in place of
# possessive ones: they match the same text here, and the tokenizers library reads "{1,3}+" as a repetition.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OTHER_MEANING = re.compile(r"\{\d*,?\d*\}\+|(?<!\\)\$|(?<![\[\\])\^")


class Family(NamedTuple):
    """pattern: how text is split before BPE. special_tokens: control token -> id. ranks: tokens in the file."""

    pattern: str
    special_tokens: Mapping[str, int]
    ranks: int


def _llama3(named: Mapping[int, str]) -> dict[str, int]:
    """256 control tokens after the ranks: the named ones at their places, all others reserved and numbered through."""
    numbers = iter(range(256))
    return {named.get(n) or f"<|reserved_special_token_{next(numbers)}|>": 128_000 + n for n in range(256)}


_LLAMA3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_LLAMA31_NAMES = _LLAMA3_NAMES | {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
FAMILIES: dict[str, Family] = {
    "llama3": Family(_CL100K, _llama3(_LLAMA3_NAMES), 128_000),
    "llama3.1": Family(_CL100K, _llama3(_LLAMA31_NAMES), 128_000),  # and 3.2, 3.3
    "cl100k_base": Family(
        _CL100K,
        {
            "<|endoftext|>": 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
        100_256,
    ),
    "o200k_base": Family(_O200K, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}, 199_998),
}


def tokenizer_json(
    path: Path,
    family: str | None = None,
    *,
    pattern: str | None = None,
    special_tokens: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The tokenizer.json of a tiktoken file, by the name of a family or by its pattern and control tokens.

    A file named as a family (cl100k_base.tiktoken) needs neither. UserError, with the line, for a file that is not of
    this form, for an unknown family, and for one that the file does not belong to.
    """
    if pattern is None:
        pattern, special_tokens, expected = _family(path, family or path.stem)
    elif family is not None:
        raise UserError(f"{path}: give the tiktoken family {family!r} or a pattern, not both")
    else:
        special_tokens, expected = special_tokens or {}, None
        if found := _OTHER_MEANING.search(pattern):
            raise UserError(
                f"{path}: {found.group()!r} in the split pattern means something else to the tokenizers library: write "
                "it without possessive braces or anchors (\\A and \\z are the text's ends)"
            )
    ranks = read_ranks(path)
    if expected not in (None, len(ranks)):
        raise UserError(
            f"{path} has {len(ranks):,} tokens, {family or path.stem} has {expected:,}: name its own family"
        )
    taken = set(ranks.values())
    for name, i in special_tokens.items():
        if i in taken:
            raise UserError(f"{path}: control token {name!r} has id {i}, which another token has")
        taken.add(i)

    from transformers.convert_slow_tokenizer import TikTokenConverter  # slow to import

    class Converter(TikTokenConverter):
        load_tiktoken_bpe = staticmethod(lambda _: ranks)  # its own reader neither checks nor says where

    spec = json.loads(Converter(str(path), pattern=pattern).converted().to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": i, "content": name} | flags for name, i in special_tokens.items()]
    return spec


def _family(path: Path, name: str) -> Family:
    if name not in FAMILIES:
        raise UserError(
            f"{path} is a tiktoken file, which does not say how text is split, and {name!r} is no family known here: "
            f"use ByteTable.from_tiktoken with one of {', '.join(FAMILIES)}, or with its pattern and special_tokens"
            + nearest(name, FAMILIES)
        )
    return FAMILIES[name]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, the id. UserError, naming the line, if a token or rank is malformed or there twice."""
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            encoded, written = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(written)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}, line {number}: not the base64 of a token, a space and its rank. A tokenizer.model of "
                "SentencePiece is another format: save it as tokenizer.json with transformers' AutoTokenizer"
            ) from None
        if not token or rank < 0 or token in ranks or rank in line_of:
            what = (
                f"rank {rank} is also on line {line_of[rank]}"
                if rank in line_of
                else f"token {token!r} is also there with rank {ranks[token]}"
                if token in ranks
                else f"token {token!r} with rank {rank}"
            )
            raise UserError(f"{path}, line {number}: {what}")
        ranks[token], line_of[rank] = rank, number
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(f"{path} has no token for {len(missing)} of 256 bytes, the first 0x{missing[0]:02X}")
    return ranks

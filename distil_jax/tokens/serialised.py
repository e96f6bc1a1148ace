"""The tokenizer.json behind whatever stands for a tokenizer: a directory, a file, or an object of a library."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from distil_jax.errors import UserError
from distil_jax.tokens import tiktoken_file

NAMED_ROLES = ("bos", "eos", "pad", "unk")


def serialised(tokenizer: Any) -> tuple[str, dict[str, str]]:
    """(tokenizer.json as text, configured strings of bos, eos, pad, unk) of a tokenizer.

    tokenizer: a directory with tokenizer.json, such a file, a tiktoken file named as its family
      (cl100k_base.tiktoken), a transformers fast tokenizer or a `tokenizers.Tokenizer`. UserError for anything else.
    """
    if isinstance(tokenizer, (str, Path)):
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if path.suffix in (".model", ".tiktoken") and path.is_file():
            return json.dumps(tiktoken_file.tokenizer_json(path)), _named_in_configs(path.parent)
        if path.suffix != ".json" or not path.is_file():
            beside = path.parent / "tokenizer.model"
            raise UserError(
                f"no tokenizer.json at {tokenizer}: give the directory of a fast (tokenizers) tokenizer"
                + (f", or, if {beside} is a tiktoken file, ByteTable.from_tiktoken" if beside.is_file() else "")
            )
        return path.read_text(encoding="utf-8"), _named_in_configs(path.parent)
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.to_str(), {}
    if isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        found = {role: getattr(tokenizer, f"{role}_token", None) for role in NAMED_ROLES}
        return tokenizer.backend_tokenizer.to_str(), {role: str(token) for role, token in found.items() if token}
    raise UserError(
        f"cannot read bytes from a {type(tokenizer).__name__}: give a tokenizer directory, a transformers fast "
        "tokenizer or a tokenizers.Tokenizer"
    )


def _named_in_configs(directory: Path) -> dict[str, str]:
    """bos/eos/pad/unk strings of tokenizer_config.json, then special_tokens_map.json."""
    named: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for role in NAMED_ROLES:
            token = config.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                named.setdefault(role, token)
    return named

"""What a tokenizer.json says about itself: whether its pipeline keeps every byte, its roles, its control tokens."""

import re
from typing import Any

from distil_jax.errors import UserError

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character

# Roles a token can play, with the strings that well-known families use, in order of preference. These come before the
# configured names: instruct checkpoints configure the end of a turn as "eos", and here that is a role of its own.
ROLES: dict[str, tuple[str, ...]] = {
    "pad": ("<pad>", "<|finetune_right_pad_id|>"),
    "bos": ("<bos>", "<|begin_of_text|>"),
    "eos": ("<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "unk": ("<unk>",),
    "start_of_turn": ("<start_of_turn>", "<|im_start|>"),
    "end_of_turn": ("<end_of_turn>", "<|eot_id|>", "<|im_end|>"),
    "start_header": ("<|start_header_id|>",),
    "end_header": ("<|end_header_id|>",),
}

# Added tokens that are control tokens although some tokenizers do not mark them special. Gemma's <s> and </s> are HTML
# (strike-through), so those count only when marked.
_CONTROL = re.compile(
    r"<unused\d+>|<\|[^|\s]+\|>|<(?:start|end)_of_\w+>|<(?:pad|bos|eos|unk|mask)>|<\w+_soft_token>"
    r"|\[(?:multimodal|@BOS@|PAD|UNK|CLS|SEP|MASK)\]"
)


def find_roles(ids: dict[str, int], named: dict[str, str]) -> dict[str, int]:
    """Role -> id, for the roles that the vocabulary has. `named`: configured strings of bos, eos, pad, unk."""
    roles = {}
    for role, strings in ROLES.items():
        for text in (*strings, named.get(role)):
            if text in ids:
                roles[role] = ids[text]
                break
    return roles


def control_tokens(spec: dict[str, Any], named: dict[str, str]) -> set[str]:
    """Tokens that text must never become: marked special, named bos/eos/pad/unk, or of a well-known control form.

    Other added tokens (Gemma's runs of newlines, its HTML tags) are text with their literal bytes.
    """
    vocab = spec["model"]["vocab"]
    added = spec.get("added_tokens") or []
    control = {t["content"] for t in added if t["special"] or _CONTROL.fullmatch(t["content"])}
    control.update(text for text in named.values() if text in vocab)
    unk = spec["model"].get("unk_token")
    return control | ({unk} if unk in vocab else set())


def pipeline_kind(spec: dict[str, Any]) -> str:
    """ "byte_level" or "sentencepiece". UserError, naming the part, if the pipeline does not keep every byte."""
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"tokenizer model {model['type']} is not supported, only BPE: its tokens have no exact bytes")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"tokenizer model BPE with {key}={model[key]!r} is not supported: its bytes are not exact")
    normalizers = _members(spec.get("normalizer"), "normalizers")
    pre_tokenizers = _members(spec.get("pre_tokenizer"), "pretokenizers")
    decoders = _members(spec.get("decoder"), "decoders")
    byte_level = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
    for part in normalizers:
        _check_normalizer(part, byte_level)
    for part in pre_tokenizers:
        _check_pre_tokenizer(part, byte_level)
    for part in decoders:
        if part["type"] not in (("ByteLevel",) if byte_level else ("Replace", "ByteFallback", "Fuse", "Metaspace")):
            raise UserError(f"tokenizer decoder {part['type']} is not supported: it changes the text of the tokens")
    if byte_level:
        return "byte_level"
    if not any(part["type"] in ("Replace", "Metaspace") for part in normalizers + pre_tokenizers):
        raise UserError(
            "tokenizer is neither byte-level BPE (pre_tokenizer ByteLevel) nor SentencePiece-style "
            f"(normalizer Replace ' ' by {SPACE_MARK!r}): the bytes of its tokens are unknown"
        )
    missing = sum(f"<0x{b:02X}>" not in model["vocab"] for b in range(256))
    if not model.get("byte_fallback") or missing:
        raise UserError(
            f"tokenizer model BPE has byte_fallback={model.get('byte_fallback')} and lacks {missing} of 256 byte "
            "tokens: unknown characters would be lost"
        )
    return "sentencepiece"


def _members(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a Sequence, nested ones too, as one list."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for member in part[key] for inner in _members(member, key)]
    return [part]


def _check_normalizer(part: dict[str, Any], byte_level: bool) -> None:
    kind = part["type"]
    # NFC keeps text that is already NFC; other text fails the round trip, text by text, instead of changing silently.
    to_mark = kind == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE_MARK
    if kind != "NFC" and (byte_level or not to_mark):
        why = "it adds a space in front of text" if kind == "Prepend" else "it changes the text"
        raise UserError(f"tokenizer normalizer {kind} is not supported: {why}")


def _check_pre_tokenizer(part: dict[str, Any], byte_level: bool) -> None:
    kind = part["type"]
    if kind == "ByteLevel" and part.get("add_prefix_space", True):
        raise UserError(
            "tokenizer pre_tokenizer ByteLevel with add_prefix_space=true is not supported: it adds a space"
        )
    if kind == "Metaspace":
        scheme = part.get("prepend_scheme", "always")
        if scheme != "never" or part.get("replacement") != SPACE_MARK or byte_level:
            raise UserError(
                f"tokenizer pre_tokenizer Metaspace with prepend_scheme={scheme!r} is not supported: it adds a space"
            )
    elif kind in ("Split", "Punctuation"):
        if part.get("behavior") == "Removed":
            raise UserError(f"tokenizer pre_tokenizer {kind} with behavior=Removed is not supported: it drops text")
    elif kind not in ("ByteLevel", "Digits"):
        raise UserError(f"tokenizer pre_tokenizer {kind} is not supported: it drops or changes text")

"""What a tokenizer.json says about itself: whether its pipeline keeps every byte, its roles, its control tokens.

Rules that add a space in front of text can be undone exactly, by leaving them out (`exact_pipeline`). Rules that drop
or change characters cannot, and are refused by name (`pipeline_kind`).
"""

import re
from collections.abc import Iterable
from typing import Any

from distil_jax.errors import UserError

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
BYTE_PIECES = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}  # SentencePiece's byte fallback

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


def vocabulary(spec: dict[str, Any]) -> dict[str, int]:
    """Piece -> id of the tokenizer's model, without added tokens. UserError if a piece or an id is there twice."""
    model = spec["model"]
    if model.get("type", "BPE") != "Unigram":
        vocab = model["vocab"]
        if len(set(vocab.values())) < len(vocab):
            first: dict[int, str] = {}
            one, other, i = next(
                (first[i], piece, i) for piece, i in vocab.items() if first.setdefault(i, piece) != piece
            )
            raise UserError(f"tokenizer vocabulary gives id {i} to {one!r} and to {other!r}: its bytes are ambiguous")
        return vocab
    ids: dict[str, int] = {}
    for i, (piece, _) in enumerate(model["vocab"]):
        if ids.setdefault(piece, i) != i:
            raise UserError(f"tokenizer vocabulary holds {piece!r} twice, as ids {ids[piece]} and {i}: remove one")
    return ids


def find_roles(ids: dict[str, int], named: dict[str, str]) -> dict[str, int]:
    """Role -> id, for the roles that the vocabulary has. `named`: configured strings of bos, eos, pad, unk."""
    roles = {}
    for role, strings in ROLES.items():
        for text in (*strings, named.get(role)):
            if text in ids:
                roles[role] = ids[text]
                break
    return roles


def control_tokens(spec: dict[str, Any], vocab: dict[str, int], named: dict[str, str]) -> set[str]:
    """Tokens that text must never become: marked special, named bos/eos/pad/unk, or of a well-known control form.

    Other added tokens (Gemma's runs of newlines, its HTML tags) are text with their literal bytes.
    """
    added = spec.get("added_tokens") or []
    control = {t["content"] for t in added if t["special"] or _CONTROL.fullmatch(t["content"])}
    control.update(text for text in named.values() if text in vocab)
    model = spec["model"]
    unk = model.get("unk_token")  # BPE names it, Unigram numbers it
    if model.get("unk_id") is not None:
        unk = model["vocab"][model["unk_id"]][0]
    return control | ({unk} if unk in vocab else set())


def pipeline_kind(spec: dict[str, Any], vocab: dict[str, int]) -> str:
    """ "byte_level" or "sentencepiece". UserError, naming the part, if the pipeline does not keep every byte."""
    model = spec["model"]
    name = model.get("type", "BPE")
    if name not in ("BPE", "Unigram"):
        raise UserError(
            f"tokenizer model {name} is not supported, only BPE and Unigram: its tokens have no exact bytes"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(
                f"tokenizer model {name} with {key}={model[key]!r} is not supported: its bytes are not exact"
            )
    normalizers = _members(spec.get("normalizer"), "normalizers")
    pre_tokenizers = _members(spec.get("pre_tokenizer"), "pretokenizers")
    decoders = _members(spec.get("decoder"), "decoders")
    byte_level = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
    for part in normalizers:
        _check_normalizer(part, byte_level)
    for part in pre_tokenizers:
        _check_pre_tokenizer(part, byte_level)
    for part in decoders:
        _check_decoder(part, byte_level, prefixed=any(map(_adds_space, normalizers + pre_tokenizers)))
    if byte_level:
        return "byte_level"
    if not any(part["type"] in ("Replace", "Metaspace") for part in normalizers + pre_tokenizers):
        raise UserError(
            "tokenizer is neither byte-level (pre_tokenizer ByteLevel) nor SentencePiece-style "
            f"(normalizer Replace ' ' by {SPACE_MARK!r}, or Metaspace): the bytes of its tokens are unknown"
        )
    missing = sum(piece not in vocab for piece in BYTE_PIECES)
    if not model.get("byte_fallback") or missing:
        raise UserError(
            f"tokenizer model {name} has byte_fallback={model.get('byte_fallback')} and lacks {missing} of 256 byte "
            "tokens: unknown characters would be lost"
        )
    return "sentencepiece"


def exact_pipeline(spec: dict[str, Any], control: Iterable[str], vocab: dict[str, int]) -> dict[str, Any]:
    """The tokenizer.json by which text is encoded; `spec` itself where nothing has to change.

    A space in front of text (Prepend, Metaspace, ByteLevel with add_prefix_space) is left out: the first token would
    hold a byte that the text has not. What the stock tokenizer makes of "the" is what this one makes of " the". Added
    tokens that are text do not swallow the space around them. Unigram matches any string of its vocabulary, so the
    names of control and byte tokens in text are cut after their first character.
    """
    control = set(control)
    changed = dict(spec)
    normalizers = _members(spec.get("normalizer"), "normalizers")
    pre_tokenizers = _members(spec.get("pre_tokenizer"), "pretokenizers")
    if any(map(_adds_space, normalizers)):
        kept = [part for part in normalizers if not _adds_space(part)]
        changed["normalizer"] = {"type": "Sequence", "normalizers": kept}
    if any(map(_adds_space, pre_tokenizers)):
        pre_tokenizers = [_without_space(part) for part in pre_tokenizers]
        changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizers}
    if spec["model"].get("type") == "Unigram":
        names = sorted(text for text in {*control, *BYTE_PIECES} & vocab.keys() if len(text) > 1)
        cuts = "|".join(f"{_literal(text[0])}(?={_literal(text[1:])})" for text in names)
        if cuts:
            cut = {"type": "Split", "pattern": {"Regex": cuts}, "behavior": "Isolated", "invert": False}
            changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*pre_tokenizers, cut]}
    added = spec.get("added_tokens") or []
    if any((t["lstrip"] or t["rstrip"]) and t["content"] not in control for t in added):
        changed["added_tokens"] = [
            t if t["content"] in control else t | {"lstrip": False, "rstrip": False} for t in added
        ]
    return spec if changed == spec else changed


def _literal(text: str) -> str:
    """`text` as a pattern of the tokenizers library (Oniguruma): every character that may have a meaning escaped."""
    return re.sub(r"([^\w\s<>])", r"\\\1", text)


def _members(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a Sequence, nested ones too, as one list."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for member in part[key] for inner in _members(member, key)]
    return [part]


def _prepend_scheme(metaspace: dict[str, Any]) -> str:
    """Files from before `prepend_scheme` say add_prefix_space."""
    return metaspace.get("prepend_scheme") or ("always" if metaspace.get("add_prefix_space", True) else "never")


def _adds_space(part: dict[str, Any]) -> bool:
    match part["type"]:
        case "Prepend":
            return True
        case "Metaspace":
            return _prepend_scheme(part) != "never"
        case "ByteLevel":
            return part.get("add_prefix_space", True)
    return False


def _without_space(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    match pre_tokenizer["type"]:
        case "Metaspace":
            kept = {k: v for k, v in pre_tokenizer.items() if k != "add_prefix_space"}
            return kept | {"prepend_scheme": "never"}
        case "ByteLevel":
            return pre_tokenizer | {"add_prefix_space": False}
    return pre_tokenizer


def _check_normalizer(part: dict[str, Any], byte_level: bool) -> None:
    kind = part["type"]
    # NFC keeps text that is already NFC; other text fails the round trip, text by text, instead of changing silently.
    if kind == "NFC":
        return
    to_mark = kind == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE_MARK
    prefix = kind == "Prepend" and part["prepend"] == SPACE_MARK
    if byte_level or not (to_mark or prefix):
        what = f"{kind} of {part['prepend']!r}" if kind == "Prepend" else kind
        raise UserError(f"tokenizer normalizer {what} is not supported: it changes the text")


def _check_pre_tokenizer(part: dict[str, Any], byte_level: bool) -> None:
    kind = part["type"]
    if kind == "Metaspace":
        if part.get("replacement") != SPACE_MARK or byte_level:
            raise UserError(
                f"tokenizer pre_tokenizer Metaspace with replacement={part.get('replacement')!r} is not supported"
                + (" beside ByteLevel" if byte_level else f", only {SPACE_MARK!r}")
                + ": the bytes of its tokens are unknown"
            )
    elif kind in ("Split", "Punctuation"):
        if part.get("behavior") == "Removed":
            raise UserError(f"tokenizer pre_tokenizer {kind} with behavior=Removed is not supported: it drops text")
    elif kind not in ("ByteLevel", "Digits"):
        raise UserError(f"tokenizer pre_tokenizer {kind} is not supported: it drops or changes text")


def _check_decoder(part: dict[str, Any], byte_level: bool, prefixed: bool) -> None:
    """Nothing here uses the decoder, but one that changes text says that the tokens are not what they seem."""
    kind = part["type"]
    # A tokenizer that adds a space takes it away again.
    unprefix = kind == "Strip" and part == {"type": "Strip", "content": " ", "start": 1, "stop": 0} and prefixed
    known = ("ByteLevel",) if byte_level else ("Replace", "ByteFallback", "Fuse", "Metaspace")
    if kind not in known and not (unprefix and not byte_level):
        raise UserError(f"tokenizer decoder {kind} is not supported: it changes the text of the tokens")

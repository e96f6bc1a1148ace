"""Exact bytes of every token id: the common ground of two tokenizers.

A `ByteTable` knows, for each id of a vocabulary, the bytes it stands for, and encodes text so that the bytes of the ids
it returns are the UTF-8 bytes of the text, or raises. Two kinds are supported, in the form of the `tokenizers` library:
byte-level (GPT-2's byte alphabet: Llama 3, SmolLM2, tiktoken files) and SentencePiece-style with byte fallback, BPE
(Gemma 3, Llama 2) or Unigram. Pipelines that drop or change characters are refused by name.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from tokenizers import AddedToken, Tokenizer

from distil_jax.errors import UserError
from distil_jax.tokens import tiktoken_file
from distil_jax.tokens.pipeline import (
    BYTE_PIECES,
    SPACE_MARK,
    control_tokens,
    exact_pipeline,
    find_roles,
    pipeline_kind,
    vocabulary,
)
from distil_jax.tokens.serialised import serialised

Ids = Int32[np.ndarray, "tokens"]  # token ids of one text
PerIdInt = Int32[np.ndarray, "V"]
PerIdBool = Bool[np.ndarray, "V"]
TeacherToStudent = Int32[np.ndarray, "Vt"]
TeacherFlags = Bool[np.ndarray, "Vt"]
Bytes = UInt8[np.ndarray, "bytes"]


class RoundTripError(UserError):
    """The bytes of the tokens are not the bytes of the text (for example a literal U+2581 in text for Gemma)."""


def _gpt2_alphabet() -> dict[int, int]:
    """Printable stand-in of GPT-2's byte-level BPE -> byte, as code points (Radford et al. 2019, `bytes_to_unicode`).

    Printable Latin-1 bytes stand for themselves; the 68 others are numbered from U+0100 in the order of the bytes.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: b for b in printable} | {0x100 + i: b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _gpt2_alphabet()
_ALPHABET = frozenset(map(chr, _BYTE_OF_CHAR))


class ByteTable:
    """Bytes, kinds and roles of a vocabulary, and an encoder that never emits control tokens.

    Attributes:
      vocab_size: 1 + the largest id of the tokenizer. The rows of a model's embedding may be more (padding) or fewer.
      lengths: int32[V], bytes of each id; 0 for ids that are not text.
      is_text: bool[V], whether the id stands for bytes of text. Control tokens and holes in the vocabulary do not.
      roles: role -> id, for the roles of `pipeline.ROLES` that the vocabulary has.
      hash: hex sha256 over the bytes, lengths, kinds and roles: equal hashes mean interchangeable vocabularies. The
        merge rules are not part of it.
      kind: "byte_level" or "sentencepiece".
    """

    def __init__(self, tokenizer_json: str, named: Mapping[str, str]):
        """Use `from_tokenizer`. `named`: configured strings of bos, eos, pad, unk."""
        spec = json.loads(tokenizer_json)
        vocab = vocabulary(spec)
        self.kind: str = pipeline_kind(spec, vocab)
        added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
        control = control_tokens(spec, vocab, named)
        self.roles: dict[str, int] = find_roles(vocab | added, named)
        self.vocab_size: int = 1 + max(max(vocab.values()), max(added.values(), default=0))

        content = [""] * self.vocab_size
        for text, i in vocab.items():
            content[i] = text
        if self.kind == "byte_level":
            pieces = _byte_level_pieces(content)
            is_fallback = np.zeros(self.vocab_size, bool)
        else:
            pieces = [BYTE_PIECES.get(text) or text.replace(SPACE_MARK, " ").encode() for text in content]
            is_fallback = np.array([text in BYTE_PIECES for text in content])
        for text, i in added.items():  # the encoder takes them from the text as they are written
            pieces[i] = text.encode() if self.kind == "byte_level" else text.replace(SPACE_MARK, " ").encode()
        for text in control:
            pieces[added[text] if text in added else vocab[text]] = b""

        self.lengths: PerIdInt = np.fromiter(map(len, pieces), np.int32, self.vocab_size)
        self.is_text: PerIdBool = self.lengths > 0
        self._pieces = pieces
        self._flat = np.frombuffer(b"".join(pieces), np.uint8)
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self._is_fallback = is_fallback & self.is_text
        self._id_of: dict[bytes, int] | None = None
        self._control = sorted(control)
        exact = exact_pipeline(spec, control, vocab)
        tokenizer_json = tokenizer_json if exact is spec else json.dumps(exact)
        del spec, exact, content, vocab  # 200 MB of Gemma's merges and names, before the tokenizer takes as much
        tokenizer = Tokenizer.from_str(tokenizer_json)
        _check_added(tokenizer, added, control)
        self._tokenizer = _text_only(tokenizer, self._control)

        digest = hashlib.sha256(self._flat.tobytes())
        digest.update(self._offsets.astype("<i8").tobytes())
        digest.update(self.is_text.tobytes())
        digest.update(json.dumps(self.roles, sort_keys=True).encode())
        self.hash: str = digest.hexdigest()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "ByteTable":
        """Table of a tokenizer directory (or tokenizer.json), transformers fast tokenizer or `tokenizers.Tokenizer`.

        The table holds a copy of its own: the caller's tokenizer keeps its truncation, padding and special tokens.
        Raises UserError for a directory without tokenizer.json and for pipelines that are not exact, naming the part.
        """
        return cls(*serialised(tokenizer))

    @classmethod
    def from_tiktoken(
        cls,
        file: str | Path,
        family: str | None = None,
        *,
        pattern: str | None = None,
        special_tokens: Mapping[str, int] | None = None,
    ) -> "ByteTable":
        """Table of a tiktoken file (Llama 3's original tokenizer.model, cl100k_base.tiktoken).

        family: one of `tiktoken_file.FAMILIES`; or pattern, the regular expression that splits text before BPE, and
        special_tokens, control token -> id. UserError, with the line, for a file that is not of this form.
        """
        spec = tiktoken_file.tokenizer_json(Path(file), family, pattern=pattern, special_tokens=special_tokens)
        return cls(json.dumps(spec), {})

    def __repr__(self) -> str:
        texts = int(self.is_text.sum())
        return f"ByteTable({self.kind}, vocab_size={self.vocab_size}, text={texts}, hash={self.hash[:12]})"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _text_only(self._tokenizer, self._control)  # a pickled Tokenizer forgets this setting

    def token_bytes(self, i: int) -> bytes:
        """Bytes of id `i`; b"" for a control token. IndexError outside the vocabulary."""
        if not 0 <= i < self.vocab_size:
            raise IndexError(f"id {i} is outside the vocabulary of {self.vocab_size}")
        return self._pieces[i]

    def id_of(self, piece: bytes) -> int | None:
        """The text id with exactly these bytes, or None.

        Where several ids share the bytes it is the smallest that is not a byte-fallback token: Gemma has both "A" and
        "<0x41>" for the byte A, and its encoder never emits the second one.
        """
        if self._id_of is None:
            ids = np.flatnonzero(self.is_text)
            order = np.lexsort((-ids, ~self._is_fallback[ids]))  # fallback first, then large ids: the last one stays
            self._id_of = {self.token_bytes(i): i for i in ids[order].tolist()}
        return self._id_of.get(piece)

    def longest_prefix(self, piece: bytes) -> int | None:
        """The text id with the most bytes that `piece` begins with, or None if there is none even for its first."""
        found = (self.id_of(piece[:n]) for n in range(len(piece), 0, -1))
        return next((i for i in found if i is not None), None)

    def gather_bytes(self, ids: Ids) -> Bytes:
        """Bytes of the ids, concatenated, uint8."""
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        return self._flat[np.repeat(self._offsets[ids] - ends + lengths, lengths) + np.arange(total)]

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        """Bytes of the ids, concatenated. Control tokens add nothing."""
        ids = np.asarray(ids, np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise IndexError(
                f"ids reach from {ids.min()} to {ids.max()}, the vocabulary from 0 to {self.vocab_size - 1}"
            )
        return self.gather_bytes(ids).tobytes()

    def encode(self, text: str) -> Ids:
        """Text ids of `text`, without bos or eos. RoundTripError if their bytes are not the text's UTF-8 bytes."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """`encode` for many texts, in parallel (TOKENIZERS_PARALLELISM). Raises for the first that does not pass."""
        results = self.try_encode_batch(texts)
        for result in results:
            if isinstance(result, RoundTripError):
                raise result
        return results

    def try_encode_batch(self, texts: Sequence[str]) -> list[Ids | RoundTripError]:
        """`encode_batch` that returns the error of a text in its place, for callers that quarantine single rows."""
        results: list[Ids | RoundTripError] = [_lone_surrogate(text) for text in texts]
        sound = [n for n, error in enumerate(results) if error is None]
        encoded = self._tokenizer.encode_batch_fast([texts[n] for n in sound], add_special_tokens=False)
        for n, encoding in zip(sound, encoded, strict=True):
            ids = encoding.ids
            want, got = texts[n].encode(), b"".join(map(self._pieces.__getitem__, ids))
            results[n] = np.array(ids, np.int32) if want == got else _round_trip_error(want, got)
        return results


class FirstPieces(NamedTuple):
    """For every teacher id: `ids` int32[Vt], the student token that its bytes begin with (-1: none), and `identical`
    bool[Vt], whether that token is the same bytes. Control tokens that correspond by role are not `identical`."""

    ids: TeacherToStudent
    identical: TeacherFlags


def first_pieces(teacher: ByteTable, student: ByteTable) -> FirstPieces:
    """First student token of every teacher token's bytes: the support of the vocabulary projection.

    The id with identical bytes, else the first token of the student's own BPE encoding of them, else (bytes that are
    not text alone) the longest student token that is a prefix of them. Control tokens map by role. From Gemma 3 to
    Llama 3 the longest prefix is another token than the true first piece for 17.9 % of the vocabulary.

    Raises UserError if the student has no token for a byte.
    """
    ids = np.full(teacher.vocab_size, -1, np.int32)
    identical = np.zeros(teacher.vocab_size, bool)
    for role in sorted(teacher.roles, key=lambda role: role == "eos"):  # a token that is eos among others maps as eos
        if role in student.roles:
            ids[teacher.roles[role]] = student.roles[role]

    split: list[int] = []  # teacher ids without an identical student token
    for i in np.flatnonzero(teacher.is_text).tolist():
        same = student.id_of(teacher.token_bytes(i))
        if same is None:
            split.append(i)
        else:
            ids[i], identical[i] = same, True
    ids[split] = first_piece_of([teacher.token_bytes(i) for i in split], student)
    return FirstPieces(ids, identical)


def first_piece_of(pieces: Sequence[bytes], student: ByteTable) -> Ids:
    """The first student token of each string of bytes: of the student's own encoding, or the longest that is a prefix
    where the bytes are not text alone. UserError if the student has no token for a byte."""
    # Bytes that are not UTF-8 decode to lone surrogates, which the encoder reports like any text it cannot give back.
    encoded = student.try_encode_batch([piece.decode(errors="surrogateescape") for piece in pieces])
    first = [
        student.longest_prefix(piece) if isinstance(ids, RoundTripError) else ids[0]
        for piece, ids in zip(pieces, encoded, strict=True)
    ]
    if None in first:
        byte = pieces[first.index(None)][0]
        raise UserError(
            f"the student vocabulary has no token for the byte 0x{byte:02X}: it cannot stand for every text"
        )
    return np.array(first, np.int32)


def _byte_level_pieces(content: list[str]) -> list[bytes]:
    """Bytes of byte-level BPE strings; b"" for strings outside the byte alphabet, which the encoder cannot emit."""
    inside = [_ALPHABET.issuperset(text) for text in content]
    return [
        text.translate(_BYTE_OF_CHAR).encode("latin-1") if ok else b"" for text, ok in zip(content, inside, strict=True)
    ]


def _check_added(tokenizer: Tokenizer, added: Mapping[str, int], control: set[str]) -> None:
    """The library numbers added tokens itself where their ids in the file do not follow on from the vocabulary."""
    for i, token in tokenizer.get_added_tokens_decoder().items():
        if token.content not in control and added[token.content] != i:
            raise UserError(
                f"added token {token.content!r} has id {added[token.content]} in tokenizer.json, but encoding gives it "
                f"{i}: added tokens must be in the vocabulary or follow it without gaps"
            )


def _text_only(tokenizer: Tokenizer, control: list[str]) -> Tokenizer:
    """Make control strings ordinary text to the encoder, in place. No id moves.

    `encode_special_tokens` skips the tokens marked special, so the control tokens that are not (Gemma's <unusedN>) are
    marked first. Removing them from the JSON would renumber the added tokens that lie outside the model's vocabulary.
    """
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _lone_surrogate(text: str) -> RoundTripError | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return RoundTripError(
            f"text holds a lone surrogate at character {error.start}, which has no UTF-8 bytes: clean the row"
        )
    return None


def _round_trip_error(want: bytes, got: bytes) -> RoundTripError:
    """Names the first byte that differs, with an excerpt of both around it."""
    at = next((n for n, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
    around = slice(max(0, at - 12), at + 12)
    return RoundTripError(
        f"tokens do not give the text back: byte {at} of {len(want)}, text has {want[around]!r}, tokens give "
        f"{got[around]!r}: remove that character or the row"
    )

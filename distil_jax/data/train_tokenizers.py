"""Trains the two small tokenizers of the tiny recipe: one in the style of Gemma 3, one in the style of Llama 3.

Both are saved as Hugging Face directories (tokenizer.json, tokenizer_config.json) that `AutoTokenizer` loads, and both
give back every text byte for byte (with one exception, Gemma's own: "▁", U+2581, comes back as a space). The structure
follows the published tokenizer.json files of google/gemma-3 and meta-llama/Llama-3.2; vocabularies and merges are ours.

    Gemma style   SentencePiece-like BPE on characters, space written as ▁, digits one by one, unknown characters as
                  byte tokens <0x00>..<0xFF>, control tokens first
    Llama style   BPE on bytes, Llama 3's split pattern with digits in groups of three, control tokens last
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distil_jax.errors import UserError

GEMMA_CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
GEMMA_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LLAMA_CONTROL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# Pieces that no merge crosses, tried in this order: a digit; a word or a run of punctuation, with the ▁ before it; the
# other ▁ of a run of spaces; line breaks and other blanks. SentencePiece learns the same limits from its options
# split_by_whitespace, split_by_unicode_script and split_digits; here the pattern stays in the saved file, so that the
# encoder cannot leave what the trainer saw.
GEMMA_PATTERN = r"\p{N}|▁?[\p{L}\p{M}]+|▁?[^\s▁\p{L}\p{M}\p{N}]+|▁+(?=▁)|▁|\s+"
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUMERALS = tuple(f"{n:0{digits}}" for digits in (1, 2, 3) for n in range(10**digits))  # 1,110
NUMERAL_COUNT = 500  # how often each is added to the text, so that its merges come before the rare ones of the text
CHARACTER_COVERAGE = 0.9999  # the rarest characters of the corpus are left to the byte tokens, as in SentencePiece


def train_gemma_style(texts: Iterable[str], vocab_size: int, directory: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Trains on `texts` and saves a tokenizer of exactly `vocab_size` ids in `directory`.

    Ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, <start_of_turn> 4, <end_of_turn> 5, the 256 bytes, characters, merges.
    <unk> never comes out of text. Raises UserError where `vocab_size` is too small or too large for the corpus.
    """
    reserved = [*GEMMA_CONTROL, *GEMMA_BYTES]
    texts = _corpus(texts)
    normalizer = normalizers.Replace(" ", "▁")
    pre_tokenizer = pre_tokenizers.Split(Regex(GEMMA_PATTERN), behavior="isolated")

    characters = Counter()
    for text in texts:
        characters.update(text)
    characters["▁"] = characters["▁"] + characters.pop(" ", 0)
    rare = _rare_characters(characters)
    if rare:  # a rare character ends a piece; left out, it would join its neighbours
        table = str.maketrans(dict.fromkeys(rare, "\n"))
        texts = [text.translate(table) for text in texts]
    fewest = len(reserved) + len(characters) - len(rare) + 1
    if vocab_size < fewest:
        raise UserError(f"a Gemma-style vocabulary for this corpus needs at least {fewest} ids; got {vocab_size}")

    learned = Tokenizer(models.BPE())
    learned.normalizer, learned.pre_tokenizer = normalizer, pre_tokenizer
    pieces, merges = _learn(learned, texts, vocab_size - len(reserved), initial_alphabet=[])
    _require_size("Gemma", len(reserved) + len(pieces), vocab_size)
    vocabulary = {piece: index for index, piece in enumerate([*reserved, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in GEMMA_CONTROL])
    tokenizer.post_processor = _begin_with(tokenizer, "<bos>")
    return _save(tokenizer, directory, bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>")


def train_llama_style(
    texts: Iterable[str], vocab_size: int, directory: str | os.PathLike, *, numerals: bool = False
) -> PreTrainedTokenizerFast:
    """Trains on `texts` and saves a tokenizer of exactly `vocab_size` ids in `directory`.

    numerals: every group of up to three digits becomes a token, as in Llama 3; otherwise those that the text has often.

    Ids: the 256 bytes, merges, then <|begin_of_text|>, <|end_of_text|>, <|start_header_id|>, <|end_header_id|> and
    <|eot_id|>. Llama has no padding token; <|end_of_text|> serves. Raises UserError as `train_gemma_style` does.
    """
    fewest = 256 + len(LLAMA_CONTROL) + 1 + numerals * len(NUMERALS)
    if vocab_size < fewest:
        raise UserError(f"a Llama-style vocabulary needs at least {fewest} ids; got {vocab_size}")
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = _corpus(texts)
    if numerals:
        texts += [numeral for numeral in NUMERALS for _ in range(NUMERAL_COUNT)]
    pieces, merges = _learn(learned, texts, vocab_size - len(LLAMA_CONTROL), initial_alphabet=alphabet)
    _require_size("Llama", len(pieces) + len(LLAMA_CONTROL), vocab_size)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if numerals and (missing := [numeral for numeral in NUMERALS if numeral not in vocabulary]):
        raise UserError(
            f"{vocab_size} ids are too few for all numerals beside this text: {len(missing)} of {len(NUMERALS)} are "
            "missing; raise config.student.vocab_size or set config.student.numerals to False"
        )
    # As tiktoken does for Llama 3, a piece that is a token whole is taken whole, before any merge.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in LLAMA_CONTROL])
    begin = _begin_with(tokenizer, "<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return _save(tokenizer, directory, bos="<|begin_of_text|>", eos="<|end_of_text|>", pad="<|end_of_text|>")


def _corpus(texts: Iterable[str]) -> list[str]:
    texts = list(texts)
    if not any(texts):
        raise UserError("no text to train a tokenizer on; check that the training split has rows")
    return texts


def _rare_characters(characters: Counter) -> set[str]:
    """The rarest characters that together make up less than 1 - CHARACTER_COVERAGE of the text; ties stay together."""
    allowed = (1 - CHARACTER_COVERAGE) * characters.total()
    by_count: dict[int, set[str]] = {}
    for character, count in characters.items():
        by_count.setdefault(count, set()).add(character)
    rare: set[str] = set()
    for count in sorted(by_count):
        allowed -= count * len(by_count[count])
        if allowed < 0:
            break
        rare |= by_count[count]
    return rare - {"▁", "\n"}


def _learn(
    tokenizer: Tokenizer, texts: list[str], size: int, initial_alphabet: list[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces by id (alphabet, then merges in the order learned) and the merges."""
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, special_tokens=[], initial_alphabet=initial_alphabet, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [tuple(merge) for merge in model["merges"]]


def _require_size(style: str, reached: int, wanted: int) -> None:
    if reached != wanted:
        raise UserError(
            f"the corpus gives a {style}-style vocabulary of {reached} ids and not the {wanted} asked for; "
            f"ask for {reached} or fewer, or bring more text"
        )


def _begin_with(tokenizer: Tokenizer, bos: str):
    return processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _save(tokenizer: Tokenizer, directory: str | os.PathLike, **roles: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,  # would take the space out of " ." when decoding
        model_input_names=["input_ids", "attention_mask"],
        **{f"{role}_token": token for role, token in roles.items()},
    )
    fast.save_pretrained(Path(directory))
    config = Path(directory) / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return fast

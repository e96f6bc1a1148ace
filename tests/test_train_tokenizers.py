"""The two tokenizers of the tiny recipe: exact size, exact bytes, the structure of Gemma 3 and of Llama 3."""

import json
import random
from string import ascii_lowercase

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from distil_jax.data import hpo
from distil_jax.data.rows import Quarantine
from distil_jax.data.train_tokenizers import GEMMA_BYTES, NUMERALS, train_gemma_style, train_llama_style
from distil_jax.errors import UserError

HARD_TEXTS = [
    "",
    " ",
    "  leading,   runs and trailing  ",
    "line\r\nbreaks\r\n\r\n\n\n  and\ttabs\t\t",
    "emoji 🧬👩‍⚕️ and Greek αβγ Δ, 中文 日本語",
    "zero\u200bwidth\u200d\ufeff and no\u00a0break\u3000space e\u0301",
    "3.14159 12345678 x2y",
    "it's . , ! <0x41> <|x|>",
    "\x00\x01\x7f",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A tenth of the corpus: (training texts, held-out texts)."""
    with Quarantine(tmp_path_factory.mktemp("corpus") / "quarantine.jsonl") as quarantine:
        rows = hpo.load_corpus(quarantine).rows[::10]
    return tuple([r.prompt + r.completion for r in rows if (r.split == "train") == side] for side in (True, False))


@pytest.fixture(scope="module")
def folders(texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    train_gemma_style(texts[0], 1536, root / "gemma")
    train_llama_style(texts[0], 1024, root / "llama")
    return {"gemma": root / "gemma", "llama": root / "llama"}


@pytest.mark.parametrize("style, size", [("gemma", 1536), ("llama", 1024)])
def test_auto_tokenizer_loads_it_with_the_exact_size_and_adds_bos(folders, style, size):
    tokenizer = AutoTokenizer.from_pretrained(folders[style])
    assert len(tokenizer) == size and sorted(tokenizer.get_vocab().values()) == list(range(size))
    ids = tokenizer("Seizure")
    assert ids["input_ids"][0] == tokenizer.bos_token_id and list(ids) == ["input_ids", "attention_mask"]
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None
    assert tokenizer.decode(ids["input_ids"], skip_special_tokens=True) == "Seizure"


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama"])
@pytest.mark.parametrize("style", ["gemma", "llama"])
def test_auto_tokenizer_keeps_the_ids_beside_a_model_config(folders, tmp_path, style, model_type):
    alone = AutoTokenizer.from_pretrained(folders[style])
    for file in folders[style].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    beside = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_TEXTS:
        assert beside.encode(text) == alone.encode(text)


@pytest.mark.parametrize("style", ["gemma", "llama"])
def test_every_text_comes_back_byte_for_byte(folders, texts, style):
    tokenizer = AutoTokenizer.from_pretrained(folders[style])
    ranges = [(0x20, 0x7F), (0, 0x300), (0x300, 0xD800), (0xE000, 0x110000)]
    draw = random.Random(0)
    wild = ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(20)) for _ in range(300)]
    for text in HARD_TEXTS + texts[1] + [text.replace("▁", "_") for text in wild]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_gemma_style_ids_digits_and_bytes(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["gemma"])
    vocabulary = tokenizer.get_vocab()
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *GEMMA_BYTES]
    assert [vocabulary[name] for name in names] == list(range(262))
    assert tokenizer.tokenize("the 125 é") == ["the", "▁", "1", "2", "5", "▁", "<0xC3>", "<0xA9>"]
    for piece, index in vocabulary.items():
        if index >= 262:
            assert "▁" not in piece[1:], "a merge crosses the start of a word"
            assert len(piece) == 1 or not any(c.isdigit() for c in piece)
    assert vocabulary["<unk>"] not in tokenizer.encode("".join(HARD_TEXTS))
    # Bytes are plain vocabulary, so their spelling in a text stays text.
    assert vocabulary["<0x41>"] not in tokenizer.encode("<0x41>")


def test_gemma_style_file_splits_as_the_trainer_did(folders, texts):
    """Without its pre-tokenizer the saved file gives the same ids: the limits are in the merges, as in Gemma's file."""
    file = json.loads((folders["gemma"] / "tokenizer.json").read_text(encoding="utf-8"))
    saved = Tokenizer.from_str(json.dumps(file))
    without = Tokenizer.from_str(json.dumps(file | {"pre_tokenizer": None}))
    for text in texts[0][:300] + texts[1]:
        assert saved.encode(text).ids == without.encode(text).ids


def test_llama_style_structure_equals_the_real_file(folders, tokenizers_dir):
    ours, real = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for folder in (folders["llama"], tokenizers_dir / "llama3")
    )
    assert ours["pre_tokenizer"] == real["pre_tokenizer"] and ours["normalizer"] == real["normalizer"]
    for key in ("type", "byte_fallback", "ignore_merges", "fuse_unk", "unk_token", "dropout"):
        assert ours["model"][key] == real["model"][key], key
    assert [p["type"] for p in ours["post_processor"]["processors"]] == ["ByteLevel", "TemplateProcessing"]
    assert ours["decoder"]["type"] == real["decoder"]["type"]


def test_gemma_style_structure_equals_the_real_file(folders, tokenizers_dir):
    ours, real = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for folder in (folders["gemma"], tokenizers_dir / "gemma3")
    )
    assert ours["normalizer"] == real["normalizer"] and ours["decoder"] == real["decoder"]
    for key in ("type", "byte_fallback", "ignore_merges", "fuse_unk", "unk_token", "dropout"):
        assert ours["model"][key] == real["model"][key], key
    assert ours["post_processor"]["single"] == real["post_processor"]["single"]


def test_llama_style_ids_digits_and_whole_pieces(folders, texts):
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    controls = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert tokenizer.convert_tokens_to_ids(controls) == list(range(1019, 1024))
    backend = tokenizer.backend_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("dose 12345mg, it's")]
    assert pieces == ["dose", "Ġ", "123", "45", "mg", ",", "Ġit", "'s"]
    # ignore_merges takes a whole piece at once; with these merges it may not change any id.
    file = json.loads(backend.to_str())
    file["model"]["ignore_merges"] = False
    merged = Tokenizer.from_str(json.dumps(file))
    for text in texts[0][:300] + texts[1] + HARD_TEXTS:
        assert merged.encode(text).ids == backend.encode(text).ids


def test_all_numerals_of_llama_3_can_be_asked_for(texts, tmp_path, tokenizers_dir):
    train_llama_style(texts[0], 2048, tmp_path, numerals=True)
    ours, real = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path, tokenizers_dir / "llama3"))
    assert len(ours) == 2048 and set(NUMERALS) <= ours.get_vocab().keys() & real.get_vocab().keys()
    for text in ("12345", "PMID:31675180", "12.5 % of 1000", "007", "x2y 3.14159"):
        digits = [[t for t in side.tokenize(text) if t.isdigit()] for side in (ours, real)]
        assert digits[0] == digits[1]
    file = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    file["model"]["ignore_merges"] = False
    merged = Tokenizer.from_str(json.dumps(file))  # by merges alone each numeral is one token too
    assert all(len(merged.encode(n, add_special_tokens=False).ids) == 1 for n in NUMERALS)
    with pytest.raises(UserError, match="needs at least 1372"):
        train_llama_style(texts[0], 1024, tmp_path, numerals=True)
    with pytest.raises(UserError, match=r"too few for all numerals.*raise config.student.vocab_size"):
        pairs = [
            " ".join(a + b for b in ascii_lowercase) for a in ascii_lowercase
        ]  # merges of the text that come first
        train_llama_style(pairs * 600, 1800, tmp_path, numerals=True)


@pytest.mark.parametrize("train, size", [(train_gemma_style, 1536), (train_llama_style, 1024)])
def test_training_is_deterministic(texts, folders, tmp_path, train, size):
    train(texts[0], size, tmp_path)
    style = "gemma" if train is train_gemma_style else "llama"
    assert (tmp_path / "tokenizer.json").read_bytes() == (folders[style] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("train", [train_gemma_style, train_llama_style])
def test_a_size_the_corpus_cannot_give_says_which_it_can(tmp_path, train):
    with pytest.raises(UserError, match="ask for .* or fewer, or bring more text"):
        train(["seizure and seizures"] * 9, 4096, tmp_path)
    with pytest.raises(UserError, match="needs at least"):
        train(["seizure and seizures"] * 9, 100, tmp_path)
    with pytest.raises(UserError, match="no text"):
        train([], 1024, tmp_path)

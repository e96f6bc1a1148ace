"""Promise: Unigram, tiktoken files and tokenizers that add a space give exact bytes, or are refused by name."""

import base64
import json
import re

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from distil_jax.errors import UserError
from distil_jax.tokens import tiktoken_file
from distil_jax.tokens.bytes import ByteTable, RoundTripError

MARK = "\u2581"
BYTES = [f"<0x{b:02X}>" for b in range(256)]
CORPUS = [
    "The patient was given 12.5 mg of the drug twice daily.",
    "the naïve patients were treated with the same dose of the drug",
    "Atrial fibrillation and heart failure; the heart rate was 120 per minute.",
    "a dose, the dose, doses of 5 mg and 50 mg were given daily",
] * 5
AWKWARD = [
    "",
    " ",
    "  two spaces in front and behind  ",
    "The drug\r\n\twas given\n\n\n12.5 mg",
    "👩🏽‍⚕️ naïve β-blockers 心房 ارتفاع e\u0301 \u200b\ufeff\x00",
    "the <s>literal</s> <unk> <pad> names, <<s> and <s<s>",
    "bytes <0x41> and <0xE2><0x96><0x81>, <0x4",
]
text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=MARK), max_size=40)


def added(i: int, content: str, special: bool = True, **flags: bool) -> dict:
    return {"id": i, "content": content, "special": special, "single_word": False, "normalized": False} | {
        "lstrip": False,
        "rstrip": False,
        **flags,
    }


@pytest.fixture(scope="module")
def unigram_json() -> dict:
    """A Unigram model of 140 pieces learned by the library, with SentencePiece's control and byte tokens in front."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Replace(" ", MARK)
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=140, show_progress=False, special_tokens=[], unk_token="<unk>")
    )
    spec = json.loads(trained.to_str())
    control = ["<unk>", "<s>", "</s>", "<pad>"]
    learned = [piece for piece in spec["model"]["vocab"] if piece[0] not in control]
    spec["model"] |= {
        "vocab": [*([name, 0.0] for name in [*control, *BYTES]), *learned],
        "unk_id": 0,
        "byte_fallback": True,
    }
    spec["added_tokens"] = [added(i, name) for i, name in enumerate(control)]
    return spec


def table_of(spec: dict) -> ByteTable:
    return ByteTable.from_tokenizer(Tokenizer.from_str(json.dumps(spec)))


def stock_ids(spec: dict, written: str) -> list[int]:
    return Tokenizer.from_str(json.dumps(spec)).encode(written, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def unigram(unigram_json) -> ByteTable:
    return table_of(unigram_json)


def test_unigram_pieces_are_bytes(unigram, unigram_json):
    vocab = unigram_json["model"]["vocab"]
    assert (unigram.kind, unigram.vocab_size) == ("sentencepiece", len(vocab))
    assert not unigram.is_text[:4].any() and unigram.is_text[4:].all()
    assert [unigram.token_bytes(4 + b) for b in (0, 0x41, 255)] == [b"\0", b"A", b"\xff"]
    for i in range(260, len(vocab)):
        assert unigram.token_bytes(i).decode() == vocab[i][0].replace(MARK, " ")
    assert len(unigram.encode("the patient was given")) == 11, "pieces, not characters"


@pytest.mark.parametrize("written", AWKWARD)
def test_unigram_gives_awkward_text_back_without_control_tokens(unigram, written):
    ids = unigram.encode(written)
    assert unigram.decode_bytes(ids) == written.encode() and unigram.is_text[ids].all()


@settings(deadline=None, max_examples=60)
@given(st.lists(text | st.sampled_from([*AWKWARD, *CORPUS[:4]]), max_size=4).map("".join))
def test_unigram_gives_any_text_back(unigram, written):
    assert unigram.decode_bytes(unigram.encode(written)) == written.encode()


def test_unigram_has_the_ids_of_the_stock_tokenizer_unless_the_text_names_a_token(unigram, unigram_json):
    for written in [*CORPUS[:4], *AWKWARD[:5]]:
        assert unigram.encode(written).tolist() == stock_ids(unigram_json, written)
    # The stock tokenizer takes the name of a byte token in text for the byte.
    assert stock_ids(unigram_json, "<0x41>") == [4 + 0x41] and unigram.decode_bytes([4 + 0x41]) == b"A"


def test_unigram_control_names_may_hold_the_signs_of_patterns(unigram_json):
    names = ["[(.*+?^$|)]", "<|a-b|>", r"\d{2}", "▁#~", "&&x"]
    spec = json.loads(json.dumps(unigram_json))
    spec["model"]["vocab"] += [[name, 0.0] for name in names]
    first = len(unigram_json["model"]["vocab"])
    spec["added_tokens"] += [added(first + n, name) for n, name in enumerate(names)]
    table = table_of(spec)
    for name in names:
        written = f"the {name} dose".replace(MARK, " ")
        ids = table.encode(written)
        assert table.decode_bytes(ids) == written.encode() and table.is_text[ids].all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"byte_fallback": False}, "Unigram has byte_fallback=False and lacks 0 of 256"),
        ({"vocab": [["<unk>", 0.0], ["a", -1.0]]}, "lacks 256 of 256 byte tokens"),
        ({"vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -1.0], ["a", -2.0]]}, "holds 'a' twice, as ids 1 and 3"),
    ],
)
def test_unigram_that_would_lose_text_is_refused(unigram_json, change, named):
    with pytest.raises(UserError, match=named):
        table_of(unigram_json | {"model": unigram_json["model"] | change, "added_tokens": []})


# Tokenizers that add a space


def sentencepiece_bpe(normalizer: dict | None, pre_tokenizer: dict | None) -> dict:
    pieces = ["<unk>", "<s>", "</s>", *BYTES, MARK, "t", "h", "e", "he", MARK + "t", MARK + "the", "the"]
    merges = [["h", "e"], [MARK, "t"], [MARK + "t", "he"], ["t", "he"]]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    undo = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": [added(i, pieces[i]) for i in range(3)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": [undo, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def byte_level_with_space() -> dict:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())


TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
LLAMA2 = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": MARK}, TO_MARK]}
METASPACE = {"type": "Metaspace", "replacement": MARK, "split": False}
WITH_SPACE = {
    "Prepend": sentencepiece_bpe(LLAMA2, None),
    "Metaspace first": sentencepiece_bpe(None, METASPACE | {"prepend_scheme": "first"}),
    "Metaspace always": sentencepiece_bpe(None, METASPACE | {"prepend_scheme": "always"}),
    "Metaspace of old files": sentencepiece_bpe(
        None, {"type": "Metaspace", "replacement": MARK, "add_prefix_space": True, "prepend_scheme": "always"}
    ),
    "ByteLevel": byte_level_with_space(),
}


@pytest.mark.parametrize("name", WITH_SPACE)
def test_the_space_that_a_tokenizer_adds_is_left_out(name):
    spec = WITH_SPACE[name]
    table = table_of(spec)
    for written in ["the", "the the", "", " the", "  the", "\nthe", "<s>the", *AWKWARD]:
        assert table.decode_bytes(table.encode(written)) == written.encode()
    for written in ["the", "the the", "thé\nthe", "12 mg"]:  # what the stock tokenizer means by `text`
        assert table.encode(" " + written).tolist() == stock_ids(spec, written)
        assert table.encode(written).tolist() != stock_ids(spec, written)


def test_unigram_with_a_space_in_front_is_exact_too(unigram_json):
    spec = unigram_json | {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "always"}}
    table = table_of(spec)
    for written in AWKWARD:
        assert table.decode_bytes(table.encode(written)) == written.encode()
    assert table.encode(" the dose").tolist() == stock_ids(spec, "the dose")


def test_a_decoder_that_takes_a_space_away_is_refused_where_none_is_added():
    with pytest.raises(UserError, match="decoder Strip"):
        table_of(sentencepiece_bpe(TO_MARK, None))


# Added tokens and double ids


def test_added_text_tokens_do_not_swallow_the_space_around_them():
    spec = sentencepiece_bpe(TO_MARK, None)
    spec["decoder"] = None
    size = len(spec["model"]["vocab"])
    spec["added_tokens"].append(added(size, "<br>", special=False, lstrip=True, rstrip=True))
    table = table_of(spec)
    assert size not in table.encode("the  < br") and size in table.encode("the  <br>  the")
    for written in ("the  <br>  the", " <br> "):
        assert table.decode_bytes(table.encode(written)) == written.encode()
    assert stock_ids(spec, " <br> ") == [size], "the stock tokenizer drops both spaces"


def test_an_added_token_that_the_library_would_renumber_is_refused():
    spec = sentencepiece_bpe(TO_MARK, None)
    spec["decoder"] = None
    size = len(spec["model"]["vocab"])
    spec["added_tokens"].append(added(size + 5, "<br>", special=False))
    with pytest.raises(UserError, match=f"'<br>' has id {size + 5} in tokenizer.json, but encoding gives it {size}"):
        ByteTable(json.dumps(spec), {})


def test_two_pieces_with_one_id_are_refused():
    spec = sentencepiece_bpe(TO_MARK, None)
    spec["decoder"] = None
    spec["model"]["vocab"]["q"] = spec["model"]["vocab"]["the"]
    with pytest.raises(UserError, match=r"gives id \d+ to 'the' and to 'q'"):
        ByteTable(json.dumps(spec), {})


# Tiktoken files


def write_tiktoken(path, tokens: dict[bytes, int]):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tokens.items()))
    return path


@pytest.fixture(scope="module")
def llama_ranks(tokenizers_dir) -> dict[bytes, int]:
    """Llama 3's tokenizer.model, written again from its tokenizer.json by a second way to bytes."""
    vocab = json.loads((tokenizers_dir / "llama3" / "tokenizer.json").read_text())["model"]["vocab"]
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    others = iter(range(256, 512))
    byte_of = {chr(b if b in printable else next(others)): b for b in range(256)}
    return {bytes(byte_of[c] for c in piece): i for piece, i in vocab.items()}


@pytest.fixture(scope="module")
def llama_file(llama_ranks, tmp_path_factory):
    return write_tiktoken(tmp_path_factory.mktemp("llama") / "tokenizer.model", llama_ranks)


@pytest.fixture(scope="module")
def from_file(llama_file) -> ByteTable:
    return ByteTable.from_tiktoken(llama_file, "llama3")


@pytest.fixture(scope="module")
def oracle(llama_ranks) -> tiktoken.Encoding:
    pattern = tiktoken_file.FAMILIES["llama3"].pattern
    return tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=llama_ranks, special_tokens={})


@pytest.fixture(scope="module")
def llama(tokenizers_dir) -> ByteTable:
    return ByteTable.from_tokenizer(tokenizers_dir / "llama3")


def test_the_tiktoken_file_of_llama_3_is_its_tokenizer_json(from_file, llama):
    assert (from_file.hash, from_file.kind, from_file.roles) == (llama.hash, "byte_level", llama.roles)
    for written in [*AWKWARD, *CORPUS, "<|eot_id|>1234567 don't\r\n\r\n  x", "\u2581", "ABC'S " * 3]:
        assert np.array_equal(from_file.encode(written), llama.encode(written))


@settings(deadline=None, max_examples=60)
@given(st.lists(text | st.sampled_from(["'ll", "\r\n", "   ", "1234", "Éa", "<|eot_id|>"]), max_size=5).map("".join))
def test_a_tiktoken_file_has_the_ids_that_tiktoken_gives(from_file, oracle, written):
    assert from_file.encode(written).tolist() == oracle.encode_ordinary(written)


def small_ranks() -> dict[bytes, int]:
    return {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b"123": 259}


def test_a_tiktoken_file_by_its_pattern_and_control_tokens(tmp_path):
    file = write_tiktoken(tmp_path / "my.tiktoken", small_ranks())
    table = ByteTable.from_tiktoken(file, pattern=r" ?\p{L}+|.|\n", special_tokens={"<|endoftext|>": 300})
    assert (table.vocab_size, table.roles) == (301, {"eos": 300})
    assert table.encode(" the the123<|endoftext|>").tolist()[:4] == [258, 258, 49, 50]
    assert table.token_bytes(258) == b" the" and not table.is_text[260:].any()
    for written in AWKWARD:
        assert table.decode_bytes(table.encode(written)) == written.encode()


def test_families_are_whole():
    for family in tiktoken_file.FAMILIES.values():
        ids = sorted(family.special_tokens.values())
        assert len(set(ids)) == len(ids) and ids[0] >= family.ranks
        Regex(family.pattern)
    names = {i: name for name, i in tiktoken_file.FAMILIES["llama3.1"].special_tokens.items()}
    # As in the tokenizer.json of Llama 3.2.
    assert [names[128_000 + n] for n in (2, 5, 11)] == [f"<|reserved_special_token_{n}|>" for n in (0, 2, 3)]
    assert names[128_255] == "<|reserved_special_token_247|>"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("dGg= 256 7", "line 257: not the base64"),
        ("dGg", "line 257: not the base64"),
        ("d*g= 256", "line 257: not the base64"),
        ("dGg= x", "line 257: not the base64"),
        ("AA== 300", r"line 257: token b'\x00' is also there with rank 0"),
        ("dGg= 65", "line 257: rank 65 is also on line 66"),
        ("dGg= -1", "line 257: token b'th' with rank -1"),
    ],
)
def test_a_broken_tiktoken_file_is_refused_with_its_line(tmp_path, line, named):
    file = write_tiktoken(tmp_path / "my.tiktoken", {bytes([b]): b for b in range(256)})
    with file.open("a") as out:
        out.write(line + "\n")
    with pytest.raises(UserError, match=re.escape(named)):
        ByteTable.from_tiktoken(file, pattern=".")


def test_a_tiktoken_file_of_no_known_family_is_refused_by_name(tmp_path, llama_file):
    file = write_tiktoken(tmp_path / "cl100k_bas.tiktoken", small_ranks())
    with pytest.raises(UserError, match="'cl100k_bas' is no family known here.*did you mean 'cl100k_base'"):
        ByteTable.from_tokenizer(file)
    with pytest.raises(UserError, match="has 260 tokens, llama3 has 128,000"):
        ByteTable.from_tiktoken(file, "llama3")
    with pytest.raises(UserError, match="'tokenizer' is no family known here"):
        ByteTable.from_tokenizer(llama_file)
    with pytest.raises(UserError, match="no tokenizer.json .*ByteTable.from_tiktoken"):
        ByteTable.from_tokenizer(llama_file.parent)
    with pytest.raises(UserError, match="or a pattern, not both"):
        ByteTable.from_tiktoken(file, "llama3", pattern=".")
    with pytest.raises(UserError, match="control token '<x>' has id 256, which another token has"):
        ByteTable.from_tiktoken(file, pattern=".", special_tokens={"<x>": 256})
    for pattern in (r"\p{N}{1,3}+", r"\s++$", "^a"):
        with pytest.raises(UserError, match="means something else"):
            ByteTable.from_tiktoken(file, pattern=pattern)
    lacking = write_tiktoken(tmp_path / "lacking.tiktoken", {bytes([b]): b for b in range(255)})
    with pytest.raises(UserError, match="no token for 1 of 256 bytes, the first 0xFF"):
        ByteTable.from_tiktoken(lacking, pattern=".")


def test_normalisers_that_change_text_are_an_error_of_that_text(unigram_json):
    table = table_of(unigram_json | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, TO_MARK]}})
    assert table.decode_bytes(table.encode("naïve dose")) == "naïve dose".encode()
    with pytest.raises(RoundTripError):
        table.encode("nai\u0308ve dose")

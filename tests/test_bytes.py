"""Promise: the bytes of the tokens are the bytes of the text, and control tokens never come out of text."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distil_jax.errors import UserError
from distil_jax.tokens.bytes import ByteTable, RoundTripError, first_pieces

MARK = "\u2581"
CONTROL_NAMES = "<bos> <start_of_turn>user <|eot_id|><unused7> [multimodal] <mask> <|begin_of_text|><image_soft_token>"
AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "tabs\t\tand\r\nCRLF\r\n\r\n\n\n\nnewlines",
    "α-synuclein, naïve β-blockers, 5 µg, ≥ 3 ± 0.1 °C",
    "👩🏽‍⚕️ 🧬🇪🇺 emoji with joiners",
    "心房細動 の 治療, 고혈압, ارتفاع ضغط الدم",
    "e\u0301 combining, zero\u200bwidth\u200d\ufeff, nbsp\u00a0, soft\u00adhyphen",
    "\x00\x01\x7f control and \U0010ffff last",
    "<table><tr><td>x</td></tr></table> <s>struck</s> <b>1</b>",
    "digits 1 12 123 1234 12345 0.05 1,234.5 p<0.001",
    CONTROL_NAMES,
]
text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=MARK), max_size=60)


@pytest.fixture(scope="module")
def gemma(tokenizers_dir):
    return ByteTable.from_tokenizer(tokenizers_dir / "gemma3")


@pytest.fixture(scope="module")
def llama(tokenizers_dir):
    return ByteTable.from_tokenizer(str(tokenizers_dir / "llama3"))


@pytest.fixture(scope="module")
def stock(tokenizers_dir):
    """The tokenizers as published, by folder name."""
    return {name: Tokenizer.from_file(str(tokenizers_dir / name / "tokenizer.json")) for name in ("gemma3", "llama3")}


def _alphabet() -> list[str]:
    """GPT-2's stand-ins of the bytes 0..255, written out a second time."""
    shown = {b: chr(b) for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b}
    hidden = iter(range(256, 512))
    return [shown[b] if b in shown else chr(next(hidden)) for b in range(256)]


def byte_level_json(without: bytes = b"") -> dict:
    """A byte-level tokenizer: bytes 0..255, " a", "ab", "abab", then control tokens out of the model's vocabulary."""
    names = ["<|begin_of_text|>", "<tool>", "<|end_of_text|>", "<|eot_id|>"]
    stand_in = _alphabet()
    vocab = {c: i for i, c in enumerate(stand_in) if i not in without} | {"Ġa": 256, "ab": 257, "abab": 258}
    split = {"type": "Split", "pattern": {"Regex": r" ?\p{L}+|\s+|."}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(259 + n, name, special=name != "<tool>") for n, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["Ġ", "a"], ["a", "b"], ["ab", "ab"]]},
    }


def sentencepiece_json() -> dict:
    """A SentencePiece-style tokenizer: <pad> <eos> <bos> <unk>, 256 byte tokens, "▁", "a", "b", "▁a", "\\n\\n"."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), MARK, "a", "b", MARK + "a"]
    decoders = [
        {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, names[i]) for i in range(4)] + [_added(264, "\n\n", special=False)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [[MARK, "a"]],
        },
    }


def _added(i: int, content: str, special: bool = True) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special} | flags


def table_of(spec: dict) -> ByteTable:
    return ByteTable.from_tokenizer(Tokenizer.from_str(json.dumps(spec)))


def test_a_small_byte_level_table_is_as_written():
    table = table_of(byte_level_json())
    assert (table.kind, table.vocab_size) == ("byte_level", 263)
    assert [table.token_bytes(i) for i in (0, 32, 97, 255)] == [b"\x00", b" ", b"a", b"\xff"]
    assert [table.token_bytes(i) for i in range(256, 263)] == [b" a", b"ab", b"abab", b"", b"<tool>", b"", b""]
    assert table.roles == {"bos": 259, "eos": 261, "end_of_turn": 262}
    assert table.encode("abab a<tool><|eot_id|>")[:3].tolist() == [258, 256, 260]
    assert table.encode("é").tolist() == [0xC3, 0xA9]
    assert table.lengths.dtype == np.int32 and table.is_text.dtype == bool
    assert np.array_equal(table.is_text, table.lengths > 0)


def test_a_small_sentencepiece_table_is_as_written():
    table = table_of(sentencepiece_json())
    assert (table.kind, table.vocab_size) == ("sentencepiece", 265)
    assert [table.token_bytes(i) for i in (0, 3, 4, 259, 260, 263, 264)] == [
        b"",
        b"",
        b"\0",
        b"\xff",
        b" ",
        b" a",
        b"\n\n",
    ]
    assert table.roles == {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    assert table.encode(" ab\n\n\n<é").tolist() == [263, 262, 264, 4 + 10, 4 + 0x3C, 4 + 0xC3, 4 + 0xA9]
    assert table.id_of(b"a") == 261, "the byte token <0x61> has the smaller id but text never becomes it"
    assert table.id_of(b"c") == 4 + ord("c")


@pytest.mark.parametrize("written", AWKWARD)
def test_awkward_text_comes_back_byte_for_byte(written, gemma, llama):
    for table in (gemma, llama):
        ids = table.encode(written)
        assert ids.dtype == np.int32
        assert b"".join(table.token_bytes(i) for i in ids) == table.decode_bytes(ids) == written.encode()
        assert table.is_text[ids].all()


@settings(deadline=None, max_examples=150)
@given(text)
def test_any_text_comes_back_byte_for_byte(gemma, llama, written):
    for table in (gemma, llama):
        assert table.decode_bytes(table.encode(written)) == written.encode()


@pytest.mark.parametrize("name", ["gemma3", "llama3"])
def test_text_without_control_names_gets_the_ids_of_the_stock_tokenizer(name, stock, gemma, llama):
    table = {"gemma3": gemma, "llama3": llama}[name]
    for written in AWKWARD[:-1]:
        assert table.encode(written).tolist() == stock[name].encode(written, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["gemma3", "llama3"])
def test_every_id_has_the_bytes_that_the_stock_decoder_gives_it(name, stock, gemma, llama):
    table = {"gemma3": gemma, "llama3": llama}[name]
    ids = np.flatnonzero(table.is_text)
    decoded = stock[name].decode_batch([[i] for i in ids.tolist()], skip_special_tokens=False)
    whole = [(i, shown) for i, shown in zip(ids.tolist(), decoded, strict=True) if "\ufffd" not in shown]
    assert len(whole) > 0.98 * len(ids), "a token that is not UTF-8 alone is shown as U+FFFD"
    wrong = [(i, shown) for i, shown in whole if table.token_bytes(i) != shown.encode()]
    assert not wrong


def test_names_of_control_tokens_stay_text(gemma, llama, stock):
    for name, table in (("gemma3", gemma), ("llama3", llama)):
        ids = stock[name].get_vocab(with_added_tokens=True)
        names = [content for content, i in ids.items() if not table.is_text[i]]
        assert len(names) == table.vocab_size - int(table.is_text.sum())
        for written, encoded in zip(names, table.encode_batch(names), strict=True):
            assert ids[written] not in encoded and table.is_text[encoded].all()


def test_added_tokens_that_are_text_keep_their_ids(gemma):
    expected = {"\n\n": 108, "\n\n\n\n": 110, "\t": 255968, "<table>": 168, "<s>": 203, "</s>": 212, "   ": 139}
    assert {written: gemma.encode(written).tolist() for written in expected} == {w: [i] for w, i in expected.items()}
    assert [gemma.token_bytes(i) for i in (108, 139, 203)] == [b"\n\n", b"   ", b"<s>"]
    for control in (0, 2, 4, 5, 6, 105, 255999, 262144):  # <pad> <bos> <mask> [multimodal] <unused0> ...
        assert gemma.token_bytes(control) == b"" and not gemma.is_text[control]


def test_roles_are_those_of_the_family_whatever_the_config_calls_eos(gemma, llama):
    # Both instruct configs name the end of a turn as eos_token.
    assert gemma.roles == {"pad": 0, "eos": 1, "bos": 2, "unk": 3, "start_of_turn": 105, "end_of_turn": 106}
    assert llama.roles == {
        "bos": 128000,
        "eos": 128001,
        "start_header": 128006,
        "end_header": 128007,
        "end_of_turn": 128009,
    }


def test_a_literal_space_mark_is_refused_with_its_place(gemma, llama):
    with pytest.raises(RoundTripError, match=r"byte 5 of 12, text has b'word \\xe2\\x96\\x81 end'.*b'word   end'"):
        gemma.encode(f"word {MARK} end")
    assert llama.decode_bytes(llama.encode(MARK)) == MARK.encode()
    errors = gemma.try_encode_batch(["fine", MARK, "also fine"])
    assert [isinstance(e, RoundTripError) for e in errors] == [False, True, False]
    with pytest.raises(RoundTripError, match="byte 0 of 3"):
        gemma.encode_batch(["fine", MARK])


def test_a_lone_surrogate_is_refused_with_its_place(llama):
    with pytest.raises(RoundTripError, match="surrogate at character 3"):
        llama.encode("bad\ud800")


def test_a_byte_that_the_vocabulary_lacks_is_refused():
    lacking = table_of(byte_level_json(without=b"\xc3"))
    assert lacking.decode_bytes(lacking.encode("ab")) == b"ab"
    with pytest.raises(RoundTripError, match="byte 0 of 2"):
        lacking.encode("é")
    with pytest.raises(UserError, match="no token for the byte 0xC3"):
        first_pieces(table_of(byte_level_json()), lacking)


def test_the_id_of_a_piece_is_the_one_that_the_encoder_emits(gemma):
    for c in map(chr, range(33, 127)):
        assert gemma.id_of(c.encode()) == gemma.encode(c).item()
    assert gemma.id_of(b"<bos>") is None and gemma.id_of(b"") is None


def test_ids_outside_the_vocabulary_are_refused(llama):
    for i in (-1, llama.vocab_size):
        with pytest.raises(IndexError, match="vocabulary"):
            llama.token_bytes(i)
        with pytest.raises(IndexError, match="vocabulary"):
            llama.decode_bytes([i])
    assert llama.decode_bytes([]) == b""


def test_every_source_gives_the_same_table(llama, tokenizers_dir):
    path = tokenizers_dir / "llama3"
    sources = [path / "tokenizer.json", Tokenizer.from_file(str(path / "tokenizer.json"))]
    sources.append(PreTrainedTokenizerFast.from_pretrained(path))
    for source in sources:
        table = ByteTable.from_tokenizer(source)
        assert (table.hash, table.roles) == (llama.hash, llama.roles)


def test_the_callers_tokenizer_is_left_alone_and_its_limits_do_not_count():
    tokenizer = Tokenizer.from_str(json.dumps(byte_level_json()))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    table = ByteTable.from_tokenizer(tokenizer)
    assert [len(ids) for ids in table.encode_batch(["a", "x y z"])] == [1, 5]
    assert not tokenizer.encode_special_tokens and tokenizer.truncation and tokenizer.padding


def test_a_pickled_table_still_keeps_control_tokens_out():
    table = table_of(
        sentencepiece_json() | {"added_tokens": [_added(0, "<pad>"), _added(264, "<unused0>", special=False)]}
    )
    again = pickle.loads(pickle.dumps(table))
    assert again.hash == table.hash
    for written in ("<pad>", "<unused0>"):
        assert np.array_equal(again.encode(written), table.encode(written)) and len(again.encode(written)) > 1


def test_the_hash_speaks_of_bytes_kinds_and_roles():
    spec = byte_level_json()
    first = table_of(spec)
    assert first.hash == table_of(spec).hash
    other_bytes, other_kind, other_role = byte_level_json(), byte_level_json(), byte_level_json()
    other_bytes["model"]["vocab"].update({"Ġa": 257, "ab": 256})
    other_kind["added_tokens"][1]["special"] = True
    other_role["added_tokens"][3]["content"] = "<|other|>"
    hashes = {first.hash, *(table_of(s).hash for s in (other_bytes, other_kind, other_role))}
    assert len(hashes) == 4


def test_configured_strings_fill_the_roles_that_no_family_string_does(tmp_path):
    spec = byte_level_json()
    spec["added_tokens"][0]["content"], spec["added_tokens"][3]["content"] = "<start>", "<filler>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    names = {"bos_token": {"content": "<start>"}, "eos_token": "<filler>", "pad_token": "<filler>", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert ByteTable.from_tokenizer(tmp_path).roles == {"bos": 259, "eos": 261, "pad": 262}


PREPEND = {"type": "Prepend", "prepend": "x"}
METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never", "split": True}
REMOVED = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}


@pytest.mark.parametrize(
    ("family", "key", "part", "named"),
    [
        (byte_level_json, "normalizer", {"type": "NFKC"}, "normalizer NFKC"),
        (byte_level_json, "normalizer", {"type": "Lowercase"}, "normalizer Lowercase"),
        (
            byte_level_json,
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [REMOVED]},
            "Split with behavior=Removed",
        ),
        (byte_level_json, "pre_tokenizer", {"type": "BertPreTokenizer"}, "pre_tokenizer BertPreTokenizer"),
        (byte_level_json, "pre_tokenizer", None, "decoder ByteLevel"),
        (sentencepiece_json, "normalizer", {"type": "Sequence", "normalizers": [PREPEND]}, "normalizer Prepend of 'x'"),
        (sentencepiece_json, "pre_tokenizer", METASPACE, "Metaspace with replacement='_'"),
        (sentencepiece_json, "normalizer", None, "neither byte-level .* nor SentencePiece"),
        (sentencepiece_json, "decoder", {"type": "Strip", "content": " ", "start": 1, "stop": 0}, "decoder Strip"),
        (sentencepiece_json, "model", {"byte_fallback": False}, "byte_fallback=False and lacks 0 of 256"),
        (sentencepiece_json, "model", {"end_of_word_suffix": "</w>"}, "end_of_word_suffix='</w>'"),
        (sentencepiece_json, "model", {"dropout": 0.1}, "dropout=0.1"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(family, key, part, named):
    spec = family()
    spec[key] = spec[key] | part if key == "model" else part
    with pytest.raises(UserError, match=named):
        table_of(spec)


def test_other_models_and_missing_files_are_refused_by_name(tmp_path):
    pieces = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 9,
    }
    with pytest.raises(UserError, match="model WordPiece is not supported"):
        model = pieces | {"vocab": {"[UNK]": 0, "a": 1}}
        table_of(sentencepiece_json() | {"model": model, "added_tokens": []})
    with pytest.raises(UserError, match="no tokenizer.json"):
        ByteTable.from_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot read bytes from a int"):
        ByteTable.from_tokenizer(3)


def test_nfc_is_accepted_and_refuses_only_the_text_it_would_change():
    table = table_of(byte_level_json() | {"normalizer": {"type": "NFC"}})
    assert table.decode_bytes(table.encode("é")) == "é".encode()
    with pytest.raises(RoundTripError):
        table.encode("e\u0301")


def test_first_pieces_of_the_real_pair(gemma, llama):
    first, identical = first_pieces(gemma, llama)
    assert first.dtype == np.int32 and first.shape == identical.shape == (gemma.vocab_size,)
    # 86,434 Llama tokens have a byte-identical Gemma token; 110 of them have a second one, the byte token <0xNN>.
    assert int(identical.sum()) == 86_544
    assert len(np.unique(first[identical])) == 86_434
    assert (first[gemma.is_text] >= 0).all()
    pairs = [(gemma.token_bytes(i), llama.token_bytes(first[i])) for i in np.flatnonzero(gemma.is_text)]
    assert all(whole.startswith(piece) and piece for whole, piece in pairs)
    assert all((whole == piece) == same for (whole, piece), same in zip(pairs, identical[gemma.is_text], strict=True))

    # The true first piece, not the longest prefix; bytes that are no text alone take the longest prefix.
    split = np.flatnonzero(gemma.is_text & ~identical)[::211]
    for i in split:
        whole = gemma.token_bytes(i).decode()
        assert first[i] == llama.encode(whole)[0]
    assert first[238 + 0xE2] == llama.id_of(b"\xe2")

    control = {gemma.roles[role]: llama.roles[role] for role in ("bos", "eos", "end_of_turn")}
    assert {i: int(first[i]) for i in np.flatnonzero(~gemma.is_text) if first[i] >= 0} == control


def test_first_pieces_of_small_tables():
    teacher, student = table_of(byte_level_json()), table_of(sentencepiece_json())
    first, identical = first_pieces(teacher, student)
    assert first[256:].tolist() == [263, 261, 261, 2, 4 + ord("<"), 1, -1]  # " a" "ab" "abab" bos <tool> eos eot
    assert identical[256:].tolist() == [True, False, False, False, False, False, False]
    assert first[0xC3] == 4 + 0xC3 and identical[0xC3]

"""Promise: every student token is root, interior or crossing, exactly as a walk over the bytes says."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int8, Int32
from tokenizers import Tokenizer

from distil_jax.tokens.align import CLASSES, CROSSING, INTERIOR, NONE, ROOT, align, align_ids, coverage, token_classes
from distil_jax.tokens.bytes import ByteTable, RoundTripError

# One hard text of each kind; the names say what of it is hard.
HARD = {
    "emoji of several code points": "👩🏽‍⚕️👨‍👩‍👧‍👦🏳️‍🌈❤️‍🔥 a👍🏿b🧑🏻‍🦰",
    "flags": "🇪🇺🇩🇪🇩 🇺🇸🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "skin tones alone": "🏻🏼🏽🏾🏿 👋🏻👋🏿",
    "Greek": "α-τοκοφερόλη, Μέγας ΑΛΈΞΑΝΔΡΟΣ ἄνθρωπος ϑ ϕ µ μ Ω Ω",
    "CJK": "心房細動の治療。고혈압 환자 𠮷野家 㐀 ﾊﾝｶｸ ＡＢＣ１２３ 々〆ヶ",
    "CRLF": "a\r\nb\r\n\r\n\r\nc\rd\n\re\r\r\n \r\n",
    "tabs": "\ta\t\tb\t \t c\t\n\t\td \t",
    "runs of spaces": " a  b   c    d" + " " * 31 + "e" + " " * 64 + "\n" + " " * 17,
    "zero width": "a\u200bb\u200c\u200dc\u2060d\ufeffe\u00ad\u034f\u061c",
    "combining": "e\u0301a\u0300\u0323o\u0302\u0301 \u0301 Z\u0351\u0310\u0357a\u0327 \u1112\u1161\u11ab ক্ষি",
    "control names of Gemma": "<bos><eos><pad><unk><start_of_turn>user\n<end_of_turn><unused99><mask>",
    "control names of Llama": "<|begin_of_text|><|eot_id|><|start_header_id|>a<|end_header_id|>\n\n",
    "control names in pieces": "< bos><<bos>><|eot_id|<|eot_id|>|>[multimodal]<|",
    "byte tokens by name": "<0x0A><0xFF><0x41>",
    "HTML that Gemma has": "<table><tr><td>1</td></tr></table><s></s><b><h1></h6><strong>",
    "byte-order mark": "\ufefftext\ufeff",
    "NUL and other controls": "\0a\0\0b\x01\x02\x1b[0m\x7f\x80\x85\x9f\x0b\x0c",
    "private use": "\ue000\uf8ff\U000f0000\U0010fffd",
    "not characters": "\uffff\ufffe\ufdd0\U0010ffff\ufffd",
    "right to left": "ارتفاع ضغط الدم ١٢٣٤ \u202bעִבְרִית\u202c שלום 12.5 מ״ג \u200f",
    "spaces that are not U+0020": "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u202fg\u1680h\u180e",
    "mathematics and units": "𝛂𝟙𝟐 x²₃ ½ ≥ ± µg °C ‰ ㎎ ﬁ Ⅷ",
    "code": "def f(x):\n    if x != 0 and y <= 1e-3:\n\t\treturn {'a': [1, 2, 3]}  # é\n\n\n",
    "doses": "12.5mg/kg q8h; p<0.001; 1,234,567.89; 0x1F; 2019-12-31T23:59; 1/2; 10^6; IL-6; T4N1M0",
    "long words": "pneumonoultramicroscopicsilicovolcanoconiosis" * 3 + "A" * 99 + "." * 77 + "=" * 65,
}
NUMBERS = {n: ("1234567890" * 3)[:n] for n in range(1, 31)}
AWKWARD = [
    "",
    "x",
    "👩🏽‍⚕️🧬 naïve α-synuclein ≥ 5 µg",
    "心房細動の治療 고혈압",
    "line\r\nline\r\n\r\n\ttab\t\t  two   three    four spaces \n \n",
    "e\u0301a\u0300 zero\u200bwidth \u200d\ufeff\u00a0\u00ad",
    "<bos>text<|eot_id|><start_of_turn>model\n<unused3>",
    "1 12 123 1234 12345 123456 1234567 12345678 0.05 1,234.567 10mg/kg 2019-2020 p<0.001",
    "<table><td>1</td></table>",
]
pieces = st.sampled_from(
    ["12", "345", " ", "  ", "\n", "\r\n", "\t", "é", "α", "🧬", "a\u0301", "\u200b", " the", "dose", "<bos>"]
)
characters = st.characters(exclude_categories=("Cs",), exclude_characters="\u2581")
text = st.lists(pieces | st.text(characters, max_size=6), max_size=20).map("".join)


@pytest.fixture(scope="module")
def gemma(tokenizers_dir):
    return ByteTable.from_tokenizer(tokenizers_dir / "gemma3")


@pytest.fixture(scope="module")
def llama(tokenizers_dir):
    return ByteTable.from_tokenizer(tokenizers_dir / "llama3")


def byte_walk(student_pieces: list[bytes], teacher_pieces: list[bytes]) -> list[tuple[int, int, int]]:
    """The oracle: (role, teacher_index, offset) of every student token, one byte at a time."""
    owner = [(i, n) for i, piece in enumerate(teacher_pieces) for n in range(len(piece))]  # byte -> token, place in it
    places, start = [], 0
    for piece in student_pieces:
        if not piece:
            places.append((NONE, -1, 0))
            continue
        index, offset = owner[start]
        inside = all(owner[start + n][0] == index for n in range(len(piece)))
        places.append(((ROOT if offset == 0 else INTERIOR) if inside else CROSSING, index, offset))
        start += len(piece)
    return places


def check(a, student, teacher, written=None):
    """An alignment against the walk over its bytes, and, with the text, its bytes against the text's."""
    if written is not None:
        want = written.encode()
        for table, ids in ((student, a.student_ids), (teacher, a.teacher_ids)):
            assert b"".join(table.token_bytes(i) for i in ids) == want and table.is_text[ids].all()
            assert table.lengths[ids].sum() == len(want)
    assert isinstance(a.role, Int8[np.ndarray, "Ts"])
    for field in (a.teacher_index, a.offset, a.student_ids):
        assert isinstance(field, Int32[np.ndarray, f"{len(a.role)}"])
    sides = [[table.token_bytes(i) for i in ids] for table, ids in ((student, a.student_ids), (teacher, a.teacher_ids))]
    assert list(zip(a.role.tolist(), a.teacher_index.tolist(), a.offset.tolist(), strict=True)) == byte_walk(*sides)


@pytest.mark.parametrize("written", AWKWARD)
def test_awkward_text_is_placed_as_by_walking_the_bytes(written, gemma, llama):
    check(align(written, student=llama, teacher=gemma), llama, gemma)
    check(align(written, student=gemma, teacher=llama), gemma, llama)


@settings(deadline=None, max_examples=150)
@given(text)
def test_any_text_is_placed_as_by_walking_the_bytes(gemma, llama, written):
    check(align(written, student=llama, teacher=gemma), llama, gemma)
    check(align(written, student=gemma, teacher=llama), gemma, llama)


def test_the_three_roles_spelled_out(gemma, llama):
    a = align("A 1234.5 naïve (p", student=llama, teacher=gemma)
    teacher = [gemma.token_bytes(i).decode() for i in a.teacher_ids]
    assert teacher == ["A", " ", "1", "2", "3", "4", ".", "5", " naïve", " (", "p"]
    table = [
        (llama.token_bytes(i).decode(), role, teacher[index], offset)
        for i, role, index, offset in zip(
            a.student_ids, a.role.tolist(), a.teacher_index, a.offset.tolist(), strict=True
        )
    ]
    assert table == [
        ("A", ROOT, "A", 0),
        (" ", ROOT, " ", 0),
        ("123", CROSSING, "1", 0),
        ("4", ROOT, "4", 0),
        (".", ROOT, ".", 0),
        ("5", ROOT, "5", 0),
        (" naï", ROOT, " naïve", 0),
        ("ve", INTERIOR, " naïve", 5),
        (" (", ROOT, " (", 0),
        ("p", ROOT, "p", 0),
    ]


def test_numbers_of_each_length_cross_as_their_digits_say(gemma, llama):
    for n in range(1, 13):
        a = align("7" * n, student=llama, teacher=gemma)  # Llama groups three from the left, Gemma has single digits
        assert a.role.tolist() == [CROSSING] * (n // 3) + ([] if n % 3 == 0 else [ROOT] if n % 3 == 1 else [CROSSING])
        b = align("7" * n, student=gemma, teacher=llama)
        assert b.teacher_index.tolist() == [i // 3 for i in range(n)] and b.offset.tolist() == [i % 3 for i in range(n)]


@pytest.mark.parametrize("kind", HARD)
def test_hard_text_is_exact_on_both_sides(kind, gemma, llama):
    written = HARD[kind]
    for text_of in (written, f" {written}", f"{written}\n{written}", f"the dose{written}12.5 mg"):
        check(align(text_of, student=llama, teacher=gemma), llama, gemma, text_of)
        check(align(text_of, student=gemma, teacher=llama), gemma, llama, text_of)


@pytest.mark.parametrize("n", NUMBERS)
def test_a_number_of_any_length_is_exact_alone_and_in_a_sentence(n, gemma, llama):
    number = NUMBERS[n]
    for written in (number, f"n = {number}.", f"{number}mg", f"-{number}.{number}", f" {number}%", f"{number:0>30}"):
        check(align(written, student=llama, teacher=gemma), llama, gemma, written)
        check(align(written, student=gemma, teacher=llama), gemma, llama, written)


@settings(deadline=None, max_examples=120)
@given(st.lists(st.sampled_from([*HARD.values(), *NUMBERS.values()]) | text, min_size=2, max_size=5), st.randoms())
def test_hard_texts_joined_and_cut_anywhere_are_exact(gemma, llama, parts, random):
    parts = [part[random.randint(0, len(part)) :] for part in parts]  # also inside a flag, a name, a CRLF
    written = "".join(parts)
    check(align(written, student=llama, teacher=gemma), llama, gemma, written)
    check(align(written, student=gemma, teacher=llama), gemma, llama, written)


def test_a_tokenizer_against_itself_is_all_roots(gemma):
    a = align(" ".join(AWKWARD), student=gemma, teacher=gemma)
    assert (a.role == ROOT).all() and not a.offset.any()
    assert a.teacher_index.tolist() == list(range(len(a.student_ids)))


def test_control_tokens_stand_anywhere_and_have_no_place(gemma, llama):
    bos, eot, turn = llama.roles["bos"], llama.roles["end_of_turn"], gemma.roles["start_of_turn"]
    student, teacher = llama.encode("naïve 123").tolist(), gemma.encode("naïve 123").tolist()
    a = align_ids(
        np.array([bos, *student[:1], eot, *student[1:], eot], np.int32),
        np.array([turn, turn, *teacher[:2], turn, *teacher[2:], turn], np.int32),
        llama,
        gemma,
    )
    check(a, llama, gemma)
    assert a.role[0] == a.role[2] == a.role[-1] == NONE and a.teacher_index[0] == -1
    only_control = align_ids(np.array([bos, eot], np.int32), np.array([], np.int32), llama, gemma)
    assert only_control.role.tolist() == [NONE, NONE] and only_control.teacher_index.tolist() == [-1, -1]


def test_different_bytes_are_refused(gemma, llama):
    for other in ("the dosage", "the dosf", "the dos"):
        with pytest.raises(RoundTripError, match="not the same bytes"):
            align_ids(llama.encode("the dose"), gemma.encode(other), llama, gemma)
    with pytest.raises(RoundTripError):
        align("a \u2581", student=llama, teacher=gemma)


def test_a_long_document_is_placed_like_its_bytes(gemma, llama):
    rng = np.random.default_rng(0)
    written = "".join(AWKWARD[i] + "the patients (n = 250) were given 12.5 mg of it. " for i in rng.integers(0, 9, 60))
    a = align(written, student=llama, teacher=gemma)
    assert len(a.student_ids) > 2000
    check(a, llama, gemma)


def test_coverage_counts_roles_by_class_of_the_student_token(gemma, llama):
    written = ["A 1234 mg", "naïve, 5"]
    found = coverage([align(w, student=llama, teacher=gemma) for w in written], llama)
    # A| |123|4| mg   and   na|ï ve|,| |5 : "123" crosses, "naïve" is not one token of both
    assert set(found) == {"all", *CLASSES}
    for counts in found.values():
        assert counts["tokens"] == counts["root"] + counts["interior"] + counts["crossing"]
        assert counts["one_to_one"] <= counts["root"]
        assert counts["crossing_at_boundary"] <= counts["crossing"]
    for key in ("tokens", "root", "interior", "crossing", "crossing_at_boundary", "one_to_one"):
        assert found["all"][key] == sum(found[c][key] for c in CLASSES)
    names = ("tokens", "root", "interior", "crossing", "crossing_at_boundary", "one_to_one")
    expected = {"digit": (3, 2, 0, 1, 1, 2), "whitespace": (2, 2, 0, 0, 0, 2), "punctuation": (1, 1, 0, 0, 0, 1)}
    for name, numbers in expected.items():
        assert found[name] == dict(zip(names, numbers, strict=True))


def test_one_to_one_is_a_whole_teacher_token(gemma, llama):
    alignments = [align(written, student=llama, teacher=gemma) for written in AWKWARD]
    both = [
        role == ROOT and llama.token_bytes(s) == gemma.token_bytes(a.teacher_ids[i])
        for a in alignments
        for s, role, i in zip(a.student_ids, a.role, a.teacher_index, strict=True)
    ]
    assert coverage(alignments, llama)["all"]["one_to_one"] == sum(both)


def test_a_crossing_may_begin_at_a_boundary_of_both_or_not(gemma, llama):
    seen = {True: 0, False: 0}
    alignments = [align(w, student=s, teacher=t) for w in HARD.values() for s, t in ((llama, gemma), (gemma, llama))]
    for a in alignments:
        for role, offset in zip(a.role.tolist(), a.offset.tolist(), strict=True):
            if role == CROSSING:
                seen[offset == 0] += 1
    counts = coverage(alignments[::2], llama)["all"], coverage(alignments[1::2], gemma)["all"]
    assert sum(c["crossing_at_boundary"] for c in counts) == seen[True] > 0
    assert sum(c["crossing"] for c in counts) == sum(seen.values())
    assert seen[False] > 0


def test_classes_of_tokens():
    # A vocabulary of whole strings: the classes come from their bytes alone.
    strings = [" dose", "β", "\u0301", "12", "x2", " ", "\r\n", "\u200b", ").", "≥", "🧬"]
    expected = ["word", "word", "word", "digit", "digit", *["whitespace"] * 3, *["punctuation"] * 3]
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    names = [f"<0x{b:02X}>" for b in range(256)] + [s.replace(" ", "\u2581") for s in strings]
    model = {"type": "BPE", "byte_fallback": True, "vocab": {s: i for i, s in enumerate(names)}, "merges": []}
    spec = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": model}
    table = ByteTable.from_tokenizer(Tokenizer.from_str(json.dumps(spec)))
    classes = [CLASSES[c] for c in token_classes(table)]
    assert classes[256:] == expected
    assert classes[0x41] == "word" and classes[0x80] == classes[0xFF] == "byte"

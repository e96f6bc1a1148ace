"""Promise: packing loses nothing, shifts by exactly one, and no segment sees another."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from distil_jax.errors import UserError
from distil_jax.tokens.align import CROSSING, INTERIOR, NONE, ROOT
from distil_jax.tokens.bytes import ByteTable, RoundTripError
from distil_jax.tokens.pack import (
    STUDENT_FIELDS,
    TEACHER_FIELDS,
    Example,
    Part,
    join_parts,
    make_example,
    make_examples,
    pack,
    unpack,
)


def small_table(pieces: list[str], control: list[str]) -> ByteTable:
    """SentencePiece-style: `control` from id 0, 256 byte tokens, characters, `pieces` and their beginnings."""
    mark = "\u2581"
    characters = sorted({c for piece in pieces for c in piece})
    merges = []
    for piece in pieces:
        merges += [[piece[:n], piece[n]] for n in range(1, len(piece)) if [piece[:n], piece[n]] not in merges]
    names = [*control, *(f"<0x{b:02X}>" for b in range(256)), mark, *characters]
    names += [a + b for a, b in merges]
    added = [
        {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, c in enumerate(control)
    ]
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": mark}
    model = {"type": "BPE", "byte_fallback": True, "vocab": {name: i for i, name in enumerate(names)}, "merges": merges}
    spec = {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "model": model}
    return ByteTable.from_tokenizer(Tokenizer.from_str(json.dumps(spec)))


STUDENT = small_table(["123", "ab"], ["<bos>", "<eos>"])
TEACHER = small_table(["abc"], ["<pad>", "<eos>", "<bos>"])
NO_BOS = small_table(["abc"], ["<eos>"])
BARE = small_table(["abc"], ["<pad>"])


def names(table: ByteTable, ids: np.ndarray) -> list[str]:
    roles = {i: f"<{role}>" for role, i in table.roles.items()}
    return [roles.get(i) or table.token_bytes(i).decode() for i in ids.tolist()]


def columns(example: Example) -> list[tuple[int, int, int]]:
    return list(zip(*(example[name].tolist() for name in ("role", "teacher_index", "offset")), strict=True))


def test_an_example_spelled_out():
    e = make_example("abc", "c1234", STUDENT, TEACHER, specialty=3, document=7)
    assert names(STUDENT, e["student_tokens"]) == ["<bos>", "ab", "c", "c", "123", "4", "<eos>"]
    assert names(TEACHER, e["teacher_tokens"]) == ["<bos>", "abc", "c", "1", "2", "3", "4", "<eos>"]
    assert e["student_supervised"].tolist() == [False, False, False, True, True, True, True]
    assert e["teacher_supervised"].tolist() == [False, False, True, True, True, True, True, True]
    assert columns(e) == [
        (NONE, -1, 0),
        (ROOT, 1, 0),
        (INTERIOR, 1, 2),
        (ROOT, 2, 0),
        (CROSSING, 3, 0),
        (ROOT, 6, 0),
        (ROOT, 7, 0),
    ]
    assert (e["specialty"], e["document"]) == (3, 7)
    dtypes = {name: value.dtype for name, value in e.items() if isinstance(value, np.ndarray)}
    assert dtypes == {
        "student_tokens": np.int32,
        "student_supervised": bool,
        "teacher_tokens": np.int32,
        "teacher_supervised": bool,
        "role": np.int8,
        "teacher_index": np.int32,
        "offset": np.int32,
    }


def test_the_border_of_prompt_and_completion_is_a_border_of_tokens_on_both_sides():
    # In one piece the teacher would take "abc" and the student "123" across the border.
    e = make_example("ab1", "23ab", STUDENT, TEACHER)
    assert names(STUDENT, e["student_tokens"]) == ["<bos>", "ab", "1", "2", "3", "ab", "<eos>"]
    e = make_example("ab", "c", STUDENT, TEACHER)
    assert names(TEACHER, e["teacher_tokens"]) == ["<bos>", "ab", "c", "<eos>"]
    assert e["teacher_supervised"].tolist() == [False, False, True, True]


def test_plain_text_has_no_prompt_and_eos_stands_only_where_the_text_ends():
    e = make_example("", "abc", STUDENT, TEACHER, append_eos=False)
    assert names(STUDENT, e["student_tokens"]) == ["<bos>", "ab", "c"]
    assert e["student_supervised"].tolist() == [False, True, True]


def test_roles_that_one_side_lacks():
    e = make_example("", "c", STUDENT, BARE)  # teacher without bos and eos
    assert names(BARE, e["teacher_tokens"]) == ["c"]
    assert columns(e) == [(NONE, -1, 0), (ROOT, 0, 0), (NONE, -1, 0)]
    row = pack([e], 3, 3).rows
    # Nothing predicts the teacher's first token: the student's target there has no teacher, but is learned.
    assert row["role"][0].tolist() == [NONE, NONE, NONE] and row["student_weights"][0].tolist() == [1, 1, 0]

    e = make_example("", "cab", NO_BOS, TEACHER)  # student without bos
    assert names(NO_BOS, e["student_tokens"]) == ["c", "ab", "<eos>"]
    assert columns(e) == [(ROOT, 1, 0), (ROOT, 2, 0), (ROOT, 3, 0)]

    e = make_example("", "cab", BARE, TEACHER)
    assert names(TEACHER, e["teacher_tokens"])[-1] == "<eos>" and e["teacher_supervised"][-1]


def test_a_row_without_anything_to_learn_is_refused():
    assert make_example("abc", "", STUDENT, TEACHER)["student_supervised"].sum() == 1  # eos after an empty answer
    with pytest.raises(UserError, match="document 4 has no token to learn"):
        make_example("abc", "", STUDENT, TEACHER, document=4, append_eos=False)
    with pytest.raises(UserError, match="no token to learn"):
        make_example("", "a", BARE, TEACHER)  # a single token is no target


def test_many_rows_are_the_single_rows_and_bad_ones_are_named():
    rows = [
        {"prompt": "ab", "completion": "c 12", "specialty": 2, "document": 40},
        {"prompt": "", "completion": "with \u2581"},
        {"prompt": "abc", "completion": "", "append_eos": False},
        {"prompt": "\ud800", "completion": "x"},
        {"prompt": "", "completion": "plain", "append_eos": False},
    ]
    examples, rejected = make_examples(rows, STUDENT, TEACHER)
    assert [(n, type(error)) for n, error in rejected] == [(1, RoundTripError), (2, UserError), (3, RoundTripError)]
    singles = [
        make_example("ab", "c 12", STUDENT, TEACHER, specialty=2, document=40),
        make_example("", "plain", STUDENT, TEACHER, document=4, append_eos=False),
    ]
    assert len(examples) == len(singles)
    for many, single in zip(examples, singles, strict=True):
        assert_same(many, single)
    assert make_examples([], STUDENT, TEACHER) == ([], [])


def test_parts_tie_templates_that_differ_between_the_models():
    both = {text: (STUDENT.encode(text), TEACHER.encode(text)) for text in ("ab", "abc1")}
    e = join_parts(
        [
            Part(np.array([0], np.int32), np.array([2, 0, 0], np.int32), tie="none"),
            Part(*both["ab"]),
            Part(STUDENT.encode("x"), np.array([], np.int32), tie="none"),
            Part(*both["abc1"], supervised=True),
            Part(np.array([1], np.int32), np.array([1], np.int32), tie="role", supervised=True),
        ],
        STUDENT,
        TEACHER,
    )
    assert columns(e) == [
        (NONE, -1, 0),
        (ROOT, 3, 0),
        (NONE, -1, 0),
        (ROOT, 4, 0),
        (INTERIOR, 4, 2),
        (ROOT, 5, 0),
        (ROOT, 6, 0),
    ]


def tiny_example(start: int, ns: int, nt: int, specialty: int = 0, document: int = 0) -> Example:
    """Tokens start, start + 1, ...; the last half supervised; every student token but the first is tied."""
    index = np.arange(ns).clip(max=nt - 1)
    index[0] = -1
    return Example(
        student_tokens=np.arange(start, start + ns, dtype=np.int32),
        student_supervised=(np.arange(ns) >= ns // 2) & (np.arange(ns) > 0),
        teacher_tokens=np.arange(start + 500, start + 500 + nt, dtype=np.int32),
        teacher_supervised=(np.arange(nt) >= nt // 2) & (np.arange(nt) > 0),
        role=np.where(index > 0, 1 + np.arange(ns) % 3, NONE).astype(np.int8),
        teacher_index=np.where(index > 0, index, -1).astype(np.int32),
        offset=np.where(index > 0, np.arange(ns) % 5, 0).astype(np.int32),
        specialty=specialty,
        document=document,
    )


def test_the_shift_spelled_out():
    first = Example(
        student_tokens=np.array([1, 11, 12, 2], np.int32),
        student_supervised=np.array([False, False, True, True]),
        teacher_tokens=np.array([5, 51, 52, 53, 6], np.int32),
        teacher_supervised=np.array([False, False, False, True, True]),
        role=np.array([NONE, CROSSING, ROOT, ROOT], np.int8),
        teacher_index=np.array([-1, 1, 3, 4], np.int32),
        offset=np.array([0, 0, 0, 0], np.int32),
        specialty=3,
        document=70,
    )
    second = Example(
        student_tokens=np.array([1, 21, 22], np.int32),
        student_supervised=np.array([False, True, True]),
        teacher_tokens=np.array([5, 61], np.int32),
        teacher_supervised=np.array([False, True]),
        role=np.array([NONE, ROOT, INTERIOR], np.int8),
        teacher_index=np.array([-1, 1, 1], np.int32),
        offset=np.array([0, 0, 2], np.int32),
        specialty=4,
        document=80,
    )
    packed = pack([second, first], 8, 8)  # the longer one is placed first
    assert {name: value[0].tolist() for name, value in packed.rows.items()} == {
        "student_tokens": [1, 11, 12, 2, 1, 21, 22, 0],
        "student_segment_ids": [1, 1, 1, 1, 2, 2, 2, 0],
        "student_positions": [0, 1, 2, 3, 0, 1, 2, 0],
        "student_targets": [11, 12, 2, 0, 21, 22, 0, 0],
        "student_weights": [0, 1, 1, 0, 1, 1, 0, 0],
        "role": [CROSSING, ROOT, ROOT, NONE, ROOT, INTERIOR, NONE, NONE],
        "teacher_position": [0, 2, 3, 0, 5, 5, 0, 0],
        "offset": [0, 0, 0, 0, 0, 2, 0, 0],
        "specialty": [3, 3, 3, 3, 4, 4, 4, 0],
        "document": [70, 70, 70, 70, 80, 80, 80, 0],
        "teacher_tokens": [5, 51, 52, 53, 6, 5, 61, 0],
        "teacher_segment_ids": [1, 1, 1, 1, 1, 2, 2, 0],
        "teacher_positions": [0, 1, 2, 3, 4, 0, 1, 0],
        "teacher_targets": [51, 52, 53, 6, 0, 61, 0, 0],
        "teacher_weights": [0, 0, 1, 1, 0, 1, 0, 0],
    }
    assert packed.over_long == [] and packed.student_fill == packed.teacher_fill == 7 / 8


lengths = st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), max_size=25)


@settings(deadline=None, max_examples=100)
@given(lengths)
def test_unpacking_gives_every_example_back_once(sizes):
    examples = [tiny_example(100 * n + 1, ns, nt, specialty=n % 3, document=n) for n, (ns, nt) in enumerate(sizes)]
    packed = pack(examples, 12, 10)
    assert packed.over_long == [n for n, (ns, nt) in enumerate(sizes) if ns > 12 or nt > 10]
    found = sorted(unpack(packed.rows), key=lambda e: e["document"])
    wanted = [e for n, e in enumerate(examples) if n not in packed.over_long]
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert_same(got, want)
    check_rows(packed.rows, 12, 10)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=60))
def test_each_example_goes_where_it_leaves_the_least_room(sizes):
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for n in sorted(range(len(sizes)), key=lambda n: (-max(sizes[n][0] * 10, sizes[n][1] * 12), n)):
        (ns, nt), fitting = (
            sizes[n],
            [(s, t, r) for r, (s, t) in enumerate(free) if s >= sizes[n][0] and t >= sizes[n][1]],
        )
        s, t, r = min(fitting, default=(12, 10, len(rows)))
        if r == len(rows):
            rows.append([])
            free.append((12, 10))
        rows[r].append(n)
        free[r] = (s - ns, t - nt)
    packed = pack([tiny_example(1, ns, nt, document=n) for n, (ns, nt) in enumerate(sizes)], 12, 10).rows
    found = [
        list(dict.fromkeys(d[s > 0].tolist()))
        for d, s in zip(packed["document"], packed["student_segment_ids"], strict=True)
    ]
    assert found == rows


def test_text_in_both_tokenizations_survives_packing_and_points_at_the_right_teacher_token():
    rng = np.random.default_rng(1)
    parts = ["ab", "abc", "123", "12", " ", "é", "1"]
    rows = [{"prompt": "".join(rng.choice(parts, 4)), "completion": "".join(rng.choice(parts, 9))} for _ in range(40)]
    examples, _ = make_examples(rows, STUDENT, TEACHER)
    packed = pack(examples, 64, 72)
    for got, want in zip(sorted(unpack(packed.rows), key=lambda e: e["document"]), examples, strict=True):
        assert_same(got, want)
    check_rows(packed.rows, 64, 72)
    rows = packed.rows
    for r, p in zip(*np.nonzero(rows["role"]), strict=True):
        at = rows["teacher_position"][r, p]
        # The teacher's target at that position contains the first byte of the student's target at this one.
        target, mine = (
            TEACHER.token_bytes(rows["teacher_targets"][r, at]),
            STUDENT.token_bytes(rows["student_targets"][r, p]),
        )
        assert target[rows["offset"][r, p] :][:1] == mine[:1]
        assert rows["teacher_segment_ids"][r, at] == rows["student_segment_ids"][r, p]


def check_rows(rows: dict[str, np.ndarray], student_length: int, teacher_length: int) -> None:
    """What every packed row must satisfy: shapes, and no target, weight or pointer that leaves its segment."""
    assert set(rows) == {*STUDENT_FIELDS, *TEACHER_FIELDS}
    for name, value in rows.items():
        assert value.dtype == np.int32
        assert value.shape[1] == (teacher_length if name in TEACHER_FIELDS else student_length)
    for side in ("student", "teacher"):
        segment = rows[f"{side}_segment_ids"]
        following = np.pad(segment[:, 1:], ((0, 0), (0, 1)))
        has_target = (segment > 0) & (following == segment)
        next_token = np.pad(rows[f"{side}_tokens"][:, 1:], ((0, 0), (0, 1)))
        assert np.array_equal(rows[f"{side}_targets"], np.where(has_target, next_token, 0))
        assert not rows[f"{side}_weights"][~has_target].any() and set(np.unique(rows[f"{side}_weights"])) <= {0, 1}
        starts = rows[f"{side}_positions"] == 0
        assert np.array_equal(
            starts & (segment > 0), (segment > 0) & (np.pad(segment[:, :-1], ((0, 0), (1, 0))) != segment)
        )
        if side == "student":
            assert not rows["role"][~has_target].any()
        for name in (f"{side}_tokens", f"{side}_positions"):
            assert not rows[name][segment == 0].any()
    at = np.take_along_axis(rows["teacher_segment_ids"], rows["teacher_position"], axis=1)
    tied = rows["role"] != NONE
    assert np.array_equal(at[tied], rows["student_segment_ids"][tied])
    has_teacher_target = np.take_along_axis(rows["teacher_targets"], rows["teacher_position"], axis=1) > 0
    assert has_teacher_target[tied].all()
    assert not rows["teacher_position"][~tied].any() and not rows["offset"][~tied].any()


def test_packing_is_deterministic_tight_and_respects_both_lengths():
    rng = np.random.default_rng(2)
    sizes = [
        (int(ns), max(1, int(ns * r)))
        for ns, r in zip(rng.integers(2, 40, 400), rng.uniform(0.8, 1.4, 400), strict=True)
    ]
    examples = [tiny_example(1, ns, nt, document=n) for n, (ns, nt) in enumerate(sizes)]
    packed, again = pack(examples, 128, 128), pack(examples, 128, 128)
    for name in packed.rows:
        assert np.array_equal(packed.rows[name], again.rows[name])
    check_rows(packed.rows, 128, 128)
    bound = -(-max(sum(ns for ns, _ in sizes), sum(nt for _, nt in sizes)) // 128)
    assert len(packed.rows["role"]) <= 1.03 * bound + 1
    assert packed.student_fill == (packed.rows["student_segment_ids"] > 0).mean()
    assert packed.teacher_fill == (packed.rows["teacher_segment_ids"] > 0).mean()


def test_nothing_to_pack_gives_no_rows():
    packed = pack([], 8, 8)
    assert packed.rows["role"].shape == (0, 8) and packed.over_long == [] and unpack(packed.rows) == []
    only_long = pack([tiny_example(1, 9, 3), tiny_example(1, 3, 9)], 8, 8)
    assert only_long.over_long == [0, 1] and len(only_long.rows["role"]) == 0
    exact = pack([tiny_example(1, 8, 8)], 8, 8)
    assert exact.over_long == [] and exact.student_fill == exact.teacher_fill == 1.0


def assert_same(got: Example, want: Example) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        assert np.array_equal(got[name], value), name

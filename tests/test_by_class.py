"""Bits and accuracy by class of token against a walk over bytes; resamples of documents."""

import numpy as np
import pytest

from distil_jax.eval import bootstrap
from distil_jax.eval.by_class import ByClass, Spans, carried
from distil_jax.tokens.align import CLASSES, token_classes
from distil_jax.tokens.bytes import ByteTable

TEXTS = (
    "Ataxia (HP:0001251) was found in 12 of 345 patients (3.5 %).",
    "PMID:31675180 — größer als 10 µg\n\n0.05",
    "no digits here, 🧬 only",
    "1234567",
)


@pytest.fixture(scope="module")
def case(tokenizers_dir):
    """Texts as the two real tokenizers cut them, laid into rows out of order, with unused and unsupervised places."""
    rng = np.random.default_rng(0)
    tables = {
        "student": ByteTable.from_tokenizer(tokenizers_dir / "llama3"),
        "teacher": ByteTable.from_tokenizer(tokenizers_dir / "gemma3"),
    }
    order = [(2, 0), (1, 3)]  # documents of each row
    laid = {}
    for side, table in tables.items():
        ids = [table.encode(text) for text in TEXTS]
        width = max(sum(len(ids[d]) for d in row) for row in order) + 5
        document, tokens, size = (np.zeros((len(order), width), np.int64) for _ in range(3))
        for r, row in enumerate(order):
            at = 1  # a place before the text, as of a begin token
            for d in row:
                span = slice(at, at + len(ids[d]))
                document[r, span], tokens[r, span], size[r, span] = d, ids[d], table.lengths[ids[d]]
                at += len(ids[d]) + 1
        nats = rng.exponential(size=size.shape) + 0.1
        right = rng.random(size.shape) < 0.7
        laid[side] = {"ids": ids, "document": document, "tokens": tokens, "size": size, "nats": nats, "right": right}
    spans = {side: Spans.of(x["document"], x["size"]) for side, x in laid.items()}
    classes = token_classes(tables["student"])
    class_N = classes[spans["student"].at(laid["student"]["tokens"])]
    return tables, laid, spans, classes, ByClass(spans["student"], spans["teacher"], class_N, len(TEXTS))


def walked(case, side):
    """{(class, document): [bits, right, tokens, bytes]} by looking at every byte of every token."""
    tables, laid, spans, classes, _ = case
    found = {}
    for d, text in enumerate(TEXTS):
        owner, values = [], []  # of each byte: which token of the side it belongs to, and that token's nats and right
        places = [p for p in spans[side].place_N if laid[side]["document"].ravel()[p] == d]
        for number, (place, token) in enumerate(zip(places, laid[side]["ids"][d], strict=True)):
            length = len(tables[side].token_bytes(int(token)))
            owner += [number] * length
            values += [(laid[side]["nats"].ravel()[place] / length, laid[side]["right"].ravel()[place])] * length
        assert len(owner) == len(text.encode())
        at = 0
        for token in laid["student"]["ids"][d].tolist():
            end = at + len(tables["student"].token_bytes(token))
            cell = found.setdefault((int(classes[token]), d), [0.0, 0, 0, 0])
            cell[0] += sum(nats for nats, _ in values[at:end]) / np.log(2)
            cell[1] += all(right for _, right in values[at:end])
            cell[2] += 1
            cell[3] += end - at
            at = end
    return found


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_sums_by_class_are_those_of_a_walk_over_bytes(case, side):
    tables, laid, spans, classes, kinds = case
    scores = kinds.scores(side, laid[side]["nats"], laid[side]["right"])
    wanted = np.zeros((4, len(CLASSES), len(TEXTS)))
    for (kind, document), cell in walked(case, side).items():
        wanted[:, kind, document] = cell
    np.testing.assert_allclose(scores.bits_CxD, wanted[0], rtol=1e-12)
    np.testing.assert_array_equal(scores.right_CxD, wanted[1])
    np.testing.assert_array_equal(kinds.tokens_CxD, wanted[2])
    np.testing.assert_array_equal(kinds.bytes_CxD, wanted[3])
    whole = laid[side]["nats"][laid[side]["size"] > 0].sum() / np.log(2)
    assert scores.bits_CxD.sum() == pytest.approx(whole, rel=1e-12)
    assert kinds.tokens_CxD[CLASSES.index("digit")].sum() > 8 and kinds.tokens_CxD[CLASSES.index("byte")].sum() > 0


def test_the_teacher_is_right_about_a_number_only_if_it_is_about_every_digit(case):
    tables, laid, spans, classes, kinds = case
    digits = classes[spans["student"].at(laid["student"]["tokens"])] == CLASSES.index("digit")
    of_last = (laid["teacher"]["document"] == 3) & (laid["teacher"]["size"] > 0)  # "1234567": seven teacher tokens
    places = np.flatnonzero(of_last.ravel())
    assert len(places) == 7 and (digits & (spans["student"].document_N == 3)).sum() == 3
    for wrong, left in ((None, 3), (0, 2), (2, 2), (6, 2)):
        right = np.ones(of_last.size, bool)
        if wrong is not None:
            right[places[wrong]] = False
        scores = kinds.scores("teacher", laid["teacher"]["nats"], right.reshape(of_last.shape))
        assert scores.right_CxD[CLASSES.index("digit"), 3] == left


def test_measures_and_differences_are_of_the_sums_with_intervals(case):
    tables, laid, spans, classes, kinds = case
    one = kinds.scores("student", laid["student"]["nats"], laid["student"]["right"])
    other = kinds.scores("teacher", laid["teacher"]["nats"], laid["teacher"]["right"])
    measures, apart = kinds.measures(one, 200), kinds.difference(other, one, 200)
    assert list(measures) == list(kinds.sizes()) == list(apart)
    i, digit = CLASSES.index("digit"), measures["digit"]
    assert digit["bits_per_byte"] == pytest.approx(one.bits_CxD[i].sum() / kinds.bytes_CxD[i].sum())
    assert digit["accuracy"] == pytest.approx(one.right_CxD[i].sum() / kinds.sizes()["digit"]["tokens"])
    wanted = (other.bits_CxD[i] - one.bits_CxD[i]).sum() / kinds.bytes_CxD[i].sum()
    assert apart["digit"]["bits_per_byte"] == pytest.approx(wanted)
    assert apart["digit"]["interval"][0] <= wanted <= apart["digit"]["interval"][1]
    nothing = kinds.difference(one, one, 200)
    assert all(d["interval"] == [0, 0] and d["accuracy_interval"] == [0, 0] for d in nothing.values())


def test_sides_of_other_bytes_are_refused(case):
    _, _, spans, _, _ = case
    student = spans["student"]
    shorter = Spans(student.place_N[1:], student.document_N[1:], student.size_N[1:])
    with pytest.raises(AssertionError, match="same bytes"):
        carried(np.ones(len(shorter.size_N)), shorter, student, np.add)


def test_an_interval_is_that_of_resamples_drawn_one_by_one():
    rng = np.random.default_rng(3)
    top, bottom, minus = rng.exponential(size=(3, 40))
    draws = np.random.default_rng(5)
    values = []
    for _ in range(300):
        chosen = draws.integers(0, 40, 40)
        values.append((top - minus)[chosen].sum() / bottom[chosen].sum())
    for _ in range(2):  # the second time from the resamples that are kept
        value, interval = bootstrap.ratio(top, bottom, minus=minus, seed=5, samples=300)
        assert value == pytest.approx((top - minus).sum() / bottom.sum(), rel=1e-12)
        np.testing.assert_allclose(interval, np.quantile(values, [0.025, 0.975]), rtol=1e-10)
    assert bootstrap.ratio(top[:10], bottom[:10], samples=300) != bootstrap.ratio(top[10:20], bottom[10:20])

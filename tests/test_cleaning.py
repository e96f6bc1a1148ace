"""Promises: mending changes no word; duplicates and benchmarks are found in the forms they take; clean rows stay."""

import json
import pickle
import random
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distil_jax.data import clean, contamination, duplicates, hpo, personal
from distil_jax.data.cleaner import CONTAMINATED, Refusal, RowCleaner
from distil_jax.data.contamination import Index, Item
from distil_jax.data.duplicates import Seen
from distil_jax.data.rows import Quarantine, Row
from distil_jax.data.words import words_of
from distil_jax.errors import UserError


@pytest.fixture(scope="module")
def definitions(tmp_path_factory) -> list[tuple[str, str]]:
    """(name, definition) of 4,000 terms, each with a definition of ten words or more of its own."""
    with Quarantine(tmp_path_factory.mktemp("q") / "q.jsonl") as quarantine:
        rows = hpo.load_corpus(quarantine).rows
    pairs = [(row.prompt[18:-9], row.completion.strip()) for row in rows if len(row.completion.split()) >= 10]
    return pairs[:4000]


# ---- mending ---------------------------------------------------------------------------------------------------------


KEPT = "\u201cquoted\u201d \ufb01ne \uff21 α→β μg ½ 心房 👩\u200d⚕\ufe0f"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("plain text, 5 mg\n\nend", "plain text, 5 mg\n\nend"),
        ("a\r\nb\rc  \nd\n\n\n\n\ne", "a\nb\nc\nd\n\ne"),
        ("Itâ€™s 37Â°C", "It\u2019s 37°C"),
        ("p &lt; 0.05 &amp; n", "p < 0.05 & n"),
        ("zero\u200bwidth\ufeff soft\u00adhyphen", "zerowidth softhyphen"),
        ("bell\x07 escape\x1b[31mred\x1b[0m", "bell escapered"),
        ("e\u0301cole", "\u00e9cole"),
        (KEPT, KEPT),
        ("  ends stay ", "  ends stay "),
    ],
)  # fmt: skip
def test_a_text_is_mended_and_says_the_same(before, after):
    assert clean.repaired(before) == after == clean.repaired(after)


def test_real_definitions_are_left_as_they_are(definitions):
    changed = [(text, clean.repaired(text)) for _, text in definitions if clean.repaired(text) != text]
    words = lambda text: re.findall(r"\w+", text)  # noqa: E731
    assert len(changed) < 0.02 * len(definitions)
    assert all(words(a) == words(b) or not a.isascii() or "&" in a for a, b in changed)


def test_what_is_no_text_is_refused():
    limits = clean.Limits(shortest=3, longest=100)
    assert clean.refusal("Q", " fine text", limits) is None
    assert clean.refusal("Q", " \n", limits)[0] == "empty text"
    assert clean.refusal("Q", " a", limits)[0] == "too short"
    assert clean.refusal("Q" * 60, "a" * 60, limits)[0] == "gigantic"


def test_other_languages_are_refused_and_medical_english_is_not(definitions):
    german = (
        "Der Patient klagte seit drei Tagen über starke Schmerzen in der Brust, die in den linken Arm ausstrahlten. "
        * 3
    )
    french = (
        "Le patient se plaint depuis trois jours de fortes douleurs thoraciques irradiant vers le bras gauche. " * 3
    )
    chinese = "患者三天前开始出现胸痛并放射至左臂伴有出汗和呼吸困难既往有高血压病史十年" * 8
    for text in (german, french, chinese):
        assert clean.refusal("", text, clean.Limits())[0] == "another language"
        assert clean.refusal("", text, clean.Limits(english=False)) is None
    drugs = (
        "Aspirin 75 mg, clopidogrel 75 mg, atorvastatin 80 mg, metoprolol 25 mg, ramipril 2.5 mg, furosemide 40 mg. "
        * 3
    )
    latin = (
        "Musculus sternocleidomastoideus, arteria carotis interna, vena jugularis, nervus vagus, fascia cervicalis. "
        * 3
    )
    for text in (drugs, latin, "corazón roto"):
        assert clean.refusal("", text, clean.Limits()) is None
    assert not [text for _, text in definitions if clean.other_language(text)]


def prints(texts):
    return duplicates.prints([(text, words_of(text)) for text in texts])


# ---- duplicates ------------------------------------------------------------------------------------------------------


def altered(text: str, rng: random.Random) -> dict[str, str]:
    """A text as it comes back elsewhere."""
    words = text.split()
    typo = list(words)
    at = rng.randrange(len(typo))
    typo[at] = typo[at][::-1] + "x" if not any(c.isdigit() for c in typo[at]) else typo[at]
    return {
        "verbatim": text,
        "case and punctuation": re.sub(r"[.,;()-]", " ", text.upper()) + " !",
        "a typo": " ".join(typo),
        "a sentence more": text + " See the review.",
    }


def test_repeated_texts_are_found_and_distinct_ones_stay(definitions):
    rng = random.Random(0)
    texts = [f"{name}: {text}" for name, text in definitions]
    seen = Seen()
    first = seen.admit(prints(texts))
    real = [n for n in np.flatnonzero(first >= 0)]
    for n in real:  # definitions that repeat each other nearly are in the corpus: look that these do
        a, b = (set(zip(w, w[1:], strict=False)) for w in (re.findall(r"\w+", texts[i].lower()) for i in (n, first[n])))
        assert len(a & b) / len(a | b) > 0.55
    assert len(real) < 0.04 * len(texts)
    long = [n for n in range(len(texts)) if first[n] < 0 and len(texts[n].split()) >= 30][:1000]
    for form in ("verbatim", "case and punctuation", "a typo", "a sentence more"):
        planted = [altered(texts[n], rng)[form] for n in long]
        found = Seen()
        found.admit(prints([texts[n] for n in long]))
        hits = found.admit(prints(planted))
        assert np.mean(hits == np.arange(len(long))) >= 0.99, form


def test_a_number_makes_another_text():
    seen = Seen()
    said = (
        "The patient was given a single dose of {} mg of the drug on the first day after the operation on the hip, "
        "and went home on the third day without fever, with less pain than before and able to walk"
    )
    assert list(seen.admit(prints([said.format(5), said.format(50), said.format(5) + " alone"]))) == [-1, -1, 0]
    few = "Increased length of the left leg."
    assert list(seen.admit(prints([few, few.replace("left", "right"), few.upper()]))) == [-1, -1, 3]


def test_exact_only_leaves_near_duplicates():
    seen = Seen(near=False)
    text = "a definition of some length that is said in the same words twice " * 3
    assert list(seen.admit(prints([text, text + " more", text.upper() + "!"]))) == [-1, -1, 0]


def test_the_memory_is_the_same_for_any_chunks_and_levels(definitions, monkeypatch):
    texts = [f"{name}: {text}" for name, text in definitions[:1500]]
    texts += [text + " See the review." for text in texts if len(text.split()) >= 30]
    whole = prints(texts)
    expected = Seen().admit(whole)
    assert (expected[1500:] >= 0).mean() > 0.95 and len(expected) > 1700
    monkeypatch.setattr(duplicates, "_RECENT", 100)
    seen = Seen()
    found = np.concatenate([seen.admit(whole[n : n + 77]) for n in range(0, len(whole), 77)])
    assert np.array_equal(found, expected) and len(seen._levels) > 1
    assert np.array_equal(whole[:50], prints(texts[:50])), "a print does not depend on its neighbours"


@pytest.mark.parametrize("size", [1, 7, 100, 200])
def test_a_text_is_remembered_while_the_recent_ones_are_sorted_in(size, monkeypatch):
    """Also for the rest of the chunk in which that happens, and however a run that goes on shows them again."""
    monkeypatch.setattr(duplicates, "_RECENT", 8)
    shown = prints([f"text number {n - n % 5 // 4 * 3}" for n in range(200)])  # the fifth repeats the second
    seen = Seen()
    found = np.concatenate([seen.admit(shown[n : n + size]) for n in range(0, 200, size)])
    assert np.array_equal(found, [n - 3 if n % 5 == 4 else -1 for n in range(200)])


def test_a_text_that_may_not_stay_is_counted_and_not_remembered():
    texts = ["one", "two", "one", "two", "one", "three"]
    seen, asked = Seen(), []
    found = seen.admit(prints(texts), lambda n: asked.append(n) or n not in (0, 1))
    assert list(found) == [-1, -1, -1, -1, 2, -1] and asked == [0, 1, 2, 3, 5], "the repeated are not asked about"
    assert list(seen.admit(prints(texts))) == [2, 3, 2, 3, 2, 5]


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def items_of(definitions) -> list[Item]:
    """Questions made of definitions, with choices."""
    rng, made = random.Random(1), []
    names = [name for name, _ in definitions]
    for n, (name, text) in enumerate(definitions[:800]):
        options = [name, *rng.sample(names, 3)]
        rng.shuffle(options)
        made.append(Item("made", str(n), f"Which of the following is described so? {text}", tuple(options), name))
    return made


def mcq(question: str, options) -> str:
    lines = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=True))
    return f"Question: {question}\n{lines}Answer: A"


def changed_to(item: Item, share: float, rng: random.Random) -> str:
    """The question with words changed until no more than `share` of its runs of five are left."""
    words = contamination.words_of(item.question)
    runs = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    changed = list(words)
    while True:
        other = list(changed)
        other[rng.choice((0, len(words) - 1, rng.randrange(len(words))))] = "xyz"
        left = {tuple(other[i : i + 5]) for i in range(len(other) - 4)}
        if np.mean([run in left for run in runs]) < share:
            return " ".join(changed)
        changed = other


def test_planted_questions_are_found_and_clean_text_is_not_accused(definitions):
    items = items_of(definitions)
    index = pickle.loads(pickle.dumps(Index(items)))
    rng = random.Random(2)
    reordered = lambda item: rng.sample(item.options, 4)  # noqa: E731
    forms = {
        "verbatim": lambda item: mcq(item.question, item.options),
        "other order": lambda item: mcq(item.question, reordered(item)),
        "case and punctuation": lambda item: re.sub(r"[.,;:?-]+", " - ", mcq(item.question.upper(), item.options)),
        "inside a text": lambda item: f"{definitions[-1][1]} {item.question} {item.answer} {definitions[-2][1]}",
        "80 % of its runs": lambda item: mcq(changed_to(item, 0.8, rng), reordered(item)),
    }
    for name, form in forms.items():
        found = [index.find(words_of(form(item))) for item in items]
        assert np.mean([hit is not None for hit in found]) >= 0.99, name
        same = [hit is not None and hit.item.question == item.question for hit, item in zip(found, items, strict=True)]
        assert np.mean(same) >= 0.98, f"{name}: some definitions repeat each other nearly"
    clean_rows = [f"Question: What is {name}?\nAnswer: {text}" for name, text in definitions[900:]]
    templated = [
        mcq("Which of the following is the drug of choice for " + name + "?", "abcd") for name, _ in definitions
    ]
    for rows in (clean_rows, templated):
        assert np.mean([index.find(words_of(row)) is not None for row in rows]) <= 0.001


def test_short_questions_need_their_choices():
    index = Index(
        [Item("b", "1", "Which drug is given first?", ("Aspirin", "Heparin", "Warfarin", "Alteplase"), "Aspirin")]
    )
    assert index.find(words_of("Which drug is given first? A. heparin B. Aspirin")).item.id == "1"
    assert index.find(words_of("Which drug is given first? A. rest B. surgery")) is None
    assert index.find(words_of("nothing of the kind")) is None and Index([]).find(["x"]) is None
    one = Index([Item("b", "2", "Define gout.", (), "Arthritis from urate")])
    assert (
        one.find(words_of("Define gout: arthritis from urate.")) and one.find(words_of("Define gout: swelling")) is None
    )


def test_benchmarks_are_read_in_their_schemas(tmp_path):
    rows = {
        "mmlu": {"question": "q1", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2},
        "medmcqa": {"id": "z", "question": "q2", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 1},
        "medqa": {"question": "q3", "options": {"A": "a", "B": "b"}, "answer_idx": "B", "answer": "b"},
        "pubmedqa": {"pubid": 7, "question": "q4", "final_decision": "yes"},
        "medqa_hf": {"id": "train", "sent1": "q5", **{f"ending{i}": o for i, o in enumerate("abcd")}, "label": 3},
        "pubmedqa_fold": {"QUESTION": "q6", "CONTEXTS": ["c"], "final_decision": "no"},
        "headqa": {"qtext": "q7", "answers": [{"aid": 1, "atext": "a"}, {"aid": 2, "atext": "b"}], "ra": 2},
        "careqa": {"question": "q8", "op1": "a", "op2": "b", "op3": "c", "op4": "d", "cop": 1},
    }
    for name, row in rows.items():
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    read = {name: contamination.read_items(tmp_path / f"{name}.parquet")[0] for name in rows}
    assert read["mmlu"] == Item("mmlu", "1", "q1", ("a", "b", "c", "d"), "c")
    assert read["medmcqa"] == Item("medmcqa", "z", "q2", ("a", "b", "c", "d"), "b")
    assert read["medqa"] == Item("medqa", "1", "q3", ("a", "b"), "b")
    assert read["pubmedqa"][:3] == ("pubmedqa", "7", "q4")
    assert read["medqa_hf"] == Item("medqa_hf", "train", "q5", ("a", "b", "c", "d"), "d")
    assert read["pubmedqa_fold"] == Item("pubmedqa_fold", "1", "q6", (), "no")
    assert read["headqa"] == Item("headqa", "1", "q7", ("a", "b"), "b")
    assert read["careqa"] == Item("careqa", "1", "q8", ("a", "b", "c", "d"), "a")
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"question": "q5", "options": ["x", "y"], "answer": "y"}) + "\n")
    assert contamination.read_items(own) == [Item("own", "1", "q5", ("x", "y"), "y")]
    own.write_text(json.dumps({"qestion": "q5"}) + "\n")
    with pytest.raises(UserError, match=r"own.jsonl: no column 'question' \(did you mean 'qestion'"):
        contamination.read_items(own)
    for bad, said in (("gone.jsonl", "does not exist"), ("x.txt", "takes .jsonl, .json, .csv, .parquet")):
        with pytest.raises(UserError, match=said):
            contamination.read_items(tmp_path / bad)
    for line, said in (
        ("{", "own.jsonl cannot be read, row 2: malformed JSON"),
        ('{"question": ""}', "row 2: the question is empty"),
    ):
        own.write_text(json.dumps({"question": "q5"}) + "\n" + line)
        with pytest.raises(UserError, match=said):
            contamination.read_items(own)
    table = tmp_path / "table.csv"
    table.write_text('question,choices,answer\nq6,"[""x"", ""y""]",1\n')
    assert contamination.read_items(table) == [Item("table", "2", "q6", ("x", "y"), "y")]
    table.write_text("question,choices,answer\nq6,x or y,1\n")
    with pytest.raises(UserError, match="row 2: its choices are no JSON"):
        contamination.read_items(table)


# ---- personal data ---------------------------------------------------------------------------------------------------

TOLD = {  # what a sentence holds, with {} in the place of what must be found
    "EMAIL": ["write to {} please", "my mail: {}", "reach me ({}) any time"],
    "PHONE": ["call me at {}", "my number is {}.", "Phone: {}", "you can reach me on {} after six"],
    "DATE OF BIRTH": ["DOB: {}", "I was born on {} in Leeds", "date of birth {}", "birthday is {}"],
    "IDENTITY NUMBER": ["my SSN is {}", "MRN: {}", "patient id {} was given"],
    "NAME": [
        "My name is {} and I cough.", "Regards, {}", "I saw Dr. {} last week", "my daughter, {}, has a fever",
        "Name: {}",
    ],
}  # fmt: skip
VALUES = {
    "EMAIL": ["john.smith@mail.com", "a_b+c@clinic.co.uk", "x99@uni-bonn.de"],
    "PHONE": ["555-123-4567", "(020) 7946 0958", "+91 98765 43210", "+4915112345678", "0161 496 0000"],
    "DATE OF BIRTH": ["12/03/1984", "3rd May 1971", "1990-07-14", "Jan 5, 2001"],
    "IDENTITY NUMBER": ["123-45-6789", "A1234567", "00412345"],
    "NAME": ["John Smith", "Priya", "Mary-Ann O'Neil", "Carlos Diaz"],
}
CLEAN = [
    "Blood pressure was 120/80 and pulse 72.", "Take 500 mg twice daily for 10 days.", "ICD code E11.9 was recorded.",
    "Down syndrome is trisomy 21.", "She has Crohn disease since 2009.",
    "Sodium 138, potassium 4.1, glucose 105.",
    "Dr. says it is viral.", "Surgery was on 12/03/2019 without complications.", "WBC 12,500 per microlitre.",
    "I am diabetic and pregnant.", "The MRI of 2014-05-06 was normal.", "Ratio 1:1000, dilution 10-100-1000.",
    "Thanks, doctor, for the answer.", "HbA1c 7.2 %, LDL 160 mg/dl.", "rs1234567 is a variant of BRCA2.",
    "Parkinson's disease and Alzheimer's dementia.", "The patient, a 45-year-old man, fell.",
    "pH 7.35, pCO2 40, HCO3 24.",
    "Hello Doctor, I have had a cough for 3 weeks.", "My mother has hypertension.", "NCT01234567 enrolled 5000 people.",
    "Dr. Down syndrome clinic hours vary.", "Chromosome 15q11-q13 deletion.", "Born at term, 3200 g.",
]  # fmt: skip


def test_personal_data_is_found_and_medical_numbers_are_not():
    counts = Counter()
    for kind, sentences in TOLD.items():
        for sentence in sentences:
            for value in VALUES[kind]:
                text = sentence.format(value)
                spans = [s for s in personal.found(text) if s.kind == kind]
                counts[kind, "asked"] += 1
                counts[kind, "found"] += any(text[s.start : s.end] == value for s in spans)
    recall = {kind: counts[kind, "found"] / counts[kind, "asked"] for kind in TOLD}
    assert all(share >= 0.85 for share in recall.values()), recall
    assert sum(n for (_, what), n in counts.items() if what == "found") >= 0.95 * sum(
        n for (_, what), n in counts.items() if what == "asked"
    ), recall
    accused = [(text, personal.found(text)) for text in CLEAN if personal.found(text)]
    assert not accused, accused


def test_what_is_found_is_replaced_by_its_kind():
    text = "My name is Ann Lee, mail ann@x.org, call 555-123-4567. BP 120/80."
    out, counts = personal.replaced(text)
    assert out == "My name is [NAME], mail [EMAIL], call [PHONE]. BP 120/80."
    assert counts == {"NAME": 1, "EMAIL": 1, "PHONE": 1}
    assert personal.replaced("nothing here") == ("nothing here", Counter())


# ---- all of it -------------------------------------------------------------------------------------------------------


def row(number: int, prompt: str, completion: str, source: str = "s", **more) -> Row:
    return Row(f"r{number}", source, "train", "l", "other", "QA", prompt, completion, **more)


def test_a_cleaner_does_each_thing_once_and_says_so():
    index = Index([Item("bench", "9", "Which drug is given first?", ("Aspirin", "Heparin"), "Aspirin")])
    cleaner = pickle.loads(pickle.dumps(RowCleaner(benchmarks=index, forums={"forum"})))
    rows = [
        row(0, "Question: What is gout?", " A form of\r\narthritis."),
        row(1, "Question: Which drug is given first?\nA. Heparin\nB. Aspirin\n", " B"),
        row(2, "Patient:", " write to a@b.org", source="forum"),
        row(3, "Patient:", " write to a@b.org"),
        row(4, "Question:", " \u200b "),
        row(5, "Q A. x B. y", " A", meta={"question": "What is it?", "options": ("y", "x")}),
        row(6, "Q A. y B. x", " B", meta={"question": "What is it?", "options": ("x", "y")}),
    ]
    outcomes, made, counts = cleaner(rows)
    assert [type(o) for o in outcomes] == [Row, Refusal, Row, Row, Refusal, Row, Row]
    assert outcomes[0].completion == " A form of\narthritis."
    assert outcomes[1].reason == CONTAMINATED and outcomes[1].detail.startswith("bench 9, 100%")
    assert (outcomes[2].completion, outcomes[3].completion) == (" write to [EMAIL]", " write to a@b.org")
    assert outcomes[4].reason == "empty text"
    assert counts == {"mended": 2, "personal data replaced, email": 1, "personal data left, email": 1}
    assert len(made) == 5 and np.array_equal(made[3], made[4]), "the order of choices says nothing"
    refused = [{"file": "s", "row": "r1", "reason": CONTAMINATED, "detail": outcomes[1].detail}]
    assert contamination.report(refused)["s"]["bench"]["rows"] == 1
    talk = ({"role": "user", "content": "\u200b"}, {"role": "assistant", "content": "Yes."})
    assert RowCleaner()([row(8, "", "Yes.", messages=talk)]).outcomes[0].reason == "empty text"
    untouched = RowCleaner(mend=False, prints=False, personal="keep")(rows)
    assert untouched.outcomes == rows and untouched.prints is None

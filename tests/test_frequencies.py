"""The corpus of frequencies: reading phenotype.hpoa, what its sentences say, splits by series of diseases."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from distil_jax import prepare
from distil_jax.config import load_config
from distil_jax.data import frequencies, hpo, hpoa
from distil_jax.data.rows import Quarantine
from distil_jax.errors import UserError
from distil_jax.tokens.align import CLASSES, ROLES, align, token_classes
from distil_jax.tokens.bytes import ByteTable

PROJECT = Path(__file__).resolve().parent.parent
SMALL_OBO = "data-version: hp/releases/2000-01-01\n" + "".join(
    f"\n[Term]\nid: {term}\nname: {name}\n" + "".join(f"is_a: {parent}\n" for parent in parents)
    for term, name, *parents in (
        ("HP:0000118", "Phenotypic abnormality"),
        ("HP:0000001", "Eye", "HP:0000118"),
        ("HP:0000002", "Red eye", "HP:0000001"),
        ("HP:0000003", "Ear", "HP:0000118"),
        ("HP:0000004", "Loss of {hearing}", "HP:0000003"),
        ("HP:0000005", "Late onset"),
        ("HP:0000006", "Dominant inheritance"),
        ("HP:0000007", "Mild"),
        ("HP:0040283", "Occasional"),
    )
)
# Columns: qualifier, term, reference, onset, frequency, sex, modifier, aspect.
GOOD = (
    ("", "HP:0000002", "PMID:12345678;PMID:2", "", "3/8", "", "", "P"),
    ("", "HP:0000004", "PMID:2", "HP:0000005", "12.5%", "female", "HP:0000007", "P"),
    ("", "HP:0000004", "OMIM:100", "", "1/1", "MALE", "", "P"),
    ("", "HP:0000001", "OMIM:100", "", "HP:0040283", "", "", "P"),
    ("NOT", "HP:0000003", "OMIM:100", "", "", "", "", "P"),
    ("NOT", "HP:0000003", "OMIM:100", "", "2/5", "", "", "P"),
    ("", "HP:0000006", "OMIM:100", "", "", "", "", "I"),
    ("", "HP:0000003", "OMIM:100", "", "", "", "", "P"),
)
BAD = {
    ("", "HP:0000002", "PMID:12345678;PMID:2", "", "3/8", "", "", "P"): "duplicate annotation",
    ("", "HP:9999999", "PMID:2", "", "3/8", "", "", "P"): "unknown term",
    ("", "HP:0000002", "PMID:2", "HP:9999999", "3/8", "", "", "P"): "unknown term",
    ("", "HP:0000002", "PMID:2", "", "9/8", "", "", "P"): "malformed frequency",
    ("", "HP:0000002", "PMID:2", "", "0/0", "", "", "P"): "malformed frequency",
    ("", "HP:0000002", "PMID:2", "", "101%", "", "", "P"): "malformed frequency",
    ("", "HP:0000002", "PMID:2", "", "٣/8", "", "", "P"): "malformed frequency",
    ("", "HP:0000002", "PMID:2", "", "HP:0000007", "", "", "P"): "malformed frequency",
    ("MAYBE", "HP:0000002", "PMID:2", "", "3/8", "", "", "P"): "malformed annotation",
    ("", "HP:0000002", "PMID:2", "", "3/8", "BOTH", "", "P"): "malformed annotation",
    ("", "HP:0000002", "PMID:2", "", "3/8", "", "", "Q"): "malformed annotation",
}


def line_of(cells, disease="OMIM:100", name="Heart {odd} syndrome, type 2"):
    qualifier, term, reference, onset, frequency, sex, modifier, aspect = cells
    return "\t".join(
        (
            disease,
            name,
            qualifier,
            term,
            reference,
            "PCS",
            onset,
            frequency,
            sex,
            modifier,
            aspect,
            "HPO:me[2000-01-01]",
        )
    )


def written(folder, lines):
    (folder / "small.obo").write_text(SMALL_OBO, encoding="utf-8")
    text = "#version: 2000-02-02\n" + "\t".join(hpoa.COLUMNS) + "\n" + "".join(f"{line}\n" for line in lines)
    (folder / "small.hpoa").write_text(text, encoding="utf-8")
    return folder / "small.obo", folder / "small.hpoa"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with Quarantine(tmp_path_factory.mktemp("frequencies") / "quarantine.jsonl") as quarantine:
        return frequencies.load_corpus(quarantine), quarantine


@pytest.fixture(scope="module")
def raw():
    """Disease -> its lines as {column: cell}, read without the code under test."""
    found = defaultdict(list)
    lines = hpoa.find_hpoa().read_text(encoding="utf-8").splitlines()
    for line in lines:
        if not line.startswith(("#", "database_id")):
            found[line.split("\t")[0]].append(dict(zip(hpoa.COLUMNS, line.split("\t"), strict=True)))
    return found


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_line_is_read_or_goes_to_the_quarantine_with_its_number_and_reason(tmp_path):
    broken = ["OMIM:100\tshort", line_of(GOOD[0], disease="disease 7"), line_of(GOOD[0], name=" ")]
    obo, file = written(tmp_path, [*map(line_of, GOOD), *map(line_of, BAD), *broken])
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        found = hpoa.read_hpoa(file, hpo.read_obo(obo, quarantine), quarantine)
    refused = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    first = 3 + len(GOOD)  # after the version, the header and the good lines
    wanted = [*BAD.values(), *["malformed annotation"] * 3]
    assert [(r["row"], r["reason"]) for r in refused] == [(first + i, reason) for i, reason in enumerate(wanted)]
    assert all(r["detail"] for r in refused) and {r["file"] for r in refused} == {str(file)}
    assert found.version == "2000-02-02" and len(found.lines) == len(GOOD)
    one, two = found.lines[:2]
    assert (one.count, one.percent, one.category) == ((3, 8), None, None)
    assert one.references == ("PMID:12345678", "PMID:2")
    assert (two.percent, two.onset, two.sex, two.modifiers) == ("12.5", "HP:0000005", "FEMALE", ("HP:0000007",))
    assert [line.absent for line in found.lines] == [cells[0] == "NOT" for cells in GOOD]


def test_a_file_that_holds_no_annotation_says_what_to_do(tmp_path):
    obo, file = written(tmp_path, [])
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        ontology = hpo.read_obo(obo, quarantine)
        for content, said in ((b"hello\n", "no annotation"), (b"\xff\xfe\n", "not a readable hpoa file")):
            file.write_bytes(content)
            with pytest.raises(UserError, match=f"{said}.*name"):
                hpoa.read_hpoa(file, ontology, quarantine)


def test_the_bounds_of_the_categories_are_those_of_the_ontology(tmp_path):
    ontology = hpo.read_obo(hpo.find_obo(), Quarantine(tmp_path / "q.jsonl"))
    for term, (low, high) in hpoa.CATEGORIES.items():
        stated = [int(n) for n in re.findall(r"(\d+)%", ontology.terms[term].definition)]
        assert stated in ([low, high], [low]) and stated[-1] == high


# ---- the sentences ---------------------------------------------------------------------------------------------------


def test_every_wording_of_every_kind_of_line_says_what_the_line_says(tmp_path, monkeypatch):
    obo, file = written(tmp_path, map(line_of, GOOD))
    with Quarantine(tmp_path / "q.jsonl") as quarantine:
        ontology = hpo.read_obo(obo, quarantine)
        lines = hpoa.read_hpoa(file, ontology, quarantine).lines
    said = [set() for _ in lines]
    for number in range(6):
        monkeypatch.setattr(frequencies, "_choose", lambda wordings, key, n=number: wordings[n % len(wordings)])
        for i, line in enumerate(lines):
            said[i].add(frequencies.sentence(line, ontology))
    assert len(said[0]) == 6 and all("Red eye" in s and "8" in s and "37.5 %" in s for s in said[0])
    assert (
        sum("PMID:12345678" in s for s in said[0]) == 1 and "Red eye was seen in 3 of 8 patients (37.5 %)." in said[0]
    )
    assert len(said[1]) == 3
    for s in said[1]:
        assert (
            "Loss of {hearing} [Mild]" in s and "12.5 % of female patients" in s and s.endswith(" Onset: Late onset.")
        )
    assert "Loss of {hearing} was seen in 1 of 1 male patient (100.0 %)." in said[2]
    assert len(said[2]) == 5, "a line without a PMID is not given one"
    assert all("occasional" in s and "5 % to 29 %" in s for s in said[3])
    assert said[4] == {"Ear (HP:0000003) was looked for and not found.", "Ear is absent."}
    assert said[5] == {None} and said[7] == {None}
    assert said[6] == {"Inheritance: Dominant inheritance.", "Inheritance: Dominant inheritance (HP:0000006)."}


def test_a_disease_is_one_row_whatever_the_order_of_the_file(tmp_path):
    lines = [*map(line_of, GOOD), line_of(GOOD[0], "OMIM:200", "Lone count")]  # one count alone is too few
    rows = []
    for i, order in enumerate((lines, lines[::-1])):
        (tmp_path / str(i)).mkdir()
        obo, file = written(tmp_path / str(i), order)
        with Quarantine(tmp_path / "q.jsonl") as quarantine:
            corpus = frequencies.load_corpus(quarantine, obo, file)
        assert corpus.manifest["diseases"] == 2 and corpus.manifest["diseases_with_too_few_counts"] == 1
        assert "hp/releases/2000-01-01" in corpus.manifest["acknowledgement"]
        rows.append(corpus.rows)
    assert rows[0] == rows[1] and [row.id for row in rows[0]] == ["OMIM:100"]
    (row,) = rows[0]
    assert "Heart {odd} syndrome, type 2 (OMIM:100)" in row.prompt
    assert row.specialty == "Ear"  # two phenotypes of each: the first by name
    assert "4 features" in row.completion and "3 references" in row.completion


def test_the_series_of_a_disease_is_its_name_without_number_or_type():
    for name, expected in {
        "Developmental and epileptic encephalopathy 96": "developmental and epileptic encephalopathy",
        "Bethlem myopathy 1A": "bethlem myopathy",
        "Myasthenic syndrome, congenital, 7B, presynaptic": "myasthenic syndrome, congenital",
        "Congenital disorder of glycosylation, type IIm": "congenital disorder of glycosylation",
        "3-methylglutaconic aciduria": "3-methylglutaconic aciduria",
        "Stereotypes syndrome": "stereotypes syndrome",
    }.items():
        assert frequencies.series(name) == expected


def test_real_sentences_state_counts_of_the_file_and_their_right_share(real, raw):
    rows = real[0].rows
    counts = {d: {line["frequency"] for line in lines} for d, lines in raw.items()}
    stated = 0
    pattern = r"(?:(\d+)(?: of |/)(\d+)[^.,(]*?(?:\(|, or )|Among (\d+) [a-z ]+, (\d+) \()(\d+\.\d) %"
    for row in rows:
        for n, m, m_first, n_second, share in re.findall(pattern, row.completion):
            n, m = (n, m) if n else (n_second, m_first)
            assert f"{n}/{m}" in counts[row.id], (row.id, n, m)
            assert abs(float(share) - 100 * int(n) / int(m)) <= 0.05 + 1e-9
            stated += 1
        assert row.id in row.prompt and not re.search(r"[{}]|None|  ", row.prompt + row.completion)
        terms = {line["hpo_id"] for line in raw[row.id]}
        assert set(re.findall(r"HP:\d+", row.completion)) <= terms
        pmids = set(re.findall(r"PMID:\d+", row.completion))
        assert pmids <= {r for line in raw[row.id] for r in line["reference"].split(";")}
        features = {x["hpo_id"] for x in raw[row.id] if x["aspect"] == "P" and x["qualifier"] != "NOT"}
        assert re.search(rf"\b{len(features)} features?\b", row.completion)
    assert stated > 15_000


def test_real_rows_are_of_the_promised_size_and_full_of_digits(real):
    corpus, quarantine = real
    rows = corpus.rows
    sizes = [len(row.completion.encode()) for row in rows]
    assert len(rows) > 5_000 and len({row.id for row in rows}) == len({row.completion for row in rows}) == len(rows)
    assert max(sizes) <= frequencies.LONGEST and min(sizes) > 40
    text = "".join(row.completion for row in rows)
    assert sum(c.isdigit() for c in text) > 0.11 * len(text)
    assert quarantine.counts["duplicate annotation"] and quarantine.counts["duplicate name"]
    m = corpus.manifest
    assert m["annotations_rendered"] + m["annotations_beyond_the_length_of_a_row"] < m["annotations"]
    assert m["version"].startswith("hp/releases/") and m["licence"].startswith("http") and m["annotations_version"]


def test_real_splits_share_no_disease_no_series_and_no_text(real, raw):
    rows = real[0].rows
    by_split = Counter(row.split for row in rows)
    assert 0.08 < by_split["test"] / len(rows) < 0.14 and 0.04 < by_split["validation"] / len(rows) < 0.12
    side = {}
    for row in rows:
        key = frequencies.series(raw[row.id][0]["disease_name"])
        assert side.setdefault(key, row.split) == row.split, key
    assert not hpo.near_duplicates(rows)
    leaked = real[0].manifest["leaked"]
    assert real[1].counts["near-duplicate of a training row"] == sum(leaked[s]["rows"] for s in leaked)
    assert len({row.specialty for row in rows if row.split == "test"}) > 12


def test_a_corpus_that_there_is_not_is_refused_with_the_names_of_those_there_are(tmp_path):
    overrides = ["--config.data.corpus=frequences"]
    config = load_config(["--config", str(PROJECT / "configs" / "tiny.py"), *overrides])[0]
    with pytest.raises(UserError, match=r"'frequences': it is definitions or frequencies \(did you mean 'frequencies"):
        prepare.rows_to_read(config)


# ---- its tokens ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(real, tmp_path_factory):
    """The byte tables of both tokenizers of the recipe, trained as `prepare` trains them."""
    config = load_config(["--config", str(PROJECT / "configs" / "tiny.py") + ":numbers"])[0]
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [row.prompt + row.completion for row in real[0].rows if row.split == "train"]
    for side in ("teacher", "student"):
        prepare.train_tokenizer(config, side, texts, folder / side)
    return {side: ByteTable.from_tokenizer(folder / side) for side in ("teacher", "student")}


def test_the_teacher_splits_digits_and_the_student_groups_three(tables):
    pieces = {
        side: [t.token_bytes(i).decode() for i in t.encode("12345 of 678: OMIM:619340").tolist()]
        for side, t in tables.items()
    }
    digits = {side: [p for p in found if any(c.isdigit() for c in p)] for side, found in pieces.items()}
    assert digits["teacher"] == list("12345678619340")
    assert digits["student"] == ["123", "45", "678", "619", "340"]
    teacher, student = tables["teacher"], tables["student"]
    numerals = [t for i in np.flatnonzero(student.is_text).tolist() if (t := student.token_bytes(i)).isdigit()]
    assert sorted(numerals) == sorted(b"%0*d" % (n, i) for n in (1, 2, 3) for i in range(10**n))
    assert not any(
        re.search(rb"\d.|.\d", teacher.token_bytes(i), re.S) for i in np.flatnonzero(teacher.is_text).tolist()
    )


def test_numbers_are_where_the_two_tokenizations_cross(real, tables):
    digit = token_classes(tables["student"]) == CLASSES.index("digit")
    roles = {True: np.zeros(len(ROLES)), False: np.zeros(len(ROLES))}
    for row in [row for row in real[0].rows if row.split == "test"][:200]:
        a = align(row.completion, student=tables["student"], teacher=tables["teacher"])
        for kind in roles:
            roles[kind] += np.bincount(a.role[digit[a.student_ids] == kind], minlength=len(ROLES))
    of_digits, of_others = roles[True] / roles[True].sum(), roles[False] / roles[False].sum()
    assert of_digits[ROLES.index("crossing")] > 0.4 > 0.1 > of_others[ROLES.index("crossing")]
    assert roles[True].sum() > 0.2 * (roles[True].sum() + roles[False].sum())

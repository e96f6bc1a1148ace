"""Promises: each of the 18 sources is read in its own schema and rendered as benchmarks are scored; nothing leaks."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distil_jax import cli
from distil_jax.data import adapters, catalogue, reading, specialties
from distil_jax.data.adapters import Unusable
from distil_jax.data.sources import KINDS, SPLITS, Quarantine
from distil_jax.errors import UserError

MEADOW = {"instruction": "Answer this question truthfully", "input": "What is gout?", "output": "A form of arthritis."}
CHOICES = {
    "question": "Which valve lies between left atrium and ventricle?",
    "opa": "Mitral", "opb": "Aortic", "opc": "Tricuspid", "opd": "Pulmonary", "cop": 0, "choice_type": "single",
    "exp": "The mitral valve has two cusps.", "subject_name": "Anatomy", "topic_name": "Cardiology", "id": "x",
}  # fmt: skip
STEP = {
    "question": "A man has crushing chest pain. What comes first?", "answer": "Aspirin", "answer_idx": "B",
    "options": {"A": "Surgery", "B": "Aspirin", "C": "Rest", "D": "Fluids"}, "meta_info": "step1",
}  # fmt: skip
ABSTRACT = {
    "pubid": 21, "question": "Does exercise lower blood pressure?", "long_answer": "It does, by 5 mm Hg.",
    "context": {"contexts": ["We asked 12 people.", "They ran."], "labels": ["A", "B"], "meshes": ["Hypertension"]},
    "final_decision": "yes",
}  # fmt: skip
# A record of each source, as its files hold it.
RECORDS = {source.name: MEADOW for source in catalogue.SOURCES} | {
    "mmlu": {
        "question": "Where is the tibia?", "subject": "anatomy", "choices": ["Leg", "Arm", "Head", "Hand"], "answer": 0,
    },
    "medmcqa": CHOICES,
    "med_qa": STEP | {"options": [{"key": key, "value": text} for key, text in STEP["options"].items()]},
    "medqa": STEP,
    "pubmedqa": ABSTRACT,
    "covid_qa": {
        "question": "What causes COVID-19?", "context": "Before. " * 400 + "SARS-CoV-2 causes it." + " After." * 400,
        "answers": {"text": ["SARS-CoV-2"], "answer_start": [3200]}, "id": 1, "document_id": 2, "is_impossible": False,
    },
    "medquad": {
        "question": "What is asthma?", "answer": "A disease of the airways.", "question_type": "information",
        "question_focus": "Asthma", "category": "Lung Diseases", "umls_cui": ["C1"],
    },
    "mimic": {"text": "Chest pain on admission."},
    "textbooks": {"text": "The heart pumps. " * 600},
}  # fmt: skip


def source_of(name: str) -> catalogue.Source:
    return next(source for source in catalogue.SOURCES if source.name == name)


def put(root: Path, name: str, records: list[dict], form: str = "parquet") -> None:
    """The records as files of the source, one for each configuration and split."""
    source = source_of(name)
    for config in source.configs:
        folder = root / source.hub / config
        folder.mkdir(parents=True, exist_ok=True)
        for split in source.splits:
            file = folder / f"{split}-00000-of-00001.{form}"
            if form == "parquet":
                pq.write_table(pa.Table.from_pylist(records), file)
            elif form == "jsonl":
                file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
            elif form == "json":
                file.write_text(json.dumps(records), encoding="utf-8")
            else:
                with file.open("w", newline="") as out:
                    writer = csv.DictWriter(out, records[0])
                    writer.writeheader()
                    writer.writerows(records)


def read(root, name: str, tmp_path):
    with Quarantine(tmp_path / "quarantine.jsonl") as quarantine:
        rows = list(reading.rows_of(source_of(name), str(root), quarantine))
    refused = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    return rows, refused


@pytest.mark.parametrize("name", [source.name for source in catalogue.SOURCES])
def test_every_source_is_read_in_its_schema(name, tmp_path):
    put(tmp_path, name, [RECORDS[name]])
    rows, refused = read(tmp_path, name, tmp_path)
    source = source_of(name)
    assert rows and not refused
    for row in rows:
        assert row.source == name and row.kind in KINDS and row.split in SPLITS and row.licence == source.licence
        assert row.completion.strip() and (row.kind == "TEXT") == (row.prompt == "")
        assert row.specialty in (*specialties.names(), "other")
    assert len({row.id for row in rows}) == len(rows)
    per_record = {"pubmedqa": 2, "textbooks": 4}.get(name, 1)
    assert len(rows) == per_record * len(source.configs) * len(source.splits)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_other_forms_of_the_files_give_the_same_rows(form, tmp_path):
    records = [MEADOW, MEADOW | {"input": 'Quotes ", commas,\nand lines?'}]
    for folder, kind in (("a", "parquet"), ("b", form)):
        put(tmp_path / folder, "flashcards", records, kind)
    found = [read(tmp_path / folder, "flashcards", tmp_path) for folder in "ab"]
    parquet, other = ([(row.split, row.prompt, row.completion) for row in rows] for rows, _ in found)
    assert parquet == other and len(other) == 2 and not found[1][1]


def test_a_long_list_in_json_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BUFFER", 64)
    folder = tmp_path / source_of("cord19").hub
    folder.mkdir(parents=True)
    file = folder / "medical_meadow_cord19.json"
    file.write_text(
        json.dumps([MEADOW | {"output": f"no. {n}, αβ ] }}"} for n in range(40)], indent=1), encoding="utf-8"
    )
    rows, _ = read(tmp_path, "cord19", tmp_path)
    assert [row.completion for row in rows] == [f" no. {n}, αβ ] }}" for n in range(40)]
    file.write_text(file.read_text(encoding="utf-8")[:-400], encoding="utf-8")
    with pytest.raises(UserError, match=r"cord19 breaks off in .* after row 3\d|breaks off after row 3\d"):
        read(tmp_path, "cord19", tmp_path)


def test_choices_are_rendered_as_they_are_scored():
    (row,) = adapters.medmcqa(CHOICES)
    assert row.prompt == (
        "Question: Which valve lies between left atrium and ventricle?\nChoices:\nA. Mitral\nB. Aortic\nC. Tricuspid\n"
        "D. Pulmonary\nAnswer:"
    )
    assert row.completion == " A. Mitral\nExplanation: The mitral valve has two cusps."
    assert "cusps" not in row.prompt and row.question == CHOICES["question"] and row.answer == "Mitral"
    (plain,) = adapters.medmcqa(CHOICES | {"exp": None})
    assert plain.completion == " A. Mitral"
    (row,) = adapters.medqa(STEP)
    assert row.prompt.startswith("Question: A man has") and row.prompt.endswith("\nD. Fluids\nAnswer:")
    assert row.completion == " B. Aspirin" and adapters.medqa(RECORDS["med_qa"]) == [row]
    (row,) = adapters.mmlu(RECORDS["mmlu"])
    assert row.prompt == (
        "The following are multiple choice questions (with answers) about anatomy.\n\nWhere is the tibia?\n"
        "A. Leg\nB. Arm\nC. Head\nD. Hand\nAnswer:"
    )
    short, long = adapters.pubmedqa(ABSTRACT)
    assert short.prompt == (
        "Abstract: We asked 12 people.\nThey ran.\nQuestion: Does exercise lower blood pressure?\nAnswer:"
    )
    assert (short.completion, long.completion) == (" yes", " It does, by 5 mm Hg.")
    assert short.cluster == long.cluster == "21" and short.kind == "MCQ"
    assert [row.part for row in adapters.pubmedqa(ABSTRACT | {"final_decision": None})] == ["long"]
    (row,) = adapters.covid_qa(RECORDS["covid_qa"])
    assert "SARS-CoV-2 causes it." in row.prompt and len(row.prompt) < 2600 and row.completion == " SARS-CoV-2"
    pieces = adapters.text(RECORDS["textbooks"])
    assert "".join(piece.completion for piece in pieces) == RECORDS["textbooks"]["text"].strip()
    assert [piece.ended for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("medmcqa", {"cop": -1}, "answer outside the options"),
        ("medmcqa", {"cop": 4}, "answer outside the options"),
        ("medmcqa", {"cop": None}, "no answer"),
        ("medmcqa", {"cop": "a"}, "wrong type"),
        ("medmcqa", {"opc": ""}, "empty option"),
        ("medmcqa", {"opc": None}, "empty option"),
        ("medmcqa", {"question": " "}, "empty text"),
        ("medmcqa", {"question": 3}, "wrong type"),
        ("medmcqa", {"exp": 3}, "wrong type"),
        ("medqa", {"answer_idx": "E"}, "answer outside the options"),
        ("medqa", {"options": "A or B"}, "wrong type"),
        ("mmlu", {"choices": ["one"]}, "wrong type"),
        ("mmlu", {"answer": 4}, "answer outside the options"),
        ("pubmedqa", {"final_decision": "perhaps"}, "answer outside the options"),
        ("pubmedqa", {"context": None}, "wrong type"),
        ("pubmedqa", {"context": {"contexts": [" "]}}, "empty text"),
        ("covid_qa", {"answers": {"text": [], "answer_start": []}}, "no answer"),
        ("medquad", {"answer": None}, "no answer"),
        ("flashcards", {"output": ""}, "empty text"),
        ("flashcards", {"output": b"\xff"}, "not UTF-8"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_with_its_reason(name, changed, reason):
    with pytest.raises(Unusable) as refused:
        source_of(name).adapt(RECORDS[name] | changed)
    assert refused.value.args[0] == reason and len(refused.value.args) == 2


def test_refused_records_are_counted_and_named(tmp_path):
    put(tmp_path, "medquad", [RECORDS["medquad"], RECORDS["medquad"] | {"answer": None}])
    rows, refused = read(tmp_path, "medquad", tmp_path)
    assert len(rows) == 1 and len(refused) == 1
    assert refused[0]["reason"] == "no answer" and refused[0]["row"] == 2 and "medquad" in refused[0]["file"]
    put(tmp_path, "medquad", [RECORDS["medquad"] | {"answer": None}] * 2)
    with pytest.raises(UserError, match=r"source medquad has no usable row \(2 refused\)"):
        read(tmp_path, "medquad", tmp_path)


def test_a_changed_schema_names_the_column(tmp_path):
    renamed = {("topic" if key == "topic_name" else key): value for key, value in CHOICES.items()}
    put(tmp_path, "medmcqa", [renamed], "jsonl")
    with pytest.raises(UserError, match=r"source medmcqa, .*: no column 'topic_name'.*schema has changed"):
        read(tmp_path, "medmcqa", tmp_path)


def test_a_missing_source_and_a_truncated_file_are_told(tmp_path):
    with pytest.raises(UserError, match=r"source medmcqa is not in config.data.root: .*hf download"):
        read(tmp_path, "medmcqa", tmp_path)
    put(tmp_path, "medmcqa", [CHOICES] * 3000)
    file = next((tmp_path / source_of("medmcqa").hub).glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"not a whole Parquet file"):
        read(tmp_path, "medmcqa", tmp_path)
    file.rename(file.with_name("test-00000-of-00001.parquet"))
    with pytest.raises(UserError, match="no .parquet, .*of the split train"):
        read(tmp_path, "medmcqa", tmp_path)


def test_splits_that_models_are_scored_on_are_not_read(tmp_path):
    put(tmp_path, "medmcqa", [CHOICES])
    folder = tmp_path / source_of("medmcqa").hub
    for other in ("validation", "test"):
        pq.write_table(pa.Table.from_pylist([CHOICES | {"question": "Secret?"}]), folder / f"{other}-0.parquet")
    put(tmp_path, "pubmedqa", [ABSTRACT])
    labelled = tmp_path / source_of("pubmedqa").hub / "pqa_labeled"
    labelled.mkdir()
    pq.write_table(pa.Table.from_pylist([ABSTRACT | {"question": "Secret?"}]), labelled / "train-0.parquet")
    for name in ("medmcqa", "pubmedqa"):
        rows, _ = read(tmp_path, name, tmp_path)
        assert rows and not any("Secret" in row.prompt for row in rows)


def test_rows_of_one_document_stand_on_one_side(tmp_path):
    put(tmp_path, "pubmedqa", [ABSTRACT | {"pubid": n, "question": f"Question {n}?"} for n in range(400)])
    rows, _ = read(tmp_path, "pubmedqa", tmp_path)
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row.meta["question"], set()).add(row.split)
    assert len(sides) == 400 and all(len(side) == 1 for side in sides.values())
    assert {"train", "test"} <= {row.split for row in rows}


def test_the_hub_is_read_through_datasets(tmp_path, monkeypatch):
    """There is no hub here: the same call on local files, streaming."""
    import datasets

    put(tmp_path, "medmcqa", [CHOICES, CHOICES | {"cop": 2}])
    files = [str(file) for file in (tmp_path / source_of("medmcqa").hub).glob("*.parquet")]
    load = datasets.load_dataset

    def from_files(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("openlifescienceai/medmcqa", None, "train", True)
        return load("parquet", data_files={"train": files}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", from_files)
    rows, _ = read("hub", "medmcqa", tmp_path)
    local, _ = read(tmp_path, "medmcqa", tmp_path)
    assert [(r.prompt, r.completion) for r in rows] == [(r.prompt, r.completion) for r in local] and len(rows) == 2

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="openlifescienceai/medmcqa cannot be read from the hub .*no route"):
        read("hub", "medmcqa", tmp_path)


def test_the_catalogue_is_the_18_sources_and_says_why(capsys):
    assert len(catalogue.SOURCES) == 18 == len({source.hub for source in catalogue.SOURCES})
    on = {source.name for source in catalogue.chosen(["all"])}
    assert not on & {"mimic", "textbooks", "healthcaremagic", "med_qa", "meadow_medqa", "meadow_mmmlu", "mmlu"}
    assert [s.name for s in catalogue.chosen(["mimic", "medqa"])] == ["medqa", "mimic"]
    with pytest.raises(UserError, match=r"names 'medmqa' \(did you mean"):
        catalogue.chosen(["medmqa"])
    assert cli.main(["data", "list"]) == 0
    said = capsys.readouterr().out
    assert all(source.name in said for source in catalogue.SOURCES) and "apache-2.0" in said and "off" in said
    assert cli.main(["data", "lst"]) == 2 and "data list" in capsys.readouterr().err


# ---- specialties -----------------------------------------------------------------------------------------------------


def test_labels_are_known_and_the_topic_comes_before_the_subject():
    of = specialties.specialty_of
    assert of("medmcqa", "Medicine/C.V.S", "") == "cardiology"
    assert of("medmcqa", "Social & Preventive Medicine/", "") == "public health"
    assert of("mmlu", "medical_genetics", "") == "genetics"
    assert of("pubmedqa", "Humans; Heart Failure", "") == "cardiology"
    assert of("x", "", "The boy has a murmur, an atrial septal defect and tachycardia.") == "cardiology"
    assert of("x", "", "The train was late.") == "other"
    subjects = (
        "Anaesthesia,Anatomy,Biochemistry,Dental,ENT,Forensic Medicine,Gynaecology & Obstetrics,Medicine,Microbiology,"
        "Ophthalmology,Orthopaedics,Pathology,Pediatrics,Pharmacology,Physiology,Psychiatry,Radiology,Skin,"
        "Social & Preventive Medicine,Surgery"
    )
    assert all(specialties.of_label(f"{subject}/") for subject in subjects.split(","))
    assert all(specialties.of_label(f"{subject.lower()}/") for subject in subjects.split(","))
    assert len(specialties.names()) > 25 and "cardiology" in specialties.names()


def test_agreement_counts_precision_and_recall():
    rows = [("cardiology", "atrial fibrillation and angina"), ("cardiology", "nothing to see"), ("ent", "aortic valve")]
    assert specialties.agreement(rows) == {
        "cardiology": {"rows": 2, "found": 2, "right": 1},
        "ent": {"rows": 1, "found": 0, "right": 0},
    }

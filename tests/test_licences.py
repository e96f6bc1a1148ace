"""Whose licence binds a student, and what an export must carry, say and be called because of it."""

from pathlib import Path

import pytest

from distil_jax import duties, licences
from distil_jax.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent
HEADINGS = {
    "LICENSE.txt": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n\nThe agreement, for a test.\n",
    "USE_POLICY.md": "**Llama 3.2** **Acceptable Use Policy**\n\nThe policy, for a test.\n",
    "hai-def.md": "# Health AI Developer Foundations Terms of Use\n\nThe terms, for a test.\n",
}
HEALTH = (
    "HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
    "https://developers.google.com/health-ai-developer-foundations/terms"
)
LLAMA = (
    "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
)


def folder_of(root, name, *texts):
    folder = root / name
    folder.mkdir(parents=True)
    for text in texts:
        (folder / text).write_text(HEADINGS[text])
    return folder


def owed(student=None, teacher=None, given=(), stated=("", "")):
    found = [
        licences.origin(role, str(path or ""), key, path)
        for role, path, key in zip(("student", "teacher"), (student, teacher), stated, strict=True)
    ]
    return duties.gather([o for o in found if o], list(given), "distil_jax 0")


def test_a_llama_student_of_medgemma_is_bound_by_both(tmp_path):
    student = folder_of(tmp_path, "meta-llama/Llama-3.2-1B", "LICENSE.txt", "USE_POLICY.md")
    teacher = folder_of(tmp_path, "google/medgemma-4b-it")
    d = owed(student, teacher)
    assert [x.key for x in d.licences] == ["llama3.2", "hai-def"] and d.prefix == "Llama"
    assert len(d.missing) == 1 and "developers.google.com/health-ai-developer-foundations/terms" in d.missing[0]
    terms = folder_of(tmp_path, "given", "hai-def.md") / "hai-def.md"
    d = owed(student, teacher, [terms])
    assert d.missing == ()
    notice = d.files["NOTICE"].decode()
    assert LLAMA in notice.splitlines() and HEALTH in notice.splitlines()
    assert "Modified files" in notice and "meta-llama/Llama-3.2-1B" in notice and "google/medgemma-4b-it" in notice
    assert d.files["LICENSE-llama3.2.txt"].decode() == HEADINGS["LICENSE.txt"]
    assert d.files["USE_POLICY-llama3.2.md"].decode() == HEADINGS["USE_POLICY.md"]
    assert d.files["LICENSE-hai-def.md"].decode() == HEADINGS["hai-def.md"]
    front = d.metadata()
    assert front["license"] == "other" and front["license_name"] == "llama3.2-and-hai-def"
    assert front["base_model"] == "meta-llama/Llama-3.2-1B" and front["license_link"] in d.files
    # An export that becomes a student itself is recognised with both.
    again = tmp_path / "again"
    again.mkdir()
    for name, text in d.files.items():
        (again / name).write_bytes(text)
    assert licences.recognise(None, again) == ("llama3.2", "hai-def")
    assert owed(again).missing == () and set(owed(again).files) == set(d.files)


@pytest.mark.parametrize(
    ("hub_id", "keys"),
    [
        ("meta-llama/Llama-3.2-3B-Instruct", ("llama3.2",)),
        ("meta-llama/Meta-Llama-3-8B", ("llama3",)),
        ("meta-llama/Llama-3.1-8B", ("llama3.1",)),
        ("m42-health/Llama3-Med42-8B", ("llama3", "other")),
        ("google/medgemma-27b-text-it", ("hai-def",)),
        ("google/gemma-3-270m", ("gemma",)),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", ("apache-2.0",)),
        ("HuggingFaceTB/SmolLM2-135M", ("apache-2.0",)),
        ("someone/Llama-3.2-1B", ()),
    ],
)
def test_a_licence_is_recognised_by_hub_id_cache_folder_and_folder(hub_id, keys, tmp_path):
    assert licences.origin("teacher", f"{hub_id}@main", "", tmp_path).licences == keys
    cached = tmp_path / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    for folder in (cached, folder_of(tmp_path, hub_id)):
        found = licences.origin("teacher", str(folder), "", folder)
        assert found.licences == keys
        assert found.hub_id == hub_id or not keys


def test_a_licence_is_recognised_by_the_card_and_the_text(tmp_path):
    for name, front, key in (
        ("a", "license: llama3.1", "llama3.1"),
        ("b", 'license: other\nlicense_name: "health-ai-developer-foundations"', "hai-def"),
        ("c", "license: cc-by-4.0", None),
    ):
        (folder_of(tmp_path, name) / "README.md").write_text(f"---\ntags: [x]\n{front}\n---\n# license: gemma\n")
        assert licences.recognise(None, tmp_path / name) == ((key,) if key else ())
    assert licences.recognise(None, folder_of(tmp_path, "d", "LICENSE.txt")) == ("llama3.2",)
    (tmp_path / "d" / "LICENSE.pdf").write_bytes(b"%PDF\xff\xfe")
    assert licences.recognise(None, tmp_path / "d") == ("llama3.2",)


def test_what_is_not_known_or_not_there_keeps_an_export_from_being_published(tmp_path):
    somewhere = folder_of(tmp_path, "somewhere")
    assert owed().missing == () and owed().files == {} and owed().metadata() == {}
    unknown = owed(somewhere)
    assert "config.student.licence" in unknown.missing[0] and "unknown" in unknown.metadata()["license_name"]
    llama = owed(somewhere, stated=("llama3.2", ""))
    assert ["use-policy" in m for m in llama.missing] == [False, True]
    assert all("https://www.llama.com/llama3_2/" in m and "licence_files" in m for m in llama.missing)
    (somewhere / "LICENSE.txt").write_text("Their own words.\n")
    other = owed(somewhere, stated=("other", ""))
    assert other.missing == () and other.files["LICENSE-of-student-LICENSE.txt"] == b"Their own words.\n"
    # A text that is not the one demanded does not pass for it.
    assert len(owed(somewhere, stated=("llama3.2", "")).missing) == 2
    with pytest.raises(UserError, match="config.student.licence is 'lama3.2' .did you mean 'llama3.2'"):
        owed(somewhere, stated=("lama3.2", ""))
    (tmp_path / "terms.pdf").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="terms.pdf cannot be read"):
        owed(somewhere, given=[tmp_path / "terms.pdf"])


def test_a_llama_3_teacher_may_improve_no_other_model(tmp_path):
    teacher = folder_of(tmp_path, "m42-health/Llama3-Med42-8B")
    other, same = folder_of(tmp_path, "meta-llama/Llama-3.2-1B"), folder_of(tmp_path, "meta-llama/Meta-Llama-3-8B")
    assert any("1.b.v" in m for m in owed(other, teacher).missing)
    assert not any("1.b.v" in m for m in owed(same, teacher).missing)
    assert owed(other, teacher).prefix == "Llama 3"


def test_the_name_follows_the_licence(tmp_path):
    llama = owed(folder_of(tmp_path, "meta-llama/Llama-3.2-1B"))
    assert llama.named("tiny run!") == "Llama-tiny-run" and llama.named("Llama-x") == "Llama-x"
    three = owed(teacher=folder_of(tmp_path, "meta-llama/Meta-Llama-3-8B"))
    assert three.named("tiny") == "Llama-3-tiny" and three.named("Llama-3.1-tiny") == "Llama-3.1-tiny"
    free = owed()
    assert free.named("..") == "distilled" and free.named("my--model") == "my-model"
    llama.check_name("Llama-3.2-mine", "key")
    free.check_name("mine", "key")
    with pytest.raises(UserError, match=r'section 1.b.i of the Llama 3.2 .* begins with "Llama": call it Llama-mine'):
        llama.check_name("mine", "config.export.name")
    for name in ("a/b", "a b", "..", "-a", "a--b", "x" * 97, "é"):
        with pytest.raises(UserError, match="letters, digits"):
            free.check_name(name, "config.export.name")


def test_a_real_text_is_known_by_its_heading(tmp_path):
    """Our own licence stands in for SmolLM2's, which its folder does not hold."""
    student = folder_of(tmp_path, "HuggingFaceTB/SmolLM2-135M")
    assert ["apache.org" in m for m in owed(student).missing] == [True]
    d = owed(student, given=[PROJECT / "LICENSE"])
    assert d.missing == () and d.files["LICENSE-apache-2.0.txt"] == (PROJECT / "LICENSE").read_bytes()
    assert d.metadata() == {"license": "apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M"}
    # A NOTICE of the model is kept line by line, in its order.
    (student / "NOTICE").write_text("Made\nby them\n\nMade, they say.\n")
    assert owed(student).files["NOTICE"].decode().endswith("\n\nMade\nby them\n\nMade, they say.\n")


def test_a_given_text_that_nothing_asks_for_goes_along(tmp_path):
    student = folder_of(tmp_path, "meta-llama/Llama-3.2-1B", "LICENSE.txt", "USE_POLICY.md")
    for folder in ("a", "b"):
        (folder_of(tmp_path, folder) / "LICENSE.txt").write_text(f"Of the data in {folder}.\n")
    (tmp_path / "a" / "data (1).txt").write_text("Of other data.\n")
    d = owed(student, given=[tmp_path / "a" / "LICENSE.txt", tmp_path / "a" / "data (1).txt"])
    assert d.files["LICENSE-LICENSE.txt"] == b"Of the data in a.\n"
    assert d.files["LICENSE-data-1-.txt"] == b"Of other data.\n" and d.missing == ()

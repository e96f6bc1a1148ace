"""What is taken away is fit to publish: whole or not there, read back, licensed, described, and pushed only if so."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import distil_jax as dj
from distil_jax import card, export, licences, readback
from distil_jax.config import load_config
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError
from distil_jax.models import hub
from distil_jax.workdir import Workdir

PROJECT = Path(__file__).resolve().parent.parent
TEXTS = [f"Question: What is finding {i} of {i * i}?\nAnswer: A reduced amount of the {i}th thing." for i in range(60)]
DOCUMENTS = [(text[: text.index("Answer:") + 7], text[text.index("Answer:") + 7 :]) for text in TEXTS[:12]]
SHAPE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
FAMILIES = {
    "llama": (train_llama_style, 340, {"model_type": "llama"}),
    "gemma": (train_gemma_style, 330, {"model_type": "gemma3_text", "sliding_window": 8}),
}
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


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A tiny model of each family with its tokenizer: name -> (model, params, tokenizer)."""
    return {family: tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def llama(models):
    return models["llama"]


def tiny(family, folder):
    from transformers import AutoTokenizer

    train, vocab_size, shape = FAMILIES[family]
    train(TEXTS * 3, vocab_size, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    table = dj.ByteTable.from_tokenizer(folder)
    ids = {f"{role}_token_id": table.roles[role] for role in ("bos", "eos", "pad") if role in table.roles}
    model = hub.model_from_config(SHAPE | shape | ids | {"vocab_size": table.vocab_size})
    return model, jax.jit(model.init, static_argnums=1)(jax.random.key(0), "float32"), tokenizer


def exported(trained, folder, dtype="float32", **more):
    model, params, tokenizer = trained
    common = dict(tokenizer=tokenizer, documents=DOCUMENTS, dtype=dtype, files={"NOTICE": b"told\n"})
    return export.export_model(
        model, params, folder, **common | {"write_card": lambda checks: json.dumps(checks)} | more
    )


# ---- the directory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gemma", "float32")])
def test_both_families_go_out_whole_and_load_elsewhere(models, tmp_path, family, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"do_sample": True, "top_p": 0.9, "bos_token_id": 99, "transformers_version": "4.45.0"}
    checks = exported(models[family], tmp_path / "out", dtype, generation_config=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md", "NOTICE"}
    assert json.loads((tmp_path / "out" / "README.md").read_text()) == checks
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1  # whoever may read one may read all
    model, params, _ = models[family]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    generation = theirs.generation_config
    assert generation.do_sample and generation.top_p == 0.9
    assert generation.bos_token_id == model.config.bos_token_id != 99
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS[0], add_special_tokens=False)["input_ids"]
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    with torch.no_grad():
        got = theirs(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(got, jax.jit(model.apply)(rounded, jnp.asarray([ids]))[0], atol=1e-4)


def test_the_checks_count_what_they_compared_and_measure_what_rounding_costs(llama, tmp_path):
    whole = exported(llama, tmp_path / "whole")
    assert whole["largest_logit_difference"] == 0 and whole["bits_per_byte_trained"] == whole["bits_per_byte_stored"]
    assert whole["texts"] == len(DOCUMENTS) + len(readback.AWKWARD_TEXTS) and whole["documents"] == 8
    assert whole["parameters"] == sum(x.size for x in jax.tree.leaves(llama[1]))
    half = exported(llama, tmp_path / "half", "bfloat16")
    assert 0 < half["largest_logit_difference"] < 0.5
    assert half["bits_per_byte_trained"] == whole["bits_per_byte_trained"] != half["bits_per_byte_stored"]
    # Bits per byte of the completions, by hand.
    model, params, tokenizer = llama
    table = dj.ByteTable.from_tokenizer(tokenizer)
    bits = size = 0
    apply = jax.jit(model.apply)
    for prompt, completion in DOCUMENTS[:8]:
        a, b = table.encode_batch([prompt, completion])
        ids = np.array([table.roles["bos"], *a, *b])
        log_p = np.asarray(jax.nn.log_softmax(apply(params, np.pad(ids, (0, 96 - len(ids)))[None])[0]))
        bits -= sum(float(log_p[t - 1, ids[t]]) for t in range(1 + len(a), len(ids))) / np.log(2)
        size += len(completion.encode())
    assert whole["bits_per_byte_trained"] == pytest.approx(bits / size, rel=1e-5)


def test_a_tokenizer_that_adds_no_beginning_is_told_of(llama, tmp_path):
    from transformers import AutoTokenizer

    model, params, tokenizer = llama
    assert exported(llama, tmp_path / "out")["bos"] is None
    bare = tmp_path / "bare"
    shutil.copytree(tmp_path / "out", bare)
    spec = json.loads((bare / "tokenizer.json").read_text()) | {"post_processor": None}
    (bare / "tokenizer.json").write_text(json.dumps(spec))
    checks = exported((model, params, AutoTokenizer.from_pretrained(bare)), tmp_path / "again")
    assert checks["bos"] == "<|begin_of_text|>"
    assert "begins with the token &lt;\\|begin\\_of\\_text\\|&gt;" in card._use("x", checks["bos"])


def test_the_texts_of_the_check_hold_what_tokenizers_get_wrong():
    whole = "\0".join(readback.AWKWARD_TEXTS)
    assert set(map(chr, range(256))) < set(whole)
    for piece in ("e\u0301", "\u200d\u2695", "\u202e", "\r\n", "\t\t ", "0000000", " " * 64, "<|eot_id|>", "<bos>"):
        assert piece in whole


def test_an_export_that_does_not_read_back_gets_no_name(llama, tmp_path, monkeypatch):
    model, params, tokenizer = llama
    exported(llama, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    save = hub.save_pretrained

    def other_weight(model, params, *args, **kwargs):
        return save(model, params | {"embedding": params["embedding"].at[3, 3].add(1e-3)}, *args, **kwargs)

    def other_ids(*args, **kwargs):
        folder = save(*args, **kwargs)
        spec = json.loads((folder / "tokenizer.json").read_text())
        del spec["model"]["merges"][:20]
        (folder / "tokenizer.json").write_text(json.dumps(spec))

    def other_template(*args, **kwargs):
        (save(*args, **kwargs) / "chat_template.jinja").write_text("{{ 1 }}")

    faults = {"embedding.* does not read back": other_weight, "other ids": other_ids, "chat template": other_template}
    for said, fault in faults.items():
        monkeypatch.setattr(hub, "save_pretrained", fault)
        with pytest.raises(UserError, match=said):
            exported(llama, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_at_the_last_file_leaves_nothing(llama, tmp_path, error):
    def interrupted(checks):
        raise error

    with pytest.raises(error):
        exported(llama, tmp_path / "out", write_card=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(llama, tmp_path):
    """A real limit on the size of files, in a process of its own: the weights do not fit."""
    save = hub.save_pretrained(*llama[:2], tmp_path / "model", tokenizer=llama[2])
    code = f"""
import resource, signal
from transformers import AutoTokenizer
from distil_jax import export
from distil_jax.models import hub
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model, params = hub.load_pretrained({str(save)!r})
tokenizer = AutoTokenizer.from_pretrained({str(save)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
export.export_model(model, params, {str(tmp_path / "out" / "x")!r}, tokenizer=tokenizer, documents=[], dtype="float32",
    files={{}}, write_card=str)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_end_tokens_of_an_instruct_student_are_kept(tmp_path):
    file = tmp_path / "generation_config.json"
    for ours, theirs, kept in ((5, [5, 7], [5, 7]), (5, [6, 7], 5), (5, 6, 5), ([5, 6], 5, [5, 6])):
        file.write_text(json.dumps({"_from_model_config": True, "eos_token_id": ours, "pad_token_id": None}))
        export.write_generation_config(file, {"eos_token_id": theirs, "temperature": 0.6, "pad_token_id": 3})
        assert json.loads(file.read_text()) == {"eos_token_id": kept, "temperature": 0.6, "pad_token_id": 3}


# ---- licences -------------------------------------------------------------------------------------------------------


def folder_of(root, name, *texts):
    folder = root / name
    folder.mkdir(parents=True)
    for text in texts:
        (folder / text).write_text(HEADINGS[text])
    return folder


def duties(student=None, teacher=None, given=(), stated=("", "")):
    found = [
        licences.origin(role, str(path or ""), key, path)
        for role, path, key in zip(("student", "teacher"), (student, teacher), stated, strict=True)
    ]
    return licences.duties([o for o in found if o], list(given), "distil_jax 0")


def test_a_llama_student_of_medgemma_is_bound_by_both(tmp_path):
    student = folder_of(tmp_path, "meta-llama/Llama-3.2-1B", "LICENSE.txt", "USE_POLICY.md")
    teacher = folder_of(tmp_path, "google/medgemma-4b-it")
    d = duties(student, teacher)
    assert [x.key for x in d.licences] == ["llama3.2", "hai-def"] and d.prefix == "Llama"
    assert len(d.missing) == 1 and "developers.google.com/health-ai-developer-foundations/terms" in d.missing[0]
    terms = folder_of(tmp_path, "given", "hai-def.md") / "hai-def.md"
    d = duties(student, teacher, [terms])
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
    assert duties(again).missing == () and set(duties(again).files) == set(d.files)


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
    assert duties().missing == () and duties().files == {} and duties().metadata() == {}
    unknown = duties(somewhere)
    assert "config.student.licence" in unknown.missing[0] and "unknown" in unknown.metadata()["license_name"]
    llama = duties(somewhere, stated=("llama3.2", ""))
    assert ["use-policy" in m for m in llama.missing] == [False, True]
    assert all("https://www.llama.com/llama3_2/" in m and "licence_files" in m for m in llama.missing)
    (somewhere / "LICENSE.txt").write_text("Their own words.\n")
    other = duties(somewhere, stated=("other", ""))
    assert other.missing == () and other.files["LICENSE-of-student-LICENSE.txt"] == b"Their own words.\n"
    # A text that is not the one demanded does not pass for it.
    assert len(duties(somewhere, stated=("llama3.2", "")).missing) == 2
    with pytest.raises(UserError, match="config.student.licence is 'lama3.2' .did you mean 'llama3.2'"):
        duties(somewhere, stated=("lama3.2", ""))
    (tmp_path / "terms.pdf").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="terms.pdf cannot be read"):
        duties(somewhere, given=[tmp_path / "terms.pdf"])


def test_a_llama_3_teacher_may_improve_no_other_model(tmp_path):
    teacher = folder_of(tmp_path, "m42-health/Llama3-Med42-8B")
    other, same = folder_of(tmp_path, "meta-llama/Llama-3.2-1B"), folder_of(tmp_path, "meta-llama/Meta-Llama-3-8B")
    assert any("1.b.v" in m for m in duties(other, teacher).missing)
    assert not any("1.b.v" in m for m in duties(same, teacher).missing)
    assert duties(other, teacher).prefix == "Llama 3"


def test_the_name_follows_the_licence(tmp_path):
    llama = duties(folder_of(tmp_path, "meta-llama/Llama-3.2-1B"))
    assert llama.named("tiny run!") == "Llama-tiny-run" and llama.named("Llama-x") == "Llama-x"
    three = duties(teacher=folder_of(tmp_path, "meta-llama/Meta-Llama-3-8B"))
    assert three.named("tiny") == "Llama-3-tiny" and three.named("Llama-3.1-tiny") == "Llama-3.1-tiny"
    free = duties()
    assert free.named("..") == "distilled" and free.named("my--model") == "my-model"
    llama.check_name("Llama-3.2-mine", "key")
    free.check_name("mine", "key")
    with pytest.raises(UserError, match=r'section 1.b.i of the Llama 3.2 .* begins with "Llama": call it Llama-mine'):
        llama.check_name("mine", "config.export.name")
    for name in ("a/b", "a b", "..", "-a", "a--b", "x" * 97, "é"):
        with pytest.raises(UserError, match="letters, digits"):
            free.check_name(name, "config.export.name")


# ---- the stage ------------------------------------------------------------------------------------------------------

FIGURES = {"bits_per_byte": 1.5, "token_accuracy": 0.5, "agreement_with_teacher": 0.25}
MODEL = {"parameters": 1234} | FIGURES | {f"{key}_interval": [0.1, 1.9] for key in FIGURES}
HOSTILE = "evil\n---\nlicense: mit\n# Heading | [x](javascript:y) <script>alert(1)</script> `\u202e"


@pytest.fixture
def work(llama, tmp_path):
    """A run whose stages before the export are finished, with a Llama student of MedGemma: makes its config."""
    model, params, tokenizer = llama
    student = folder_of(tmp_path, "meta-llama/Llama-3.2-1B", "LICENSE.txt", "USE_POLICY.md")
    texts = {p.name: p.read_bytes() for p in student.iterdir()}
    shutil.rmtree(student)
    hub.save_pretrained(model, params, student, tokenizer=tokenizer)
    for name, text in texts.items():
        (student / name).write_bytes(text)
    (student / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": True}))
    teacher = folder_of(tmp_path, "google/medgemma-4b-it")
    terms = folder_of(tmp_path, "given", "hai-def.md") / "hai-def.md"
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")

    def make(**overrides):
        settings = {"workdir": tmp_path / "tiny run", "data.files": data, "student.path": student}
        settings |= {"teacher.path": teacher, "export.licence_files": terms} | overrides
        arguments = ["--config", str(PROJECT / "configs" / "tiny.py")]
        arguments += [f"--config.{key}={value}" for key, value in settings.items()]
        config = load_config(arguments)[0]
        work, interval = Workdir(config), [0.1, 0.3]
        alignment = {"test": {"root": 0.9, "interior": 0.06, "crossing": 0.04}}
        facts = {
            "corpus": {
                "provenance": {"files": [str(data)], "licences": {f"{HOSTILE}: cc-by-4.0": 1200, "mine: none": 3}},
                "rows": {"train": 1000, "validation": 100, "test": 103},
                "quarantined": {"too long": 2},
                "alignment": alignment,
                "tokenizers": {side: {"vocab_size": 5000 + len(side)} for side in ("teacher", "student")},
            },
            "projection": {"fitted": {"ip_kl": 0.98, "ip_bpb": 0.97}},
            "control": {},
            "smoothing": {},
            "distilled": {"parameters": 1234, "steps": 7, "skipped": 0},
            "evaluate": {
                "documents": 103,
                "bytes": 9999,
                "models": {n: MODEL for n in ("teacher", "student_before", "control", "smoothing", "distilled")},
                "differences": {"control - distilled": {"bits_per_byte": 0.2, "interval": interval}},
            },
        }
        for stage, values in facts.items():
            if not work.done(stage):
                work.begin(stage).finish(**values)
        if not (work / "distilled" / "model").exists():
            hub.save_pretrained(model, params, work / "distilled" / "model", tokenizer=tokenizer)
        records = [{"split": "test", "prompt": p, "completion": c} for p, c in DOCUMENTS]
        lines = "\n".join(map(json.dumps, records))
        (work / "corpus" / "documents.jsonl").write_text(lines)
        return config

    return make


def test_the_stage_writes_a_model_that_says_everything_about_itself(work, capsys):
    config = work()
    facts = export.main(config)
    folder = Path(facts["path"])
    assert folder == Path(config.workdir) / "export" / "Llama-tiny-run" and facts["missing"] == []
    said = capsys.readouterr().out
    assert str(folder) in said and "ready to publish" in said and "bit for bit" in said
    loaded = ModelCard.load(folder / "README.md")
    front, body = loaded.data.to_dict(), loaded.content
    assert front["license"] == "other" and front["license_name"] == "llama3.2-and-hai-def"
    assert front["base_model"] == "meta-llama/Llama-3.2-1B" and front["pipeline_tag"] == "text-generation"
    assert set(front) == {
        "license", "license_name", "license_link", "base_model", "library_name", "pipeline_tag", "tags"
    }  # fmt: skip
    for promised in (
        "**Built with Llama**", "Not for clinical use", "google/medgemma-4b-it", "section 3.2", "student, untouched",
        "control - distilled | +0.2000 [+0.1000, +0.3000]", "1,200", "IP_KL 0.9800",
        "root 90.0%", f"{facts['checks']['ids']:,} ids", "vllm serve", "dj.load_pretrained", dj.__version__,
    ):  # fmt: skip
        assert promised in body, promised
    assert (folder / "NOTICE").read_text().count(LLAMA) == 1 and HEALTH in (folder / "NOTICE").read_text()
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.6
    assert str(Path(config.workdir).parent) not in "".join(
        p.read_text() for p in folder.iterdir() if p.suffix in (".md", ".json") or p.name == "NOTICE"
    )
    # Done is done; where it is pushed to changes nothing, another text does.
    stamp = (folder / "README.md").stat().st_mtime_ns
    assert export.make(work(**{"export.private": "false"}))["path"] == facts["path"]
    assert (folder / "README.md").stat().st_mtime_ns == stamp
    assert Workdir(work(**{"export.licence_files": ""})).done("export") is None


def test_a_hostile_source_name_stays_one_line_of_text(work):
    text = (Path(export.make(work())["path"]) / "README.md").read_text()
    loaded = ModelCard(text)
    assert loaded.data.license == "other" and "evil" not in loaded.data.to_yaml()
    line = next(line for line in loaded.text.splitlines() if "evil" in line)
    assert "cc-by-4.0 | 1,200 |" in line and line.startswith("| evil --- license: mit \\# Heading \\| ")
    assert "<script" not in text and "](javascript" not in text and "\u202e" not in text
    assert card.escape("a\x00b\r\n" + "x" * 999).startswith("a b x") and len(card.escape("x" * 999)) == card.LONGEST
    assert card.escape("\ud800") == "?"


def test_a_missing_text_is_said_everywhere_and_stops_the_push(work, capsys):
    config = work(**{"export.licence_files": "", "export.push_to": "me/Llama-tiny"})
    with pytest.raises(UserError, match="not ready to publish and was not pushed. Missing: the text of the Health AI"):
        export.main(config)
    said = capsys.readouterr().out
    assert "not ready to publish; missing:" in said and licences.LICENCES["hai-def"].url in said
    facts = Workdir(config).require("export")
    assert len(facts["missing"]) == 1
    assert "**Not ready to publish.**" in (Path(facts["path"]) / "README.md").read_text()


def test_a_name_against_the_licence_is_refused_before_anything_is_written(work):
    config = work(**{"export.name": "MyMedicalModel"})
    with pytest.raises(UserError, match="config.export.name.*call it Llama-MyMedicalModel"):
        export.main(config)
    assert not (Path(config.workdir) / "export").exists()
    config = work(**{"export.push_to": "me/tiny"})
    with pytest.raises(UserError, match="config.export.push_to.*call it Llama-tiny"):
        export.main(config)


def test_the_card_waits_for_the_results(work):
    assert "evaluate" in Workdir(work()).inputs("export")
    config = work()
    shutil.rmtree(Path(config.workdir) / "evaluate")
    with pytest.raises(UserError, match="distil-jax evaluate"):
        export.main(config)


def test_a_run_without_models_of_others_is_bound_by_nothing(tmp_path):
    config = load_config(["--config", str(PROJECT / "configs" / "tiny.py")])[0]
    assert export.duties_of(config).origins == ()
    config.student.licence = "mit"
    (o,) = export.duties_of(config).origins
    assert (o.name, o.licences) == ("made here", ("mit",))


# ---- the push -------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The endpoints of the hub that a push of small files asks, over HTTP. State is on the server object."""

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer(200, {"id": self.server.repo, "private": self.server.private, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{self.server.repo}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{self.server.repo}/commit/1"
            return self.answer(200, {"success": True, "commitOid": "1", "commitUrl": url})
        self.answer(404, {"error": self.path})

    def log_message(self, *args):
        pass


@pytest.fixture
def local_hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repo, server.private, server.files, server.asked, server.created = "me/Llama-tiny", True, {}, [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(folder, endpoint, home, repo="me/Llama-tiny", **env):
    """A push in a process of its own: the client reads its environment when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"} | env
    code = (
        "import sys, pathlib; from distil_jax.push import push; from distil_jax.errors import UserError\n"
        "try: print(push(pathlib.Path(sys.argv[1]), sys.argv[2], private=True))\n"
        "except UserError as error: print('error:', error)"
    )
    command = [sys.executable, "-c", code, str(folder), repo]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=True).stdout


def test_a_push_brings_every_file_byte_for_byte(llama, local_hub, tmp_path):
    exported(llama, tmp_path / "out")
    endpoint = f"http://127.0.0.1:{local_hub.server_port}"
    assert pushed(tmp_path / "out", endpoint, tmp_path / "home", HF_TOKEN="hf_right").strip().endswith("/commit/1")
    assert local_hub.files == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert local_hub.created["name"] == "Llama-tiny" and "private" in json.dumps(local_hub.created)
    # A public repository is not filled by a push that was to be private.
    local_hub.private, local_hub.files = False, {}
    said = pushed(tmp_path / "out", endpoint, tmp_path / "home", HF_TOKEN="hf_right")
    assert "it is public; set --config.export.private=false" in said and local_hub.files == {}


def test_a_push_that_cannot_be_is_one_line_with_the_way_on(local_hub, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("# x\n")
    endpoint = f"http://127.0.0.1:{local_hub.server_port}"
    closed = "http://127.0.0.1:9"
    for said, arguments in {
        "no token": (endpoint, {}),
        "(401)": (endpoint, {"HF_TOKEN": "hf_wrong"}),
        "HF_HUB_OFFLINE is set": (endpoint, {"HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "1"}),
        "ConnectError": (closed, {"HF_TOKEN": "hf_right"}),
    }.items():
        out = pushed(folder, arguments[0], tmp_path / "home", **arguments[1])
        assert out.startswith("error: not pushed to me/Llama-tiny") and said in out and out.count("\n") == 1
        assert "--config.export.push_to=me/Llama-tiny" in out and "hf_" not in out
    assert local_hub.files == {}
    assert "config.export.push_to is 'a/b/c'" in pushed(folder, endpoint, tmp_path, "a/b/c", HF_TOKEN="hf_right")

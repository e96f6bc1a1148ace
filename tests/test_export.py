"""What is taken away is whole or not there, read back, described, and says what keeps it from being published."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from test_licences import HEALTH, LLAMA, folder_of

import distil_jax as dj
from distil_jax import card, export, licences, readback
from distil_jax.config import load_config
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError
from distil_jax.eval import answers
from distil_jax.eval.answers import Answers
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


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_type_that_cannot_hold_the_model_is_refused(models, tmp_path):
    """float16 ends at 65,504: the weights may fit and what is computed with them may not, as in the larger Gemmas."""
    model, params, tokenizer = models["llama"]
    with pytest.raises(UserError, match="config.export.dtype is 'bfloat' .did you mean 'bfloat16'"):
        exported(models["llama"], tmp_path / "out", "bfloat")
    layers = params["layers"]
    weights = params | {"embedding": params["embedding"] * 1e7}
    activations = params | {"layers": layers | {"mlp": jax.tree.map(lambda x: x * 1e4, layers["mlp"])}}
    for large, said in ((weights, "embedding.* is not finite"), (activations, "logits that are not finite")):
        with pytest.raises(UserError, match=f"{said} in float16: .*bfloat16"):
            exported((model, large, tokenizer), tmp_path / "out", "float16")
        assert list(tmp_path.iterdir()) == []


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
    assert done.returncode == 1 and re.search("File too large|disk is full", done.stderr)
    assert list((tmp_path / "out").iterdir()) == []


# ---- the stage ------------------------------------------------------------------------------------------------------

FIGURES = {"bits_per_byte": 1.5, "token_accuracy": 0.5, "agreement_with_teacher": 0.25}
MODEL = {"parameters": 1234} | FIGURES | {f"{key}_interval": [0.1, 1.9] for key in FIGURES}
# What each model had right of four items of each task.
RIGHT = {"teacher": [1, 1, 1, 1], "student_before": [1, 0, 0, 0], "control": [1, 1, 0, 0], "distilled": [1, 1, 1, 0]}
RIGHT |= {"smoothing": [0, 0, 0, 1]}
HOSTILE = "evil\n---\nlicense: mit\n# Heading | [x](javascript:y) <script>alert(1)</script> `\u202e"

TASKS = ("medqa_4options", HOSTILE)


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
        made_with = dj.ByteTable.from_tokenizer(tokenizer).hash
        facts = {
            "corpus": {
                "provenance": {"files": [str(data)], "licences": {f"{HOSTILE}: cc-by-4.0": 1200, "mine: none": 3}},
                "rows": {"train": 1000, "validation": 100, "test": 103},
                "chat": {"train": {"rows": 0, "tokens": 0, "supervised": 0.0}},
                "quarantined": {"too long": 2},
                "alignment": alignment,
                "tokenizers": {
                    side: {"vocab_size": 5000 + len(side), "hash": made_with, "path": str(path)}
                    for side, path in (("teacher", teacher), ("student", student))
                },
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
        (work / "evaluate" / "answers").mkdir(exist_ok=True)
        for name, right in RIGHT.items():
            nats = np.where(np.array(right)[:, None], [-1.0, -2.0], [-2.0, -1.0])
            size, ids = np.ones((len(right), 2), np.int64), tuple(map(str, range(len(right))))
            told = [Answers(task, 0, ids, np.zeros(len(right), np.int64), nats, size) for task in TASKS]
            answers.save(work / "evaluate" / "answers" / f"{name}.json", name, told)
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
    # Benchmarks: beside the teacher, the untouched student and the control, but not what has nothing to do with it.
    rows = {line.split(" | ")[0]: line for line in body.splitlines() if line.startswith("| ")}
    for said in ("75.0% [", "50.0% [", "25.0% [", "100.0% [", "student, text alone (control)"):
        assert said in body, said
    assert "smoothed" not in next(line for line in body.splitlines() if line.startswith("| task |"))
    assert "| 4 | 50.0% |" in rows["| medqa\\_4options"] and "mean over all tasks" in body
    paired = [line for line in body.splitlines() if "student, distilled" in line and "untouched" in line][-1]
    assert "+50.0% [" in paired and paired.endswith("| 2 | 0 | 0.5 (exact) |")
    assert "was not searched for the questions of" in body
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
    lines = [line for line in loaded.text.splitlines() if "evil" in line]
    start = "| evil --- license: mit \\# Heading \\| "
    assert all(line.startswith((start, "- ")) for line in lines)
    line = next(line for line in lines if "1,200" in line)
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
    with pytest.raises(UserError, match="choose another config.export.name"):
        export.main(work(**{"export.name": "key", "student.licence": "other", "teacher.licence": "other"}))
    config = work(**{"export.push_to": "me/tiny"})
    with pytest.raises(UserError, match="config.export.push_to.*call it Llama-tiny"):
        export.main(config)


def test_the_card_says_what_learned_in_place_of_the_parameters(work):
    settings = {"student.lora.rank": 8, "student.lora.alpha": 16.0, "student.training.ema": 0.99}
    text = (Path(export.make(work(**settings))["path"]) / "README.md").read_text()
    assert "parameters that were not trained: all; low-rank updates (LoRA, rank 8, alpha 16)" in text
    assert "running average over the updates, decay 0.99" in text


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

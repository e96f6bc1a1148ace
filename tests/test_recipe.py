"""The recipe of a real pair, at toy size: its config, its frozen embedding, two checkpoints brought from disk."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

import distil_jax as dj
from distil_jax import run, train
from distil_jax.config import flatten, load_config, load_config_file, track_reads
from distil_jax.data import hpo
from distil_jax.data.rows import Quarantine
from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.errors import UserError
from distil_jax.metrics import read_metrics
from distil_jax.models import hub

PROJECT = Path(__file__).resolve().parent.parent
RECIPE = PROJECT / "configs" / "gemma270m_smollm135m.py"
TINY = PROJECT / "configs" / "tiny.py"
FEW = {"steps": 6, "warmup": 1, "log_every": 1, "evaluate_every": 6, "checkpoint_every": 2}
SMALL = {
    "data.student_length": 128,
    "data.teacher_length": 128,
    **{f"{side}.training.{key}": value for side in ("teacher", "student") for key, value in FEW.items()},
    "projection.fit_rows": 8,
    "projection.fit_steps": 3,
    "runs": "control,distilled",
    "evaluation.bootstrap": 50,
    "evaluation.rows": 9,
    "evaluation.curve_rows": 8,
    "evaluation.answers": 1,
    "evaluation.answer_tokens": 3,
    "report.calibration_rows": 4,
    "report.turns": 1,
    "report.prompt_tokens": 4,
    "report.new_tokens": 4,
}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SHAPE |= {"num_hidden_layers": 2, "max_position_embeddings": 512, "tie_word_embeddings": True, "sliding_window": 32}


@pytest.fixture(scope="module")
def tool():
    """bench/small_checkpoints.py, which makes the full-size pair."""
    spec = importlib.util.spec_from_file_location("small_checkpoints", PROJECT / "bench" / "small_checkpoints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def definitions(tmp_path_factory):
    """Two hundred real definitions as a JSONL file."""
    folder = tmp_path_factory.mktemp("rows")
    with Quarantine(folder / "quarantine.jsonl") as quarantine:
        rows = hpo.load_corpus(quarantine).rows
    file = folder / "definitions.jsonl"
    chosen = rows[:: len(rows) // 200]
    lines = ({"prompt": r.prompt, "completion": r.completion, "specialty": r.specialty} for r in chosen)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file, [r.prompt + r.completion for r in chosen]


@pytest.fixture(scope="module")
def pair(tool, definitions, tmp_path_factory):
    """Random checkpoints of both families on disk, each with its own tokenizer; the student's as SmolLM2's is."""
    folder = tmp_path_factory.mktemp("pair")
    gemma = train_gemma_style(definitions[1], 640, folder / "gemma_tokenizer")
    train_llama_style(definitions[1], 560, folder / "llama_tokenizer")
    smollm = PreTrainedTokenizerFast(
        tokenizer_object=tool.cut(folder / "llama_tokenizer", 512), bos_token=tool.END, eos_token=tool.END
    )
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    tool.write_model(
        SHAPE | ids | {"model_type": "gemma3_text", "vocab_size": 640}, folder / "teacher", gemma, "bfloat16", 0
    )
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    tool.write_model(
        SHAPE | ids | {"model_type": "llama", "vocab_size": 512}, folder / "student", smollm, "bfloat16", 1
    )
    return folder


def config_of(pair, definitions, workdir, **overrides):
    paths = {f"{side}.path": pair / side for side in ("teacher", "student")}
    settings = SMALL | paths | {"workdir": workdir, "data.files": definitions[0]} | overrides
    return load_config(["--config", str(RECIPE), *(f"--config.{k}={v}" for k, v in settings.items())])[0]


@pytest.fixture(scope="module")
def finished(pair, definitions, tmp_path_factory):
    """The whole recipe, with the keys that nothing read."""
    config = track_reads(config_of(pair, definitions, tmp_path_factory.mktemp("run") / "work"))
    return config, run.main(config), config.unread()


@pytest.mark.parametrize("file", [RECIPE, RECIPE.with_name("medgemma4b_llama1b_24gb.py")], ids=lambda file: file.stem)
def test_its_keys_are_those_of_the_tiny_recipe_without_shapes_to_make_models_from(file):
    tiny, recipe = (flatten(load_config_file(str(file))) for file in (TINY, file))
    made = {k for k in tiny if k.split(".")[1:2] in (["shape"], ["vocab_size"], ["numerals"])}
    assert recipe.keys() == tiny.keys() - made
    assert {k: type(v) for k, v in recipe.items()} == {k: type(tiny[k]) for k in recipe}


def test_every_key_is_read_and_the_recipe_runs_to_its_end(finished):
    config, summary, unread = finished
    assert unread == ["objective.label_smoothing"]  # of the smoothing control, which is left out here for time
    work = Path(config.workdir)
    for name in ("teacher", "student_before", "control", "distilled"):
        assert summary[name]["bits_per_byte"] > 0
    assert (work / "report" / "index.html").is_file() and (Path(summary["export"]) / "config.json").is_file()
    manifest = json.loads((work / "evaluate" / "manifest.json").read_text())
    documents = (work / "corpus" / "documents.jsonl").read_text().count('"split": "test"')
    assert 0 < manifest["documents"] <= documents


def test_the_adapted_teacher_keeps_its_embedding_bit_for_bit_and_nothing_else(finished, pair):
    config, summary, _ = finished
    folder = Path(config.workdir) / "teacher"
    before, params = hub.load_pretrained(pair / "teacher"), hub.load_pretrained(folder / "model")[1]
    np.testing.assert_array_equal(before[1]["embedding"], params["embedding"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before[1], params)
    assert not moved.pop("embedding") and all(jax.tree.leaves(moved))
    whole, frozen = sum(p.size for p in jax.tree.leaves(params)), params["embedding"].size
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["parameters"], manifest["trainable_parameters"]) == (whole, whole - frozen)
    first = read_metrics(folder / "metrics.jsonl")[0]
    assert (first["parameters"], first["trainable_parameters"]) == (whole, whole - frozen)
    assert summary["teacher"]["parameters"] == whole
    # What a checkpoint holds: three numbers for each parameter that learns.
    held = json.loads((folder / "checkpoints" / "6" / "whole.json").read_text())["files"]
    assert not any("embedding" in name for name in held)


def test_an_adaptation_that_was_cut_off_ends_with_the_same_weights(finished, pair, definitions, tmp_path):
    config, *_ = finished
    for stage in ("corpus", "teacher"):
        shutil.copytree(Path(config.workdir) / stage, tmp_path / "work" / stage)
    folder = tmp_path / "work" / "teacher"
    for there in (folder / "model", folder / "checkpoints" / "6"):
        shutil.rmtree(there)
    (folder / "manifest.json").unlink()
    facts = train.train(config_of(pair, definitions, tmp_path / "work"), "teacher")
    assert facts["resumed_at"] == 4
    weights = [load_file(f / "model" / "model.safetensors") for f in (folder, Path(config.workdir) / "teacher")]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name])


def test_a_freeze_that_the_last_run_would_stumble_over_stops_the_first(finished, pair, definitions, tmp_path):
    shutil.copytree(Path(finished[0].workdir) / "corpus", tmp_path / "work" / "corpus")
    wrong = config_of(pair, definitions, tmp_path / "work", **{"student.training.freeze": "embedding,layers.attn"})
    with pytest.raises(UserError, match=r"no parameter 'layers.attn' \(did you mean"):
        train.train(wrong, "teacher")
    with pytest.raises(UserError, match="config.student.path is empty"):
        run.main(config_of(pair, definitions, tmp_path / "other", **{"student.path": ""}))


def test_a_cut_vocabulary_is_a_bpe_of_the_same_bytes(pair, definitions, tool):
    """The ids below the cut with their merges, behind the control tokens; text comes back byte for byte."""
    longer = json.loads((pair / "llama_tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    table = dj.ByteTable.from_tokenizer(pair / "student")
    assert table.vocab_size == 512 and table.roles["bos"] == table.roles["eos"] == 0
    vocabulary = tool.cut(pair / "llama_tokenizer", 512).get_vocab()
    assert all(vocabulary[piece] == i + len(tool.CONTROL) for piece, i in longer.items() if i + len(tool.CONTROL) < 512)
    texts = [*definitions[1][:20], "0123 456 \r\n\t ünïcode ▁ 漢字 <|endoftext|>"]
    encoded = table.encode_batch(texts)
    assert [table.decode_bytes(ids).decode() for ids in encoded] == texts
    assert max(map(max, encoded)) > 256 + len(tool.CONTROL)  # merges are used

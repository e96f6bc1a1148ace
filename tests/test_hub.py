"""Hugging Face directories: what is written loads elsewhere, what is read is checked, and bad input is named."""

import json
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file

from distil_jax.errors import UserError
from distil_jax.models import Gemma3, Llama, load_pretrained, model_from_config, save_pretrained
from distil_jax.models.hub import load_model
from distil_jax.models.tensors import INDEX, SINGLE
from distil_jax.sharding import make_mesh, param_shardings

TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "gemma": TINY
    | {"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8}
    | {"query_pre_attn_scalar": 24, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "eos_token_id": [1, 7]},
    "llama": TINY
    | {"model_type": "llama", "num_hidden_layers": 2, "rope_theta": 5e5, "max_position_embeddings": 256}
    | {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
}


def random_params(model, seed=0):
    """Parameters far from their initial values, norms included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.5 * (leaf.ndim < 3), 0.2, leaf.shape), leaf.dtype),
        model.abstract_params(),
    )


@pytest.fixture(scope="module", params=CONFIGS)
def ours(request):
    model = model_from_config(CONFIGS[request.param])
    return model, random_params(model)


@pytest.fixture(scope="module")
def llama():
    model = model_from_config(CONFIGS["llama"])
    return model, random_params(model)


@pytest.fixture
def llama_directory(llama, tmp_path):
    return save_pretrained(*llama, tmp_path / "model")


@pytest.fixture
def gemma_directory(tmp_path):
    model = model_from_config(CONFIGS["gemma"])
    return save_pretrained(model, random_params(model), tmp_path / "gemma")


def tokenizer_of(size: int) -> transformers.PreTrainedTokenizerFast:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", pad_token="w3", bos_token="w5", eos_token="w7"
    )


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(params, other):
    """Bit for bit, in the same tree."""
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
    assert jax.tree.structure(params) == jax.tree.structure(other)


# ---- writing --------------------------------------------------------------------------------------------------------


def test_transformers_loads_the_export_and_gives_the_same_logits(ours, tmp_path):
    model, params = ours
    save_pretrained(model, params, tmp_path / "model", tokenizer=tokenizer_of(60))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 30), dtype=np.int32)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(params, tokens), logits, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.encode("w9 w11") == [9, 11]
    # the tokenizer's ids, but Gemma's list of eos ids holds its eos already and stays
    eos = [1, 7] if isinstance(model, Gemma3) else 7
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (5, 3, eos)


def test_export_loads_back_bit_for_bit(ours, tmp_path):
    model, params = ours
    again, loaded = load_pretrained(save_pretrained(model, params, tmp_path / "model"))
    assert again == model
    assert_same(params, loaded)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    save_pretrained(model, half, tmp_path / "half")
    assert_same(half, load_pretrained(tmp_path / "half", dtype="bfloat16")[1])
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    save_pretrained(model, params, tmp_path / "cast", dtype="bfloat16")
    assert_same(half, load_pretrained(tmp_path / "cast", dtype="bfloat16")[1])


def test_large_exports_are_cut_into_files_with_an_index(llama, tmp_path):
    save_pretrained(*llama, tmp_path / "model", shard_bytes=20_000)
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(tmp_path / "model" / file).values()) <= 20_000 for file in files)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(llama[1]))
    assert_same(llama[1], load_pretrained(tmp_path / "model")[1])
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]


def test_a_failed_export_leaves_the_earlier_model_and_nothing_else(llama, tmp_path):
    model, params = llama
    save_pretrained(model, params, tmp_path / "model")

    class Broken:
        vocab_size = 60

        def save_pretrained(self, directory):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        save_pretrained(model, jax.tree.map(jnp.zeros_like, params), tmp_path / "model", tokenizer=Broken())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same(params, load_pretrained(tmp_path / "model")[1])
    other = random_params(model, seed=1)
    save_pretrained(model, other, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same(other, load_pretrained(tmp_path / "model")[1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_export_passes_through_transformers_bit_for_bit(ours, dtype, tmp_path):
    """Rows of the vocabulary beyond the tokenizer's ids included."""
    model, params = ours
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    save_pretrained(model, params, tmp_path / "ours", tokenizer=tokenizer_of(60))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    again, loaded = load_pretrained(tmp_path / "theirs", dtype=dtype)
    assert again.weights == model.weights and again.layer_kinds()[1] == model.layer_kinds()[1]
    assert_same(params, loaded)


def test_biases_pass_through_transformers_bit_for_bit(tmp_path):
    model = model_from_config(CONFIGS["llama"] | {"attention_bias": True, "mlp_bias": True})
    params = random_params(model)
    save_pretrained(model, params, tmp_path / "ours")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    for mesh in (None, make_mesh(data=1, fsdp=4, tensor=2)):
        again, loaded = load_pretrained(tmp_path / "theirs", mesh=mesh)
        assert again.config.attention_bias and again.config.mlp_bias
        assert_same(params, loaded)


def test_generation_options_are_kept_under_our_special_ids(llama, tmp_path):
    source = {"eos_token_id": [9, 11], "bos_token_id": 2, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    directory = save_pretrained(*llama, tmp_path / "model", tokenizer=tokenizer_of(60), generation_config=source)
    written = json.loads((directory / "generation_config.json").read_text())
    ours = {"eos_token_id": 7, "bos_token_id": 5, "pad_token_id": 3}
    assert written == source | ours
    theirs = transformers.GenerationConfig.from_pretrained(directory)
    assert (theirs.temperature, theirs.top_p, theirs.do_sample, theirs.eos_token_id) == (0.6, 0.9, True, 7)


@pytest.mark.parametrize("ours, theirs, kept", [(5, [5, 7], [5, 7]), (5, [6, 7], 5), (5, 6, 5), ([5, 6], 5, [5, 6])])
def test_end_tokens_of_an_instruct_model_are_kept(llama, tmp_path, ours, theirs, kept):
    model, params = llama
    model = model_from_config(
        model.config.to_hf() | {"model_type": "llama", "eos_token_id": ours, "pad_token_id": None}
    )
    source = {"eos_token_id": theirs, "temperature": 0.6, "pad_token_id": 3, "_from_model_config": True}
    directory = save_pretrained(model, params, tmp_path / "model", generation_config=source)
    written = json.loads((directory / "generation_config.json").read_text())
    assert {key: written[key] for key in source if key in written} == {
        "eos_token_id": kept, "temperature": 0.6, "pad_token_id": 3,
    }  # fmt: skip


def test_stop_ids_are_those_of_generation_config(llama_directory):
    assert load_model(llama_directory).config.eos_token_id == 2
    (llama_directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9, 11]}))
    model, params = load_pretrained(llama_directory)
    assert model.config.eos_token_id == (2, 9, 11)
    save_pretrained(model, params, llama_directory)
    assert load_model(llama_directory).config.eos_token_id == (2, 9, 11)
    (llama_directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert load_model(llama_directory).config.eos_token_id == (2, 9, 11)
    (llama_directory / "generation_config.json").unlink()
    assert load_model(llama_directory).config.eos_token_id == (2, 9, 11)


def test_the_chat_template_goes_with_the_tokenizer(llama, tmp_path):
    tokenizer = tokenizer_of(60)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w9 {% endfor %}"
    save_pretrained(*llama, tmp_path / "model", tokenizer=tokenizer)
    assert (tmp_path / "model" / "chat_template.jinja").is_file()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.apply_chat_template([{"role": "user", "content": "w4"}], return_dict=False) == [4, 9]


FULL_DISK = """
import resource, sys
import jax, numpy
from distil_jax.errors import UserError
from distil_jax.models import model_from_config, save_pretrained
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # as a disk that has room for one file, not for the second
sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
model = model_from_config({"model_type": "llama"} | sizes)
zeros = jax.tree.map(lambda leaf: numpy.zeros(leaf.shape, leaf.dtype), model.abstract_params())
try:
    save_pretrained(model, zeros, sys.argv[1], shard_bytes=10_000)
except UserError as error:
    print(error)
"""


def test_a_disk_that_fills_up_leaves_what_was_there(llama, llama_directory):
    before = load_file(llama_directory / SINGLE)
    command = [sys.executable, "-c", FULL_DISK, str(llama_directory)]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, timeout=60).stdout
    assert said.startswith(f"{llama_directory}: no room to write the model") and said.count("\n") == 1
    assert [path.name for path in llama_directory.parent.iterdir()] == ["model"]
    after = load_file(llama_directory / SINGLE)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_export_does_not_replace_what_is_no_model(llama, tmp_path):
    (tmp_path / "thesis.tex").write_text("three years of work")
    with pytest.raises(UserError, match="no model directory"):
        save_pretrained(*llama, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_tokenizer_larger_than_the_embedding_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match="65 ids.*64 rows"):
        save_pretrained(*llama, tmp_path / "model", tokenizer=tokenizer_of(65))


# ---- reading --------------------------------------------------------------------------------------------------------


def test_parameters_land_in_their_shards(ours, tmp_path):
    model, params = ours
    save_pretrained(model, params, tmp_path / "model")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    _, placed = load_pretrained(tmp_path / "model", mesh=mesh)
    assert_same(params, placed)
    jax.tree.map(
        lambda leaf, want: leaf.sharding == want or pytest.fail(str(want)), placed, param_shardings(model, mesh)
    )
    assert placed["layers"]["mlp"]["up"].addressable_shards[0].data.shape == (model.config.num_hidden_layers, 16, 24)
    assert_same(params, load_pretrained(save_pretrained(model, placed, tmp_path / "again"))[1])


GEMMA_4B = {  # the fields of the released config.json, which leaves out what equals a default
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}


def test_the_config_of_gemma_3_4b():
    config = model_from_config(GEMMA_4B).config
    assert (config.vocab_size, config.text_vocab_size) == (262208, 262144)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [5, 11, 17, 23, 29] and len(config.layer_types) == 34
    assert config.eos_token_id == (1, 106) and config.tie_word_embeddings
    rope = config.rope_parameters
    assert (rope.full_attention.rope_theta, rope.full_attention.factor) == (1e6, 8.0)
    assert (rope.sliding_attention.rope_theta, rope.sliding_attention.rope_type) == (1e4, "default")


def test_the_parameter_count_of_llama_3_2_1b():
    config = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
        "rope_scaling": CONFIGS["llama"]["rope_scaling"] | {"original_max_position_embeddings": 8192},
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    }  # fmt: skip
    model = model_from_config(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params())) == 1_235_814_400


OLD_AND_NEW = {
    "llama rope": (
        {"model_type": "llama", "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "model_type": "llama",
            "rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0},
        },
    ),
    "llama nulls": (
        {"model_type": "llama", "rope_scaling": None, "head_dim": None, "num_key_value_heads": None},
        {"model_type": "llama", "head_dim": 128, "num_key_value_heads": 32},
    ),
    "gemma rope": (
        {
            "model_type": "gemma3_text",
            "rope_theta": 7.0,
            "rope_local_base_freq": 5.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        {
            "model_type": "gemma3_text",
            "rope_parameters": {
                "full_attention": {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0},
                "sliding_attention": {"rope_theta": 5.0, "rope_type": "default"},
            },
        },
    ),
    "gemma layers": (
        {"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window_pattern": 2},
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


@pytest.mark.parametrize("name", OLD_AND_NEW)
def test_old_and_new_spellings_are_one_config(name):
    """And both are what transformers understands by them."""
    old, new = OLD_AND_NEW[name]
    assert model_from_config(old) == model_from_config(new)
    theirs = transformers.AutoConfig.for_model(**old)
    written = model_from_config(old).config.to_hf()
    understood = {key: getattr(theirs, key) for key in written}
    understood["rope_parameters"].pop("type", None)  # transformers keeps the oldest spelling beside the new
    assert understood == written


@pytest.mark.parametrize("text, head", [("language_model.model.", "language_model."), ("model.language_model.", "")])
def test_the_text_tower_of_a_vision_file_is_read(gemma_directory, text, head):
    model, params = load_pretrained(gemma_directory)
    tensors = load_file(gemma_directory / SINGLE)
    wrapped = {text + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    outside = "model." if text.startswith("model.") else ""
    wrapped[outside + "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = np.ones((3, 2), np.float32)
    wrapped[outside + "multi_modal_projector.mm_input_projection_weight"] = np.ones((3, 2), np.float32)
    wrapped[head + "lm_head.weight"] = tensors["model.embed_tokens.weight"]  # a duplicate of the tied embedding
    save_file(wrapped, gemma_directory / SINGLE)
    config = json.loads((gemma_directory / "config.json").read_text())
    (gemma_directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    again, loaded = load_pretrained(gemma_directory)
    assert again == model
    assert_same(params, loaded)


def test_the_wrapper_that_transformers_writes_is_read(tmp_path):
    text = {k: v for k, v in CONFIGS["gemma"].items() if k != "model_type"} | {"num_hidden_layers": 2}
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63, eos_token_id=[1, 7]
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(10, 60, (1, 20), dtype=np.int32)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(params, tokens), logits, atol=1e-4, rtol=0)


def test_a_tied_head_that_differs_is_used_as_transformers_does(gemma_directory, caplog):
    tensors = load_file(gemma_directory / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(0.5)
    save_file(tensors, gemma_directory / SINGLE, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        model, params = load_pretrained(gemma_directory)
    assert "lm_head.weight" in caplog.text and not model.config.tie_word_embeddings
    tokens = np.random.default_rng(0).integers(0, 64, (1, 12), dtype=np.int32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gemma_directory)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(jax.jit(model.apply)(params, tokens), logits, atol=1e-4, rtol=0)


def test_mistral_without_a_window_is_a_llama(tmp_path):
    """Read with Mistral's own defaults; what is written is a Llama directory of the same logits."""
    config = transformers.MistralConfig(
        **TINY, num_hidden_layers=2, sliding_window=None, max_position_embeddings=64, head_dim=12
    )
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "mistral")
    model, params = load_pretrained(tmp_path / "mistral")
    assert isinstance(model, Llama)
    save_pretrained(model, params, tmp_path / "llama")
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["model_type"] == "llama"
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40), dtype=np.int32)
    with torch.no_grad():
        logits, again = (torch_model(torch.tensor(tokens)).logits.numpy() for torch_model in (theirs, written))
    np.testing.assert_allclose(again, logits, atol=1e-5, rtol=0)
    np.testing.assert_allclose(jax.jit(model.apply)(params, tokens), logits, atol=1e-4, rtol=0)
    bare = {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}
    assert model_from_config(bare).config.num_key_value_heads == 8  # which config.json may leave out
    with pytest.raises(UserError, match="sliding_window 4096 .* is shorter than max_position_embeddings 131072"):
        model_from_config({"model_type": "mistral"})


def test_code_of_the_repository_is_not_run(llama, llama_directory, caplog):
    (llama_directory / "modeling_own.py").write_text("raise SystemExit('code of a repository was run')")
    edit_config(llama_directory, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with caplog.at_level(logging.WARNING):
        assert_same(llama[1], load_pretrained(llama_directory)[1])
    assert "auto_map" in caplog.text


def test_buffers_of_old_llama_files_are_passed_over(llama, llama_directory):
    tensors = load_file(llama_directory / SINGLE)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, llama_directory / SINGLE)
    assert_same(llama[1], load_pretrained(llama_directory)[1])


def test_a_dtype_that_cannot_hold_weights_is_refused(llama_directory):
    with pytest.raises(UserError, match="'int8' cannot hold weights"):
        load_pretrained(llama_directory, dtype="int8")


def test_every_tensor_of_the_file_is_written_as_it_lies_in_torch(llama, llama_directory):
    """The name table both ways: the transpose is in the bytes, not in the strides."""
    model, params = llama
    tensors = safetensors.numpy.load_file(llama_directory / SINGLE)
    attention = params["layers"]["attention"]
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert isinstance(model, Llama) and q[3 * 8 + 5, 7] == attention["q"][1, 7, 3, 5]  # [head * K + k, d]
    o = tensors["model.layers.1.self_attn.o_proj.weight"]
    assert o[7, 3 * 8 + 5] == attention["o"][1, 3, 5, 7]
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert down[2, 9] == params["layers"]["mlp"]["down"][0, 9, 2]

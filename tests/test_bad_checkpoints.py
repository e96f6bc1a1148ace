"""A directory that cannot be used is refused in one line that names the file, the tensor or the key."""

import json
import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distil_jax.errors import UserError
from distil_jax.models import load_pretrained, model_from_config, save_pretrained
from distil_jax.models.tensors import INDEX, SINGLE


@pytest.fixture
def llama_directory(tmp_path):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    model = model_from_config({"model_type": "llama", "num_hidden_layers": 2} | sizes)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), model.abstract_params())
    return save_pretrained(model, params, tmp_path / "model")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory, change):
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def without(name):
    return lambda directory: rewrite(directory, lambda tensors: tensors.pop(name))


def with_tensor(name, value):
    return lambda directory: rewrite(directory, lambda tensors: tensors.update({name: value}))


def truncated(directory):
    whole = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(whole[: len(whole) // 2])


def git_lfs_pointer(directory):
    (directory / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def only_a_pickle(directory):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    (directory / SINGLE).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def index_to(weight_map):
    def damage(directory):
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


DAMAGES = {
    r"config\.json is missing": lambda directory: (directory / "config.json").unlink(),
    r"config\.json is no valid JSON": lambda directory: (directory / "config.json").write_text("{"),
    r"config\.json holds a list": lambda directory: (directory / "config.json").write_text("[]"),
    r"model_type 'mamba'": lambda directory: edit_config(directory, model_type="mamba"),
    r"q_proj\.bias' is missing": lambda directory: edit_config(directory, attention_bias=True),
    r"'model\.norm\.weight' is missing": without("model.norm.weight"),
    r"'lm_head\.weight' is missing and config\.json does not tie it": without("lm_head.weight"),
    r"generation_config\.json is no valid JSON": lambda directory: (directory / "generation_config.json").write_text(
        "{"
    ),
    r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing": without("model.layers.1.mlp.up_proj.weight"),
    r"safetensors: tensor 'model\.layers\.1\..*' has no place": lambda directory: edit_config(
        directory, num_hidden_layers=1
    ),
    r"'model\.layers\.0\.self_attn\.q_proj\.bias' has no place": with_tensor(
        "model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32)
    ),
    r"'model\.embed_tokens\.weight' has shape \[64, 32\], config\.json asks for \[80, 32\]": lambda directory: (
        edit_config(directory, vocab_size=80)
    ),
    r"'model\.norm\.weight' is stored as I8": with_tensor("model.norm.weight", np.ones(32, np.int8)),
    r"are the same tensor under two names": with_tensor("language_model.lm_head.weight", np.ones((64, 32), np.float32)),
    r"model\.safetensors is no whole safetensors file": truncated,
    r"Git LFS": git_lfs_pointer,
    r"only as a pickle \(pytorch_model\.bin\)": only_a_pickle,
    r"holds no model\.safetensors": lambda directory: (directory / SINGLE).unlink(),
    r"names 'model-00002-of-00002\.safetensors'": index_to({"lm_head.weight": "model-00002-of-00002.safetensors"}),
    r"names '\.\./model\.safetensors'": index_to({"lm_head.weight": "../model.safetensors"}),
    r"tensor 'lm_tail\.weight' is listed": index_to({"lm_tail.weight": SINGLE}),
    r"has no weight_map": index_to({}),
    r"model: config: num_attention_heads 4 is no multiple of num_key_value_heads 3": lambda directory: edit_config(
        directory, num_key_value_heads=3
    ),
    r"hidden_size 32 is no multiple of num_attention_heads 6": lambda directory: edit_config(
        directory, num_attention_heads=6, num_key_value_heads=6, head_dim=None
    ),
    r"q_proj\.weight' has shape \[32, 32\], config\.json asks for \[64, 32\]": lambda directory: edit_config(
        directory, head_dim=16
    ),
    r"vocab_size is '64'": lambda directory: edit_config(directory, vocab_size="64"),
    r"tie_word_embeddings is 'no'": lambda directory: edit_config(directory, tie_word_embeddings="no"),
    r"rms_norm_eps is 0": lambda directory: edit_config(directory, rms_norm_eps=0),
    r"rope parameters are 'linear'": lambda directory: edit_config(directory, rope_parameters="linear"),
    r"factor of rope_parameters is -1": lambda directory: edit_config(
        directory, rope_parameters={"rope_type": "linear", "factor": -1}
    ),
    r"'qwen2' is not supported \(Qwen 2 has biases": lambda directory: edit_config(directory, model_type="qwen2"),
    r"text_config is no object": lambda directory: edit_config(directory, model_type="gemma3", text_config="gemma"),
}


@pytest.mark.parametrize("named", DAMAGES)
def test_a_directory_that_cannot_be_used_is_named(llama_directory, named):
    DAMAGES[named](llama_directory)
    with pytest.raises(UserError, match=named) as caught:
        load_pretrained(llama_directory)
    assert "\n" not in str(caught.value)

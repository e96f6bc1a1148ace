"""The models compute what transformers' do: logits whole and layer by layer, attention maps, masks, packing.

The other side is a randomly initialised torch model, norm weights included (at their defaults of 0 and 1 a mistaken
`1 + w` would not show), handed over through a directory as transformers writes it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jaxtyping import Array, Float, Int, jaxtyped
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama

from distil_jax.errors import UserError
from distil_jax.models import (
    Gemma3,
    Gemma3Config,
    Llama,
    LlamaConfig,
    load_pretrained,
    model_from_config,
    save_pretrained,
)
from distil_jax.models.layers import RMSNorm, attend, attention_map, attention_mask, segment_positions
from distil_jax.objective import Frozen, Loss, Objective

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SIZES = dict(vocab_size=97, intermediate_size=48, num_attention_heads=4, max_position_embeddings=128)
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TORCH_CONFIGS = {
    # Heads wider than hidden_size / heads; a window of 8 in rows of 40; linear scaling on the full layer only.
    "gemma": transformers.Gemma3TextConfig(
        **SIZES,
        hidden_size=32,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    # Long enough for all three of llama3's bands: wavelengths kept, interpolated and stretched.
    "llama_tied": transformers.LlamaConfig(
        **SIZES,
        hidden_size=64,
        num_hidden_layers=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters=LLAMA3,
    ),
    # Biases everywhere, and three query heads to each of three key heads.
    "llama_biases": transformers.LlamaConfig(
        **SIZES | {"num_attention_heads": 9},
        hidden_size=36,
        num_hidden_layers=2,
        num_key_value_heads=3,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    ),
    "llama_untied": transformers.LlamaConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, head_dim=12, tie_word_embeddings=False
    ),
}


@dataclasses.dataclass
class Pair:
    """One model on both sides."""

    torch_model: torch.nn.Module
    model: object
    params: dict

    def torch_outputs(self, tokens_BxL):
        with torch.no_grad():
            return self.torch_model(
                torch.tensor(np.asarray(tokens_BxL)), output_hidden_states=True, output_attentions=True
            )


@pytest.fixture(scope="module", params=TORCH_CONFIGS)
def pair(request, tmp_path_factory) -> Pair:
    config = TORCH_CONFIGS[request.param]
    torch.manual_seed(0)
    torch_model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in torch_model.named_parameters():
        # Away from the identity, and large enough that every part of a layer moves the logits.
        at = 1.0 if "norm" in name and request.param != "gemma" else 0.0
        std = 0.3 if "norm" in name else 0.2
        parameter.data = at + std * torch.randn_like(parameter)
    directory = tmp_path_factory.mktemp(request.param)
    torch_model.save_pretrained(directory)
    return Pair(torch_model, *load_pretrained(directory))


@pytest.fixture(scope="module")
def tokens_BxL():
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 40), dtype=np.int32)


def test_logits_equal_transformers(pair, tokens_BxL):
    logits = jax.jit(pair.model.apply)(pair.params, tokens_BxL)
    theirs = pair.torch_outputs(tokens_BxL).logits.numpy()
    assert np.abs(theirs).max() > 1  # a flat output would agree with anything
    np.testing.assert_allclose(logits, theirs, atol=1e-4, rtol=0)


def test_every_layer_equals_transformers(pair, tokens_BxL):
    states = pair.torch_outputs(tokens_BxL).hidden_states  # the last one is normed already, the others are not
    count = pair.model.config.num_hidden_layers
    hidden = jax.jit(pair.model.hidden)
    for last in range(1, count + 1):
        theirs = states[last]
        if last < count:
            with torch.no_grad():
                theirs = pair.torch_model.model.norm(theirs)
        # A layer whose outputs are zero adds nothing: the state after layer `last` reaches the final norm.
        layers = {
            part: {
                name: leaf.at[last:].set(0) if name in ("o", "o_bias", "down", "down_bias") else leaf
                for name, leaf in leaves.items()
            }
            for part, leaves in pair.params["layers"].items()
        }
        params = pair.params | {"layers": layers}
        np.testing.assert_allclose(hidden(params, tokens_BxL), theirs.numpy(), atol=1e-4, rtol=0)


def test_attention_maps_equal_transformers(pair, tokens_BxL):
    chosen = (0, 1) if pair.model.config.num_hidden_layers == 2 else (1, 2)
    hidden, maps = jax.jit(functools.partial(pair.model.hidden, attention_layers=chosen))(pair.params, tokens_BxL)
    theirs = pair.torch_outputs(tokens_BxL)
    assert set(maps) == set(chosen)
    for layer in chosen:
        np.testing.assert_allclose(maps[layer], theirs.attentions[layer].numpy(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(hidden, theirs.hidden_states[-1].numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "theirs, one_plus", [(modeling_gemma3.Gemma3RMSNorm, True), (modeling_llama.LlamaRMSNorm, False)]
)
def test_norms_round_where_transformers_rounds(theirs, one_plus):
    """Gemma multiplies in float32 and casts, Llama casts and multiplies; in bfloat16 the order shows."""
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(64, 48)).astype(np.float32), rng.normal(size=48).astype(np.float32)
    module = theirs(48, eps=1e-6).to(torch.bfloat16)
    module.weight.data = torch.tensor(scale).bfloat16()
    with torch.no_grad():
        want = module(torch.tensor(x).bfloat16()).float().numpy()
    norm = RMSNorm(48, 1e-6, one_plus=one_plus, dtype=jnp.bfloat16)
    norm.scale[...] = jnp.asarray(scale, jnp.bfloat16)
    same = norm(jnp.asarray(x, jnp.bfloat16)).astype(jnp.float32) == want
    assert same.mean() > 0.99


def test_packed_rows_equal_separate_rows_of_transformers(pair):
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, SIZES["vocab_size"], size) for size in (21, 12, 30)]
    row = np.zeros((1, 70), np.int32)
    segments = np.zeros((1, 70), np.int32)
    at = 0
    for i, document in enumerate(documents):
        row[0, at : at + len(document)] = document
        segments[0, at : at + len(document)] = i + 1
        at += len(document)
    row[0, at:] = 5  # whatever stands in the padding
    logits = np.asarray(jax.jit(pair.model.apply)(pair.params, row, segments))
    assert np.isfinite(logits).all()
    at = 0
    for document in documents:
        theirs = pair.torch_outputs(document[None]).logits.numpy()
        np.testing.assert_allclose(logits[:, at : at + len(document)], theirs, atol=1e-4, rtol=0)
        at += len(document)


def test_query_blocks_change_no_number():
    """Attention in blocks of queries, the last one shorter, against the whole square."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 150, 3, 8)), jnp.float32) for _ in range(3))
    segments = jnp.asarray([[1] * 70 + [2] * 75 + [0] * 5, [1] * 150])
    for window in (None, 16):
        mask = attention_mask(segments, window)
        whole = jnp.einsum("bhlm,bmhk->blhk", attention_map(q, k, mask), v)
        blocks = attend(q, k, v, mask)
        np.testing.assert_allclose(blocks[0, :145], whole[0, :145], atol=1e-5)
        np.testing.assert_allclose(blocks[1], whole[1], atol=1e-5)
        assert np.isfinite(blocks).all()


def test_sliding_mask_of_a_packed_row():
    mask = attention_mask(jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]]), window=3)
    literal = [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(mask[0].astype(int), literal)


def test_full_mask_of_a_packed_row():
    mask = attention_mask(jnp.asarray([[1, 1, 1, 2, 2, 0]]))
    literal = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(mask[0].astype(int), literal)


def test_positions_restart_with_each_segment():
    positions = segment_positions(jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]]))
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]])


TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
OURS = {
    "gemma3_text": TINY | {"num_hidden_layers": 2, "head_dim": 8, "sliding_window": 4},
    "llama": TINY | {"num_hidden_layers": 2},
}


@pytest.fixture(scope="module", params=OURS)
def ours(request):
    """A model of ours and its initial parameters."""
    model = model_from_config({"model_type": request.param} | OURS[request.param])
    return model, jax.jit(model.init, static_argnums=1)(jax.random.key(0), "float32")


def test_init_is_calm_and_shaped_as_promised(ours):
    model, params = ours
    abstract = model.abstract_params()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    ranks = jax.tree.map(len, model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, abstract)
    kernels = params["layers"]["attention"]["q"]
    assert not np.array_equal(kernels[0], kernels[1])  # layers are drawn apart
    tokens = np.random.default_rng(0).integers(0, 64, (3, 40), dtype=np.int32)
    log_p = jax.nn.log_softmax(jax.jit(model.apply)(params, tokens))
    cross_entropy = -jnp.mean(jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1))
    assert abs(cross_entropy - np.log(64)) < 1.0


def test_bfloat16_stays_bfloat16_and_near_float32(ours):
    model, params = ours
    tokens = np.random.default_rng(0).integers(0, 64, (3, 40), dtype=np.int32)
    hidden = jax.jit(model.hidden)
    half = hidden(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), tokens)
    assert half.dtype == jnp.bfloat16
    assert float(jnp.abs(half.astype(jnp.float32) - hidden(params, tokens)).mean()) < 0.02


def test_given_positions_replace_the_index_within_the_segment(ours):
    model, params = ours
    tokens = np.random.default_rng(0).integers(0, 64, (3, 40), dtype=np.int32)
    hidden = jax.jit(model.hidden)
    index = jnp.broadcast_to(jnp.arange(40)[None], (3, 40))
    plain = hidden(params, tokens)
    np.testing.assert_allclose(hidden(params, tokens, positions=index), plain, atol=1e-5)
    assert np.abs(hidden(params, tokens, positions=3 * index) - plain).max() > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_padding_gives_zero_maps_and_finite_gradients_with_remat_or_without(ours, remat):
    model, params = ours
    tokens = np.random.default_rng(0).integers(0, 64, (3, 40), dtype=np.int32)
    segments = jnp.asarray([[1] * 20 + [2] * 12 + [0] * 8, [1] * 40, [0] * 40])  # the last is padding alone

    def loss(params, remat):
        hidden, maps = model.hidden(params, tokens, segment_ids=segments, remat=remat, attention_layers=(1,))
        return jnp.sum(hidden**2) + jnp.sum(maps[1] ** 2), maps[1]

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (kept, maps), (again, _) = grad(params, "none"), grad(params, remat)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(maps.sum(-1)[0, :, :32], 1.0, atol=1e-5)
    assert (maps[0, :, 32:] == 0).all() and (maps[2] == 0).all()
    assert (maps[0, :, 20:32, :20] == 0).all()


def test_shapes_bind_as_annotated(ours):
    """Whatever B, L, D and V are, they are the same on both sides of a call."""
    model, params = ours
    tokens = jnp.zeros((3, 9), jnp.int32)
    hidden, maps = jax.eval_shape(functools.partial(model.hidden, attention_layers=(1,)), params, tokens)
    logits = jax.eval_shape(model.apply, params, tokens)
    with jaxtyped("context"):
        assert isinstance(tokens, Int[Array, "B L"])
        assert isinstance(hidden, Float[jax.ShapeDtypeStruct, "B L D"])
        assert isinstance(maps[1], Float[jax.ShapeDtypeStruct, "B H L L"])
        assert isinstance(model.unembedding(params), Float[Array, "V D"])
        assert isinstance(logits, Float[jax.ShapeDtypeStruct, "B L V"])


def test_attention_layer_out_of_range_is_refused(ours):
    model, params = ours
    with pytest.raises(UserError, match="numbered 0 to 1"):
        model.hidden(params, jnp.zeros((1, 4), jnp.int32), attention_layers=(2,))


def test_ids_beyond_the_text_vocabulary_cannot_be_predicted():
    config = Gemma3Config(
        vocab_size=262_208, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    assert config.text_vocab_size == 262_144
    model = Gemma3(config)
    logits = jax.jit(lambda key: model.apply(model.init(key), jnp.asarray([[2, 262_144]])))(jax.random.key(0))
    assert (logits[..., 262_144:] == np.finfo(np.float32).min).all()
    assert (jnp.abs(logits[..., :262_144]) < 100).all()


@pytest.mark.parametrize("model_type", OURS)
def test_rows_beyond_the_tokenizer_are_kept_and_in_no_softmax(model_type, tmp_path):
    """Vocabularies are padded for the hardware; only the tokenizer knows."""
    model = model_from_config({"model_type": model_type} | OURS[model_type] | {"eos_token_id": 3})
    params = jax.jit(model.init)(jax.random.key(0))
    told = model.with_tokenizer(60)
    assert (told.config.text_vocab_size, told.config.vocab_size) == (60, 64) and told != model
    assert "tokenizer_size" not in told.config.to_hf()
    tokens = np.random.default_rng(0).integers(0, 60, (1, 9), dtype=np.int32)
    logits = jax.jit(told.apply)(params, tokens)
    assert (logits[..., 60:] == np.finfo(np.float32).min).all()
    np.testing.assert_array_equal(logits[..., :60], jax.jit(model.apply)(params, tokens)[..., :60])
    again, stored = load_pretrained(save_pretrained(told, params, tmp_path / "model"))
    assert again == model  # config.json does not say it
    np.testing.assert_array_equal(stored["embedding"], params["embedding"])
    labels, weights = jnp.asarray(tokens), jnp.ones((1, 9))

    def bits(m):
        objective = Objective(m, "teacher", block=4)
        batch = {f"teacher_{name}": values for name, values in (
            ("tokens", labels), ("targets", labels), ("weights", weights), ("segment_ids", jnp.ones_like(labels)),
            ("positions", jnp.arange(9)[None]),
        )}  # fmt: skip
        return Loss(objective)({"model": params}, Frozen(jnp.ones(1)), batch, 0)[0]

    log_p = jax.nn.log_softmax(logits[..., :60].astype(jnp.float32))
    want = -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1))
    np.testing.assert_allclose(bits(told), want, rtol=1e-5)
    assert bits(model) > bits(told)


def test_defaults_are_those_of_transformers():
    """Released files leave out what equals a default of transformers."""
    for ours, theirs in (
        (Gemma3Config(), transformers.Gemma3TextConfig()),
        (LlamaConfig(), transformers.LlamaConfig()),
    ):
        written = ours.to_hf()
        # this one key is ours to fill: transformers leaves it out where it is "default"
        assert {key: getattr(theirs, key) for key in written} == written


def test_models_of_equal_configs_are_equal():
    """So a model can be a static argument of jit without compiling twice."""
    one, other = (Llama(LlamaConfig(**OURS["llama"])) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != Llama(LlamaConfig(**OURS["llama"], rms_norm_eps=1e-3))


BAD_CONFIGS = {
    "model_type 'mamba'": {"model_type": "mamba"},
    "model_type None": {},
    "hidden_act": {"model_type": "llama", "hidden_act": "gelu"},
    "quantization_config": {"model_type": "llama", "quantization_config": {"bits": 4}},
    "rope_type 'yarn'": {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "needs 'low_freq_factor'": {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
    "partial_rotary_factor": {"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}},
    "num_hidden_layers": {"model_type": "llama", "num_hidden_layers": 0},
    "no multiple of num_key_value_heads": {"model_type": "llama", "num_key_value_heads": 3},
    "head_dim 5": {"model_type": "llama", "head_dim": 5},
    "final_logit_softcapping": {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
    "use_bidirectional_attention": {"model_type": "gemma3_text", "use_bidirectional_attention": True},
    "layer_types has 1 entries": {"model_type": "gemma3_text", "layer_types": ["full_attention"]},
    "'chunked'": {"model_type": "gemma3_text", "num_hidden_layers": 1, "layer_types": ["chunked"]},
    "sliding_window": {"model_type": "gemma3_text", "sliding_window": None},
    "nested": {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}},
}


@pytest.mark.parametrize("named", BAD_CONFIGS)
def test_config_that_cannot_be_computed_is_refused(named):
    with pytest.raises(UserError, match=named):
        model_from_config(BAD_CONFIGS[named])

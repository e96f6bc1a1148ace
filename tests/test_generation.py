"""Generation writes what transformers writes, whatever the batch, the window and the mesh; draws follow the seed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from test_models import SIZES, TORCH_CONFIGS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import distil_jax as dj
from distil_jax.errors import UserError
from distil_jax.generation import Sampling, complete, engine, generate, sampling, stream, text
from distil_jax.models import cache, load_pretrained
from distil_jax.sharding import make_mesh, param_shardings

pytestmark = pytest.mark.usefixtures("quickly_compiled")

V = SIZES["vocab_size"]
LENGTHS = (3, 17, 1, 30)  # prompts shorter and longer than the window of 8


def random_pair(name, directory):
    """(torch model, ours, parameters): random weights that do not settle into repeating one token."""
    torch.manual_seed(1)
    torch_model = transformers.AutoModelForCausalLM.from_config(TORCH_CONFIGS[name]).eval()
    for weight, parameter in torch_model.named_parameters():
        at = 1.0 if "norm" in weight and name != "gemma" else 0.0
        std = 0.05 if "embed" in weight else 0.3  # a tied head would answer each token with itself
        parameter.data = at + std * torch.randn_like(parameter)
    torch_model.save_pretrained(directory)
    return torch_model, *load_pretrained(directory)


@pytest.fixture(scope="module", params=["gemma", "llama_biases"])
def pair(request, tmp_path_factory):
    return random_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """(model, parameters) with layers of both kinds, tied."""
    return random_pair("gemma", tmp_path_factory.mktemp("gemma"))[1:]


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, V, length).astype(np.int32) for length in LENGTHS]


def theirs(torch_model, prompts, new_tokens):
    """Greedy ids of transformers, all prompts in one batch."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    out = torch_model.generate(
        tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[:, longest:].numpy()


def ours(model, params, prompts, new_tokens, how=text.GREEDY, **options):
    steps = engine.steps(model, params, prompts, max_new_tokens=new_tokens, sampling=how, **options)
    return np.stack(list(steps), axis=1)


def test_greedy_tokens_are_those_of_transformers(pair, prompts):
    """Unequal prompts in one batch, on to far beyond the sliding window."""
    torch_model, model, params = pair
    want = theirs(torch_model, prompts, 40)
    assert len(np.unique(want)) > 20  # text that says something
    np.testing.assert_array_equal(ours(model, params, prompts, 40), want)


def test_every_decoded_state_is_that_of_the_whole_text(pair, prompts):
    _, model, params = pair
    rng = np.random.default_rng(1)
    lengths = np.array([20, 9], np.int32)
    text = rng.integers(3, V, (2, 45)).astype(np.int32)
    start = 20 - lengths
    tokens = np.zeros((2, 20), np.int32)
    for row in range(2):
        tokens[row, start[row] :] = text[row, : lengths[row]]
    prefill = jax.jit(functools.partial(cache.prefill, model, capacity=50))
    decode = jax.jit(functools.partial(cache.decode, model))
    whole = jax.jit(model.hidden)(params, text)
    hidden, stored = prefill(params, tokens, start)
    for step in range(24):
        for row in range(2):
            np.testing.assert_allclose(hidden[row], whole[row, lengths[row] - 1 + step], atol=1e-4)
        hidden, stored = decode(params, stored, text[np.arange(2), lengths + step])


def test_a_sliding_layer_keeps_its_window_alone(pair):
    _, model, _ = pair
    params = model.abstract_params("bfloat16")
    _, stored = jax.eval_shape(
        functools.partial(cache.prefill, model, capacity=64), params, np.zeros((3, 20), np.int32), np.zeros(3, np.int32)
    )
    c = model.config
    kinds, kind_of_layer = model.layer_kinds()
    for kind, keys in enumerate(stored.keys):
        T = 64 if kinds[kind].window is None else 8
        assert keys.shape == (kind_of_layer.count(kind), 3, c.num_key_value_heads, T, c.head_dim)
        assert keys.dtype == jnp.bfloat16


def test_a_sharded_model_writes_the_same(pair, prompts):
    _, model, params = pair
    placed = jax.device_put(params, param_shardings(model, make_mesh(data=2, fsdp=2, tensor=2)))
    np.testing.assert_array_equal(ours(model, placed, prompts, 12), ours(model, params, prompts, 12))


def test_a_cache_that_cannot_hold_the_prompt_is_refused(gemma):
    model, params = gemma
    with pytest.raises(ValueError, match="cannot hold"):
        cache.prefill(model, params, np.zeros((1, 9), np.int32), np.zeros(1, np.int32), 8)


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 400])
def test_top_k_keeps_what_transformers_keeps(k):
    logits = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32)
    logits[0, :9] = logits[0].max() + 1  # ties at the top
    logits[1] -= 100  # all negative
    warped = transformers.TopKLogitsWarper(k)(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(sampling.top_k(jnp.asarray(logits.T), k).T, np.isfinite(warped))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(p):
    logits = (3 * np.random.default_rng(0).normal(size=(6, 300))).astype(np.float32)
    warped = transformers.TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(sampling.top_p(jnp.asarray(logits.T), p).T, np.isfinite(warped))


def test_draws_have_the_frequencies_of_the_softmax():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05, 0.0]))
    draws = 20_000
    keys = jax.vmap(jax.random.key)(jnp.arange(draws))
    many = jnp.tile(logits[:, None], (1, draws))
    counts = lambda how: np.bincount(sampling.choose(many, how, keys, 0), minlength=5) / draws  # noqa: E731
    np.testing.assert_allclose(counts(Sampling(temperature=1.0)), [0.5, 0.3, 0.15, 0.05, 0], atol=0.015)
    sharp = np.array([0.5, 0.3, 0.15, 0.05, 0.0]) ** 2
    np.testing.assert_allclose(counts(Sampling(temperature=0.5)), sharp / sharp.sum(), atol=0.015)
    np.testing.assert_allclose(counts(Sampling(temperature=1.0, top_k=2)), [0.625, 0.375, 0, 0, 0], atol=0.015)
    np.testing.assert_allclose(
        counts(Sampling(temperature=1.0, top_p=0.9)), np.array([50, 30, 15, 0, 0]) / 95, atol=0.015
    )


def test_draws_follow_the_seed_and_the_place_and_not_the_batch(gemma, prompts):
    model, params = gemma
    how = Sampling(temperature=1.0, top_p=0.95, seed=3)
    together = ours(model, params, prompts, 10, how)
    np.testing.assert_array_equal(ours(model, params, prompts, 10, how), together)
    np.testing.assert_array_equal(ours(model, params, prompts[1:2], 10, how, places=[1])[0], together[1])
    assert (ours(model, params, prompts, 10, Sampling(temperature=1.0, top_p=0.95, seed=4)) != together).any()
    same = ours(model, params, [prompts[0]] * 4, 10, how)
    assert len({tuple(row) for row in same.tolist()}) == 4  # equal prompts are drawn apart


def test_ids_beyond_the_vocabulary_are_never_chosen(gemma, prompts):
    model, params = gemma
    params = params | {"embedding": params["embedding"].at[90:].mul(100.0)}  # large scores for the padding rows
    for how in (Sampling(), Sampling(temperature=5.0)):
        steps = engine.steps(model.with_tokenizer(90), params, prompts, max_new_tokens=8, sampling=how)
        assert all((tokens < 90).all() for tokens in steps)


@pytest.mark.parametrize(
    "wrong, named", [({"temperature": -1.0}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p")]
)
def test_sampling_that_makes_no_sense_is_refused(wrong, named):
    with pytest.raises(UserError, match=named):
        Sampling(**wrong)


# ---- text -----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|start|>{{ m['role'] }} {{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


def byte_tokenizer(template=None):
    """A byte-level tokenizer without merges (ids 3 to 258) and with three control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "<|eot_id|>", "<|start|>"]
    vocab = {text: i for i, text in enumerate(names + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(names)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=template)


@pytest.fixture(scope="module")
def talker():
    """A small random Llama over bytes: (model, params, tokenizer)."""
    from distil_jax.models import model_from_config

    fields = dict(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = model_from_config({"model_type": "llama"} | fields)
    return model, jax.jit(model.init)(jax.random.key(0)), byte_tokenizer(TEMPLATE)


def with_stop(model, ids):
    from distil_jax.models import model_from_config

    return model_from_config(model.config.to_hf() | {"model_type": "llama", "eos_token_id": ids})


def test_completions_come_in_the_order_of_the_prompts_in_any_batches(talker):
    prompts = ["a", "bb " * 20, "ccc", "d" * 50, "ee"]
    texts = generate(*talker, prompts, max_new_tokens=6)
    assert texts == generate(*talker, prompts, max_new_tokens=6, batch_size=2)
    assert texts == [generate(*talker, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert len(set(texts)) > 1


def test_an_answer_ends_at_any_of_the_stop_ids(talker):
    model, params, tokenizer = talker
    (free,) = complete(*talker, ["Once"], max_new_tokens=12)
    assert len(free.tokens) == 12 and not free.stopped
    stop = free.tokens[4]
    (ended,) = complete(with_stop(model, [299, stop]), params, tokenizer, ["Once"], max_new_tokens=12)
    assert ended.stopped and ended.tokens == free.tokens[: free.tokens.index(stop)]
    both = complete(with_stop(model, [299, stop]), params, tokenizer, ["Once", "Twice upon"], max_new_tokens=12)
    assert both[0] == ended  # and the other prompt of the batch goes on


def test_streamed_pieces_are_the_text_and_whole_characters(talker):
    model, params, tokenizer = talker
    prompt = "wähle 2 µg 😀"
    for how in (Sampling(), Sampling(temperature=1.5, seed=1)):
        pieces = list(stream(*talker, prompt, max_new_tokens=40, sampling=how))
        assert "".join(pieces) == generate(*talker, [prompt], max_new_tokens=40, sampling=how)[0]
        assert len(pieces) > 3


def test_a_chat_is_rendered_by_the_template_and_ends_with_the_turn(talker):
    model, params, tokenizer = talker
    conversation = [{"role": "user", "content": "hello"}]
    rendered = tokenizer("<|start|>user hello<|eot_id|><|start|>assistant ", add_special_tokens=False)["input_ids"]
    (tokens,) = ours(model.with_tokenizer(259), params, [np.asarray(rendered, np.int32)], 8).tolist()
    (chat,) = complete(*talker, ["hello"], max_new_tokens=8, chat=True)
    assert chat.tokens == tokens and 1 not in tokens  # id 1 is <|eot_id|>
    to_end = params | {"lm_head": params["lm_head"].at[1].set(10 * params["lm_head"][tokens[3]])}
    (ended,) = complete(model, to_end, tokenizer, ["hello"], max_new_tokens=8, chat=True)
    assert ended.stopped and len(ended.tokens) < 8
    assert not complete(model, to_end, tokenizer, ["hello"], max_new_tokens=8)[
        0
    ].stopped  # it means nothing in raw text
    assert complete(*talker, [conversation], max_new_tokens=8)[0] == chat
    assert complete(*talker, ["hello"], max_new_tokens=8)[0] != chat


def test_what_cannot_be_continued_is_refused(talker):
    model, params, tokenizer = talker
    refused = functools.partial(generate, model, params)
    with pytest.raises(UserError, match="no prompt"):
        refused(tokenizer, [])
    with pytest.raises(UserError, match="is empty"):
        refused(tokenizer, ["a", "  "])
    with pytest.raises(UserError, match="longer than the context of 256"):
        refused(tokenizer, ["a" * 250], max_new_tokens=20)
    with pytest.raises(UserError, match="max_new_tokens"):
        refused(tokenizer, ["a"], max_new_tokens=0)
    with pytest.raises(UserError, match="no chat template"):
        refused(byte_tokenizer(), ["a"], chat=True)
    with pytest.raises(UserError, match="does not take this conversation: no tools here"):
        refused(tokenizer, [[{"role": "tool", "content": "x"}]])
    assert dj.generate is generate

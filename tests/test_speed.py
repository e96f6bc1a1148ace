"""How fast models write: one protocol for all, in turns, and what is counted."""

import itertools
import json

import jax
import numpy as np
import pytest

from distil_jax import cli
from distil_jax.errors import UserError
from distil_jax.eval import speed
from distil_jax.eval.speed import Protocol
from distil_jax.generation import engine
from distil_jax.models import model_from_config, save_pretrained

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SMALL = dict(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def models():
    made = [model_from_config({"model_type": "llama", **SMALL, "num_hidden_layers": n}) for n in (1, 2)]
    return {f"of {n}": (model, jax.jit(model.init)(jax.random.key(n))) for n, model in enumerate(made, 1)}


def test_models_take_turns_and_what_is_counted_is_what_they_made(models, monkeypatch):
    asked, real = [], engine.steps

    def watched(model, params, prompts, **options):
        made = real(model, params, prompts, **options)
        asked.append((model.config.num_hidden_layers, [len(p) for p in prompts], 0))
        for tokens_B in made:
            asked[-1] = (*asked[-1][:2], asked[-1][2] + len(tokens_B))
            yield tokens_B

    monkeypatch.setattr(engine, "steps", watched)
    found = speed.measure(models, Protocol(prompt_tokens=7, new_tokens=5, batch=2, turns=3, warm_up=1))
    assert [layers for layers, _, _ in asked] == [2, 1, 1, 2, 2, 1, 1, 2]  # the first two are the warm-up
    assert all(lengths == [7, 7] and made == 10 for _, lengths, made in asked)  # no answer was ended early
    for of_model in found["models"].values():
        seconds = of_model["seconds"]
        assert {len(turns) for turns in seconds.values()} == {3}
        assert np.array(seconds["prefill"]) + seconds["decode"] == pytest.approx(seconds["whole"], abs=3e-6)
        for part, tokens in (("prefill", 14), ("decode", 8), ("whole", 10)):
            assert of_model["tokens_per_second"][part] == pytest.approx(tokens / np.median(seconds[part]), rel=0.01)
    assert found["models"]["of 2"]["parameters"] > found["models"]["of 1"]["parameters"]
    assert found["against"] == "of 1" and list(found["ratios"]) == ["of 2"]


def test_a_ratio_and_its_interval():
    slow, fast = [2.0, 2.2, 8.0], [1.0, 1.1, 4.0]
    found = speed.ratio(slow, fast)
    assert found["value"] == pytest.approx(2) and found["interval"] == pytest.approx([2, 2])  # paired: always double
    other = speed.ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    medians = sorted(np.median(drawn) for drawn in itertools.product([1.0, 2.0, 3.0], repeat=3))
    assert other["value"] == 2 and other["interval"] == pytest.approx([medians[0], medians[-1]])


def test_a_protocol_that_measures_nothing_is_refused(models):
    for wrong, said in ((Protocol(new_tokens=1), "new-tokens is 1"), (Protocol(turns=0), "turns"),
                        (Protocol(warm_up=0), "warm-up is 0"), (Protocol(60, 5), "context of 64")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            speed.measure(models, wrong)


def test_the_command_compares_directories(models, tmp_path, capsys):
    paths = [str(save_pretrained(*models[f"of {n}"], tmp_path / f"model{n}")) for n in (1, 2)]
    out = tmp_path / "speed.json"
    few = ["--prompt-tokens", "7", "--new-tokens", "5", "--batch", "2", "--turns", "2"]
    assert cli.main(["speed", *paths, *few, "--out", str(out)]) == 0
    found, told = json.loads(out.read_text()), capsys.readouterr().out
    assert found["protocol"] == {"prompt_tokens": 7, "new_tokens": 5, "batch": 2, "turns": 2, "warm_up": 1}
    assert list(found["models"]) == ["model1", "model2"] and "times as fast" in told and "of 2 turns" in told
    assert cli.main(["speed", paths[0], paths[0]]) == 2
    assert cli.main(["speed", paths[0], "--turns", "0"]) == 2
    assert "given twice" in capsys.readouterr().err

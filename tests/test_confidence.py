"""How sure a model is of the next token: from whole logits, on meshes too, with intervals over documents."""

import jax
import numpy as np
import pytest

from distil_jax import sharding
from distil_jax.eval import confidence, statistics
from distil_jax.models import hub

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SIZES = {"model_type": "llama", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def model():
    model = hub.model_from_config(SIZES).with_tokenizer(40)  # eight rows of the vocabulary are no token
    params = jax.jit(model.init)(jax.random.key(0))
    # Rows that are no token would win if they counted, and logits are far enough apart to be sure of.
    head = params["lm_head"] * 6
    return model, params | {"lm_head": head.at[40:].set(50 * head[:8])}


@pytest.fixture(scope="module")
def batch():
    """Eight rows of 21 positions with two documents each and some padding."""
    rng = np.random.default_rng(0)
    segments = np.repeat([[1] * 9 + [2] * 10 + [0] * 2], 8, axis=0)
    positions = np.repeat([[*range(9), *range(10), 0, 0]], 8, axis=0)
    fields = {"tokens": rng.integers(0, 40, (8, 21)), "targets": rng.integers(0, 40, (8, 21))}
    fields |= {"weights": (rng.random((8, 21)) < 0.7) & (segments > 0), "positions": positions, "segment_ids": segments}
    made = {f"student_{name}": np.asarray(values, np.int32) for name, values in fields.items()}
    return made | {"document": np.asarray(2 * np.arange(8)[:, None] + (segments == 2), np.int32)}


@pytest.mark.parametrize("mesh", ["data:1", "data:2,fsdp:2,tensor:2"])
def test_confidence_is_the_largest_probability_of_whole_logits(model, batch, mesh, monkeypatch):
    monkeypatch.setattr(confidence, "AT_ONCE", 32)  # several blocks, the last one filled up
    model, params = model
    devices = jax.devices()[: 1 if mesh == "data:1" else 8]
    mesh = sharding.mesh_of(mesh, devices)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(model, mesh))
        found = confidence.gathered(
            confidence.make_surest(model, "student", mesh), placed, [batch, batch], "student", mesh
        )
    fields = [batch[f"student_{name}"] for name in ("tokens", "segment_ids", "positions")]
    p = np.asarray(jax.nn.softmax(jax.jit(model.apply)(params, *fields), axis=-1))
    at = batch["student_weights"] > 0
    assert found["confidence"] == pytest.approx(np.tile(p.max(-1)[at], 2), rel=1e-4)
    right = (p.argmax(-1) == batch["student_targets"])[at]
    assert (found["right"] == np.tile(right, 2)).all() and right.any()
    assert (found["document"] == np.tile(batch["document"][at], 2)).all()


def test_the_curve_and_its_error_are_those_of_the_statistics():
    rng = np.random.default_rng(1)
    sure = rng.random(600)
    right = rng.random(600) < sure**2  # too sure
    document = np.repeat(np.arange(60) * 7, 10)
    found = confidence.measure(sure, right, document, samples=400)
    curve = statistics.reliability(sure, right)
    assert found["ece"] == pytest.approx(statistics.ece(curve))
    for (count, confidence_b, accuracy, low, high), b in zip(found["curve"], curve, strict=True):
        assert (count, confidence_b) == (b.count, pytest.approx(b.confidence, abs=1e-5))
        assert low <= accuracy <= high and accuracy == pytest.approx(b.accuracy, abs=1e-5)
    assert found["accuracy"] == right.mean() and found["confidence"] == pytest.approx(sure.mean())
    assert found["ece_interval"][0] < found["ece"] < found["ece_interval"][1]


def test_intervals_know_that_tokens_of_a_document_go_together():
    """Each token ten times in its document: no more is known than of one, and the interval is as wide."""
    rng = np.random.default_rng(2)
    sure, document = np.full(200, 0.7), np.arange(200)
    right = rng.random(200) < 0.5
    once = confidence.measure(sure, right, document, samples=2000)["curve"][0]
    often = confidence.measure(*(np.repeat(x, 10) for x in (sure, right, document)), samples=2000)["curve"][0]
    assert often[0] == 10 * once[0] and often[3:] == once[3:]
    alone = confidence.measure(np.full(2000, 0.7), np.repeat(right, 10), np.arange(2000), samples=2000)["curve"][0]
    assert alone[4] - alone[3] < 0.5 * (once[4] - once[3])

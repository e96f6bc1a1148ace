"""How fast models write, under one protocol: same numbers of tokens, same machine, in turns.

A turn is a batch of prompts read (prefill: until the first new token has arrived) and continued (decode: the others),
with the engine that `generate` uses. Every model is warmed up first, so that nothing is compiled in a turn. The models
take turns, the order reversed each time, so that what slows the machine for a while slows all of them. Prompts are
random ids: the work does not depend on them, and no answer is ended early.

tokens are a model's own: where tokenizers differ, they are not the same amount of text.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from distil_jax.errors import UserError
from distil_jax.generation import engine
from distil_jax.generation.sampling import Sampling

PARTS = ("prefill", "decode", "whole")
SAMPLES = 2000  # bootstrap, of turns


class Protocol(NamedTuple):
    """Tokens of each prompt, new tokens of each, prompts at a time, measured turns of each model, turns before them."""

    prompt_tokens: int = 128
    new_tokens: int = 64
    batch: int = 1
    turns: int = 5
    warm_up: int = 1

    def check(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        least = {"prompt_tokens": 1, "new_tokens": 2, "batch": 1, "turns": 1, "warm_up": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise UserError(f"speed: {name.replace('_', '-')} is {getattr(self, name)}; give at least {number}")

    def tokens(self) -> dict[str, int]:
        """What is counted of each part: prompt tokens; new tokens but the first; all new tokens."""
        made = {"prefill": self.prompt_tokens, "decode": self.new_tokens - 1, "whole": self.new_tokens}
        return {part: n * self.batch for part, n in made.items()}


def measure(models: Mapping[str, tuple[Any, Any]], protocol: Protocol, *, against: str | None = None) -> dict[str, Any]:
    """Seconds and tokens per second of each (model, params) by its name, and how many times as fast as `against` (by
    default the first) the others are.

    Of each of "models": `{"parameters", "dtype", "tokens_per_second": {part: median}, "seconds": {part: [one a
    turn]}}`. Of each of "ratios": `{part: {"value", "interval"}}`, the ratio of the medians with a 95 % bootstrap over
    turns. Parts: prefill in prompt tokens a second, decode and whole (prefill too) in new tokens a second.

    Raises UserError for a protocol that measures nothing or does not fit a model's context.
    """
    protocol.check()
    for name, (model, _) in models.items():
        room, wanted = model.config.max_position_embeddings, protocol.prompt_tokens + protocol.new_tokens
        if wanted > room:
            raise UserError(
                f"speed of {name}: {protocol.prompt_tokens} prompt and {protocol.new_tokens} new tokens are more than "
                f"its context of {room}"
            )
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in models}
    for turn in range(-protocol.warm_up, protocol.turns):
        for name in list(models) if turn % 2 == 0 else list(models)[::-1]:
            taken = _turn(*models[name], protocol, max(turn, 0))
            if turn >= 0:
                for part, value in taken.items():
                    seconds[name][part].append(value)
    first = against if against is not None else next(iter(models))
    device = jax.devices()[0]
    return {
        "protocol": protocol._asdict(),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "against": first,
        "models": {
            name: {
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(models[name][1])),
                "dtype": str(jax.tree.leaves(models[name][1])[0].dtype),
                "tokens_per_second": {
                    part: protocol.tokens()[part] / float(np.median(values)) for part, values in of_model.items()
                },
                "seconds": {part: [round(value, 6) for value in values] for part, values in of_model.items()},
            }
            for name, of_model in seconds.items()
        },
        "ratios": {
            name: {part: ratio(seconds[first][part], of_model[part]) for part in PARTS}
            for name, of_model in seconds.items()
            if name != first
        },
    }


def ratio(slow: list[float], fast: list[float], samples: int = SAMPLES) -> dict[str, Any]:
    """How many times as fast: `median(slow) / median(fast)` with its interval. Turns are redrawn in pairs, as the two
    models took them one after the other."""
    slow_T, fast_T = np.asarray(slow), np.asarray(fast)
    drawn_SxT = np.random.default_rng(0).integers(0, len(slow_T), (samples, len(slow_T)))
    values = np.median(slow_T[drawn_SxT], axis=1) / np.median(fast_T[drawn_SxT], axis=1)
    return {
        "value": float(np.median(slow_T) / np.median(fast_T)),
        "interval": np.quantile(values, [0.025, 0.975]).tolist(),
    }


def _turn(model: Any, params: Any, protocol: Protocol, seed: int) -> dict[str, float]:
    """Seconds of one batch."""
    ids = np.random.default_rng(seed).integers(
        0, model.config.text_vocab_size, (protocol.batch, protocol.prompt_tokens), dtype=np.int32
    )
    started = time.perf_counter()
    steps = engine.steps(model, params, list(ids), max_new_tokens=protocol.new_tokens, sampling=Sampling())
    next(steps)
    read = time.perf_counter()
    for _ in steps:
        pass
    ended = time.perf_counter()
    return {"prefill": read - started, "decode": ended - read, "whole": ended - started}

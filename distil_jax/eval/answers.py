"""What a model answered to a task with choices: the log-likelihood of every choice, from which all scores follow.

A file of answers is JSON: `{"model": ..., "answers": [Answers.to_json(), ...]}`, one entry for each task and number of
shots. The items stand in the task's order, so the answers of two models to one task are paired by position; `ids` says
so, and pairing others is an error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from distil_jax.errors import UserError
from distil_jax.manifest import write_json_atomic


@dataclass(frozen=True)
class Answers:
    """One model's answers to one task.

    task: its name, as lm-evaluation-harness has it (mmlu_anatomy, medmcqa, ...). shots: examples before each question.
    ids: of the items. gold_I: the right choice of each. loglikelihood_IxC: nats of each choice after the context,
    summed over its tokens; -inf where an item has fewer choices. bytes_IxC: UTF-8 bytes of each choice, 0 there.
    """

    task: str
    shots: int
    ids: tuple[str, ...]
    gold_I: Int[np.ndarray, " I"]
    loglikelihood_IxC: Float[np.ndarray, "I C"]
    bytes_IxC: Int[np.ndarray, "I C"]

    def chosen(self, *, normalised: bool = False) -> Int[np.ndarray, " I"]:
        """The likeliest choice of each item; normalised: by nats a byte (acc_bytes)."""
        nats = self.loglikelihood_IxC
        return np.argmax(nats / np.maximum(self.bytes_IxC, 1) if normalised else nats, axis=1)

    def right(self, *, normalised: bool = False) -> Bool[np.ndarray, " I"]:
        """Whether the chosen one is the right one."""
        return self.chosen(normalised=normalised) == self.gold_I

    def probabilities(self) -> Float[np.ndarray, "I C"]:
        """Softmax of the log-likelihoods over the choices of an item; 0 where there is none."""
        shifted = self.loglikelihood_IxC - self.loglikelihood_IxC.max(axis=1, keepdims=True)
        mass = np.exp(shifted)
        return mass / mass.sum(axis=1, keepdims=True)

    def to_json(self) -> dict[str, Any]:
        items = [
            {"id": i, "gold": int(g), "loglikelihoods": nats[size > 0].tolist(), "bytes": size[size > 0].tolist()}
            for i, g, nats, size in zip(self.ids, self.gold_I, self.loglikelihood_IxC, self.bytes_IxC, strict=True)
        ]
        return {"task": self.task, "shots": self.shots, "items": items}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Answers":
        items = found["items"]
        widest = max((len(item["bytes"]) for item in items), default=0)
        nats = np.full((len(items), widest), -np.inf)
        size = np.zeros((len(items), widest), np.int64)
        for row, item in enumerate(items):
            nats[row, : len(item["bytes"])] = item["loglikelihoods"]
            size[row, : len(item["bytes"])] = item["bytes"]
        gold = np.array([item["gold"] for item in items], np.int64)
        return cls(found["task"], found["shots"], tuple(item["id"] for item in items), gold, nats, size)


def save(file: Path, model: str, answers: Sequence[Answers]) -> None:
    """Writes a file of answers."""
    write_json_atomic(file, {"model": model, "answers": [a.to_json() for a in answers]})


def load(file: Path) -> tuple[str, list[Answers]]:
    """(model, answers) of a file. Raises UserError for one that is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["model"], [Answers.from_json(a) for a in found["answers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no file of answers ({error}): `distil-jax evaluate` writes them") from error


def paired(one: Answers, other: Answers) -> None:
    """Raises UserError unless both answer the same items."""
    if (one.task, one.shots, one.ids) != (other.task, other.shots, other.ids):
        raise UserError(
            f"{one.task} at {one.shots} shots and {other.task} at {other.shots} have other items: answers are compared "
            "by the item, so score both models on the same files"
        )

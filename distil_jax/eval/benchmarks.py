"""One model's answers to tasks, and what they are worth.

acc: the share of items whose likeliest choice is the right one. acc_norm: likelihoods are divided by the characters of
the choice first, acc_bytes: by its bytes. exact_match: the share whose right choice is what the model would write,
greedily; for a task with a free answer, whose answer is one of the right texts. Definitions and names are those of
lm-evaluation-harness (docs/evaluation.md).
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from distil_jax.eval import bootstrap, own, records, tasks
from distil_jax.eval.answers import Answers, save
from distil_jax.eval.encoding import Encoder
from distil_jax.eval.prompts import DELIMITER, Item, items
from distil_jax.eval.scoring import Scorer
from distil_jax.eval.tasks import Task
from distil_jax.eval.until import generate_until
from distil_jax.metrics import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exam:
    """A task at a number of shots: its items, as every model gets them."""

    task: Task
    shots: int
    items: tuple[Item, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of every choice of every item."""
        return [(item.context, DELIMITER + choice) for item in self.items for choice in item.choices]


@dataclass(frozen=True)
class Result:
    """One model's result of an exam. answers: None for free answers, of which `written` are the texts."""

    task: str
    shots: int
    right: dict[str, np.ndarray]  # metric -> [I], 0 or 1
    chance: float
    answers: Answers | None
    written: tuple[tuple[str, str], ...] = ()  # (item's id, text)

    def facts(self, samples: int) -> dict[str, Any]:
        """Each metric with its 95 % interval over items, the number of items, and what guessing gets."""
        found: dict[str, Any] = {"task": self.task, "shots": self.shots, "items": len(next(iter(self.right.values())))}
        for metric, right_I in self.right.items():
            value, interval = bootstrap.ratio(right_I, np.ones(len(right_I)), samples=samples)
            found |= {metric: value, f"{metric}_interval": interval}
        return found | {"chance": self.chance}


def exams(names: Sequence[str], folder: str | Path | None, shots: Sequence[int], limit: int = 0) -> list[Exam]:
    """The items of every task of these names (tasks, groups, files) at every number of shots.

    folder: of local files, None for the hub. limit: items of each task, 0 for all. Raises UserError, before any model
    is read, for what is not there.
    """
    found = []
    for task in tasks.named(names, own.task_of)[0]:
        rows, examples = records.read(task, folder, limit=limit, shots=max(shots, default=0))
        for count in shots:
            found.append(Exam(task, count, tuple(items(task, rows, examples, count))))
    return found


def answer(
    exams: Sequence[Exam], model: Any, params: Any, tokenizer: Any, *, mesh: Mesh | None = None, label: str = ""
) -> list[Result]:
    """The model's results, in the order of the exams. tokenizer: of transformers. Logs what it took."""
    encoder = Encoder(tokenizer)
    scorer = Scorer(model, params, mesh=mesh)
    started = time.perf_counter()
    # All at once: rows of all exams fill the batches.
    pairs = [pair for exam in exams if not exam.task.generated for pair in exam.pairs]
    with Progress(len(pairs), label or "answers") as progress:
        scores = iter(scorer(encoder.requests(pairs), lambda done, tokens: progress.update(done, tokens=tokens)))
    results = [
        _written(exam, model, params, tokenizer, encoder) if exam.task.generated else _chosen(exam, scores)
        for exam in exams
    ]
    seconds, work = time.perf_counter() - started, scorer.work
    if work.requests:
        log.info(
            "%s: %d requests of %d tokens in %.1f s; %d tokens went through the model, in %d programs",
            label or "model", work.requests, work.asked, seconds, work.computed, len(work.shapes),
        )  # fmt: skip
    if work.cut:
        log.warning("%s: %d requests were longer than its %d tokens and lost their beginning",
                    label or "model", work.cut, scorer.max_length)  # fmt: skip
    return results


def _chosen(exam: Exam, scores: Any) -> Result:
    count, widest = len(exam.items), max(len(item.choices) for item in exam.items)
    nats = np.full((count, widest), -np.inf)
    size, characters = np.zeros((count, widest), np.int64), np.ones((count, widest), np.int64)
    gold = np.array([item.gold for item in exam.items], np.int64)
    greedy = np.zeros(count)
    for row, item in enumerate(exam.items):
        for column, choice in enumerate(item.choices):
            score = next(scores)
            nats[row, column] = score.nats
            size[row, column], characters[row, column] = len(choice.encode("utf-8", "surrogatepass")), len(choice)
            if column == item.gold:
                greedy[row] = score.greedy
    answers = Answers(exam.task.name, exam.shots, tuple(item.id for item in exam.items), gold, nats, size)
    right = {
        "acc": answers.right(),
        "acc_norm": np.argmax(nats / characters, axis=1) == gold,
        "acc_bytes": answers.right(normalised=True),
        "exact_match": greedy,
    }
    chance = float(np.mean([1 / len(item.choices) for item in exam.items]))
    return Result(
        exam.task.name, exam.shots, {k: np.asarray(v, np.float64) for k, v in right.items()}, chance, answers
    )


def _written(exam: Exam, model: Any, params: Any, tokenizer: Any, encoder: Encoder) -> Result:
    texts = generate_until(
        model, params, tokenizer, encoder.encode([item.context for item in exam.items]),
        until=exam.task.stop, max_new_tokens=exam.task.max_new_tokens,
    )  # fmt: skip
    right = [text.strip() in [gold.strip() for gold in item.gold] for text, item in zip(texts, exam.items, strict=True)]
    written = tuple((item.id, text) for item, text in zip(exam.items, texts, strict=True))
    return Result(exam.task.name, exam.shots, {"exact_match": np.array(right, np.float64)}, 0.0, None, written)


def keep(folder: Path, model: str, results: Sequence[Result]) -> None:
    """Writes answers/MODEL.json (answers.py) and, of tasks with free answers, written/MODEL.jsonl: a line an item."""
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    save(folder / "answers" / f"{model}.json", model, [r.answers for r in results if r.answers])
    free = [r for r in results if r.answers is None]
    if free:
        (folder / "written").mkdir(exist_ok=True)
        with (folder / "written" / f"{model}.jsonl").open("w", encoding="utf-8") as file:
            for r in free:
                for (name, text), right in zip(r.written, r.right["exact_match"], strict=True):
                    row = {"task": r.task, "shots": r.shots, "id": name, "text": text, "right": bool(right)}
                    print(json.dumps(row, ensure_ascii=False), file=file)


def summary(results: Sequence[Result], names: Sequence[str], samples: int) -> dict[str, Any]:
    """{"tasks": [facts of each result], "groups": [...]}: of a group its macro mean, in which every task counts alike,
    and its mean by size, in which every item does. Intervals redraw the items of each task."""
    groups = {name: tasks.GROUPS[name] for name in names if name in tasks.GROUPS}
    if not groups and len({r.task for r in results if r.answers}) > 1:
        groups = {"all": tuple(dict.fromkeys(r.task for r in results if r.answers))}
    made = []
    for name, members in groups.items():
        for shots in dict.fromkeys(r.shots for r in results):
            of = [r for r in results if r.task in members and r.shots == shots and r.answers]
            if not of:
                continue
            facts: dict[str, Any] = {"group": name, "shots": shots, "tasks": [r.task for r in of]}
            facts["items"] = sum(len(r.right["acc"]) for r in of)
            for metric in ("acc", "acc_norm"):
                means = [float(r.right[metric].mean()) for r in of]
                facts[f"{metric}_macro"] = float(np.mean(means))
                joined = np.concatenate([r.right[metric] for r in of])
                value, interval = bootstrap.ratio(joined, np.ones(len(joined)), samples=samples)
                facts |= {f"{metric}_by_size": value, f"{metric}_by_size_interval": interval}
                facts[f"{metric}_macro_interval"] = _macro_interval([r.right[metric] for r in of], samples)
            facts["chance"] = float(np.mean([r.chance for r in of]))
            made.append(facts)
    return {"tasks": [r.facts(samples) for r in results], "groups": made}


def _macro_interval(right: Sequence[np.ndarray], samples: int) -> list[float]:
    """95 % percentile interval of the mean of the tasks' means; the items of each task are redrawn."""
    rng = np.random.default_rng(0)
    # Redrawing n items of which a share p is right is a binomial draw.
    means = [rng.binomial(len(r), r.mean(), samples) / len(r) for r in right]
    low, high = np.quantile(np.mean(means, axis=0), [(1 - bootstrap.LEVEL) / 2, (1 + bootstrap.LEVEL) / 2])
    return [float(low), float(high)]

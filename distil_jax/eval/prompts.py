"""Records of a task to what a model is asked, as lm-evaluation-harness writes it.

A prompt is the description, then examples with their answers, then the question; a choice follows the delimiter " ".
Drawn examples come from Python's generator with the harness's seed, in the order of the items: both draw the same ones.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distil_jax.errors import UserError
from distil_jax.eval.tasks import Record, Task

DELIMITER, BETWEEN = " ", "\n\n"  # before an answer; after an example
SEED = 1234  # of the harness's draws


@dataclass(frozen=True)
class Item:
    """A question as a model sees it. choices: without the delimiter, none for a free answer. gold: as `Task.gold`.

    id: its place and a hash of its text: the answers of two models pair only if both were asked the same.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    gold: int | tuple[str, ...]


def items(task: Task, records: Sequence[Record], examples: Sequence[Record], shots: int) -> Iterator[Item]:
    """The items of a task. `records` begin where the split does: draws of examples depend on an item's place.

    Raises UserError if there are fewer examples than shots, and for a record that is no item.
    """
    if shots > len(examples):
        raise UserError(f"{task.name}: {shots} shots, and its {task.shots_split} split has {len(examples)} examples")
    draw = random.Random(SEED)
    for number, record in enumerate(records):
        chosen = examples[:shots] if task.order == "first" else draw.sample(examples, shots) if shots else ()
        before = ""
        for example in chosen:
            question, choices, gold = _parts(task, example)
            before += f"{question}{DELIMITER}{choices[gold] if task.choices else gold[0]}{BETWEEN}"
        question, choices, gold = _parts(task, record)
        text = "\0".join([question, *choices]).encode("utf-8", "surrogatepass")
        name = f"{number}:{hashlib.sha256(text).hexdigest()[:8]}"
        yield Item(name, task.description + before + question, choices, gold)


def _parts(task: Task, record: Record) -> tuple[str, tuple[str, ...], int | tuple[str, ...]]:
    """(context, choices, gold) of a record. Raises UserError naming its file, row and what is wrong."""
    where = getattr(record, "where", "a record")
    try:
        for column in task.columns:
            record[column]
        question, gold = task.context(record), task.gold(record)
        choices = tuple(task.choices(record)) if task.choices else ()
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, SyntaxError) as error:
        raise UserError(
            f"{where}: not an item of {task.name} ({type(error).__name__}: {error}); its columns are "
            f"{', '.join(task.columns)}"
        ) from error
    if task.choices and not 0 <= gold < len(choices):
        raise UserError(f"{where}: the answer is choice {gold} of {len(choices)}, counted from 0; mend the row")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise UserError(f"{where}: a choice is empty or no text; mend the row")
    return question, choices, gold

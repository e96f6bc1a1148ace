"""Med-HALT-style probes of a multiple-choice task: does a model notice that no choice is right, or that a question is
none?

Made from items that a user has, `{"id", "question", "choices": [...], "gold": int}`, and scored as any task is. After
the reasoning tests of Med-HALT (Pal et al. 2023, arXiv 2307.15343):

none_of_the_above: the right choice gives way to "None of the above", in its place, which then is right. As there.
false_question: a question that cannot be answered; right is "I do not know". There such questions were written by
    experts and by GPT-3.5; here a question gets the choices of another item, none of which answers it, so that any file
    will do. Files of written false questions need no probe: they are a task of their own.

`distil-jax probes FILE` writes them beside a user's file, as files that `evaluate --tasks` takes.

Each probe comes with a control of the same form in which the added choice is wrong. The two are read together: a model
that always takes the added words has all of the probe right and none of the control.
"""

import random
from collections.abc import Sequence
from typing import Any

from distil_jax.errors import UserError

NONE_OF_THE_ABOVE = "None of the above"
DO_NOT_KNOW = "I do not know"
WRONG = -0.25  # points; a right answer has 1 (Med-HALT's pointwise score, after the marking of the exams)

Item = dict[str, Any]


def none_of_the_above(items: Sequence[Item]) -> list[Item]:
    """Each item with its right choice replaced. Raises UserError naming an item that is none, or has the words."""
    found = []
    for item in map(_checked, items):
        choices = list(item["choices"])
        choices[item["gold"]] = _new(item, NONE_OF_THE_ABOVE)
        found.append(item | {"choices": choices})
    return found


def none_of_the_above_control(items: Sequence[Item], seed: int = 0) -> list[Item]:
    """Each item with a wrong choice replaced by the same words: the right one is there. Raises UserError as above."""
    found = []
    for item in map(_checked, items):
        choices = list(item["choices"])
        wrong = [n for n in range(len(choices)) if n != item["gold"]]
        choices[random.Random(f"{seed} {item['id']}").choice(wrong)] = _new(item, NONE_OF_THE_ABOVE)
        found.append(item | {"choices": choices})
    return found


def false_question(items: Sequence[Item], seed: int = 0) -> list[Item]:
    """Each question with the choices of another item and "I do not know", which is right.

    The other item shares no choice with this one; which it is depends on the seed and the ids. Raises UserError naming
    an item that is none, or for which there is no other.
    """
    items = [_checked(item) for item in items]
    found = []
    for item in items:
        own = {_same(choice) for choice in item["choices"]}
        others = list(range(len(items)))
        random.Random(f"{seed} {item['id']}").shuffle(others)
        # Any choice in common, its right one above all, could answer the question.
        other = next((items[n] for n in others if not own & {_same(choice) for choice in items[n]["choices"]}), None)
        if other is None:
            raise UserError(f"item {item['id']!r}: every other item shares a choice with it, so none makes it false")
        choices = [*other["choices"], _new(item, DO_NOT_KNOW)]
        found.append(item | {"choices": choices, "gold": len(choices) - 1})
    return found


def false_question_control(items: Sequence[Item]) -> list[Item]:
    """Each item as it is, with "I do not know" after its choices. Raises UserError as above."""
    return [item | {"choices": [*item["choices"], _new(item, DO_NOT_KNOW)]} for item in map(_checked, items)]


# Name of a task's probe: TASK_NAME. A probe and its control stand one after the other.
PROBES = {
    "none_of_the_above": none_of_the_above,
    "none_of_the_above_control": none_of_the_above_control,
    "false_question": false_question,
    "false_question_control": false_question_control,
}


def is_probe(task: str) -> bool:
    """Whether a task's name is that of a probe."""
    return any(task.endswith(f"_{name}") for name in PROBES)


def points(right: Sequence[bool]) -> float:
    """Med-HALT's pointwise score: the mean of 1 for a right answer and -0.25 for a wrong one."""
    return sum(1.0 if r else WRONG for r in right) / len(right)


def _checked(item: Item) -> Item:
    choices, gold = item.get("choices"), item.get("gold")
    if not isinstance(choices, (list, tuple)) or len(choices) < 2 or type(gold) is not int:
        raise UserError(f"item {item.get('id')!r}: a probe needs two choices or more and gold, the number of the right")
    if not 0 <= gold < len(choices):
        raise UserError(f"item {item.get('id')!r}: gold is {gold}, but there are {len(choices)} choices, from 0 on")
    return item


def _new(item: Item, words: str) -> str:
    """The words, which no choice of the item may be already: the right answer would be unclear."""
    if _same(words) in {_same(choice) for choice in item["choices"]}:
        raise UserError(f"item {item['id']!r} has a choice {words!r} already: leave it out of the probe")
    return words


def _same(choice: Any) -> str:
    return " ".join(str(choice).lower().split()).rstrip(".")

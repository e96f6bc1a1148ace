"""A task of the user's own: a file of questions, or a TOML or JSON file that says how to read one.

    name = "ward_exam"
    file = "exam.jsonl"          # beside this file; .jsonl, .json, .parquet or .csv
    format = "letters"           # or "answers", or "generate"
    shots_file = "examples.jsonl"
    description = "The following are questions about the ward.\\n\\n"
    max_new_tokens = 16          # of "generate"; its answer ends at `stop`
    stop = ["\\n"]

Rows have `question`, `choices` (a list; in CSV as JSON) and `answer`: the number of the right choice from 0,
its letter, or its text. "letters" lists the choices and scores the letters, as MMLU does; "answers" scores the choices
themselves after the question, as HeadQA does; "generate" has no choices, and what the model writes must be `answer`, a
text or a list of texts that are right.
"""

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distil_jax.errors import UserError, nearest
from distil_jax.eval.tasks import LETTERS, Record, Task, lettered

FORMATS = ("letters", "answers", "generate")
_KEYS: dict[str, type] = {
    **dict.fromkeys(("name", "file", "format", "shots_file", "description"), str),
    **{"max_new_tokens": int, "stop": list},
}


def task_of(name: str) -> Task:
    """The task of a file. Raises UserError that names the file and the key."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"task file {path} does not exist")
    if path.suffix in (".jsonl", ".csv", ".parquet"):
        return _task(path, {"file": path.name})
    try:
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no {path.suffix[1:].upper()} ({error})") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: a task is an object with the key 'file'; questions in a .jsonl file need none")
    return _task(path, given)


def _task(path: Path, given: Mapping[str, Any]) -> Task:
    for key, value in given.items():
        if key not in _KEYS:
            raise UserError(f"{path}: no key {key!r}{nearest(key, _KEYS)}; a task has {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]):
            raise UserError(f"{path}: {key} is {value!r}, not of type {_KEYS[key].__name__}")
    if "file" not in given:
        raise UserError(f"{path}: no key 'file' that names the questions")
    form = given.get("format", "letters")
    if form not in FORMATS:
        raise UserError(f"{path}: format is {form!r}{nearest(form, FORMATS)}; use one of {', '.join(FORMATS)}")
    files = {"test": str(path.parent / given["file"])}
    if "shots_file" in given:
        files["shots"] = str(path.parent / given["shots_file"])
    context, choices, gold = _HOW[form]
    return Task(
        name=given.get("name", path.stem),
        hub=str(path),
        columns=("question", "answer") if form == "generate" else ("question", "choices", "answer"),
        context=context,
        choices=choices,
        gold=gold,
        shots_split="shots",
        order="first",
        description=given.get("description", ""),
        stop=tuple(given.get("stop", ("\n",))),
        max_new_tokens=given.get("max_new_tokens", 32),
        files=files,
    )


def _choices(record: Record) -> list[str]:
    given = record["choices"]
    if isinstance(given, str):  # of a CSV file
        given = json.loads(given)
    if not isinstance(given, list) or not 2 <= len(given) <= len(LETTERS):
        raise ValueError(f"choices is {given!r}, not a list of 2 to {len(LETTERS)} texts")
    return [str(choice) for choice in given]


def _gold(record: Record) -> int:
    answer, choices = record["answer"], _choices(record)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    text = str(answer).strip()
    if text in choices:
        return choices.index(text)
    if len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
        return LETTERS.index(text.upper())
    if text.isdigit():
        return int(text)
    raise ValueError(f"the answer {answer!r} is no number, letter or text of a choice")


def _texts(record: Record) -> tuple[str, ...]:
    answer = record["answer"]
    texts = tuple(str(one) for one in answer) if isinstance(answer, list) else (str(answer),)
    if answer is None or not all(text.strip() for text in texts) or not texts:
        raise ValueError("the answer is empty")
    return texts


def _question(record: Record) -> str:
    if not isinstance(record["question"], str) or not record["question"].strip():
        raise ValueError("the question is empty or no text")
    return record["question"].strip()


def _listed(record: Record) -> str:
    return f"Question: {_question(record)}\n{lettered(_choices(record))}\nAnswer:"


def _plain(record: Record) -> str:
    return f"Question: {_question(record)}\nAnswer:"


_HOW: dict[str, tuple[Callable, Callable | None, Callable]] = {
    "letters": (_listed, lambda record: list(LETTERS[: len(_choices(record))]), _gold),
    "answers": (_plain, _choices, _gold),
    "generate": (_plain, None, _texts),
}

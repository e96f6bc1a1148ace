"""From a record of a source to prompt and completion, for each of the 18.

Choices are rendered as lm-evaluation-harness renders them, and a completion begins as it scores them (" B"); the text
of the choice and an explanation follow in the completion, never in the prompt. What cannot be used raises Unusable,
with one of a few reasons.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LETTERS = "ABCDEFGHIJ"
_AROUND = 1200  # characters of a long context kept on each side of the answer in it
_PIECE = 3000  # characters of a piece of a long text


class Unusable(Exception):
    """A record that gives no row: args are (reason, detail)."""


class Adapted(NamedTuple):
    """A row of a source before it has an id, a split and a specialty.

    question, answer, options: bare, for finding benchmarks in them. label: what the source says of the specialty, as it
    says it. cluster: rows with the same one stand on one side of the held-out split. part: tells rows of one record
    apart. ended: false where the text is cut short.
    """

    kind: str
    prompt: str
    completion: str
    question: str = ""
    answer: str = ""
    options: tuple[str, ...] = ()
    label: str = ""
    cluster: str = ""
    part: str = ""
    ended: bool = True


def question(record: Mapping[str, Any]) -> list[Adapted]:
    """`input` is the question; the instruction says no more than that it should be answered."""
    asked, answer = _text(record, "input"), _text(record, "output")
    return [Adapted("QA", f"Question: {asked}\nAnswer:", f" {answer}", asked, answer)]


def task(record: Mapping[str, Any]) -> list[Adapted]:
    """`instruction` is what is to be done with `input`, which may be empty."""
    instruction, answer = _text(record, "instruction"), _text(record, "output")
    given = _text(record, "input", empty=True)
    asked = f"{instruction}\n\n{given}" if given else instruction
    return [Adapted("QA", f"{asked}\n\nAnswer:", f" {answer}", given or instruction, answer)]


def dialogue(record: Mapping[str, Any]) -> list[Adapted]:
    """A patient's message and a doctor's answer; the instruction is the same everywhere."""
    asked, answer = _text(record, "input"), _text(record, "output")
    return [Adapted("DIALOGUE", f"Patient: {asked}\nDoctor:", f" {answer}", asked, answer)]


def text(record: Mapping[str, Any]) -> list[Adapted]:
    """Running text, in pieces that end where a paragraph or a sentence does."""
    whole = _text(record, "text")
    pieces, start = [], 0
    while start < len(whole):
        end = start + _PIECE
        if end < len(whole):
            breaks = (whole.rfind(mark, start + _PIECE // 2, end) + len(mark) for mark in ("\n\n", "\n", ". ", " "))
            end = next((at for at in breaks if at > start + _PIECE // 2), end)
        pieces.append(whole[start:end])
        start = end
    cluster = _digest(whole)
    return [
        Adapted("TEXT", "", piece, cluster=cluster, part=str(n) if len(pieces) > 1 else "", ended=n == len(pieces) - 1)
        for n, piece in enumerate(pieces)
        if piece.strip()
    ]


def mmlu(record: Mapping[str, Any]) -> list[Adapted]:
    """choices is a list, answer a number from 0."""
    asked, subject = _text(record, "question"), _text(record, "subject")
    options = _options(record.get("choices"), "choices")
    about = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n{asked}\n"
    return [_choice(head, asked, options, _index(record.get("answer"), options, "answer"), label=subject)]


def medmcqa(record: Mapping[str, Any]) -> list[Adapted]:
    """cop is the answer, from 0 (-1 in the test split, which has none); exp may be null."""
    asked = _text(record, "question")
    options = _options([record.get(f"op{letter}") for letter in "abcd"], "opa to opd")
    right = _index(record.get("cop"), options, "cop")
    explanation = record.get("exp")
    if explanation is not None and not isinstance(explanation, str):
        raise Unusable("wrong type", f"exp is {type(explanation).__name__}")
    label = "/".join(str(record.get(name) or "") for name in ("subject_name", "topic_name"))
    made = _choice(f"Question: {asked}\nChoices:\n", asked, options, right, label=label)
    if explanation and explanation.strip():
        made = made._replace(completion=f"{made.completion}\nExplanation: {explanation.strip()}")
    return [made]


def medqa(record: Mapping[str, Any]) -> list[Adapted]:
    """options is {letter: text}, or a list of {key, value}; answer_idx is a letter."""
    asked, given = _text(record, "question"), record.get("options")
    if isinstance(given, Mapping):
        pairs = sorted((letter, value) for letter, value in given.items() if value is not None)
    elif isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(o, Mapping) for o in given):
        pairs = sorted((o.get("key"), o.get("value")) for o in given)
    else:
        raise Unusable("wrong type", f"options is {type(given).__name__}")
    options = _options([value for _, value in pairs], "options")
    letter = _text(record, "answer_idx")
    letters = [str(key) for key, _ in pairs]
    if letter not in letters:
        raise Unusable("answer outside the options", f"answer_idx is {letter!r}, the options are {', '.join(letters)}")
    return [_choice(f"Question: {asked}\n", asked, options, letters.index(letter))]


def pubmedqa(record: Mapping[str, Any]) -> list[Adapted]:
    """Yes, no or maybe where it is given (pqa_artificial), and the conclusion of the abstract as a second row."""
    asked, conclusion = _text(record, "question"), _text(record, "long_answer")
    context = record.get("context")
    if not isinstance(context, Mapping) or not isinstance(context.get("contexts"), Sequence):
        raise Unusable("wrong type", "context has no list of contexts")
    abstract = "\n".join(str(part) for part in context["contexts"])
    if not abstract.strip():
        raise Unusable("empty text", "contexts")
    label = "; ".join(map(str, context.get("meshes") or ()))
    common = {"question": asked, "label": label, "cluster": str(record.get("pubid"))}
    head = f"Abstract: {abstract}\nQuestion: {asked}\n"
    rows = [Adapted("QA", f"{head}Conclusion:", f" {conclusion}", answer=conclusion, part="long", **common)]
    decision = record.get("final_decision")
    if decision not in (None, ""):
        if decision not in ("yes", "no", "maybe"):
            raise Unusable("answer outside the options", f"final_decision is {decision!r}, none of yes, no, maybe")
        rows.insert(0, Adapted("MCQ", f"{head}Answer:", f" {decision}", answer=decision, part="short", **common))
    return rows


def covid_qa(record: Mapping[str, Any]) -> list[Adapted]:
    """An answer marked in an article, with the article's text around it: whole articles are longer than a row."""
    asked, article = _text(record, "question"), _text(record, "context")
    answers = record.get("answers")
    given = answers.get("text") if isinstance(answers, Mapping) else None
    if not given or not str(given[0]).strip():
        raise Unusable("no answer", "answers")
    answer = str(given[0])
    starts = answers.get("answer_start") or [max(0, article.find(answer))]
    begin, end = max(0, int(starts[0]) - _AROUND), int(starts[0]) + len(answer) + _AROUND
    prompt = f"Context: {article[begin:end].strip()}\nQuestion: {asked}\nAnswer:"
    return [Adapted("QA", prompt, f" {answer.strip()}", asked, answer, label="virology", cluster=_digest(article))]


def medquad(record: Mapping[str, Any]) -> list[Adapted]:
    """Answers of some sources were taken out for their licence and are null."""
    asked, answer = _text(record, "question"), _text(record, "answer", missing="no answer")
    label = str(record.get("category") or "")
    focus = str(record.get("question_focus") or asked)
    return [Adapted("QA", f"Question: {asked}\nAnswer:", f" {answer}", asked, answer, label=label, cluster=focus)]


def _choice(head: str, asked: str, options: tuple[str, ...], right: int, label: str = "") -> Adapted:
    lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    completion = f" {LETTERS[right]}. {options[right]}"
    return Adapted("MCQ", f"{head}{lines}Answer:", completion, asked, options[right], options, label)


def _text(record: Mapping[str, Any], name: str, *, empty: bool = False, missing: str = "") -> str:
    value = record.get(name)
    if value is None or value == "":
        if empty:
            return ""
        raise Unusable(missing or "empty text", name)
    if isinstance(value, bytes):
        raise Unusable("not UTF-8", name)
    if not isinstance(value, str):
        raise Unusable("wrong type", f"{name} is {type(value).__name__} and not text")
    if not value.strip() and not empty:
        raise Unusable(missing or "empty text", name)
    return value.strip()


def _options(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not 2 <= len(values) <= len(LETTERS):
        raise Unusable("wrong type", f"{name} is no list of 2 to {len(LETTERS)} choices")
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise Unusable("empty option", name)
    return tuple(value.strip() for value in values)


def _index(value: Any, options: Sequence[str], name: str) -> int:
    if value is None:
        raise Unusable("no answer", name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unusable("wrong type", f"{name} is {type(value).__name__} and not a number")
    if not 0 <= value < len(options):
        raise Unusable("answer outside the options", f"{name} is {value}, there are {len(options)} options")
    return value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

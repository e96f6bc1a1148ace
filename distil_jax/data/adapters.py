"""A source's record to the fields of a row: one pure function for each shape of record.

Questions with choices are written as lm-evaluation-harness writes them (its tasks mmlu, medmcqa, medqa_4options and
pubmedqa), so that training and evaluation read one format. The completion is the letter that the harness scores and the
text of the choice, " A. aspirin": one letter alone would be one or two learned tokens for a whole exam question. An
explanation never stands in the prompt (the reference corpus had it there, with the answer in it).

What a record lacks is a `Refused` with one of a few reasons; a column that is not there at all is found earlier, in
reading.py.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distil_jax import conversation
from distil_jax.conversation import Message
from distil_jax.data import specialties
from distil_jax.data.rows import as_text, encodable

REASONS = (
    *("null answer", "empty answer", "answer outside the options", "answer not in the context", "empty option"),
    *("empty question", "empty text", "wrong type", "not UTF-8"),
)
LETTERS = "ABCDEFGHIJ"
WINDOW = 1500  # characters of a paper that are kept on each side of an answer (covid_qa): about 700 tokens in all


class Refused(ValueError):
    """A record that cannot be a row: `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Fields:
    """What an adapter makes of a record. specialty: from the source's own labels, "" where they say nothing. id: the
    source's own, "" if it has none. explanation: may follow the completion, and never stands in the prompt."""

    kind: str
    prompt: str
    completion: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    specialty: str = ""
    id: str = ""
    explanation: str = ""
    messages: tuple[Message, ...] = ()


Record = Mapping[str, Any]
Adapter = Callable[[Record], list[Fields]]

# --- instruction, input, output ---------------------------------------------------------------------------------------


def question(record: Record) -> list[Fields]:
    """The input is a question; the instruction ("Answer this question truthfully") says nothing and is left out."""
    asked, answer = _text(record, "input", "empty question"), _answer(record, "output")
    return [Fields("QA", f"Question: {asked}\nAnswer:", f" {answer}", {"question": asked, "answer": answer})]


def instruction(record: Record) -> list[Fields]:
    """The instruction says what is to be done with the input (a title for an abstract, a class for a sentence)."""
    return [_instructed("QA", record)]


def choice_instruction(record: Record) -> list[Fields]:
    """A question whose choices stand in the input, in a form of its own, which is kept as it is."""
    return [_instructed("MCQ", record)]


def dialogue(record: Record) -> list[Fields]:
    """A patient's letter and a doctor's answer, as a conversation."""
    asked, answer = _text(record, "input", "empty question"), _answer(record, "output")
    messages = conversation.of_pair(asked, answer)
    return [Fields("DIALOGUE", *as_text(messages), {"question": asked, "answer": answer}, messages=messages)]


def _instructed(kind: str, record: Record) -> Fields:
    task, given = _text(record, "instruction", "empty question"), _text(record, "input", "empty question")
    answer = _answer(record, "output")
    meta = {"question": given, "answer": answer}
    return Fields(kind, f"{task}\n\n{given}\nAnswer:", f" {answer}", meta)


# --- questions with choices -------------------------------------------------------------------------------------------


def mmlu(record: Record) -> list[Fields]:
    """`question`, `subject`, `choices` (four texts), `answer` (0 to 3)."""
    asked, subject = _text(record, "question", "empty question"), _text(record, "subject", "empty question")
    options = _options(_list(record, "choices"))
    listed = _lettered(options)
    about = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    specialty = specialties.of_mmlu(subject)
    more = {"topic": about, "tells_label": head}
    return [_choice(f"{head}{asked}\n{listed}\nAnswer:", asked, options, record["answer"], specialty, **more)]


def medmcqa(record: Record) -> list[Fields]:
    """`question`, `opa` to `opd`, `cop` (0 to 3; -1 where the answer is kept secret), `exp`, subject and topic."""
    asked = _text(record, "question", "empty question")
    options = _options([record[name] for name in ("opa", "opb", "opc", "opd")])
    subject, topic = (_optional(record, name) for name in ("subject_name", "topic_name"))
    specialty = specialties.of_exam(subject, topic)
    prompt = f"Question: {asked}\nChoices:\n{_lettered(options)}\nAnswer:"
    more = {"topic": topic or subject} if topic or subject else {}
    explanation = _optional(record, "exp")
    return [
        _choice(
            *(prompt, asked, options, record["cop"], specialty),
            id=_optional({"id": None, **record}, "id"),
            explanation=explanation,
            **more,
        )
    ]


def medqa(record: Record) -> list[Fields]:
    """`question`, `options` ({"A": text, ...}, or a list of {"key", "value"}), `answer_idx` (a letter)."""
    asked = _text(record, "question", "empty question")
    given = record["options"]
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        if not all(isinstance(o, Mapping) and {"key", "value"} <= set(o) for o in given):
            raise Refused("wrong type", "options is no list of keys and values")
        given = {o["key"]: o["value"] for o in given}
    if not isinstance(given, Mapping):
        raise Refused("wrong type", f"options is {_kind(given)}")
    if not all(isinstance(key, str) for key in given):
        raise Refused("wrong type", "a key of options is no letter")
    letters = sorted(given)
    options = _options([given[letter] for letter in letters])
    answer = _text(record, "answer_idx", "null answer")
    if answer not in letters:
        raise Refused("answer outside the options", f"answer_idx is {answer!r}, the options are {', '.join(letters)}")
    prompt = f"Question: {asked}\n{_lettered(options)}\nAnswer:"
    return [_choice(prompt, asked, options, letters.index(answer), "")]


def _choice(prompt: str, asked: str, options: list[str], answer: object, specialty: str, **more: Any) -> Fields:
    if answer is None:
        raise Refused("null answer")
    if isinstance(answer, str) and re.fullmatch(r"-?\d+", answer.strip()):
        answer = int(answer)  # of a CSV file
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise Refused("wrong type", f"the answer is {_kind(answer)}, not the number of an option")
    if not 0 <= answer < len(options):
        raise Refused("answer outside the options", f"{answer} of {len(options)} options, counted from 0")
    own = {name: more.pop(name) for name in ("id", "explanation") if name in more}
    meta = {"question": asked, "answer": options[answer], "options": options, **more}
    return Fields("MCQ", prompt, f" {LETTERS[answer]}. {options[answer]}", meta, specialty, **own)


def _lettered(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def _options(values: Sequence[object]) -> list[str]:
    if not 2 <= len(values) <= len(LETTERS):
        raise Refused("wrong type", f"{len(values)} options")
    named = {LETTERS[n]: value for n, value in enumerate(values)}
    return [_text(named, letter, "empty option") for letter in named]


# --- abstracts and papers ---------------------------------------------------------------------------------------------


def pubmedqa(record: Record) -> list[Fields]:
    """`pubid`, `question`, `context` (`contexts`, `meshes`), `long_answer`, and in two configs `final_decision`.

    One row for the decision, where there is one, and one for the long answer, which is the conclusion of the abstract
    and is asked for by that name: one prompt with two answers would teach neither.
    """
    asked = _text(record, "question", "empty question")
    context = record["context"]
    if not isinstance(context, Mapping) or not {"contexts", "meshes"} <= set(context):
        raise Refused("wrong type", f"context is {_kind(context)}, not contexts and meshes")
    paragraphs = _list(context, "contexts")
    abstract = "\n".join(_text({"contexts": p}, "contexts", "empty text") for p in paragraphs)
    if not abstract:
        raise Refused("empty text", "context has no paragraph")
    meshes = [term for term in _list(context, "meshes") if isinstance(term, str)]
    specialty = specialties.of_mesh(meshes)
    meta = {"question": asked, "context": abstract, "cluster": f"pubmed:{record['pubid']}"}
    head, number = f"Abstract: {abstract}\nQuestion: {asked}\n", str(record["pubid"])
    conclusion = _answer(record, "long_answer")
    fields = [
        Fields("QA", f"{head}Conclusion:", f" {conclusion}", meta | {"answer": conclusion}, specialty, f"{number}:long")
    ]
    if "final_decision" in record:
        decision = _answer(record, "final_decision")
        if decision not in (options := ["yes", "no", "maybe"]):
            raise Refused("answer outside the options", f"final_decision is {decision!r}")
        meta |= {"answer": decision, "options": options}
        fields.insert(0, Fields("MCQ", f"{head}Answer:", f" {decision}", meta, specialty, number))
    return fields


def covid_qa(record: Record) -> list[Fields]:
    """`question`, `context` (a whole paper), `answers` (`text`, `answer_start`): the text around the answer is kept."""
    asked, answers = _text(record, "question", "empty question"), record["answers"]
    paper = record["context"]
    _text(record, "context", "empty text")  # for its errors; offsets count from the unstripped text
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= set(answers):
        raise Refused("wrong type", f"answers is {_kind(answers)}, not text and answer_start")
    texts, starts = _list(answers, "text"), _list(answers, "answer_start")
    if not texts or not starts:
        raise Refused("null answer")
    answer, start = texts[0], starts[0]
    _text({"text": answer}, "text", "empty answer")
    if not isinstance(start, int):
        raise Refused("wrong type", f"answer_start is {_kind(start)}")
    if start < 0 or paper[start : start + len(answer)] != answer:
        raise Refused("answer not in the context", f"not at character {start}")
    window = _window(paper, start, start + len(answer))
    paper_hash = hashlib.sha256(paper.encode()).hexdigest()[:16]
    answer = answer.strip()
    meta = {"question": asked, "answer": answer, "context": window, "cluster": f"covid_qa:{paper_hash}"}
    return [Fields("QA", f"Context: {window}\nQuestion: {asked}\nAnswer:", f" {answer}", meta, "infectious_diseases")]


def _window(text: str, start: int, end: int) -> str:
    """The text around [start, end), at most WINDOW characters on each side, cut at white space."""
    left, right = max(0, start - WINDOW), min(len(text), end + WINDOW)
    if left and (space := re.search(r"\s", text[left:start])):
        left += space.end()
    if right < len(text) and (words := re.match(r"(?s).*\s", text[end:right])):
        right = end + words.end()
    return text[left:right].strip()


# --- questions and plain text -----------------------------------------------------------------------------------------


def medquad(record: Record) -> list[Fields]:
    """`question`, `answer` (null in two rows of three), `question_focus` (what is asked about), `category`."""
    asked, answer = _text(record, "question", "empty question"), _answer(record, "answer")
    meta = {"question": asked, "answer": answer}
    if focus := _optional(record, "question_focus"):
        meta |= {"cluster": f"medquad:{focus.casefold()}", "topic": focus}
    specialty = specialties.of_medquad(_optional(record, "category"))
    return [Fields("QA", f"Question: {asked}\nAnswer:", f" {answer}", meta, specialty)]


def case(record: Record) -> list[Fields]:
    """`text`: a patient's record, learned whole."""
    return [Fields("CASE", "", _text(record, "text", "empty text"))]


def plain(record: Record) -> list[Fields]:
    """`text`: a passage, learned whole."""
    return [Fields("TEXT", "", _text(record, "text", "empty text"))]


# --- values -----------------------------------------------------------------------------------------------------------


def _text(record: Record, name: str, reason_if_empty: str) -> str:
    """The stripped text of a column."""
    value = record[name]
    if value is None:
        raise Refused(reason_if_empty, f"{name} is null")
    if not encodable(value):
        raise Refused("not UTF-8", f"in {name}")
    if not isinstance(value, str):
        raise Refused("wrong type", f"{name} is {_kind(value)}, not a text")
    if not (text := value.strip()):
        raise Refused(reason_if_empty, f"{name} is empty")
    return text


def _answer(record: Record, name: str) -> str:
    return _text(record, name, "null answer" if record[name] is None else "empty answer")


def _optional(record: Record, name: str) -> str:
    """As `_text`; an empty string where the value is null or empty."""
    value = record[name]
    return (
        "" if value is None or value == "" or (isinstance(value, str) and value.isspace()) else _text(record, name, "")
    )


def _list(record: Record, name: str) -> list[Any]:
    value = record[name]
    if not isinstance(value, list):
        raise Refused("wrong type", f"{name} is {_kind(value)}, not a list")
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"

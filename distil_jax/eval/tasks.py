"""The benchmark tasks as data: where their items are, and how lm-evaluation-harness (0.4.13) writes them.

prompts.py makes items of them: every context and every choice is byte for byte what the harness sends a model, so that
scores compare with published ones. The data are those of the hub, or local files in the same schema (records.py). A
user's own task is a file (own.py).
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distil_jax.errors import UserError, nearest

Record = Mapping[str, Any]
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Task:
    """One task. `gold` is the number of the right choice, or for a task without choices the texts that are right.

    hub, config: the dataset on the hub. columns: what a record must have. split: of the items. shots_split: of the
    examples; order: they are its first ones ("first"), or drawn anew for each item ("random"). stop, max_new_tokens:
    where a free answer ends; `choices` is None then. files: of a user's task, split -> file.
    """

    name: str
    hub: str
    columns: tuple[str, ...]
    context: Callable[[Record], str]
    gold: Callable[[Record], int | tuple[str, ...]]
    choices: Callable[[Record], list[str]] | None
    config: str = ""
    split: str = "test"
    shots_split: str = "train"
    order: str = "random"
    description: str = ""
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 32
    files: Mapping[str, str] | None = None

    @property
    def generated(self) -> bool:
        """Whether an answer is written and compared, instead of chosen."""
        return self.choices is None


# ---- what the harness's yaml and doc_to_text functions say -----------------------------------------------------------


def _number(value: Any) -> int:
    """A number of a choice; text in a CSV file."""
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not the number of a choice")
    return value


def _listed(value: Any) -> list[Any]:
    """A list; in a CSV file its text."""
    found = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"{value!r} is not a list")
    return list(found)


def lettered(choices: Sequence[str]) -> str:
    """A. one\\nB. two"""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _letters(record: Record) -> list[str]:
    return list(LETTERS[:4])


def _mmlu(subject: str) -> Task:
    about = subject.replace("_", " ")

    def context(record: Record) -> str:
        return f"{record['question'].strip()}\n{lettered(_listed(record['choices'])[:4])}\nAnswer:"

    return Task(
        name=f"mmlu_{subject}",
        hub="cais/mmlu",
        config=subject,
        columns=("question", "choices", "answer"),
        context=context,
        choices=_letters,
        gold=lambda record: _number(record["answer"]),
        shots_split="dev",
        order="first",
        description=f"The following are multiple choice questions (with answers) about {about}.\n\n",
    )


def _question_choices(question: str, choices: Sequence[Any]) -> str:
    return f"Question: {question}\nChoices:\n{lettered(choices)}\nAnswer:"


MEDMCQA = Task(
    name="medmcqa",
    hub="openlifescienceai/medmcqa",
    columns=("question", "opa", "opb", "opc", "opd", "cop"),
    context=lambda r: _question_choices(r["question"], [r["opa"], r["opb"], r["opc"], r["opd"]]),
    choices=_letters,
    gold=lambda r: _number(r["cop"]),
    split="validation",  # the answers of the test split are kept secret
)
MEDQA = Task(
    name="medqa_4options",
    hub="GBaker/MedQA-USMLE-4-options-hf",
    columns=("sent1", "ending0", "ending1", "ending2", "ending3", "label"),
    context=lambda r: f"Question: {r['sent1']}\n{lettered([r[f'ending{i}'] for i in range(4)])}\nAnswer:",
    choices=_letters,
    gold=lambda r: _number(r["label"]),
)
_DECISIONS = ("yes", "no", "maybe")
PUBMEDQA = Task(
    name="pubmedqa",
    hub="bigbio/pubmed_qa",
    config="pubmed_qa_labeled_fold0_source",
    columns=("QUESTION", "CONTEXTS", "final_decision"),
    context=lambda r: "Abstract: {}\nQuestion: {}\nAnswer:".format("\n".join(_listed(r["CONTEXTS"])), r["QUESTION"]),
    choices=lambda r: list(_DECISIONS),
    gold=lambda r: _DECISIONS.index(r["final_decision"]),
)


def _headqa_choices(record: Record) -> list[str]:
    given = record["answers"]
    if isinstance(given, Mapping):  # Parquet files of older versions of `datasets`: a struct of lists
        return list(given["atext"])
    return [one["atext"] for one in _listed(given)]


HEADQA = Task(
    name="headqa_en",
    hub="EleutherAI/headqa",
    config="en",
    columns=("qtext", "answers", "ra"),
    context=lambda r: f"Question: {r['qtext']}\nAnswer:",
    choices=_headqa_choices,
    gold=lambda r: _number(r["ra"]) - 1,
)
# One record of CareQA_en has no question; the harness knows what was asked.
_CAREQA_LOST = (
    "In relation to the immune mechanism involved in the rejection of transplanted solid organs, indicate the "
    "incorrect answer:",
    "Acute T-cell mediated rejection can be controlled through the use of drugs such as cyclosporine A or "
    "corticosteroids.",
    "The presence of specific antibodies against the donor (DSA) in the recipient prior to transplantation is a "
    "contraindication for it.",
    "Chronic rejection or chronic graft injury is associated with endothelial damage mediated by anti-HLA antibodies.",
    "Hyperacute rejection is mediated by cytotoxic T lymphocytes against donor antigens present in the recipient.",
)


def _careqa_context(record: Record) -> str:
    if record["question"] is None:
        return _question_choices(_CAREQA_LOST[0], _CAREQA_LOST[1:])
    return _question_choices(record["question"], [record[f"op{i}"] for i in range(1, 5)])


CAREQA = Task(
    name="careqa_en",
    hub="HPAI-BSC/CareQA",
    config="CareQA_en",
    columns=("question", "op1", "op2", "op3", "op4", "cop"),
    context=_careqa_context,
    choices=_letters,
    gold=lambda r: _number(r["cop"]) - 1,
    shots_split="test",  # it has no other; the harness does not take care that an item is not its own example
)

SIX = ("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics")
SIX += ("professional_medicine",)
TASKS = {
    task.name: task
    for task in (
        *(_mmlu(subject) for subject in (*SIX, "nutrition", "virology")),
        *(MEDMCQA, MEDQA, PUBMEDQA, HEADQA, CAREQA),
    )
}
GROUPS = {
    "mmlu_medical": tuple(f"mmlu_{subject}" for subject in (*SIX, "nutrition", "virology")),  # the paper's eight
    "multimedqa": ("pubmedqa", "medmcqa", "medqa_4options", *(f"mmlu_{subject}" for subject in SIX)),
}


def named(names: Sequence[str], own: Callable[[str], Task]) -> tuple[list[Task], dict[str, tuple[str, ...]]]:
    """(the tasks of these names, each once and in their order; the groups among them).

    own: makes the task of a name that is a file. Raises UserError for a name that is no task, group or file.
    """
    found: dict[str, Task] = {}
    for name in names:
        if name.endswith((".toml", ".json", ".jsonl", ".csv", ".parquet")):
            task = own(name)
            if task.name in TASKS or task.name in GROUPS or task.name in found:
                raise UserError(f"{name}: there is a task {task.name!r} already; give it another name")
            found[task.name] = task
        elif name in GROUPS:
            found |= {member: TASKS[member] for member in GROUPS[name] if member not in found}
        elif name in TASKS:
            found.setdefault(name, TASKS[name])
        else:
            known = (*TASKS, *GROUPS)
            raise UserError(
                f"no task {name!r}{nearest(name, known)}; there are {', '.join(known)}, and files of your own "
                "(.toml, .jsonl, .csv, .parquet)"
            )
    return list(found.values()), {name: GROUPS[name] for name in names if name in GROUPS}

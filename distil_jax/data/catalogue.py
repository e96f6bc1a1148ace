"""The 18 sources of the unified medical corpus: where they are, under which licence, and whether they are on.

A source is read from the hub, or from a folder that holds the same files (data/reading.py), and becomes rows by its
adapter (data/adapters.py). docs/data.md says of each what we do with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distil_jax.data import adapters
from distil_jax.data.adapters import Adapted
from distil_jax.errors import UserError, nearest

MMLU = ("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics",
        "professional_medicine")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One source.

    configs: of the hub's dataset; "" where it has only one. splits: those that are read; what benchmarks are scored on
    never is. columns: without which a record cannot be read. why: that it is on, or off unless it is asked for by name.
    """

    name: str
    hub: str
    licence: str
    rows: int | None
    columns: tuple[str, ...]
    adapt: Callable[[dict], Sequence[Adapted]]
    why: str
    on: bool = True
    configs: tuple[str, ...] = ("",)
    splits: tuple[str, ...] = ("train",)
    forum: bool = False  # people write of themselves: personal data is replaced, not only reported


_MEADOW = ("instruction", "input", "output")
_MEDQA = ("question", "options", "answer_idx")

SOURCES: tuple[Source, ...] = (
    Source(
        "mediqa", "medalpaca/medical_meadow_mediqa", "cc", 2208, _MEADOW, adapters.task,
        "consumer questions with long answers",
    ),
    Source(
        "flashcards", "medalpaca/medical_meadow_medical_flashcards", "cc", 33955, _MEADOW, adapters.question,
        "short questions and answers of medical students",
    ),
    Source(
        "wikidoc", "medalpaca/medical_meadow_wikidoc", "cc", 10000, _MEADOW, adapters.question,
        "paragraphs of a medical encyclopaedia under questions",
    ),
    Source(
        "mmlu", "cais/mmlu", "MIT", 30 + 141, ("question", "subject", "choices", "answer"), adapters.mmlu,
        "dev and validation of a benchmark: its few-shot examples and what is tuned on", on=False, configs=MMLU,
        splits=("dev", "validation"),
    ),
    Source(
        "medmcqa", "openlifescienceai/medmcqa", "apache-2.0", 182822,
        ("question", "opa", "opb", "opc", "opd", "cop", "exp", "subject_name", "topic_name"), adapters.medmcqa,
        "entrance examinations with subjects and explanations; validation is a benchmark and is not read",
    ),
    Source(
        "med_qa", "bigbio/med_qa", "unknown", 10178, _MEDQA, adapters.medqa,
        "no licence is stated, and medqa has the same questions", on=False, configs=("med_qa_en_4options_source",),
    ),
    Source(
        "medqa", "GBaker/MedQA-USMLE-4-options", "cc-by-4.0", 10178, (*_MEDQA, "meta_info"), adapters.medqa,
        "questions of the US licensing examination; test is a benchmark and is not read",
    ),
    Source(
        "meadow_mmmlu", "medalpaca/medical_meadow_mmmlu", "cc", 3787, _MEADOW, adapters.task,
        "comes from MMLU, on which models are scored", on=False,
    ),
    Source(
        "patient_information", "medalpaca/medical_meadow_wikidoc_patient_information", "cc", 5942, _MEADOW,
        adapters.question, "an encyclopaedia's pages for patients, under questions",
    ),
    Source(
        "meadow_medqa", "medalpaca/medical_meadow_medqa", "cc", 10178, _MEADOW, adapters.task,
        "the same questions as medqa", on=False,
    ),
    Source(
        "pubmedqa", "qiaojin/PubMedQA", "MIT", 211269 + 61200, ("pubid", "question", "context", "long_answer"),
        adapters.pubmedqa, "abstracts with a question and its answer; pqa_labeled is a benchmark and is not read",
        configs=("pqa_artificial", "pqa_unlabeled"),
    ),
    Source(
        "covid_qa", "deepset/covid_qa_deepset", "apache-2.0", 2019, ("question", "context", "answers"),
        adapters.covid_qa, "questions on articles about COVID-19, marked by experts",
    ),
    Source(
        "cord19", "medalpaca/medical_meadow_cord19", "cc", 821007, _MEADOW, adapters.task,
        "abstracts about coronaviruses with their titles; half of all rows, so data.cap or data.weights may lower it",
    ),
    Source(
        "pubmed_causal", "medalpaca/medical_meadow_pubmed_causal", "cc", 2446, _MEADOW, adapters.task,
        "sentences of abstracts, with the kind of relation that they claim",
    ),
    Source(
        "medquad", "lavita/MedQuAD", "cc-by-4.0", 47441,
        ("question", "answer", "question_type", "question_focus", "category"), adapters.medquad,
        "questions and answers of the NIH's pages; 16,407 have an answer, the others are refused and counted",
    ),
    Source(
        "healthcaremagic", "lavita/ChatDoctor-HealthCareMagic-100k", "none stated", 112165, _MEADOW, adapters.dialogue,
        "no licence is stated, and it is what patients wrote in a forum", on=False, forum=True,
    ),
    Source(
        "mimic", "Medilora/mimic_iii_diagnosis_anonymous", "PhysioNet, no redistribution", None, ("text",),
        adapters.text, "PhysioNet forbids to pass it on", on=False, forum=True,
    ),
    Source(
        "textbooks", "Medilora/us_medical_license_exam_textbooks_en", "unclear", None, ("text",), adapters.text,
        "whole textbooks, whose licence is unclear", on=False,
    ),
)  # fmt: skip


def chosen(names: Sequence[str]) -> list[Source]:
    """The sources of these names, in the order of the catalogue; "all" stands for those that are on.

    Raises UserError for a name that is none.
    """
    known = {source.name: source for source in SOURCES}
    for name in names:
        if name != "all" and name not in known:
            raise UserError(
                f"config.data.sources names {name!r}{nearest(name, known)}; there are all, {', '.join(known)} "
                "(distil-jax data list)"
            )
    return [source for source in SOURCES if source.name in names or (source.on and "all" in names)]

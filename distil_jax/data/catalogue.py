"""The 18 sources of the medical corpus: where each stands, what may be done with it, and whether it is read by default.

The list and the licences are those of the reference corpus (DistilLLM-Med); the choice is ours and each entry says why.
A source, or a part of one, that is off is turned on by naming it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distil_jax.data import adapters
from distil_jax.data.adapters import Adapter
from distil_jax.errors import UserError, nearest


@dataclass(frozen=True)
class Part:
    """One config and split of a source.

    config: the hub's name of it, "" where the repository has one alone. files: which files of the config's folder hold
    the split, as a pattern of their paths in it. export: where the repository has only a loading script, which
    `datasets` no longer runs, the files of the hub's own Parquet export. columns: those that are needed, where they
    differ from the source's. off: why it is left out although its source is on; "" if it is not. rows: records that its
    card counts, where the source has several parts; makes: rows of a record.
    """

    config: str = ""
    split: str = "train"
    files: str = "*"
    export: str = ""
    columns: tuple[str, ...] = ()
    off: str = ""
    rows: int = 0
    makes: int = 1

    @property
    def name(self) -> str:
        return f"{self.config}/{self.split}" if self.config else self.split


@dataclass(frozen=True)
class Source:
    """A corpus on the hub. `rows` is what its card says, 0 where it says nothing; `on`: read by default, and `why`."""

    name: str
    hub_id: str
    adapter: Adapter
    columns: tuple[str, ...]
    licence: str
    rows: int
    on: bool
    why: str
    parts: tuple[Part, ...] = (Part(),)
    forum: bool = False  # people write of themselves, so personal data is replaced and not only reported

    def columns_of(self, part: Part) -> tuple[str, ...]:
        return part.columns or self.columns


ALPACA = ("instruction", "input", "output")
MMLU_CONFIGS = (
    *("anatomy", "clinical_knowledge", "college_biology"),
    *("college_medicine", "medical_genetics", "professional_medicine"),
)
_PUBMEDQA = ("pubid", "question", "context", "long_answer", "final_decision")
_TRAIN = (Part(files="*train*"),)

SOURCES = (
    Source(
        *("mediqa", "medalpaca/medical_meadow_mediqa", adapters.instruction, ALPACA, "cc", 2_208, True),
        "Answers of experts to consumers' questions, with the documents that they rest on.",
    ),
    Source(
        *("flashcards", "medalpaca/medical_meadow_medical_flashcards", adapters.question, ALPACA, "cc", 33_955, True),
        "Short facts of the medical curriculum, one to a row.",
    ),
    Source(
        *("wikidoc", "medalpaca/medical_meadow_wikidoc", adapters.question, ALPACA, "cc", 10_000, True),
        "Paragraphs of a medical encyclopaedia as questions and answers.",
    ),
    Source(
        *("mmlu", "cais/mmlu", adapters.mmlu, ("question", "subject", "choices", "answer"), "MIT", 0, False),
        "Its dev and validation splits are few-shot examples and material of the evaluation; training on them makes "
        "the MMLU score no longer a measure.",
        tuple(Part(config, split, f"*{split}*") for config in MMLU_CONFIGS for split in ("dev", "validation")),
    ),
    Source(
        *("medmcqa", "openlifescienceai/medmcqa", adapters.medmcqa),
        ("question", "opa", "opb", "opc", "opd", "cop", "choice_type", "exp", "subject_name", "topic_name"),
        *("apache-2.0", 182_822, True),
        "The largest set of exam questions, each with its subject; the training split alone.",
        (
            Part(files="*train*", rows=182_822),
            Part(
                "",
                "validation",
                "*validation*",
                off="the harness evaluates MedMCQA on its validation split",
                rows=4_183,
            ),
        ),
    ),
    Source(
        *("medqa_bigbio", "bigbio/med_qa", adapters.medqa, ("question", "options", "answer_idx"), "unknown", 10_178),
        *(False, "The same questions as medqa, under a licence that nobody states."),
        (Part("med_qa_en_4options_source", "train", "*train*", "med_qa_en_4options_source/train/*.parquet"),),
    ),
    Source(
        *("medqa", "GBaker/MedQA-USMLE-4-options", adapters.medqa),
        ("question", "answer", "options", "meta_info", "answer_idx"),
        *("cc-by-4.0", 10_178, True, "Questions of the US licensing exam, under a stated licence; the training split."),
        _TRAIN,
    ),
    Source(
        *("mmmlu", "medalpaca/medical_meadow_mmmlu", adapters.choice_instruction, ALPACA, "cc", 3_787, False),
        "Made from MMLU with no word of which splits: what the evaluation asks may be in it.",
    ),
    Source(
        *("wikidoc_patient", "medalpaca/medical_meadow_wikidoc_patient_information", adapters.question, ALPACA),
        *("cc", 5_942, True, "The encyclopaedia's pages for patients: the same matter in plain words."),
    ),
    Source(
        *("medqa_meadow", "medalpaca/medical_meadow_medqa", adapters.choice_instruction, ALPACA, "cc", 10_178, False),
        "The training questions of medqa once more, in another dress.",
    ),
    Source(
        *("pubmedqa", "qiaojin/PubMedQA", adapters.pubmedqa, _PUBMEDQA, "MIT", 273_469, True),
        "Questions that an abstract answers, with MeSH terms; the expert-labelled part is left to the evaluation.",
        (
            Part("pqa_artificial", files="*train*", rows=211_269, makes=2),
            Part("pqa_unlabeled", files="*train*", columns=_PUBMEDQA[:-1], rows=61_200),
            Part(
                *("pqa_labeled", "train", "*train*"),
                off="half of its 1,000 rows are the harness's PubMedQA test",
                rows=1_000,
                makes=2,
            ),
        ),
    ),
    Source(
        *("covid_qa", "deepset/covid_qa_deepset", adapters.covid_qa, ("question", "context", "answers")),
        *("apache-2.0", 2_019, True, "Answers marked by experts in papers on COVID-19; the matter of virology."),
        (Part(export="*/train/*.parquet"),),
    ),
    Source(
        *("cord19", "medalpaca/medical_meadow_cord19", adapters.instruction, ALPACA, "cc", 821_007, True),
        "Abstracts with their titles: the bulk of the corpus, so how much of it is taken is a matter of the mixture.",
    ),
    Source(
        *("pubmed_causal", "medalpaca/medical_meadow_pubmed_causal", adapters.instruction, ALPACA, "cc", 2_446, True),
        "Sentences of abstracts with the kind of causal claim that they make.",
    ),
    Source(
        *("medquad", "lavita/MedQuAD", adapters.medquad, ("question", "answer", "question_focus", "category")),
        *("cc-by-4.0", 47_441, True),
        "Questions answered by the US institutes of health; two thirds have no answer for reasons of copyright and go "
        "to the quarantine.",
    ),
    Source(
        *("healthcaremagic", "lavita/ChatDoctor-HealthCareMagic-100k", adapters.dialogue, ALPACA, "none stated"),
        *(112_165, False, "Posts of patients and doctors in a forum, with no licence and no word of their consent."),
        forum=True,
    ),
    Source(
        *("mimic", "Medilora/mimic_iii_diagnosis_anonymous", adapters.case, ("text",), "PhysioNet", 0, False),
        "Records of patients; PhysioNet forbids their redistribution and asks for an agreement of your own.",
        forum=True,
    ),
    Source(
        *("textbooks", "Medilora/us_medical_license_exam_textbooks_en", adapters.plain, ("text",), "unclear", 0, False),
        "Textbooks whose publishers are not known to have agreed.",
    ),
)


def named(name: str) -> Source:
    """The source of that name. Raises UserError for another."""
    for source in SOURCES:
        if source.name == name:
            return source
    names = [source.name for source in SOURCES]
    raise UserError(f"no source {name!r}{nearest(name, names)}; there are {', '.join(names)}")


def chosen(names: Sequence[str] = ()) -> list[Source]:
    """The sources of these names, with the parts that are read; without names, those that are on by default.

    A name is "all" for those, "medmcqa", or "medmcqa:validation" for one part ("pubmedqa:pqa_labeled/train"), which may
    be off by default. Several parts of one source make one source. Raises UserError for a name that there is not, or
    one twice.
    """
    if not names:
        return [_default_parts(source) for source in SOURCES if source.on]
    parts: dict[str, tuple[Part, ...]] = {}
    on = [source.name for source in SOURCES if source.on]
    for name in (one for given in names for one in (on if given == "all" else [given])):
        source_name, colon, part_name = name.partition(":")
        source = named(source_name)
        found = tuple(p for p in source.parts if p.name == part_name) if colon else _default_parts(source).parts
        if not found:
            there = [part.name for part in source.parts]
            raise UserError(f"{source_name} has no part {part_name!r}{nearest(part_name, there)}: {', '.join(there)}")
        if set(found) & set(parts.get(source_name, ())):
            raise UserError(f"the source {name!r} is named twice; name it once")
        parts[source_name] = parts.get(source_name, ()) + found
    return [replace(named(name), parts=those) for name, those in parts.items()]


def _default_parts(source: Source) -> Source:
    return replace(source, parts=tuple(part for part in source.parts if not part.off))

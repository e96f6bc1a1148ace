"""The model card (README.md) of an export: what it is made of, how good it is, how it was checked, what it may be used
for.

Everything that comes from a user (names of sources, licences, paths) is escaped: it cannot end the YAML front matter,
open a heading or a link, or spread over lines. Of local paths only the last part is shown.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from ml_collections import ConfigDict

import distil_jax
from distil_jax import variants
from distil_jax.duties import Duties
from distil_jax.eval import comparison
from distil_jax.eval.answers import Answers
from distil_jax.licences import LICENCES, Origin
from distil_jax.tables import accuracy_rows, gain, label_of, paired_rows, table_rows
from distil_jax.workdir import names_of

LONGEST = 300  # characters of a user's text
LIMITS = (
    "**Research only. Not for clinical use: it has not been evaluated for any medical purpose**, and must not inform "
    "the diagnosis or treatment of anyone. It continues text and cannot tell when it is wrong. What it writes can be "
    "false, out of date or biased as its sources and its teacher are. It was measured on held-out text of the same "
    "sources alone."
)


def card(
    name: str,
    config: ConfigDict,
    done: Mapping[str, Mapping[str, Any]],
    duties: Duties,
    checks: Mapping[str, Any],
    answers: Mapping[str, Sequence[Answers]],
) -> str:
    """The card in Markdown with a YAML front matter, as the Hugging Face hub reads it.

    done: the manifests of the stages corpus, projection, evaluate and of the run that is exported. checks: what
    `readback.compare` found. answers: of each model to benchmarks; the card has no word of them where there are none.
    """
    run = config.export.run
    metadata = duties.metadata() | {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata["tags"] = ["distillation", "cross-tokenizer-distillation", "distil-jax", "medical"]
    origins = {o.role: o for o in duties.origins}
    built_with = [x.built_with for x in duties.licences if x.built_with]
    sections = [
        "---\n" + ModelCardData(**metadata).to_yaml() + "\n---",
        f"# {escape(name)}",
        *(f"**{line}**" for line in dict.fromkeys(built_with)),
        f"A student of {done[run]['parameters']:,} parameters, {_model(config, 'student', origins)}, taught by "
        f"{_model(config, 'teacher', origins)}. Teacher and student have tokenizers of their own "
        f"({done['corpus']['tokenizers']['teacher']['vocab_size']:,} and "
        f"{done['corpus']['tokenizers']['student']['vocab_size']:,} ids): the teacher's next-token distribution was "
        "projected into the student's vocabulary by the bytes of the tokens.",
        LIMITS,
        "## Use",
        _use(name, checks["bos"]),
        "## Results",
        _results(done["evaluate"], run),
        *_benchmarks(config, done["corpus"], answers),
        "## Recipe",
        _recipe(config, done),
        "## Data",
        _data(done["corpus"]),
        "## How this export was checked",
        _checked(checks),
        "## Licence",
        _licence(duties),
        f"Made with distil_jax {distil_jax.__version__}.",
    ]
    return "\n\n".join(sections) + "\n"


def escape(value: Any) -> str:
    """A user's text as one line of Markdown that shows it as it is."""
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+", " ", str(value)).strip()
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    text = text.encode(errors="replace").decode().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#|~$!])", r"\\\1", text)


def _model(config: ConfigDict, role: str, origins: Mapping[str, Origin]) -> str:
    """A phrase for one of the two models."""
    if not config[role].path:
        return "trained from random weights" if role == "student" else "a teacher that was trained on the same text"
    origin = origins[role]
    name = f"[{origin.name}](https://huggingface.co/{origin.hub_id})" if origin.hub_id else escape(origin.name)
    if role == "student":
        return f"trained further from {name}"
    return name + (", adapted to the same text first" if config.teacher.adapt else "")


def _use(name: str, bos: str | None) -> str:
    """How to load it. bos: what has to stand in front of a text, where transformers does not put it there."""
    hint = (
        f"The text that it was trained on begins with the token {escape(bos)}, which this tokenizer does not put there "
        "in transformers and vLLM: write it in front. distil_jax does.\n\n"
        if bos
        else ""
    )
    return f"""{hint}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")  # this folder, or its id on the hub
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Question: What is ageusia?\\nAnswer:", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=48)[0]))
```

```python
import distil_jax as dj

model, params = dj.load_pretrained("{name}")
table = dj.ByteTable.from_tokenizer("{name}")
print(dj.generate(model, params, table, ["Question: What is ageusia?\\nAnswer:"], max_new_tokens=48))
```

```
vllm serve ./{name}
```"""


def _results(evaluated: Mapping[str, Any], run: str) -> str:
    header, *rows = table_rows(evaluated["models"])
    differences = [
        (escape(label), gain(difference))
        for label, difference in evaluated["differences"].items()
        if label.endswith(f" - {run}")
    ]
    return "\n\n".join(
        [
            f"On {evaluated['documents']:,} held-out documents ({evaluated['bytes']:,} bytes) that no model was "
            "trained on here, with 95 % intervals over documents. Bits per byte: lower is better; bytes are the same "
            "for every tokenizer. Accuracy and agreement count the places where both tokenizations have a boundary.",
            _table(("model", *header[1:]), rows),
            f"Differences in bits per byte, paired by document; above 0 this model, {label_of(run)}, is better:",
            _table(("", "bits per byte"), differences),
        ]
    )


def _benchmarks(config: ConfigDict, corpus: Mapping[str, Any], answers: Mapping[str, Sequence[Answers]]) -> list[str]:
    """The exported student beside the teacher, the untouched student and the control."""
    run = config.export.run
    shown = {name: answers[name] for name in ("teacher", *comparison.ALWAYS, run) if name in answers}
    found = comparison.compared(shown, [run], config.evaluation.bootstrap)
    tasks = [task for task in found["tasks"] if not task["probe"]]
    if run not in answers or not tasks:
        return []
    header, *rows = accuracy_rows(tasks, found["means"], list(shown))
    tested, *tests = paired_rows(tasks)
    searched = names_of(config.data.benchmarks)
    known = comparison.overlap(corpus, searched, [task["task"] for task in tasks])
    return [
        "### Tasks with choices",
        "Accuracy of the likeliest choice with 95 % bootstrap intervals over items; in brackets by nats a byte.",
        _table(("task", *header[1:]), [(escape(row[0]), *row[1:]) for row in rows]),
        "Paired by item, this model less the other; p is McNemar's, not corrected for the number of tests:",
        _table(("task", *tested[1:]), [(escape(row[0]), *row[1:]) for row in tests]),
        *([_bullets([escape(sentence) for sentence in known])] if known else []),
    ]


def _recipe(config: ConfigDict, done: Mapping[str, Mapping[str, Any]]) -> str:
    run = config.export.run
    o, t, fitted = variants.applied(config, run).objective, config.student.training, done["projection"]["fitted"]

    def course(s: ConfigDict) -> str:
        return f"{s.start}" if s.kind == "constant" else f"{s.start} to {s.end} ({escape(s.kind)})"

    roles = done["corpus"]["alignment"]["test"]
    lines = [
        "objective, per token: alpha × cross-entropy + (1 − alpha) × tau² × KL to the projected teacher where the "
        "teacher has a boundary too, cross-entropy alone elsewhere",
        f"alpha {course(o.alpha)}; temperature tau {course(o.temperature)}; weight of the distance of attention maps "
        f"{course(o.beta)}, of hidden states {o.hidden_states:g}",
        f"specialty weighting: {escape(o.specialty_weighting)} {escape(o.specialty_weights)}".rstrip(),
        f"{done[run]['steps']:,} steps of {t.batch_size} rows of {config.data.student_length} tokens; AdamW, "
        f"learning rate {t.learning_rate:g} after {t.warmup} steps of warm-up, then a cosine to {t.end_fraction:g} of "
        f"it; weight decay {t.weight_decay:g}; gradient norm at most {t.clip:g}; computed in "
        f"{escape(t.compute_dtype)}; seed {config.seed}",
        f"parameters that were not trained: {_frozen(config)}",
        *([f"the weights are their running average over the updates, decay {t.ema:g}"] if t.get("ema") else []),
        f"updates left out because they were not finite: {done[run]['skipped']}",
        f"vocabulary projection: IP_KL {fitted['ip_kl']:.4f}, IP_bpb {fitted['ip_bpb']:.4f} (shares of the teacher's "
        "information that pass through it)",
        "student tokens of the test text by alignment: "
        + ", ".join(f"{role} {roles[role]:.1%}" for role in ("root", "interior", "crossing")),
    ]
    return _bullets(lines)


def _frozen(config: ConfigDict) -> str:
    """Which, and what was learned in place of them."""
    adapters = config.student.get("lora")
    if not adapters or not adapters.rank:
        return escape(config.student.training.get("freeze", "") or "none")
    return (
        f"all; low-rank updates (LoRA, rank {adapters.rank}, alpha {adapters.alpha:g}) of {escape(adapters.targets)} "
        f"were learned on the parameters in {escape(adapters.dtype)} and added to them"
    )


def _data(corpus: Mapping[str, Any]) -> str:
    provenance = corpus["provenance"]
    lines = [f"{escape(k)}: {escape(v)}" for k, v in provenance.items() if isinstance(v, str)]
    if files := provenance.get("files"):
        lines.append("files: " + ", ".join(escape(Path(f).name) for f in files))
    lines.append("rows used: " + ", ".join(f"{escape(split)} {n:,}" for split, n in corpus["rows"].items()))
    refused = sum(corpus["quarantined"].values())
    lines.append(
        f"rows refused: {refused:,}" + "".join(f"; {escape(k)} {n:,}" for k, n in corpus["quarantined"].items())
    )
    text = _bullets(lines)
    if licences := provenance.get("licences"):
        text += "\n\n" + _table(("source: licence", "rows"), [(escape(k), f"{n:,}") for k, n in licences.items()])
    return text


def _checked(checks: Mapping[str, Any]) -> str:
    lines = [
        f"weights: {checks['parameters']:,}, read back bit for bit in {checks['dtype']}",
        f"tokenizer: {checks['texts']:,} texts (held-out documents and awkward ones: every Latin-1 character, "
        f"combining marks, emoji, both directions, line ends, names of control tokens), {checks['ids']:,} ids, all "
        "equal to those of training",
    ]
    if checks["documents"]:
        worst = checks["largest_logit_difference"]
        trained, stored = checks["bits_per_byte_trained"], checks["bits_per_byte_stored"]
        lines += [
            f"logits: on {checks['documents']} held-out documents the largest difference between the stored model, "
            f"computed in {checks['dtype']}, and the trained one in float32 is {worst:.2e}",
            f"what storing in {checks['dtype']} costs on them: {trained:.5f} to {stored:.5f} bits per byte "
            f"({stored - trained:+.1e})",
        ]
    return _bullets(lines)


def _licence(duties: Duties) -> str:
    if not duties.origins:
        return (
            "The weights come from no other model. No licence was chosen for them: state it in config.student.licence. "
            "Mind the licences of the data above."
        )
    lines = []
    for o in duties.origins:
        titles = " and ".join(map(_cited, o.licences))
        lines.append(f"{o.role}, {escape(o.name)}: {titles or 'its licence is **not known**'}")
    lines += [x.restrictions for x in duties.licences if x.restrictions]
    lines.append(
        "files in this folder were modified: [NOTICE](NOTICE) says which, and holds the attribution notices; "
        "[LICENSE.md](LICENSE.md) lists the texts"
    )
    text = _bullets(lines)
    if duties.missing:
        text += "\n\n**Not ready to publish.** Still missing:\n\n" + _bullets([escape(m) for m in duties.missing])
    return text


def _cited(key: str) -> str:
    licence = LICENCES[key]
    return licence.title + (f" ({licence.url})" if licence.url.startswith("https://") else "")


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])

"""Stage 5: the distilled student as a Hugging Face directory, checked by reading it back.

    distil-jax export --config configs/tiny.py

Writes export/ : config.json, generation_config.json, model.safetensors, the student's tokenizer, README.md (a model
card).
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distil_jax import learners
from distil_jax.errors import UserError
from distil_jax.models import hub
from distil_jax.tokens.bytes import ByteTable
from distil_jax.workdir import Workdir

CHECKED_DOCUMENTS = 8


def main(config: ConfigDict) -> dict[str, Any]:
    """Exports the distilled student unless that is done; returns the manifest."""
    work = Workdir(config)
    if found := work.done("export"):
        return found
    distilled, corpus = work.require("distilled"), work.require("corpus")
    stage = work.begin("export")
    mesh = learners.mesh_of(config)
    model_folder = stage.folder / "model"
    with jax.set_mesh(mesh):
        model, params = learners.trained(work, "distilled", mesh)
        hub.save_pretrained(
            model, params, model_folder, tokenizer=learners.hf_tokenizer(work, "student"), dtype=config.export.dtype
        )
        texts = checked_texts(work / "corpus" / "documents.jsonl")
        difference = verify(model, params, model_folder, texts, config.export.dtype)
    (model_folder / "README.md").write_text(card(config, corpus, distilled, difference), encoding="utf-8")
    return stage.finish(path=str(model_folder), largest_logit_difference=difference, checked_texts=len(texts))


def checked_texts(file: Path) -> list[str]:
    """Held-out documents that the export is compared on."""
    with file.open(encoding="utf-8") as lines:
        documents = [json.loads(line) for _, line in zip(range(CHECKED_DOCUMENTS), lines, strict=False)]
    return [d["prompt"] + d["completion"] for d in documents]


def verify(model: Any, params: Any, folder: Path, texts: list[str], dtype: str) -> float:
    """Reads the directory back; returns the largest difference of a logit from the trained model's on `texts`.

    Raises UserError if a weight stored in `dtype` is not the trained one cast to it, or the tokenizer gives other ids.
    """
    again, stored = hub.load_pretrained(folder, dtype=dtype)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(stored), strict=True):
        if not np.array_equal(np.asarray(a.astype(dtype)), np.asarray(b)):
            raise UserError(
                f"export to {folder} failed: {jax.tree_util.keystr(path)} does not read back as it was written"
            )
    from transformers import AutoTokenizer

    tokenizer, table = AutoTokenizer.from_pretrained(folder), ByteTable.from_tokenizer(folder)
    encoded = [table.encode(text) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids.tolist():
            raise UserError(
                f"export to {folder} failed: its tokenizer gives other ids than training's for {text[:40]!r}"
            )
    longest = max(map(len, encoded))
    tokens_BxL = jnp.asarray([np.pad(ids, (0, longest - len(ids))) for ids in encoded])
    segment_ids = jnp.asarray([np.arange(longest) < len(ids) for ids in encoded], jnp.int32)
    before = jax.jit(model.apply)(params, tokens_BxL, segment_ids)
    after = jax.jit(again.apply)(stored, tokens_BxL, segment_ids)
    return float(jnp.max(jnp.abs(before - after) * segment_ids[..., None]))


def card(config: ConfigDict, corpus: dict[str, Any], distilled: dict[str, Any], difference: float) -> str:
    """The model card: what it is, what it was taught on, how the export was checked, what it is not for."""
    provenance = corpus["provenance"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, medical]",
        "---",
        "",
        f"# {Path(config.workdir).name}, distilled",
        "",
        f"A student of {distilled['parameters']:,} parameters, taught by "
        f"{config.teacher.path or 'a teacher trained on the same corpus'} across tokenizers with distil_jax.",
        "",
        "**Research only. Not for clinical use: it has not been evaluated for any medical purpose.**",
        "",
        "## Data",
        "",
        *(f"- {name}: {value}" for name, value in provenance.items() if isinstance(value, str)),
        *(f"- licence of {name} ({count} rows)" for name, count in provenance.get("licences", {}).items()),
        f"- rows: {corpus['rows']}",
        "",
        "## Training",
        "",
        f"- {distilled['steps']} steps; held-out bits per byte on the validation split: "
        f"{distilled['validation_bits_per_byte']:.4f}",
        f"- temperature {config.objective.temperature.kind} {config.objective.temperature.start} to "
        f"{config.objective.temperature.end}; alpha {config.objective.alpha.start} to {config.objective.alpha.end}",
        "",
        "## Export",
        "",
        f"- read back and compared: weights bit for bit in {config.export.dtype}, token ids equal, "
        f"largest difference of a logit {difference:.2e}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))

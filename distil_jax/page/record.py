"""What a finished work folder holds, read for a page. The folder is enough: no config file, no model, no JAX."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distil_jax import manifest
from distil_jax.errors import UserError
from distil_jax.eval import comparison
from distil_jax.eval.answers import Answers
from distil_jax.metrics import read_metrics
from distil_jax.tables import label_of

SUMMARY = "summary.json"  # in the work folder
EXHIBITS = "exhibits.json"  # in the folder of the stage `report`


@dataclass(frozen=True)
class Record:
    """One work folder. name: what it is called on the page. told: what `report` asked of the models (exhibits.py).
    config: dotted keys and values. answers: to benchmark tasks, by model."""

    name: str
    summary: dict[str, Any]
    told: dict[str, Any]
    corpus: dict[str, Any]
    projection: dict[str, Any]
    evaluate: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    timing: dict[str, list[dict[str, Any]]]
    answers: dict[str, list[Answers]]

    @property
    def config(self) -> dict[str, Any]:
        return self.told.get("config", {})

    @property
    def runs(self) -> list[str]:
        """The trained students, in their order."""
        return self.summary["runs"]

    @property
    def exported(self) -> str:
        """The student that the run is about."""
        return self.summary["difference"]["of"].rsplit(" - ", 1)[1]

    @classmethod
    def read(cls, folder: str | Path, name: str | None = None) -> "Record":
        """Raises UserError for a folder without a finished run, and for a file of it that cannot be read."""
        folder = Path(folder)
        summary = _json(folder / SUMMARY, folder)
        told = _json(folder / "report" / EXHIBITS, folder)
        stages = {stage: manifest.read(folder / stage) for stage in ("corpus", "projection", "evaluate")}
        if missing := [stage for stage, found in stages.items() if found is None]:
            raise UserError(f"{folder} has no finished {missing[0]}: run `distil-jax run` with its config first")
        trained = [run for run in ("teacher", *summary["runs"]) if (folder / run / "metrics.jsonl").is_file()]
        timed = [run for run in trained if (folder / run / "timing.jsonl").is_file()]
        return cls(
            name=name or str(folder),
            summary=summary,
            told=told,
            corpus=stages["corpus"],
            projection=stages["projection"],
            evaluate=stages["evaluate"],
            metrics={run: read_metrics(folder / run / "metrics.jsonl") for run in trained},
            timing={run: read_metrics(folder / run / "timing.jsonl") for run in timed},
            answers=comparison.read(folder / "evaluate", summary["runs"]),
        )


def _json(file: Path, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no {file}: {folder} holds no finished run, or one of before this file was written; `distil-jax run` with "
            "its config makes what is missing"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete it and run `distil-jax report` again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object: delete it and run `distil-jax report` again")
    return found


def named(folders: Sequence[str | Path]) -> list[str]:
    """What the folders are called: their last parts, or the whole of them where two would be the same."""
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def label(record: Record, model: str, records: Sequence[Record]) -> str:
    """A model in words; where several folders are compared, with the name of its folder."""
    return label_of(model) if len(records) == 1 else f"{record.name}: {label_of(model)}"

"""Stage 4, if the teacher's scores are stored: one pass of the teacher over the training shards.

    distil-jax score --config configs/tiny.py --config.teacher.scores=stored

Writes scores/, a file for each shard of the corpus (data/scores.py says what is in it). A file appears under its name
only when it is whole, and what describes it, NAME.json, after it; a pass that was stopped goes on with the next file.
Process p of P takes the files p, p + P, ..., on its own devices. The scores depend on the tokenizers and the teacher,
and not on how W was fitted: which teacher tokens W maps is decided by bytes alone.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from distil_jax import hosts, learners
from distil_jax.data import scores
from distil_jax.data.loader import Loader, write_file
from distil_jax.losses.stored import LARGEST_CODE
from distil_jax.manifest import write_json_atomic
from distil_jax.metrics import Progress
from distil_jax.scorer import Scorer
from distil_jax.workdir import Stage, Workdir


def main(config: ConfigDict) -> dict[str, Any]:
    """Scores the training shards unless that is done; returns the manifest."""
    work = Workdir(config)
    if found := work.done("scores"):
        return found
    scores.check(config)
    work.require("corpus")
    stage = work.begin("scores")
    score_files(config, work, stage, hosts.index(), hosts.count())
    hosts.barrier("scores written")
    finish(config, work, stage)
    return work.require("scores")


def score_files(config: ConfigDict, work: Workdir, stage: Stage, process_index: int, process_count: int) -> None:
    """Writes the files of one process; what is there already stays as it is."""
    part = work.require("corpus")["shards"]["train"]
    mine = part["files"][process_index::process_count]
    missing = [shard for shard in mine if entry_of(stage.folder, shard) is None]
    if not missing:
        return
    if len(missing) < len(mine):
        there = f"{len(mine) - len(missing)} of {len(mine)} files are there already"
        print(f"scores: {there}; going on with {missing[0]['name']}", file=sys.stderr)
    rows = scores.total(mine, "records")
    mesh = learners.mesh_of_this_process(config)  # its files are its own, so its mesh is too
    with jax.set_mesh(mesh), Progress(rows, "score", start=rows - scores.total(missing, "records")) as progress:
        scorer = Scorer(config, work, mesh)
        for shard in missing:
            one = part | {"files": [shard], "records": shard["records"]}
            loader = Loader(work / "corpus", one, config.evaluation.batch_size, config.seed)
            counts = Counts(scorer.layout.top_k)
            entry = write_file(stage.folder / shard["name"], counts.records(scorer, loader, progress))
            entry |= vars(counts) | {"corpus_sha256": shard["sha256"]}
            write_json_atomic(stage.folder / facts_name(shard), entry)


class Counts:
    """What is counted while one file is written."""

    def __init__(self, top_k: int):
        self.top_k = top_k
        self.positions = 0
        self.most = 0  # positions of one row
        self.tokens = 0  # supervised tokens of the student
        self.clamped = 0  # logits too far below the largest for the fixed point
        self.error: dict[str, Any] = {"positions": 0}  # of storing, on a sample

    def records(self, scorer: Scorer, loader: Loader, progress: Progress) -> Iterator[bytes]:
        """The records of the loader's file."""
        left = loader.records
        for scored in scorer.sweep(loader.sweep()):
            if not self.error["positions"]:
                self.error = scorer.error(scored)
            self.positions += len(scored.kept.ids_NxK)
            self.most = max(self.most, *map(len, scored.positions))
            self.tokens += scored.tokens
            self.clamped += int((scored.kept.codes_NxK == LARGEST_CODE).sum())
            rows = min(loader.batch_size, left)  # a last batch is filled up
            left -= rows
            yield from itertools.islice(scored.records(scorer.layout), rows)
            progress.update(progress.step + rows, tokens=len(scored.kept.ids_NxK))


def facts_name(shard: dict[str, Any]) -> str:
    """The file that describes the score file of a corpus shard."""
    return f"{shard['name']}.json"


def entry_of(folder: Path, shard: dict[str, Any]) -> dict[str, Any] | None:
    """What describes the finished score file of a corpus shard; None if it is not there, or not of this shard."""
    file, facts = folder / shard["name"], folder / facts_name(shard)
    if not (file.is_file() and facts.is_file()):
        return None
    entry = json.loads(facts.read_text(encoding="utf-8"))
    same = entry["corpus_sha256"] == shard["sha256"] and entry["bytes"] == file.stat().st_size
    return entry if same else None


def finish(config: ConfigDict, work: Workdir, stage: Stage) -> dict[str, Any] | None:
    """Writes the manifest if the files of all processes are there, and returns it; None otherwise."""
    entries = [entry_of(stage.folder, shard) for shard in work.require("corpus")["shards"]["train"]["files"]]
    if None in entries:
        return None
    return stage.finish(**scores.summary(tuple(config.score.temperatures), entries))


if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))

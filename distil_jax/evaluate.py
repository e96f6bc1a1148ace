"""Stage 4: what each model makes of held-out text, side by side, with intervals over documents.

    distil-jax evaluate --config configs/tiny.py

Writes evaluate/manifest.json with one entry for the teacher, the untouched student and every trained student, and the
paired differences of every taught student to the models that no teacher taught, to the teacher, and to the rung below
it (variants.py).

bits_per_byte: the supervised text (a definition, given its question) in bits per byte of UTF-8. Bytes are the same for
    both tokenizers, so teacher and student compare. End-of-sequence tokens have no bytes and are left out.
token_accuracy: at root positions, where both tokenizations stand at the same byte, how often a model's most likely
    token is the true next token of its own tokenization. "Token-level accuracy retained" is the student's over the
    teacher's.
agreement_with_teacher: at root positions, how often the student's most likely token is the first piece of the
    teacher's.
by_class: bits per byte and accuracy of words, digits, whitespace, punctuation and bytes (eval/by_class.py).
retention: what each student keeps of the teacher, KL included, whole, by specialty and by class (eval/retention.py).

With config.evaluation.tasks every model also answers these benchmarks (docs/evaluation.md): answers/MODEL.json has the
log-likelihood of every choice, "benchmarks" of the manifest accuracies with intervals over items. Models without a
config: `distil-jax evaluate PATH --tasks ...` (eval/command.py).
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from distil_jax import learners, recipe, variants
from distil_jax.data.loader import Loader
from distil_jax.eval import bootstrap, likelihood, retention, stage_tasks
from distil_jax.eval.by_class import ByClass, ClassScores, Spans
from distil_jax.objective import Loss, Objective
from distil_jax.projection import Projection
from distil_jax.tokens import align
from distil_jax.tokens.align import CLASSES, ROOT
from distil_jax.workdir import Workdir

SPLIT = "test"
ALWAYS = ("teacher", "student_before")  # scored beside the runs


def main(config: ConfigDict) -> dict[str, Any]:
    """Scores every model on the test split, and on config.evaluation.tasks, unless that is done; returns the manifest.

    Models without a config and checkpoints of a run: `distil-jax evaluate MODEL --help`.
    """
    work = Workdir(config)
    if found := work.done("evaluate"):
        return found
    corpus = work.require("corpus")
    for run in config.runs:
        work.require(run)
    stage = work.begin("evaluate")
    mesh = learners.mesh_of(config)
    tables = learners.tables_of(work)
    e = config.evaluation
    tasks = stage_tasks.of(work, mesh, stage.folder)
    with jax.set_mesh(mesh):
        loader = Loader(work / "corpus", corpus["shards"][SPLIT], e.batch_size, 0)
        rows = collect(loader, e)
        W = Projection.load(work / "projection", teacher=tables["teacher"], student=tables["student"])
        teacher, teacher_params = learners.teacher(work, mesh)
        frozen = recipe.projected(W, teacher, teacher_params, mesh)

        @functools.cache  # the students are one model, which compiles once
        def scorer_of(side, model):
            return likelihood.make_scorer(
                model, side, block=config.objective.block, attention=config.attention, mesh=mesh
            )

        @functools.cache
        def apart_of(model):
            options = {"block": config.objective.block, "attention": config.attention, "mesh": mesh}
            kl_at_1 = jax.jit(Loss(Objective(model, teacher=teacher, positions="boundaries", **options)).kl_at_1)
            return lambda params, batch: kl_at_1(params, frozen, batch)

        def scored(side, model, params, name):
            tasks.answered_by(name, side, model, params)
            values = likelihood.sweep(scorer_of(side, model), params, loader.sweep(e.batch_size, e.rows), mesh)
            if side == "student":
                batches = loader.sweep(e.batch_size, e.rows)
                values |= likelihood.sweep(apart_of(model), params, batches, mesh, ("kl", "spoken"))
            values = {name: array[: len(loader.spread(e.rows))] for name, array in values.items()}
            return values | {"parameters": learners.count(params)}

        scores = {"teacher": scored("teacher", teacher, teacher_params, "teacher")}
        scores["student_before"] = scored("student", *learners.untrained(work, "student", mesh), "student_before")
        for run in config.runs:
            scores[run] = scored("student", *learners.trained(work, run, mesh), run)

    documents = Documents(rows, tables)
    results = {
        name: documents.measure(
            "teacher" if name == "teacher" else "student", values, scores["teacher"], W.best(), e
        )
        for name, values in scores.items()
    }
    kinds = documents.by_class(align.token_classes(tables["student"]))
    of_kinds = {name: documents.class_scores(kinds, name == "teacher", values) for name, values in scores.items()}
    for name, measures in results.items():
        measures["by_class"] = kinds.measures(of_kinds[name], e.bootstrap)
    facts: dict[str, Any] = {"documents": documents.count, "bytes": int(documents.bytes_D.sum()), "models": results}
    facts["classes"] = kinds.sizes()
    parts = documents.parts(corpus["specialties"], align.token_classes(tables["student"]))
    facts["retention"] = {
        name: documents.retention(values, scores["teacher"], W.best(), parts, e)
        for name, values in scores.items()
        if name != "teacher"
    }
    bits = {name: documents.bits(name == "teacher", values["nats"]) for name, values in scores.items()}
    compared = pairs(config.runs)
    facts["differences"] = {
        f"{other} - {run}": difference(bits[other], bits[run], documents.bytes_D, e) for other, run in compared
    }
    by_class = {f"{o} - {run}": kinds.difference(of_kinds[o], of_kinds[run], e.bootstrap) for o, run in compared}
    facts["differences_by_class"] = {
        kind: {pair: differences[kind] for pair, differences in by_class.items()} for kind in facts["classes"]
    }
    of_each = documents.of_each(corpus["specialties"])
    facts["bits_per_byte_by_specialty"] = {
        name: {model: float(bits_D[of].sum() / documents.bytes_D[of].sum()) for model, bits_D in bits.items()}
        for name, of in of_each.items()
    }
    facts["differences_by_specialty"] = {
        name: {
            f"{other} - {run}": difference(bits[other][of], bits[run][of], documents.bytes_D[of], e)
            for other, run in compared
            if other == variants.below(config.runs, run)
        }
        for name, of in of_each.items()
    }
    return stage.finish(**facts, **tasks.facts())


def collect(loader: Loader, e: ConfigDict) -> dict[str, np.ndarray]:
    """The rows that are scored, on the host: field -> [R, L]."""
    batches = list(loader.sweep(e.batch_size, e.rows))
    return {name: np.concatenate([b[name] for b in batches])[: len(loader.spread(e.rows))] for name in batches[0]}


def pairs(runs: Sequence[str]) -> list[tuple[str, str]]:
    """Which models are compared: (the other, a taught run)."""
    found = []
    for run in variants.taught(runs):
        others = [name for name in (*variants.UNTAUGHT, *ALWAYS) if name in (*runs, *ALWAYS)]
        lower = variants.below(runs, run)
        found += [(other, run) for other in dict.fromkeys([*others, lower]) if other]
    return found


def difference(bits_D: np.ndarray, minus_D: np.ndarray, bytes_D: np.ndarray, e: ConfigDict) -> dict[str, Any]:
    """Bits per byte of one model less another's, paired by document. Above 0: the second is better."""
    value, interval = bootstrap.ratio(bits_D, bytes_D, minus=minus_D, samples=e.bootstrap)
    return {"bits_per_byte": value, "interval": interval}


class Documents:
    """The test rows, seen as documents: what is needed to turn per-token scores into per-document sums."""

    def __init__(self, rows: dict[str, np.ndarray], tables: dict[str, Any]):
        self.rows = rows
        used = rows["student_segment_ids"] > 0
        ids, inverse = np.unique(rows["document"][used], return_inverse=True)
        self.count = len(ids)
        self.index = np.zeros(used.shape, np.int64)  # [R, Ls] -> 0..D-1
        self.index[used] = inverse
        self.teacher_index = self._teacher_index(used)
        self.size = {
            side: tables[side].lengths[rows[f"{side}_targets"]] * (rows[f"{side}_weights"] > 0)
            for side in ("student", "teacher")
        }
        self.bytes_D = self._sum(self.index, self.size["student"])
        if not np.array_equal(self.bytes_D, self._sum(self.teacher_index, self.size["teacher"])):
            raise AssertionError("both tokenizations of a document must supervise the same bytes")
        self.roots = (rows["role"] == ROOT) & (self.size["student"] > 0)
        self.specialty_D = np.zeros(self.count, np.int64)
        self.specialty_D[self.index[used]] = rows["specialty"][used]

    def _teacher_index(self, used: np.ndarray) -> np.ndarray:
        """Document of each teacher position: segments have the same numbers on both sides of a row."""
        lookup = np.zeros((len(used), int(self.rows["student_segment_ids"].max()) + 1), np.int64)
        r, c = np.nonzero(used)
        lookup[r, self.rows["student_segment_ids"][r, c]] = self.index[r, c]
        return np.take_along_axis(lookup, self.rows["teacher_segment_ids"].astype(np.int64), axis=1)

    def _sum(self, index: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(index.ravel(), values.ravel().astype(np.float64), minlength=self.count)

    def bits(self, of_teacher: bool, nats: np.ndarray) -> np.ndarray:
        """Bits of each document's bytes, [D]."""
        side, index = ("teacher", self.teacher_index) if of_teacher else ("student", self.index)
        return self._sum(index, nats * (self.size[side] > 0)) / np.log(2)

    def by_class(self, classes_V: np.ndarray) -> ByClass:
        """The supervised tokens by the student's classes. classes_V: class of each student id."""
        student = Spans.of(self.index, self.size["student"])
        teacher = Spans.of(self.teacher_index, self.size["teacher"])
        return ByClass(student, teacher, classes_V[student.at(self.rows["student_targets"])], self.count)

    def class_scores(self, kinds: ByClass, of_teacher: bool, values: dict[str, Any]) -> ClassScores:
        side = "teacher" if of_teacher else "student"
        return kinds.scores(side, values["nats"], values["prediction"] == self.rows[f"{side}_targets"])

    def of_each(self, specialties: Sequence[str]) -> dict[str, np.ndarray]:
        """Which documents each specialty has, [D] bool, of those that have any."""
        found = {name: self.specialty_D == i for i, name in enumerate(specialties)}
        return {name: of for name, of in found.items() if self.bytes_D[of].sum() > 0}

    def parts(self, specialties: Sequence[str], classes_V: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """The student's positions by specialty and by class of their target: kind -> name -> [R, L] bool."""
        of = classes_V[self.rows["student_targets"]]
        of_specialty = {name: documents[self.index] for name, documents in self.of_each(specialties).items()}
        of_class = {name: of == i for i, name in enumerate(CLASSES)}
        return {"all": {"all": np.ones_like(self.roots)}, "by_specialty": of_specialty, "by_class": of_class}

    def retention(
        self, values: dict[str, Any], teacher: dict[str, Any], first_piece: np.ndarray, parts: Any, e: ConfigDict
    ) -> dict[str, Any]:
        """What a student keeps of the teacher (eval/retention.py): the whole, `by_specialty` and `by_class`."""
        says, teacher_right = self._teacher_says(teacher)
        right = values["prediction"] == self.rows["student_targets"]
        agree = values["prediction"] == first_piece[says]
        spoken = values["spoken"] & (self.size["student"] > 0)
        kept = retention.Kept(self.roots, right, teacher_right, agree, values["kl"], spoken)
        found = {kind: retention.measures(kept, self.index, of, e.bootstrap) for kind, of in parts.items()}
        return found.pop("all")["all"] | found

    def _teacher_says(self, teacher: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's most likely token where it speaks about each student position, and whether it is right."""
        at = self.rows["teacher_position"].astype(np.int64)
        says = np.take_along_axis(teacher["prediction"], at, axis=1)
        return says, says == np.take_along_axis(self.rows["teacher_targets"], at, axis=1)

    def measure(
        self, side: str, values: dict[str, Any], teacher: dict[str, Any], first_piece: np.ndarray, e: ConfigDict
    ) -> dict[str, Any]:
        """The measures of one model (module docstring) with their intervals."""
        says, right = self._teacher_says(teacher)
        agree = np.ones_like(right)
        if side == "student":
            right = values["prediction"] == self.rows["student_targets"]
            agree = values["prediction"] == first_piece[says]
        roots_D = self._sum(self.index, self.roots)
        measures: dict[str, Any] = {"parameters": int(values["parameters"])}
        for name, top, bottom in (
            ("bits_per_byte", self.bits(side == "teacher", values["nats"]), self.bytes_D),
            ("token_accuracy", self._sum(self.index, right & self.roots), roots_D),
            ("agreement_with_teacher", self._sum(self.index, agree & self.roots), roots_D),
        ):
            value, interval = bootstrap.ratio(top, bottom, samples=e.bootstrap)
            measures |= {name: value, f"{name}_interval": interval}
        return measures


if __name__ == "__main__":
    from distil_jax.cli import stage_main

    sys.exit(stage_main(main))

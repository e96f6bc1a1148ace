"""`make_examples` over processes: the same examples and errors, in the same order, for any number of them.

Encoding takes threads as it is (the tokenizers library), four fifths of the work and more, so that processes share the
rest, which is Python's. Each of them loads both tables, two to three seconds and 370 MB for Gemma 3 and Llama 3. They
pay for large corpora on more than two cores (bench/tokens.py).
"""

import multiprocessing
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from distil_jax.errors import UserError
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.pack import Example, make_examples

POOL_PAYS = 32_000_000  # characters below which this process alone is as fast, or uses less for the same
_ROWS = 512  # documents that a process takes at a time
_FIELDS = {
    "student_tokens": "student",
    "student_supervised": "student",
    "role": "student",
    "teacher_index": "student",
    "offset": "student",
    "teacher_tokens": "teacher",
    "teacher_supervised": "teacher",
}
_tables: dict[str, ByteTable] = {}  # of a worker process, set once by `_start`


class _Bundle(NamedTuple):
    """Examples end to end: a few large arrays pass between processes faster than many small ones."""

    columns: dict[str, np.ndarray]
    ends: dict[str, np.ndarray]  # of each example in the columns of the side
    specialties: list[int]
    documents: list[int]
    rejected: list[tuple[int, UserError]]


def examples_of(
    rows: Sequence[Mapping[str, Any]], student: ByteTable, teacher: ByteTable, processes: int = 1
) -> tuple[list[Example], list[tuple[int, UserError]]]:
    """`make_examples(rows, student, teacher)`, by so many processes.

    processes: 1: this one; n: n others; 0: as many others as there are cores, or this one if that does not pay: for
      less text than POOL_PAYS, or on one or two cores. A script that asks for others must guard its main module, as
      Python's spawn needs.

    UserError if a process dies, for example for want of memory.
    """
    if processes < 0:
        raise UserError(f"config.data.processes is {processes}: 0 means as many as cores, 1 this process alone")
    if processes == 0:
        length = sum(_characters(row) for row in rows)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = cores if length >= POOL_PAYS and cores > 2 else 1
    chunks = [(start, rows[start : start + _ROWS]) for start in range(0, len(rows), _ROWS)]
    processes = min(processes, len(chunks))
    examples: list[Example] = []
    rejected: list[tuple[int, UserError]] = []
    if processes <= 1:
        for chunk in chunks:  # in pieces here too: what the encoder returns takes 100 bytes a token until it is read
            found, refused = _examples(chunk, student, teacher)
            examples.extend(found)
            rejected.extend(refused)
        return examples, rejected

    tables = pickle.dumps({"student": student, "teacher": teacher})  # once, not once for each process
    # Not fork: JAX has threads, and their locks would stay shut in a copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=(tables,)) as pool:
        try:
            for bundle in pool.map(_work, chunks):
                examples.extend(_unbundle(bundle))
                rejected.extend(bundle.rejected)
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {processes} processes that align the text died, perhaps for want of memory: give "
                "config.data.processes=1, or fewer of them"
            ) from error
    return examples, rejected


def _characters(row: Mapping[str, Any]) -> int:
    said = sum(len(message["content"]) for message in row.get("messages") or ())
    return len(row["prompt"]) + len(row["completion"]) + said


def _examples(
    chunk: tuple[int, Sequence[Mapping[str, Any]]], student: ByteTable, teacher: ByteTable
) -> tuple[list[Example], list[tuple[int, UserError]]]:
    """`make_examples` of a chunk, (number of its first row, its rows), with the rows' own numbers."""
    start, rows = chunk
    numbered = [{"document": start + n} | dict(row) for n, row in enumerate(rows)]
    examples, rejected = make_examples(numbered, student, teacher)
    return examples, [(start + n, error) for n, error in rejected]


def _start(tables: bytes) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes have the cores already
    _tables.update(pickle.loads(tables))


def _work(chunk: tuple[int, Sequence[Mapping[str, Any]]]) -> _Bundle:
    examples, rejected = _examples(chunk, _tables["student"], _tables["teacher"])
    return _Bundle(
        columns={field: np.concatenate([e[field] for e in examples]) for field in _FIELDS if examples},
        ends={
            side: np.cumsum([len(e[f"{side}_tokens"]) for e in examples], dtype=np.int64)
            for side in ("student", "teacher")
        },
        specialties=[e["specialty"] for e in examples],
        documents=[e["document"] for e in examples],
        rejected=rejected,
    )


def _unbundle(bundle: _Bundle) -> Iterator[Example]:
    starts = dict.fromkeys(bundle.ends, 0)
    for n, (specialty, document) in enumerate(zip(bundle.specialties, bundle.documents, strict=True)):
        ends = {side: int(bundle.ends[side][n]) for side in starts}
        own = {f: bundle.columns[f][starts[side] : ends[side]] for f, side in _FIELDS.items()}
        yield Example(**own, specialty=specialty, document=document)
        starts = ends

"""The byte tables, the support of W, alignment and `prepare`'s processes, with the real Gemma 3 and Llama 3 tokenizers.

    python bench/tokens.py TOKENIZERS [--processes 1,2] [--megabytes 32]

TOKENIZERS holds gemma3/ and llama3/. The text is the Human Phenotype Ontology's definitions, repeated. Each measure is
a process of its own, so that its peak memory is its own. The table is in bench/RESULTS.md.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

GEMMA, LLAMA = "gemma3", "llama3"


def table(folder: Path, name: str):
    from distil_jax.tokens.bytes import ByteTable

    return ByteTable.from_tokenizer(folder / name)


def corpus() -> list[str]:
    from distil_jax.data import hpo
    from distil_jax.data.rows import Quarantine

    with Quarantine("/dev/null") as quarantine:
        return [row.completion for row in hpo.load_corpus(quarantine).rows]


def imports(folder: Path) -> dict:
    """What the others hold before they begin: the libraries."""
    import distil_jax.projection  # noqa: F401

    return {}


def tables(folder: Path) -> dict:
    gemma, llama = (
        {t.token_bytes(i) for i in t.is_text.nonzero()[0]} for t in (table(folder, GEMMA), table(folder, LLAMA))
    )
    return {"identical": len(gemma & llama)}


def support(folder: Path) -> dict:
    """Both tables and W without a corpus."""
    from distil_jax.projection import Projection

    start = time.perf_counter()
    teacher, student = table(folder, GEMMA), table(folder, LLAMA)
    seconds = {"tables_seconds": time.perf_counter() - start}
    start = time.perf_counter()
    w = Projection.build(teacher=teacher, student=student)
    return seconds | {"build_seconds": time.perf_counter() - start, "mapped": int(w.mapped.sum())}


def alignment(folder: Path, length: int = 2048) -> dict:
    """One document of so many student tokens, encoded before the clock starts."""
    from distil_jax.tokens.align import align_ids

    teacher, student = table(folder, GEMMA), table(folder, LLAMA)
    ids = student.encode(" ".join(corpus()[:400]))[:length]
    text = student.decode_bytes(ids).decode()
    student_ids, teacher_ids = student.encode(text), teacher.encode(text)
    align_ids(student_ids, teacher_ids, student, teacher)
    runs = []
    for _ in range(200):
        start = time.perf_counter()
        align_ids(student_ids, teacher_ids, student, teacher)
        runs.append(time.perf_counter() - start)
    return {"student_tokens": len(student_ids), "align_ms": 1e3 * sorted(runs)[len(runs) // 2]}


def prepare(folder: Path, megabytes: float, short: bool) -> dict:
    """Examples of so much text: a definition each, or 8,000 characters each."""
    from distil_jax.tokens.pack import make_examples

    teacher, student = table(folder, GEMMA), table(folder, LLAMA)
    texts = corpus()
    texts *= 1 + int(megabytes * 1e6 / sum(map(len, texts)))
    if not short:
        whole = " ".join(texts)
        texts = [whole[n : n + 8000] for n in range(0, len(whole), 8000)]
    kept, size = [], 0.0
    for text in texts:
        if size >= megabytes * 1e6:
            break
        kept.append({"prompt": "", "completion": text})
        size += len(text)
    start = time.perf_counter()
    examples, rejected = [], []
    for first in range(0, len(kept), 512):  # as shard.py does
        found, refused = make_examples(kept[first : first + 512], student, teacher)
        examples += found
        rejected += refused
    seconds = time.perf_counter() - start
    tokens = sum(len(e["student_tokens"]) for e in examples)
    return {"documents": len(examples), "rejected": len(rejected), "tokens": tokens, "prepare_seconds": seconds}


def _measure(function, arguments, results) -> None:
    start = time.perf_counter()
    found = function(*arguments) | {"seconds": time.perf_counter() - start}
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    found |= {
        "cpu_seconds": own.ru_utime + own.ru_stime,
        "cpu_seconds_of_children": children.ru_utime + children.ru_stime,
    }
    results.put(found | {"peak_mb": own.ru_maxrss / 1024})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("--megabytes", type=float, default=32)
    asked = parser.parse_args()
    measures = [(imports, ()), (tables, ()), (support, ()), (alignment, ())]
    measures += [(prepare, (asked.megabytes, short)) for short in (True, False)]
    context = multiprocessing.get_context("spawn")
    for function, arguments in measures:
        results = context.Queue()
        process = context.Process(target=_measure, args=(function, (asked.tokenizers, *arguments), results))
        process.start()
        found = results.get()
        process.join()
        shown = {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}
        print(f"{function.__name__}{arguments}", json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()

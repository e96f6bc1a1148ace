"""`prepare` of the medical corpus beside tokenising the same text twice: seconds, rows a second, memory, packing.

    python bench/corpus.py TOKENIZERS [--rows 200000 --processes 2 --folder DIR]

TOKENIZERS holds gemma3/ and llama3/. The files are made here: every one of the 18 sources in its schema and in its
share of the real rows, with sentences of the Human Phenotype Ontology drawn at random, 800 bytes a row; one row in a
hundred repeats another with a word more, and one in a thousand holds a benchmark's question. Mending, near duplicates,
personal data and decontamination are on. Tokenising alone is both tokenizers' encode_batch over the rows that
`prepare` kept, in this process with the threads that it takes by itself.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distil_jax.data import blocks, catalogue, hpo
from distil_jax.data.rows import Quarantine

TINY = str(Path(__file__).resolve().parent.parent / "configs" / "tiny.py")
SHAPE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip
MODELS = {
    "gemma3": {"model_type": "gemma3_text", "vocab_size": 262144, "sliding_window": 64, **SHAPE},
    "llama3": {"model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5, "rms_norm_eps": 1e-5, **SHAPE},
}
UNSTATED = 10_000  # rows of the sources that do not say how many they have
BENCHMARK = 2_000  # questions
BATCH = 20_000  # records written at once


class Memory(threading.Thread):
    """The largest sum of proportional set sizes (what is shared counts once) of this process and those it started."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(2):
            total = 0
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError, StopIteration):
                    parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
                    if os.getpid() in (parent, int(stat.parent.name)):
                        lines = (stat.parent / "smaps_rollup").read_text().splitlines()
                        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        self.done.set()
        self.join()
        return self.peak


class Sentences:
    """Random text that is nowhere twice."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        with Quarantine(Path(tempfile.mkdtemp()) / "quarantine.jsonl") as quarantine:
            rows = hpo.load_corpus(quarantine).rows
        self.all = [row.completion.strip() for row in rows]
        words = sorted({word for text in self.all for word in text.split()})
        self.of_benchmarks = [" ".join(self.random.sample(words, 20)) + "?" for _ in range(BENCHMARK)]

    def text(self, size: float) -> str:
        """About so many characters in the mean, as different in length as real texts are."""
        size *= self.random.lognormvariate(-0.25, 0.7)
        out = []
        while size > 0:
            words = self.random.choice(self.all).split(" ")
            start = self.random.randrange(max(1, len(words) - 8))
            out.append(" ".join(words[start : start + 24]))
            size -= len(out[-1]) + 1
        return " ".join(out)


def record(source: catalogue.Source, number: int, s: Sentences) -> dict:
    """A record in the source's schema."""
    question = f"What is said of {s.text(60)}?"
    if source.columns == catalogue.ALPACA:
        return {"instruction": "Answer this question truthfully", "input": question, "output": s.text(480)}
    if source.name == "medmcqa":
        options = {f"op{letter}": s.text(30) for letter in "abcd"}
        more = {"cop": number % 4, "choice_type": "single", "exp": s.text(250)}
        more |= {"subject_name": "Medicine", "topic_name": "Cardiology"}
        return {"question": s.text(120) + "?", **options, **more}
    if "answer_idx" in source.columns:
        return {
            "question": s.text(500) + "?", "answer_idx": "ABCD"[number % 4], "meta_info": "step1", "answer": "",
            "options": {letter: s.text(30) for letter in "ABCD"},
        }  # fmt: skip
    return {
        "mmlu": lambda: {"question": s.text(150), "subject": "anatomy", "answer": 1,
                         "choices": [s.text(20) for _ in range(4)]},
        "pubmedqa": lambda: {"pubid": number, "question": question, "long_answer": s.text(250),
                             "context": {"contexts": [s.text(300)] * 2, "meshes": ["Humans", "Heart Failure"]},
                             "final_decision": "yes"},
        "covid_qa": lambda: paper(question, s),
        "medquad": lambda: {"question": question, "answer": s.text(500) if number % 3 == 0 else None,
                            "question_type": "information", "question_focus": s.text(20), "category": "Heart Diseases"},
    }.get(source.name, lambda: {"text": s.text(3000)})()  # fmt: skip


def paper(question: str, s: Sentences) -> dict:
    text = s.text(3000)
    middle = len(text) // 2
    return {
        "question": question,
        "context": text,
        "answers": {"text": [text[middle : middle + 60]], "answer_start": [middle]},
    }


def write_sources(root: Path, wanted: int) -> int:
    """Files of all sources with `wanted` rows in their real proportions, and exam.jsonl; returns the records."""
    s, written, exam = Sentences(0), 0, []
    # A record of pubmedqa gives two rows, a third of medquad's give one.
    yields = {"pubmedqa": 2, "medquad": 1 / 3}
    whole = sum((source.rows or UNSTATED) * yields.get(source.name, 1) for source in catalogue.SOURCES)
    for source in catalogue.SOURCES:
        count = max(20, round((source.rows or UNSTATED) * wanted / whole))
        for at, part in enumerate(source.parts):
            folder = root / source.hub_id / part.config
            folder.mkdir(parents=True, exist_ok=True)
            writer = None
            for start in range(0, -(-count // len(source.parts)), BATCH):
                records = [
                    record(source, at * 10**7 + n, s)
                    for n in range(start, min(start + BATCH, -(-count // len(source.parts))))
                ]
                records = [{name: r[name] for name in source.columns_of(part)} for r in records]
                for n in range(100, len(records), 100):
                    key = next(k for k in ("output", "exp", "long_answer", "text", "question") if k in records[n])
                    records[n] = records[n - 1] | {key: (records[n - 1][key] or "") + " again"}
                for n in range(500, len(records), 1000):
                    key = next((k for k in ("input", "question") if k in records[n]), None)
                    if key and len(exam) < BENCHMARK:
                        exam.append({"question": s.of_benchmarks[len(exam)], "id": str(len(exam))})
                        records[n][key] = exam[-1]["question"]
                table = pa.Table.from_pylist(records)
                writer = writer or pq.ParquetWriter(folder / f"{part.split}-00000-of-00001.parquet", table.schema)
                writer.write_table(table)
                written += len(records)
            writer.close()
    exam += [{"question": s.of_benchmarks[n], "id": str(n)} for n in range(len(exam), BENCHMARK)]
    (root / "exam.jsonl").write_text("".join(json.dumps(item) + "\n" for item in exam))
    return written


def main() -> None:
    # Here, since the processes that `prepare` starts import this module too.
    from distil_jax import prepare
    from distil_jax.config import load_config
    from distil_jax.tokens.bytes import ByteTable

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the files and the corpus here")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp())
    if not (folder / "sources").exists():
        # In a process of its own: what that takes is not what `prepare` takes.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            written = pool.submit(write_sources, folder / "sources", asked.rows).result()
        print(f"{written:,} records written", flush=True)
    for name, config in MODELS.items():
        if not (folder / name).exists():
            shutil.copytree(asked.tokenizers / name, folder / name)
            (folder / name / "config.json").write_text(json.dumps(config))
    names = ",".join(source.name for source in catalogue.SOURCES)
    values = {
        "workdir": folder / "work", "data.sources": names, "data.root": folder / "sources", "data.mend": True,
        "data.duplicates": "near", "data.personal": "report", "data.benchmarks": folder / "sources" / "exam.jsonl",
        "data.student_length": 1024, "data.teacher_length": 1024, "data.processes": asked.processes,
        "teacher.path": folder / "gemma3", "student.path": folder / "llama3",
    }  # fmt: skip
    config = load_config(["--config", TINY, *(f"--config.{key}={value}" for key, value in values.items())])[0]
    memory = Memory()
    start = time.perf_counter()
    made = prepare.main(config)
    seconds = time.perf_counter() - start
    peak = memory.stop()
    rows = sum(made["rows"].values())
    train = made["shards"]["train"]
    print(json.dumps({k: made[k] for k in ("quarantined", "mended")}))
    print(f"filled: student {train['student_fill']}, teacher {train['teacher_fill']}")
    print(f"prepare: {seconds:.1f} s, {rows / seconds:,.0f} rows/s; {peak / 1e6:,.0f} MB, all processes together")

    facts = blocks.facts(folder / "work" / "corpus" / "rows")
    texts = [t for n in range(len(facts)) for row in blocks.read(folder / "work" / "corpus" / "rows", n)
             for t in (row.prompt, row.completion)]  # fmt: skip
    tables = [ByteTable.from_tokenizer(folder / name) for name in MODELS]
    start = time.perf_counter()
    for table in tables:
        for at in range(0, len(texts), 1024):
            table._tokenizer.encode_batch_fast(texts[at : at + 1024], add_special_tokens=False)
    alone = time.perf_counter() - start
    size = sum(len(text.encode()) for text in texts)
    print(f"tokenising twice, {size / 1e6:.0f} MB: {alone:.1f} s; prepare takes {seconds / alone:.2f} times that")


if __name__ == "__main__":
    main()

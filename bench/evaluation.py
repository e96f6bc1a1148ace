"""Native scoring beside lm-evaluation-harness's own model on torch, CPU, float32: the same weights and items, in turns.

    python bench/evaluation.py [smollm135m|small] [items] [rounds]

MMLU-like questions made of the Human Phenotype Ontology (a definition, four names), five examples before each. Both
sides get texts and give log-likelihoods: tokenising is in the time, compiling is not (the first call, printed). The
harness runs at the fastest of a few batch sizes. Choices must be identical.
"""

import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

SHAPES = {
    "smollm135m": dict(
        model_type="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "small": dict(
        model_type="llama", vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
}  # fmt: skip
BATCH_SIZES = {"small": (1, 4, 16), "smollm135m": (1, 4, 8)}  # the larger one's logits at 16 are 2 GB


def main(name: str = "smollm135m", items: int = 16, rounds: int = 3) -> None:
    from distil_jax.data.train_tokenizers import train_llama_style
    from distil_jax.models import model_from_config, save_pretrained

    rows = questions(items + 5)
    pairs = prompts(rows)
    with tempfile.TemporaryDirectory() as folder:
        texts = [f"{row['question']} {' '.join(row['choices'])}\nA. B. C. D. Answer:" for row in questions(2000)]
        tokenizer = train_llama_style(texts, 4096, Path(folder) / "tokenizer")
        model = model_from_config(SHAPES[name])
        params = jax.jit(model.init)(jax.random.key(0))
        save_pretrained(model, params, Path(folder) / "model", tokenizer=tokenizer)
        del params
        compare(name, Path(folder) / "model", pairs, rounds)


def questions(count: int) -> list[dict]:
    """Rows in MMLU's schema, drawn from the ontology."""
    from distil_jax.data import hpo
    from distil_jax.data.rows import Quarantine

    with tempfile.TemporaryDirectory() as folder, Quarantine(Path(folder) / "quarantine.jsonl") as quarantine:
        terms = [row for row in hpo.load_corpus(quarantine).rows if 80 < len(row.completion) < 400]
    rng = np.random.default_rng(0)
    made = []
    for index in rng.permutation(len(terms))[:count]:
        others = rng.permutation(len(terms))[:3]
        names = [terms[i].prompt.replace("Question: ", "").replace("\nAnswer:", "") for i in (index, *others)]
        order = rng.permutation(4)
        question = f"Which of the following is asked about in this text?{terms[index].completion}"
        made.append({"question": question, "choices": [names[i] for i in order], "answer": int(np.argmin(order))})
    return made


def prompts(rows: list[dict]) -> list[tuple[str, str]]:
    """Five shots, as mmlu_anatomy writes them."""
    from distil_jax.eval.prompts import DELIMITER, items
    from distil_jax.eval.tasks import TASKS

    made = items(TASKS["mmlu_anatomy"], rows[5:], rows[:5], 5)
    return [(item.context, DELIMITER + choice) for item in made for choice in item.choices]


def compare(name: str, folder: Path, pairs: list[tuple[str, str]], rounds: int) -> None:
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from distil_jax.eval.encoding import Encoder
    from distil_jax.eval.scoring import Scorer
    from distil_jax.models import load_pretrained

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, params = load_pretrained(folder)
    encoder, scorer = Encoder(transformers.AutoTokenizer.from_pretrained(folder)), Scorer(model, params)
    harness = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]

    def native():
        return [score.nats for score in scorer(encoder.requests(pairs))]

    def theirs():
        return [nats for nats, _ in harness.loglikelihood(instances, disable_tqdm=True)]

    compiling, ours = timed(native)
    work = scorer.work
    print(f"{name}: {len(pairs) // 4} items, {work.asked // len(pairs)} tokens a request; native computes", end=" ")
    print(f"{work.computed} tokens in {len(work.shapes)} programs; first call, with compiling, {compiling:.1f} s")
    tried = {}
    for size in BATCH_SIZES[name]:
        harness.batch_size_per_gpu = size
        tried[size], want = timed(theirs)
    best = min(tried, key=tried.__getitem__)
    harness.batch_size_per_gpu = best
    print("harness, seconds by batch size:", {size: round(s, 1) for size, s in tried.items()})
    seconds: dict[str, list[float]] = {"native": [], "harness": []}
    for _ in range(rounds):
        for side, run in (("native", native), ("harness", theirs)):
            seconds[side].append(timed(run)[0])
    ours, want = np.reshape(ours, (-1, 4)), np.reshape(want, (-1, 4))
    same = (ours.argmax(1) == want.argmax(1)).mean()
    medians = {side: statistics.median(s) for side, s in seconds.items()}
    ours_s, theirs_s = medians["native"], medians["harness"]
    print(f"median of {rounds}: native {ours_s:.2f} s, harness at batch size {best} {theirs_s:.2f} s")
    print(f"ratio {theirs_s / ours_s:.2f}; same choice {same:.1%}; ", end="")
    print(f"largest difference {np.abs(ours - want).max():.1e} nats")


def timed(run):
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))

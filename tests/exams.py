"""Exams for the tests of evaluation: files of every benchmark as a clone of the hub has them, and small models."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from distil_jax.data.train_tokenizers import train_gemma_style, train_llama_style
from distil_jax.eval.tasks import SIX

WORDS = (
    "heart lung vein of the a which patient drug dose 12 mg/kg fever β-blocker naïve  and is most likely acute "
    "{{curly}} Crohn’s \t 37.5°C enzyme gene virus cell wall diet iron vitamin D B12 retina nerve muscle"
).split(" ")


def phrase(rng: random.Random, low: int = 1, high: int = 6) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high))).strip() or "none"


def mmlu(rng):
    question = rng.choice(["", " "]) + phrase(rng, 6, 20) + rng.choice(["?", "?  ", ":\n"])
    choices = [phrase(rng) for _ in range(4)]
    return {"question": question, "subject": "s", "choices": choices, "answer": rng.randrange(4)}


def medmcqa(rng):
    options = {f"op{letter}": phrase(rng) for letter in "abcd"}
    return {"id": str(rng.random()), "question": phrase(rng, 6, 20), **options, "cop": rng.randrange(4), "exp": None}


def medqa(rng):
    ends = {f"ending{i}": phrase(rng) for i in range(4)}
    return {"id": "x", "sent1": phrase(rng, 10, 40), "sent2": "", **ends, "label": rng.randrange(4)}


def pubmedqa(rng):
    contexts = [phrase(rng, 10, 20) for _ in range(rng.randint(1, 3))]
    return {"QUESTION": phrase(rng, 5, 9), "CONTEXTS": contexts, "final_decision": rng.choice(["yes", "no", "maybe"])}


def headqa(rng):
    answers = [{"aid": i, "atext": phrase(rng, 1, 5)} for i in range(1, rng.choice([4, 5]) + 1)]
    return {"qtext": phrase(rng, 5, 12), "answers": answers, "ra": rng.randint(1, len(answers)), "qid": "1"}


def careqa(rng):
    return {"question": phrase(rng, 5, 12), **{f"op{i}": phrase(rng) for i in range(1, 5)}, "cop": rng.randint(1, 4)}


def write_all(root: Path, items: int = 7, examples: int = 9) -> Path:
    """Files of the 13 tasks under `root`, in the layouts that their repositories have."""
    rng = random.Random(3)
    for subject in (*SIX, "nutrition", "virology"):
        folder = root / "mmlu" / subject
        folder.mkdir(parents=True)
        for split, count in (("test", items), ("dev", 5), ("validation", 3)):
            rows = [mmlu(rng) for _ in range(count)]
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    write(root / "medmcqa/data/train-00000-of-00001.parquet", [medmcqa(rng) for _ in range(examples)])
    write(root / "medmcqa/data/validation-00000-of-00001.parquet", [medmcqa(rng) for _ in range(items)])
    for split, count in (("train", examples), ("dev", 3), ("test", items)):
        write(root / f"GBaker--MedQA-USMLE-4-options-hf/{split}.json", [medqa(rng) for _ in range(count)])
    for split, count in (("train", examples), ("test", items)):
        rows = [pubmedqa(rng) for _ in range(count)]
        write(root / f"bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source/{split}.jsonl", rows)
        write(root / f"headqa/en/{split}.jsonl", [headqa(rng) for _ in range(count)])
    lost = careqa(rng) | {"question": None}
    write(root / "CareQA/CareQA_en.json", [careqa(rng) for _ in range(items - 1)] + [lost], array=True)
    write(root / "CareQA/CareQA_es.json", [careqa(rng)], array=True)
    return root


def write(file: Path, rows: list[dict], array: bool = False) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif array:
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return file


def random_model(directory: Path, family: str, *, max_positions: int = 1024) -> Path:
    """A Hugging Face directory with random weights whose answers are far from each other, and a tokenizer."""
    texts = [" ".join(WORDS), "Question: Choices:\nA. B. C. D. Answer: yes no maybe Abstract multiple choice"] * 3
    train = train_llama_style if family == "llama" else train_gemma_style
    tokenizer = train(texts, 330, directory)
    sizes = dict(
        vocab_size=336,  # more rows than tokens, as released models have
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if family == "llama":
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=False)
    else:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = transformers.Gemma3TextConfig(
            **sizes, num_hidden_layers=3, head_dim=16, query_pre_attn_scalar=16, sliding_window=24, layer_types=kinds
        )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight, parameter in model.named_parameters():
        at = 1.0 if "norm" in weight and family == "llama" else 0.0
        std = 0.05 if "embed" in weight else 0.3
        parameter.data = at + std * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory

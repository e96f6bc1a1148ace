"""The training step of TRL's GOLD at the size of bench/step.py: what it refuses, seconds a step, peak of memory
above what the process held before it loaded the models.

    python3 -m venv TRL && TRL/bin/pip install torch==2.13.0 transformers trl
    TRL/bin/python bench/gold.py TEACHER_DIR STUDENT_DIR BYTE_LEVEL_TOKENIZER_DIR DOCUMENTS.jsonl [--steps 6]

Runs in an environment of its own and needs nothing of distil_jax. The models are those of bench/small_checkpoints.py,
float32. GOLD aligns byte-level tokenizers only, so the teacher keeps Gemma's layers and its 262,144 logits but reads
text through the byte-level tokenizer of the third folder (Llama 3's: its ids are below 262,144): the cost is the
teacher's, and the weights are random anyway. The fourth argument is corpus/documents.jsonl of a prepared work folder.
Everything is off-policy (lmbda 0): nothing is generated.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer


def resident(line: str) -> int:
    """Bytes, of this process: VmRSS now, VmHWM at the peak."""
    with open("/proc/self/status") as lines:
        return next(int(text.split()[1]) for text in lines if text.startswith(line)) * 1024


def give_back() -> None:
    """Hands what was freed back to the system, so that it does not count as resident (as bench/memory.py)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class Clock(TrainerCallback):
    """Seconds of each optimiser step: batch, both forward passes, loss, backward pass, clipping, update."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.started)
        if state.global_step == 1:
            give_back()
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts again: loading is not measured


def trained(args, tokenizer: str, rows: list[dict[str, str]], steps: int) -> list[float]:
    """Seconds of each of `steps` steps."""
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # noqa: E731
    student_tokenizer = AutoTokenizer.from_pretrained(args.student)
    if student_tokenizer.pad_token is None:
        student_tokenizer.pad_token = student_tokenizer.eos_token
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = GOLDConfig(
            output_dir=folder,
            per_device_train_batch_size=args.rows,
            max_length=args.length,
            max_completion_length=args.length - 1,  # of what it would generate
            max_steps=steps,
            use_uld_loss=True,
            uld_use_hybrid_loss=args.hybrid,
            uld_crossentropy_weight=0.5,
            uld_distillation_weight=0.5,
            lmbda=0.0,
            teacher_tokenizer_name_or_path=tokenizer,
            learning_rate=1e-5,
            weight_decay=0.01,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            gradient_checkpointing=args.gradient_checkpointing,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GOLDTrainer(
            load(args.student),
            load(args.teacher),
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=student_tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds


PROMPT = "Definitions:"  # GOLD needs one; a row that is too long would lose it


def filled(texts: list[str], tokenizer, rows: int, length: int) -> list[dict[str, str]]:
    """`rows` rows of running text, each as many words as make `length` tokens with the prompt and an eos."""
    words, out = " ".join(texts).split(" "), []
    while len(out) < rows:
        taken = length
        while len(tokenizer(PROMPT + " " + " ".join(words[:taken])).input_ids) >= length:
            taken -= 1
        out.append({"prompt": PROMPT, "completion": " " + " ".join(words[:taken])})
        words = words[taken:]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("tokenizer")
    parser.add_argument("documents")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=126)
    parser.add_argument("--steps", type=int, default=6, help="timed, after one that warms up")
    parser.add_argument("--hybrid", action="store_true", help="uld_use_hybrid_loss, which is off by default")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="TRL's default is on")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    print({name: version(name) for name in ("trl", "transformers", "torch")})

    with open(args.documents) as lines:
        texts = [(row["prompt"] + row["completion"]).strip() for row in map(json.loads, lines)]
    rows = filled(texts, AutoTokenizer.from_pretrained(args.student), args.rows * (args.steps + 1), args.length)
    try:
        trained(args, args.teacher, rows, 1)
    except NotImplementedError as error:
        print(f"with the teacher's own tokenizer: NotImplementedError: {error}")
    else:
        raise SystemExit("GOLD took the teacher's own tokenizer: measure that instead")
    give_back()
    before = resident("VmRSS")
    first, *seconds = trained(args, args.tokenizer, rows, args.steps + 1)
    peak = (resident("VmHWM") - before) / 2**30
    print(
        f"{args.rows} x {args.length} tokens: {statistics.median(seconds):.2f} s a step (first {first:.2f}, then "
        f"{min(seconds):.2f} to {max(seconds):.2f}), {peak:.2f} GiB at the peak"
    )


if __name__ == "__main__":
    main()

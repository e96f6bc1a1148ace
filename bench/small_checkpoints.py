"""Random checkpoints of exactly the shapes of Gemma 3 270M and SmolLM2 135M, with tokenizers, for runs without a hub.

    python bench/small_checkpoints.py OUT_DIR --gemma-tokenizer DIR --llama-tokenizer DIR [--dtype bfloat16]

Writes OUT_DIR/gemma-3-270m and OUT_DIR/smollm2-135m as Hugging Face directories. They know nothing, but cost what the
released models cost: time and memory of configs/gemma270m_smollm135m.py can be measured with them.

--gemma-tokenizer: a folder with Gemma 3's own tokenizer.json. --llama-tokenizer: a folder with a byte-level BPE
tokenizer.json of at least 49,135 ranks (Llama 3's); its first ranks become a tokenizer of the student's size, in the
pipeline of SmolLM2: seventeen control tokens first, digits one by one, GPT-2's split.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distil_jax.models import hub

GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
SMOLLM = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
END = "<|endoftext|>"  # begins and ends a document, as in SmolLM2
CONTROL = (END, "<|im_start|>", "<|im_end|>", *(f"<|reserved_{n}|>" for n in range(14)))


def write_model(fields: dict, directory: Path, tokenizer: object, dtype: str, seed: int) -> int:
    """A random model of that config.json; returns its number of parameters."""
    model = hub.model_from_config(fields)
    params = model.init(jax.random.key(seed), dtype)
    hub.save_pretrained(model, params, directory, tokenizer=tokenizer)
    return sum(p.size for p in jax.tree.leaves(params))


def cut(directory: str | Path, size: int, control: tuple[str, ...] = CONTROL) -> Tokenizer:
    """A byte-level BPE of `size` ids: the control tokens, then the first ranks of the tokenizer in `directory`.

    In a BPE file a token has a higher id than both halves of any merge that makes it, so the ids below a cut with the
    merges among them are a BPE again.
    """
    spec = json.loads((Path(directory) / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    ranks = size - len(control)
    pieces = sorted((i, piece) for piece, i in spec["vocab"].items() if i < ranks)
    if [i for i, _ in pieces] != list(range(ranks)):
        raise SystemExit(f"{directory}: no BPE vocabulary with the ids 0 to {ranks - 1}")
    kept = {piece for _, piece in pieces}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in spec["merges"]]
    merges = [(a, b) for a, b in merges if a in kept and b in kept and a + b in kept]
    vocabulary = {piece: n for n, piece in enumerate([*control, *(piece for _, piece in pieces)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gemma-tokenizer", type=Path, required=True)
    parser.add_argument("--llama-tokenizer", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=hub.DTYPES)
    args = parser.parse_args()
    gemma = args.out / "gemma-3-270m"
    print(f"{gemma}: {write_model(GEMMA, gemma, AutoTokenizer.from_pretrained(args.gemma_tokenizer), args.dtype, 0):,}")
    smollm = args.out / "smollm2-135m"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=cut(args.llama_tokenizer, SMOLLM["vocab_size"]),
        clean_up_tokenization_spaces=False,
        bos_token=END,
        eos_token=END,
        unk_token=END,
    )
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    print(f"{smollm}: {write_model(SMOLLM, smollm, tokenizer, args.dtype, 1):,}")


if __name__ == "__main__":
    main()

"""`distil-jax generate`: ask a model one thing, talk to it, or have it answer a file.

distil-jax generate MODEL --prompt "Question: What is ageusia?"       streamed to the terminal
distil-jax generate MODEL                                             a conversation
distil-jax generate MODEL --prompts asked.jsonl --out answered.jsonl  a file, in batches
distil-jax generate --config configs/tiny.py ...                      the student that this config exported
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from distil_jax import arguments, sharding
from distil_jax.config import load_config
from distil_jax.errors import UserError
from distil_jax.generation.sampling import Sampling
from distil_jax.generation.text import Codec, complete, stream
from distil_jax.manifest import read as read_manifest
from distil_jax.models import hub
from distil_jax.models.int8 import quantize

BATCHES_AT_ONCE = 16  # of a file of prompts: what is sorted by length together, and written together


def parser() -> arguments.Parser:
    """The arguments of the command."""
    p = arguments.Parser(
        prog="distil-jax generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", nargs="?", help="a Hugging Face directory or hub id (owner/name, owner/name@revision)")
    p.add_argument(
        "--config", metavar="FILE", help="instead of MODEL: what this config exported (--config.KEY=VALUE too)"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="one prompt; its answer goes to standard output as it is written")
    what.add_argument(
        "--prompts", metavar="FILE", help='JSONL with "prompt" (text) or "messages" (a conversation) in a row'
    )
    p.add_argument("--out", metavar="FILE", help="JSONL with the answers to --prompts; standard output by default")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the most likely token")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens only")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely mass P only")
    p.add_argument("--seed", type=int, default=0)
    chat = p.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="render prompts with the chat template (default where there is one)",
    )
    chat.add_argument("--raw", dest="chat", action="store_false", help="continue prompts as they are")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts of a file at a time")
    p.add_argument("--dtype", choices=hub.DTYPES, help="of the weights; default: bfloat16, float32 on CPU")
    p.add_argument("--int8", action="store_true", help="hold the weights in 8 bits")
    p.add_argument(
        "--fsdp", type=int, default=1, metavar="N", help="devices that share the weights, each with other prompts"
    )
    p.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that share the weights and the prompts")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status. Raises UserError for what the user can mend."""
    ours, of_config = arguments.split(argv)
    args = parser().parse_args(ours)
    if (args.model is None) == (not of_config):
        raise UserError(
            "distil-jax generate: give one model, a directory or a hub id, or a --config that has exported one"
        )
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: give at least 1")
    if args.out and not args.prompts:
        raise UserError("--out goes with --prompts; the answer to one prompt is written to the terminal")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    rows = _rows(Path(args.prompts)) if args.prompts else []  # before the model: a bad row should not wait for it
    directory = _exported(of_config) if of_config else hub.resolve(args.model)
    tokenizer = _tokenizer(directory)
    chat = tokenizer.chat_template is not None if args.chat is None else args.chat
    codec = Codec(tokenizer)
    model, params = _load(directory, args)
    how = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "chat": chat}
    if args.prompts:
        _answer_file(model, params, codec, rows, args, how)
    elif args.prompt is not None:
        _say(stream(model, params, codec, args.prompt, **how))
    else:
        _talk(model, params, codec, how)
    return 0


def _exported(of_config: list[str]) -> Path:
    """The directory that the export of a config wrote."""
    config, _ = load_config(of_config)
    found = read_manifest(Path(config.workdir) / "export")
    if not found or not Path(found["path"]).is_dir():
        raise UserError(f"{config.workdir} holds no exported student: run `distil-jax run` with this config first")
    return Path(found["path"])


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error


def _load(directory: Path, args: argparse.Namespace) -> tuple[Any, Any]:
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    mesh = sharding.make_mesh(-1, args.fsdp, args.tensor) if jax.device_count() > 1 else None
    if mesh is None and max(args.fsdp, args.tensor) > 1:
        raise UserError("--fsdp and --tensor need more than one device")
    started = time.perf_counter()
    model, params = hub.load_pretrained(directory, dtype=dtype, mesh=mesh)
    if args.int8:
        params = quantize(model, params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    _note(f"{directory.name}: {size / 2**30:.2f} GiB, read in {time.perf_counter() - started:.1f} s")
    return model, params


def _say(pieces: Iterator[str]) -> str:
    """Writes pieces as they come; returns them all."""
    written = []
    for piece in pieces:
        print(piece, end="", flush=True)
        written.append(piece)
    print(flush=True)
    return "".join(written)


def _talk(model: Any, params: Any, codec: Codec, how: dict[str, Any]) -> None:
    """Reads a line, answers it, and so on. In a chat the model sees the whole conversation."""
    _note(
        ("A chat" if how["chat"] else "Text is continued as it is (no chat template)")
        + ". /reset forgets what was said, /exit or the end of input leaves, Ctrl-C stops an answer."
    )
    said: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            _note("")
            return
        if line == "/exit":
            return
        if line == "/reset":
            said.clear()
        elif line:
            asked = [*said, {"role": "user", "content": line}]
            try:
                answer = _say(stream(model, params, codec, asked if how["chat"] else line, **how))
            except KeyboardInterrupt:
                _note("\n(stopped)")
                continue
            except UserError as error:  # too long by now, say: the conversation goes on
                _note(f"{error}; /reset starts afresh" if said else str(error))
                continue
            if how["chat"]:
                said[:] = [*asked, {"role": "assistant", "content": answer}]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts. Raises UserError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: no valid JSON ({error}); each line is an object") from None
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise UserError(f'{where}: a row is an object with either "prompt" or "messages"')
        messages = row.get("messages", [])
        if not isinstance(row.get("prompt", ""), str) or not isinstance(messages, list):
            raise UserError(f'{where}: "prompt" is text, "messages" is a list')
        if any(not isinstance(m, dict) or not isinstance(m.get("content"), str) or "role" not in m for m in messages):
            raise UserError(f'{where}: a message is an object with "role" and "content"')
        rows.append({"where": where, "row": row, "prompt": row.get("prompt", messages)})
    if not rows:
        raise UserError(f"{path} has no rows: nothing to answer")
    return rows


def _answer_file(model, params, codec, rows, args: argparse.Namespace, how: dict[str, Any]) -> None:
    """Answers in the order of the file; the output takes its name when it is whole."""
    for entry in rows:  # all of them first, so that a bad one stops nothing half done
        try:
            codec.encode(model, entry["prompt"], max_new_tokens=how["max_new_tokens"], chat=how["chat"])
        except UserError as error:
            raise UserError(f"{entry['where']}: {error}") from None
    out = Path(args.out) if args.out else None
    partial = out.with_name(f".{out.name}.partial") if out else None
    started, tokens, at_once = time.perf_counter(), 0, args.batch_size * BATCHES_AT_ONCE
    file = partial.open("w", encoding="utf-8") if partial else sys.stdout
    try:
        for first in range(0, len(rows), at_once):
            chunk = rows[first : first + at_once]
            answers = complete(
                model, params, codec, [entry["prompt"] for entry in chunk], batch_size=args.batch_size,
                first_place=first, **how,
            )  # fmt: skip
            for entry, answer in zip(chunk, answers, strict=True):
                facts = {"completion": answer.text, "tokens": len(answer.tokens), "stopped": answer.stopped}
                print(json.dumps(entry["row"] | facts, ensure_ascii=False), file=file)
                tokens += len(answer.tokens)
            file.flush()
            seconds = time.perf_counter() - started
            _note(f"{first + len(chunk)} of {len(rows)} prompts, {tokens} tokens, {tokens / seconds:.1f} tokens/s")
        if out:
            file.close()
            partial.replace(out)
    finally:
        if partial:
            file.close()
            partial.unlink(missing_ok=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr)

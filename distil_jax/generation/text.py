"""Text in, text out: prompts to ids, batches through the engine, ids to text."""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distil_jax import conversation
from distil_jax.errors import UserError
from distil_jax.generation import engine
from distil_jax.generation.sampling import Sampling
from distil_jax.tokens.bytes import ByteTable
from distil_jax.tokens.chat import Template

GREEDY = Sampling()
# A prompt is text, or a conversation: [{"role": "user", "content": "..."}, ...].
Prompt = str | Sequence[Mapping[str, str]]


class Completion(NamedTuple):
    """What a model wrote after a prompt."""

    text: str  # bytes that are no UTF-8 (an answer cut inside a character) show as U+FFFD
    tokens: list[int]  # without the stop token
    stopped: bool  # whether the model ended it; else it was cut at max_new_tokens


def generate(
    model: Any,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    chat: bool = False,
    batch_size: int = 8,
) -> list[str]:
    """The continuation of each prompt, in the order of the prompts. See `complete`, which returns more."""
    completions = complete(
        model, params, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat,
        batch_size=batch_size,
    )  # fmt: skip
    return [completion.text for completion in completions]


def complete(
    model: Any,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    chat: bool = False,
    batch_size: int = 8,
    first_place: int = 0,
) -> list[Completion]:
    """Continues each prompt up to a stop id of the model's config or `max_new_tokens`.

    tokenizer: a transformers tokenizer, a directory, a ByteTable, or a Codec of one of them. Prompts of text are
    encoded as they are (a control token's name in them stays text) after the beginning-of-sequence token if the
    vocabulary has one; with `chat`, and for conversations, the tokenizer's chat template renders them (without one, the
    format of its family: tokens/chat.py), and the end of a turn stops the answer too.
    Prompts of like length are batched together, `batch_size` at a time; a mesh that the parameters lie on is used.
    Random draws depend on the seed and on a prompt's place, counted from `first_place`.

    Raises UserError for no prompt, an empty one, one that leaves no room in the model's context, and a chat with a
    tokenizer that has neither template nor known family.
    """
    codec = Codec.of(tokenizer)
    model = codec.tell(model)
    encoded = [codec.encode(model, prompt, max_new_tokens=max_new_tokens, chat=chat) for prompt in prompts]
    if not prompts:
        raise UserError("no prompt to continue")
    stops = codec.stop_ids(model, chat=chat or any(not isinstance(prompt, str) for prompt in prompts))
    done: dict[int, Completion] = {}
    longest_first = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    for first in range(0, len(encoded), batch_size):
        places = longest_first[first : first + batch_size]
        written: list[list[int]] = [[] for _ in places]
        stopped = [False] * len(places)
        for tokens_B in engine.steps(
            model, params, [encoded[i] for i in places], max_new_tokens=max_new_tokens, sampling=sampling,
            places=[first_place + i for i in places],
        ):  # fmt: skip
            for row, token in enumerate(tokens_B.tolist()):
                stopped[row] = stopped[row] or token in stops
                if not stopped[row]:
                    written[row].append(token)
            if all(stopped):
                break
        for place, ids, ended in zip(places, written, stopped, strict=True):
            done[place] = Completion(codec.decode(ids), ids, ended)
    return [done[i] for i in range(len(encoded))]


def stream(
    model: Any,
    params: Any,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    chat: bool = False,
) -> Iterator[str]:
    """The continuation of one prompt piece by piece, as it is written. Arguments and errors as for `complete`."""
    codec = Codec.of(tokenizer)
    model = codec.tell(model)
    ids = codec.encode(model, prompt, max_new_tokens=max_new_tokens, chat=chat)
    stops = codec.stop_ids(model, chat=chat or not isinstance(prompt, str))
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be spread over tokens
    for (token,) in engine.steps(model, params, [ids], max_new_tokens=max_new_tokens, sampling=sampling):
        if int(token) in stops:
            break
        if piece := utf8.decode(codec.table.token_bytes(int(token))):
            yield piece
    if rest := utf8.decode(b"", final=True):
        yield rest


class Codec:
    """Prompts to ids and ids to text with one tokenizer. Make it once where prompts come one by one: the byte table of
    262,144 ids takes a second."""

    def __init__(self, tokenizer: Any):
        self.table = tokenizer if isinstance(tokenizer, ByteTable) else ByteTable.from_tokenizer(tokenizer)
        self._tokenizer = tokenizer  # for its chat template

    @classmethod
    def of(cls, tokenizer: Any) -> "Codec":
        """`tokenizer` if it is a Codec, else the Codec of it."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer)

    def tell(self, model: Any) -> Any:
        """The model, knowing where this tokenizer ends."""
        return model.with_tokenizer(self.table.vocab_size)

    def encode(self, model: Any, prompt: Prompt, *, max_new_tokens: int, chat: bool) -> np.ndarray:
        """Ids of a prompt, int32. Raises UserError as `complete`."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: give at least 1")
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise UserError(f"prompt {prompt!r} is empty: give it some text to continue")
        if chat or not isinstance(prompt, str):
            ids = self._render(prompt)
        else:
            bos = np.array([self.table.roles["bos"]] if "bos" in self.table.roles else [], np.int32)
            ids = np.concatenate([bos, self.table.encode(prompt)])
        room = model.config.max_position_embeddings
        if len(ids) + max_new_tokens > room:
            shown = prompt if isinstance(prompt, str) else prompt[-1].get("content", "")
            raise UserError(
                f"prompt {shown[:40]!r} has {len(ids)} tokens: with {max_new_tokens} new ones it is longer than the "
                f"context of {room}; shorten it or lower max_new_tokens"
            )
        return ids

    def _render(self, prompt: Prompt) -> np.ndarray:
        """A conversation, ready for the answer: in the tokenizer's own chat format, else in that of its family."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if isinstance(self._tokenizer, (str, Path)):
            from transformers import AutoTokenizer  # slow to import, and only a chat needs it

            self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer)
        if getattr(self._tokenizer, "chat_template", None) is None:
            return self._render_as_family(messages)
        try:
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template raises what its author liked, jinja2 its own errors
            raise UserError(f"the chat template does not take this conversation: {error}") from error
        return np.asarray(ids, np.int32)

    def _render_as_family(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        try:
            template = Template(self.table)
        except UserError as error:
            raise UserError(
                f"this tokenizer has no chat template, and none is known for it ({error}): give prompts as plain text, "
                "without chat, or use an instruction-tuned model"
            ) from error
        return template.render(conversation.checked(messages), answer=True)

    def stop_ids(self, model: Any, *, chat: bool) -> frozenset[int]:
        """The ids that end an answer: those of the model's config, in a chat also the end of a turn."""
        eos = model.config.eos_token_id
        ids = [eos] if isinstance(eos, int) else list(eos or [])
        if chat and "end_of_turn" in self.table.roles:
            ids.append(self.table.roles["end_of_turn"])
        return frozenset(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens have none."""
        return self.table.decode_bytes(np.asarray(ids, np.int32)).decode("utf-8", errors="replace")

"""Texts to token ids as lm-evaluation-harness does it for a causal Hugging Face model (its TemplateLM and HFLM).

The ids of a continuation are those that context and continuation together have beyond the context's own; spaces at the
end of a context move to its continuation. Special tokens come as the tokenizer adds them, but not to a text that begins
with the one at the start already.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from distil_jax.errors import UserError


class Request(NamedTuple):
    """Score `continuation` after `context`: token ids, both not empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Encoder:
    """One tokenizer of transformers. add_bos: True or False overrides what it does by itself."""

    def __init__(self, tokenizer: Any, add_bos: bool | None = None):
        self.tokenizer, self.add_bos = tokenizer, add_bos
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:
            raise UserError("the tokenizer names neither a first nor a last token: set bos_token in its config")
        self.prefix_id = int(eos if bos is None else bos)  # what a text without a context follows
        self.prefix_text = tokenizer.decode(self.prefix_id)

    def encode(self, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Ids of each text. special: whether special tokens are added; None: as the tokenizer does."""
        special = self.add_bos if special is None else special
        begun = [special is None and text.startswith(self.prefix_text) for text in texts]
        done: list[list[int]] = [[] for _ in texts]
        for of, add in ((True, False), (False, special)):
            places = [i for i in range(len(texts)) if begun[i] == of]
            how = {} if add is None else {"add_special_tokens": add}
            if places:
                encoded = self.tokenizer([texts[i] for i in places], return_attention_mask=False, **how)["input_ids"]
                for place, ids in zip(places, encoded, strict=True):
                    done[place] = ids
        return done

    def requests(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Each (context, continuation) as ids. An empty context is the token that begins a text."""
        moved = [_spaces_moved(*pair) for pair in pairs]
        contexts = list(dict.fromkeys(context for context, _ in moved if context))
        ids_of = dict(zip(contexts, self.encode(contexts), strict=True))
        whole = iter(self.encode([context + continuation for context, continuation in moved if context]))
        alone = iter(self.encode([continuation for context, continuation in moved if not context], special=False))
        found = []
        for context, _ in moved:
            if context:
                before = ids_of[context]
                found.append(Request(tuple(before), tuple(next(whole)[len(before) :])))
            else:
                ids = next(alone)
                start = [self.prefix_id] if ids[:1] != [self.prefix_id] else ids[:1]
                found.append(Request(tuple(start), tuple(ids if ids[:1] != [self.prefix_id] else ids[1:])))
        return found


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    """The harness moves them where there is any context, be it of spaces alone."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation

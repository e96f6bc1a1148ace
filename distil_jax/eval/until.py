"""Generation up to a stop text, from token ids: free answers to a task, and lm-evaluation-harness's generate_until."""

from collections.abc import Sequence
from typing import Any

from distil_jax.errors import UserError
from distil_jax.generation import engine
from distil_jax.generation.sampling import Sampling

GREEDY = Sampling()


def generate_until(
    model: Any,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 8,
    sampling: Sampling = GREEDY,
    max_length: int | None = None,
) -> list[str]:
    """What the model writes after each prompt (token ids), up to the first of the texts `until`, which is left out, to
    an end token, or to max_new_tokens. tokenizer: of transformers. A prompt that leaves no room for max_new_tokens in
    the model's context (max_length, by default the config's) loses its beginning. Raises UserError if none has room."""
    ends = model.config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    room = (max_length or model.config.max_position_embeddings) - max_new_tokens
    if room < 1:
        raise UserError(f"{max_new_tokens} new tokens leave no room for a prompt in the model's context; ask for fewer")
    cut = [list(ids[-room:]) for ids in prompts]
    order = sorted(range(len(cut)), key=lambda i: -len(cut[i]))
    texts = [""] * len(cut)
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        written: list[list[int]] = [[] for _ in places]
        done = [False] * len(places)
        for tokens_B in engine.steps(
            model, params, [cut[i] for i in places], max_new_tokens=max_new_tokens, sampling=sampling, places=places
        ):
            for row, token in enumerate(tokens_B.tolist()):
                if not done[row]:
                    written[row].append(token)
                    # Whole: a stop text may be spread over tokens, and a token's text depends on the one before.
                    done[row] = token in ends or _stopped(tokenizer, written[row], until)
            if all(done):
                break
        for place, ids in zip(places, written, strict=True):
            text = tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True)
            for stop in filter(None, until):
                text = text.split(stop)[0]
            texts[place] = text
    return texts


def _stopped(tokenizer: Any, ids: list[int], until: Sequence[str]) -> bool:
    tail = ids[-max(16, 2 + max((len(stop) for stop in until), default=0)) :]
    text = tokenizer.decode(tail, skip_special_tokens=False)
    return any(stop and stop in text for stop in until)

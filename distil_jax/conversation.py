"""Conversations: a list of messages, each with a role and a text, and what makes it one."""

from collections.abc import Mapping, Sequence
from typing import Any

from distil_jax.errors import UserError, nearest

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]  # "role" (of ROLES) and "content"


def checked(messages: Any) -> tuple[dict[str, str], ...]:
    """The messages with their role and content alone, white space at both ends of each content removed.

    Gemma's and Llama's own templates remove it, ChatML's does not; here it is done before any template is chosen, so
    that both models read the same bytes.

    messages: a list of {"role": system, user or assistant, "content": text}. A system message may come first, before a
      user message; user and assistant take turns.

    Raises UserError that says which message (from 1) is not so.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise UserError("messages is no list with at least one message")
    found: list[dict[str, str]] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f'message {number} is no object with "role" and "content"')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UserError(f"message {number} has the role {role!r}, none of {', '.join(ROLES)}{_guess(role)}")
        if not isinstance(content, str):
            raise UserError(f"the content of message {number} is no text but {type(content).__name__}")
        if not content.strip():
            raise UserError(f"the content of message {number} is empty")
        before = found[-1]["role"] if found else None
        if role == before or (before is not None and role == "system") or (before == "system" and role != "user"):
            raise UserError(
                f"message {number} ({role}) follows a message of the {before}: a system message may only come first, "
                "before the user's, and user and assistant take turns"
            )
        found.append({"role": role, "content": content.strip()})
    return tuple(found)


def of_pair(prompt: str, completion: str) -> tuple[dict[str, str], ...]:
    """A prompt and its completion as what a user asks and the assistant answers. Raises UserError as `checked`."""
    return checked([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])


def _guess(role: Any) -> str:
    return nearest(role, ROLES) if isinstance(role, str) else ""

"""Conversations in the ids of one vocabulary, as each family of models writes them.

Nothing is rendered to text and read back: a message's content is encoded alone, so that a control token's name in it
stays text, and the spans that a model learns are known because they are put together here. The ids are those of the
families' own templates (docs/chat.md lists the differences).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from distil_jax.conversation import ROLES, Message
from distil_jax.errors import UserError
from distil_jax.tokens.bytes import ByteTable, Ids

NAME = "{role}"  # in a header: what the family calls the role
NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Family:
    """How a family of models writes a conversation.

    control: the control tokens that it needs, role of the token -> string. header: what stands before a message,
    pieces of text and roles of control tokens. after: text between the end of a turn and the next header. names: what
    it calls the roles of messages, where that is another word. begins: whether a conversation begins with bos.
    joint: None where a system message is a turn of its own; else it stands at the head of the user's, and this between.
    """

    name: str
    control: Mapping[str, str]
    header: tuple[str, ...]
    after: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    begins: bool = True
    joint: str | None = None


LLAMA3 = Family(
    name="Llama 3",
    control={
        "bos": "<|begin_of_text|>",
        "start_header": "<|start_header_id|>",
        "end_header": "<|end_header_id|>",
        "end_of_turn": "<|eot_id|>",
    },
    header=("start_header", NAME, "end_header", "\n\n"),
)
GEMMA = Family(
    name="Gemma",
    control={"bos": "<bos>", "start_of_turn": "<start_of_turn>", "end_of_turn": "<end_of_turn>"},
    header=("start_of_turn", f"{NAME}\n"),
    after="\n",
    names={"assistant": "model"},
    joint="\n\n",
)
CHATML = Family(
    name="ChatML",
    control={"start_of_turn": "<|im_start|>", "end_of_turn": "<|im_end|>"},
    header=("start_of_turn", f"{NAME}\n"),
    after="\n",
    begins=False,
)


def family_of(table: ByteTable, side: str = "model") -> Family:
    """The family whose conversations a vocabulary can write, by the roles that it has.

    Headers are Llama 3's. Gemma and ChatML begin a turn with one token; Gemma's vocabularies are SentencePiece-style,
    ChatML's byte-level.

    Raises UserError that names the roles that are missing and the side.
    """
    if {"start_header", "end_header"} & table.roles.keys():
        family = LLAMA3
    else:
        family = GEMMA if table.kind == "sentencepiece" else CHATML
    missing = [f"{role} ({string})" for role, string in family.control.items() if role not in table.roles]
    if missing:
        raise UserError(
            f"the {side}'s tokenizer has no {' and no '.join(missing)}, which a conversation in the {family.name} "
            f"format needs: use a {side} whose tokenizer has it, or rows of plain text (prompt and completion, with "
            "config.data.chat off)"
        )
    return family


class Frame(NamedTuple):
    """What the template puts around a message's content: `before` it, and the `end` of its turn (one id or none)."""

    before: Ids
    end: Ids


class Template:
    """A family's way with conversations, in the ids of one vocabulary."""

    def __init__(self, table: ByteTable, side: str = "model"):
        """Raises UserError as `family_of`."""
        self.table, self.family = table, family_of(table, side)
        self._bos = self._ids("bos") if self.family.begins else NOTHING
        self._end, self._after = self._ids("end_of_turn"), table.encode(self.family.after)
        self._header = {role: self._header_of(role) for role in ROLES}
        self._joint = table.encode(self.family.joint or "")

    def frames(self, roles: Sequence[str], *, ended: bool = True) -> list[Frame]:
        """A frame for each message of a conversation, and one more with what follows the last.

        roles: of the messages, in an order that `conversation.checked` lets pass. ended: whether the last message is
          whole; else its turn is left open.
        """
        frames: list[Frame] = []
        before = self._bos
        for role in roles:
            inside = role == "system" and self.family.joint is not None
            joined = bool(frames) and not len(frames[-1].end)  # the system's text stands in the turn already
            header = self._joint if joined else self._header["user" if inside else role]
            frames.append(Frame(np.concatenate([before, header]), NOTHING if inside else self._end))
            before = NOTHING if inside else self._after
        if not ended:
            frames[-1], before = frames[-1]._replace(end=NOTHING), NOTHING
        return [*frames, Frame(before, NOTHING)]

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> Ids:
        """A whole conversation. answer: the assistant's header follows, for a model to go on from.

        Raises RoundTripError for a content that the vocabulary cannot give back.
        """
        contents = self.table.encode_batch([message["content"] for message in messages])
        frames = self.frames([message["role"] for message in messages])
        parts = []
        for frame, content in zip(frames[:-1], contents, strict=True):
            parts += [frame.before, content, frame.end]
        parts += [frames[-1].before, self._header["assistant"] if answer else NOTHING]
        return np.concatenate(parts)

    def _ids(self, role: str) -> Ids:
        return np.array([self.table.roles[role]], np.int32)

    def _header_of(self, role: str) -> Ids:
        name = self.family.names.get(role, role)
        pieces = [
            self._ids(piece) if piece in self.family.control else self.table.encode(piece.replace(NAME, name))
            for piece in self.family.header
        ]
        return np.concatenate(pieces)


def jinja(family: Family) -> str:
    """The same as a chat template, for tools that render conversations with transformers.

    There a control token's name in a content becomes the token; in `Template` it stays text.
    """
    quoted = lambda text: "'" + text.replace("\n", "\\n") + "'"  # noqa: E731
    name = "message['role']"
    for role, other in family.names.items():
        name = f"({quoted(other)} if message['role'] == {quoted(role)} else {name})"

    def header(name: str) -> str:
        pieces = [family.control.get(piece) for piece in family.header]
        texts = [
            quoted(control) if control else " + ".join(_around(piece, name, quoted))
            for control, piece in zip(pieces, family.header, strict=True)
        ]
        return " + ".join(texts)

    begin = f"{{{{ {quoted(family.control['bos'])} }}}}" if family.begins else ""
    end = quoted(family.control["end_of_turn"] + family.after)
    turn = f"{{{{ {header(name)} + state.before + message['content'] | trim + {end} }}}}"
    if family.joint is not None:
        kept = f"{{% set state.before = message['content'] | trim + {quoted(family.joint)} %}}"
        given = turn + "{% set state.before = '' %}"
        turn = f"{{% if message['role'] == 'system' %}}{kept}{{% else %}}{given}{{% endif %}}"
    answer = header(quoted(family.names.get("assistant", "assistant")))
    return (
        f"{begin}{{% set state = namespace(before='') %}}{{% for message in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
    )


def _around(piece: str, name: str, quoted) -> list[str]:
    """A piece of a header as jinja terms: its text, with the expression `name` in its place."""
    before, found, after = piece.partition(NAME)
    return [term for term in (before and quoted(before), found and name, after and quoted(after)) if term]

"""How a family of models writes tool calls, and what becomes of one while it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import regex

# White space within a call. The bound keeps what is held back, and read again with each piece, short.
SPACE = r"\s{0,64}"


class Spelling(NamedTuple):
    """`before` the first call (the opening first, unless calls are bare), `between` two (None: there is one only),
    `after` the last."""

    before: str
    between: str | None
    after: str


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """Calls are `opening`, JSON objects that hold a name and arguments, and `closing`, if there is one. `first` and
    `next` are regular expressions for what stands before the first object and between two; None: there is one only.

    `is_bare`: an answer may also begin with an object, without the opening. `spelling` is what models write around the
    objects, for answers that must hold calls.

    With an `arguments_marker` calls are no objects, but a name, this marker and the arguments; `call_id_marker` and an
    id may stand before it.
    """

    name: str
    opening: str
    closing: str | None = None
    arguments_key: str = "arguments"
    first: str = SPACE
    next: str | None = None
    is_bare: bool = False
    arguments_marker: str | None = None
    call_id_marker: str | None = None
    spelling: Spelling

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be single tokens."""
        markers = (self.opening, self.closing, self.arguments_marker, self.call_id_marker)
        return tuple(filter(None, markers))

    @property
    def head(self) -> str:
        """A regular expression for a call of any tool, whose name is the group `name`, up to its arguments' brace."""
        name = r"[A-Za-z0-9_-]{1,64}"
        if self.arguments_marker is not None:
            call_id = rf"(?:{regex.escape(self.call_id_marker)}[^\s\[]{{1,64}})?" if self.call_id_marker else ""
            return rf"(?P<name>{name}){call_id}{regex.escape(self.arguments_marker)}{SPACE}(?=\{{)"
        kind = rf'(?:"type"{SPACE}:{SPACE}"function"{SPACE},{SPACE})?'
        key = "|".join(dict.fromkeys((self.arguments_key, "arguments")))
        return (
            rf'\{{{SPACE}{kind}"name"{SPACE}:{SPACE}"(?P<name>{name})"{SPACE},{SPACE}"(?:{key})"{SPACE}:{SPACE}(?=\{{)'
        )

    def spell_call(self, name: str) -> tuple[str, str]:
        """What models write before and after a call's arguments."""
        if self.arguments_marker is not None:
            return name + self.arguments_marker, ""
        return f'{{"name": {json.dumps(name)}, "{self.arguments_key}": ', "}"


@dataclass(slots=True)
class ToolCallPiece:
    """What is new of one call: on its first piece `id` and `name`, on each more of the arguments' JSON text."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""

"""How a family of models writes tool calls, and what becomes of one while it is written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import regex

# White space within a call. The bound keeps what is held back, and read again with each piece, short.
SPACE = r"\s{0,64}"


class Spelling(NamedTuple):
    """`before` the first object (the opening first, unless objects are bare), `between` two (None: there is one only),
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
    """

    name: str
    opening: str
    closing: str | None = None
    arguments_key: str = "arguments"
    first: str = SPACE
    next: str | None = None
    is_bare: bool = False
    spelling: Spelling

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be single tokens."""
        return (self.opening,) if self.closing is None else (self.opening, self.closing)

    def head(self, names: Collection[str]) -> str:
        """A regular expression for an object up to its arguments' brace; the group `name` is one of `names`."""
        kind = rf'(?:"type"{SPACE}:{SPACE}"function"{SPACE},{SPACE})?'
        name = "|".join(regex.escape(name) for name in names)
        key = "|".join(dict.fromkeys((self.arguments_key, "arguments")))
        return (
            rf'\{{{SPACE}{kind}"name"{SPACE}:{SPACE}"(?P<name>{name})"{SPACE},{SPACE}"(?:{key})"{SPACE}:{SPACE}(?=\{{)'
        )


@dataclass(slots=True)
class ToolCallPiece:
    """What is new of one call: on its first piece `id` and `name`, on each more of the arguments' JSON text."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""

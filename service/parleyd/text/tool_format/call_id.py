"""Ids of tool calls: made from the request alone, so that a resumed answer has the same ones."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Collection
from itertools import count

_ALPHABET = string.digits + string.ascii_letters
_LENGTH = 9  # Mistral's templates take no other


def call_id(seed: int, choice: int, index: int, taken: Collection[str] = ()) -> str:
    """The id of a conversation's call number `index`, made in choice `choice` of the answer with this seed.

    It is none of `taken`: a client that leaves out its oldest turns has calls with the ids of later numbers.
    """
    # Each index has candidates of its own, so that one that moves on meets no other's.
    candidates = (_spell(f"{seed}/{choice}/{index}/{attempt}") for attempt in count())
    return next(candidate for candidate in candidates if candidate not in taken)


def _spell(text: str) -> str:
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    characters = []
    for _ in range(_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        characters.append(_ALPHABET[digit])
    return "".join(characters)

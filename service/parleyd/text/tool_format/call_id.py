"""Ids of tool calls: made from the request alone, so that a resumed answer has the same ones."""

from __future__ import annotations

import hashlib
import string

_ALPHABET = string.digits + string.ascii_letters
_LENGTH = 9  # Mistral's templates take no other


def call_id(seed: int, choice: int, index: int) -> str:
    """The id of a conversation's call number `index`, made in choice `choice` of the answer with this seed."""
    number = int.from_bytes(hashlib.blake2b(f"{seed}/{choice}/{index}".encode(), digest_size=8).digest())
    characters = []
    for _ in range(_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        characters.append(_ALPHABET[digit])
    return "".join(characters)

"""Special tokens that requests spell, such as <|im_end|>: with a mark in them, they are ordinary text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parleyd.text.tokenizer import Tokenizer

# A noncharacter: no text that is meant for others holds one.
_MARK = "\ufdd0"


class SpecialSpellings:
    """Marks those in what clients send, before the chat template adds its own; the mark is a token that is then left
    out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Teaches the tokenizer the mark, and to take special tokens by their exact spelling alone. One that is a word,
        such as `user`, or a single character is left as it is: templates and tools have such names."""
        tokens = tokenizer.spell_special_tokens_exactly()
        self._tokens = [token for token in tokens if len(token) > 1 and not token.isidentifier()]
        tokenizer.add_special_token(_MARK)
        self._mark_id = tokenizer.token_id(_MARK)

    def mark(self, value: Any) -> Any:
        """The same with a mark in every spelling, in strings, lists and mappings. Marks that were there are gone."""
        if isinstance(value, str):
            return self._mark_text(value.replace(_MARK, ""))
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(one) for key, one in value.items()}
        return [self.mark(one) for one in value] if isinstance(value, list | tuple) else value

    def count(self, text: str) -> int:
        """The marks in a text; so many of its ids are not to be counted."""
        return text.count(_MARK)

    def without_marks(self, token_ids: list[int]) -> list[int]:
        """The ids of a marked text."""
        return [token_id for token_id in token_ids if token_id != self._mark_id]

    def _mark_text(self, text: str) -> str:
        for token in self._tokens:
            while token in text:  # again where one begins within another of the same
                text = text.replace(token, f"{token[0]}{_MARK}{token[1:]}")
        return text

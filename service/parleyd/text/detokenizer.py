"""Token ids to text as they are made: whole characters at once, half ones never. One per generated sequence."""

from __future__ import annotations

import codecs
from typing import Protocol

from parleyd.text.tokenizer import ByteCoding, Tokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes one sequence id by id; the pushed texts together are `tokenizer.decode(ids)`.

    An incomplete character waits for its other bytes, and one that the sequence's end cuts off is never sent, not even
    as U+FFFD. Bytes that can no longer become a character are U+FFFD, as in `decode`. What has been returned after *n*
    ids depends on these n ids alone. Time and memory per id are constant.

    This is not `tokenizers.decoders.DecodeStream`: fed arbitrary ids, that one (0.23) raises "Invalid prefix
    encountered" for byte fallback, holds back every U+FFFD, and takes quadratic time on a run of broken bytes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
        id_before: int | None = None,
    ) -> None:
        """`shown_ids` are special tokens whose text is wanted all the same. `id_before`: the sequence goes on behind
        this one, whose text is not told; else it begins a text, of which some vocabularies drop the first space."""
        self._skipped = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset()
        by_bytes = tokenizer.byte_coding is ByteCoding.BYTE_LEVEL
        self._decoder: _Decoder = (_ByteDecoder if by_bytes else _PieceDecoder)(tokenizer, id_before)

    def push(self, token_id: int) -> str:
        """The text that this id completes, often empty."""
        if token_id in self._skipped:
            return ""
        return self._decoder.push(token_id)


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...


class _ByteDecoder:
    """Byte-level vocabularies: text is the UTF-8 reading of all ids' bytes, whichever ids they come from."""

    def __init__(self, tokenizer: Tokenizer, id_before: int | None) -> None:
        self._tokenizer = tokenizer
        self._is_first = id_before is None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        data = self._tokenizer.first_bytes(token_id) if self._is_first else self._tokenizer.token_bytes(token_id)
        self._is_first = False
        text = self._utf8.decode(data)
        if data[-1:] >= b"\xa0" and _holds_surrogate(self._utf8):
            text += self._utf8.decode(b"", final=True)
        return text


class _PieceDecoder:
    """Vocabularies of pieces of text, SentencePiece's above all, with or without byte fallback.

    How a piece reads may depend on the piece before it (the text's first space goes, WordPiece puts spaces between),
    so its text is what decoding both gives beyond decoding the one before.
    """

    def __init__(self, tokenizer: Tokenizer, id_before: int | None) -> None:
        self._tokenizer = tokenizer
        self._before = [] if id_before is None else [id_before]
        self._bytes = _ByteRun()

    def push(self, token_id: int) -> str:
        byte = self._tokenizer.fallback_byte(token_id)
        if byte is not None:
            # The text's first space goes even when it comes as a byte; only the library knows.
            text = self._bytes.push(byte) if self._before or byte != b" " else self._decode([token_id])
        elif self._tokenizer.token(token_id) is not None:
            text = self._bytes.end() + self._decode([*self._before, token_id])[len(self._decode(self._before)) :]
        else:
            return ""
        self._before = [token_id]
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False) if token_ids else ""


class _ByteRun:
    """Byte fallback pieces in a row. As in the library, each byte of a broken run becomes a U+FFFD of its own.

    The library also takes back whole characters that stand before the first broken byte of the run. Here they are kept:
    waiting for the run's end would delay scripts that are written in bytes throughout, and stop strings with them.
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._waiting = 0
        self._is_broken = False

    def push(self, byte: bytes) -> str:
        self._waiting += 1
        if not self._is_broken:
            try:
                text = self._utf8.decode(byte)
                self._is_broken = _holds_surrogate(self._utf8)
            except UnicodeDecodeError:
                text, self._is_broken = "", True
        if self._is_broken:
            return self._replace_waiting()
        if text:
            self._waiting = 0
        return text

    def end(self) -> str:
        """Closes the run; what is left of a character is broken now."""
        self._utf8.reset()
        self._is_broken = False
        return self._replace_waiting()

    def _replace_waiting(self) -> str:
        text = _REPLACEMENT * self._waiting
        self._waiting = 0
        return text


def _holds_surrogate(utf8: codecs.IncrementalDecoder) -> bool:
    """Python awaits the third byte of a surrogate, although after two it is clear that no character begins so."""
    pending = utf8.getstate()[0]
    return len(pending) == 2 and pending >= b"\xed\xa0" and pending[0] == 0xED

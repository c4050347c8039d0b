"""Text to token ids and back, from a local tokenizer.json. The gateway calls `encode` in its thread pool; grammars are
followed with the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import tokenizers

from parleyd.errors import StartupError
from parleyd.text.tokenizer_config import TokenizerConfig

_SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


class ByteCoding(Enum):
    """How a tokenizer's ids can stand for less than a character."""

    BYTE_LEVEL = "every id stands for bytes"
    BYTE_FALLBACK = "ids of pieces such as <0xE2> stand for one byte each, all others for whole characters"
    NONE = "every id stands for whole characters"


class Tokenizer:
    """A `tokenizers.Tokenizer` that neither truncates nor pads nor adds special tokens. Safe for many threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self.byte_coding = _byte_coding(backend)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json and what `TokenizerConfig` reads beside it.

        Raises StartupError where tokenizer.json is missing or a file cannot be used.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise StartupError(f"{folder} holds no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise StartupError(f"{path} cannot be read: {error}") from error
        _add_configured_tokens(backend, TokenizerConfig.load(folder))
        return cls(backend)

    def to_json(self, vocab_size: int) -> str:
        """For grammars, as a tokenizer.json holds it: with the tokens that the configuration adds, without added ones
        from `vocab_size` on, which a model may have no logits for, and such that texts are read as they are."""
        fields = json.loads(self._backend.to_str().replace('"add_prefix_space":true', '"add_prefix_space":false'))
        fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] < vocab_size]
        normalizer = fields["normalizer"] or {}
        parts = normalizer.get("normalizers", [normalizer])
        # What else they do, such as composing characters, is done to prompts alone.
        spaces = [part for part in parts if "▁" in (part.get("prepend"), part.get("content"))]
        fields["normalizer"] = {"type": "Sequence", "normalizers": spaces}
        if "Metaspace" in _decoder_kinds(fields["decoder"]):  # llguidance knows spaces as Llama 2 writes them
            fields["decoder"]["decoders"].insert(0, _SPACES)
        return json.dumps(fields)

    def encode(self, text: str) -> tokenizers.Encoding:
        """Ids of `text`, special tokens only where the text spells them: chat templates write those themselves.

        `len()` counts the ids, `.ids` makes a list of them, which holds the GIL for long.
        """
        # A batch of one, because the backend's encode() holds the GIL to its end (0.5 s for 450,000 characters in
        # tokenizers 0.23); the fast variant leaves out the character offsets that nobody here reads.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0]

    def add_special_token(self, text: str) -> None:
        """Has `encode` read one more, which no model knows."""
        self._backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])

    def spell_special_tokens_exactly(self) -> list[str]:
        """The texts of the special tokens. From now on `encode` looks for them before it normalises a text, in which
        other texts may become theirs."""
        tokens = [token for token in self._backend.get_added_tokens_decoder().values() if token.special]
        self._backend.encode_special_tokens = False  # else it would find none, nor any that is added
        self._backend.add_special_tokens(
            [
                tokenizers.AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                    special=True,
                )
                for token in tokens
            ]
        )
        return [token.content for token in tokens]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that make no character become U+FFFD, ids outside the vocabulary nothing."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id, such as `Ġthe` or `▁the`; None outside the vocabulary."""
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary; None: there is no such token."""
        return self._backend.token_to_id(token)

    def special_ids_of(self, tokens: Iterable[str]) -> frozenset[int]:
        """The ids of those of `tokens` that are special tokens."""
        return self.special_ids & {self.token_id(token) for token in tokens}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id adds to a text, in mid-text; empty outside the vocabulary."""
        value = self._bytes.get(token_id)
        if value is None:
            value = self._bytes[token_id] = self._find_bytes(token_id)
        return value

    def first_bytes(self, token_id: int) -> bytes:
        """The bytes of an id at the start of a text, of which some vocabularies drop the first space."""
        data = self.token_bytes(token_id)  # not those of its text, which may end amid a character
        num_dropped = len(data.decode(errors="replace")) - len(self.decode([token_id], skip_special_tokens=False))
        return data[num_dropped:]

    def fallback_byte(self, token_id: int) -> bytes | None:
        """The byte of a byte fallback piece such as `<0xE2>`; None for every other id."""
        if self.byte_coding is not ByteCoding.BYTE_FALLBACK:
            return None
        return _parse_byte_piece(self._backend.id_to_token(token_id))

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if (byte := self.fallback_byte(token_id)) is not None:
            return byte
        letter = self._backend.token_to_id("a")
        before = [] if letter is None else [letter]  # some decoders strip the first space of a text
        text = self._backend.decode([*before, token_id], skip_special_tokens=False)[len(before) :]
        if self.byte_coding is ByteCoding.BYTE_LEVEL and "\ufffd" in text and all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        return text.encode()


def _add_configured_tokens(backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Adds what the configuration names and tokenizer.json leaves out, as transformers does, so that ids agree."""
    backend.encode_special_tokens = config.split_special_tokens
    present = backend.get_added_tokens_decoder()
    added = {**config.older_added_tokens, **present, **config.added_tokens}
    backend.add_tokens([token for key, token in sorted(added.items()) if repr(present.get(key)) != repr(token)])
    by_content = {token.content: token for token in added.values()}
    extra = [token for token in config.extra_special_tokens if token.content not in by_content]
    named = [by_content.get(token.content, token) for token in config.special_tokens.values()]
    backend.add_special_tokens(named + extra)


def _byte_coding(backend: tokenizers.Tokenizer) -> ByteCoding:
    kinds = set(_decoder_kinds(json.loads(backend.decoder.__getstate__()))) if backend.decoder else set()
    if "ByteLevel" in kinds:
        return ByteCoding.BYTE_LEVEL
    return ByteCoding.BYTE_FALLBACK if "ByteFallback" in kinds else ByteCoding.NONE


def _decoder_kinds(decoder: dict[str, Any]) -> list[str]:
    if decoder["type"] == "Sequence":
        return [kind for part in decoder["decoders"] for kind in _decoder_kinds(part)]
    return [decoder["type"]]


def _parse_byte_piece(token: str | None) -> bytes | None:
    if token is None or len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    try:
        return bytes.fromhex(token[3:5])
    except ValueError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte, in which byte-level vocabularies are written."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()

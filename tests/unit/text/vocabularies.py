"""Small tokenizers of every kind that decodes in its own way, for the tests of this folder."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models

from parleyd.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import byte_level_tokenizer

PIECES = ("▁", "▁the", "▁▁", "the", "a", "é", "好", "�", ".", "▁é")
SPECIAL = ("<unk>", "<s>", "</s>")
FIRST_BYTE_ID, FIRST_PIECE_ID = 3, 259


def byte_level() -> Tokenizer:
    """Ids 0 to 255 are bytes, then three special tokens, then added ones outside and inside GPT-2's alphabet."""
    backend = byte_level_tokenizer()
    backend.add_tokens([AddedToken("<a b>", normalized=False), AddedToken("好", normalized=False), "é"])
    return Tokenizer(backend)


def byte_level_without_first_space() -> Tokenizer:
    """Bytes, a word and the first byte of "é" after a space, in texts whose first space goes."""
    backend = byte_level_tokenizer()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("Ġthe", "ĠÃ")])
    return Tokenizer(backend)


def byte_fallback(*, strips_first_space: bool = True) -> Tokenizer:
    """As Llama 2 (strips) and Gemma (does not): special tokens, byte pieces, PIECES."""
    texts = (*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES)
    model = models.BPE(
        vocab={text: i for i, text in enumerate(texts)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    strip = [decoders.Strip(" ", 1, 0)] if strips_first_space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return Tokenizer(backend)


def metaspace() -> Tokenizer:
    """As T5: Unigram pieces without bytes."""
    backend = tokenizers.Tokenizer(models.Unigram([(text, -1.0) for text in (*SPECIAL, *PIECES)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return Tokenizer(backend)


def word_piece() -> Tokenizer:
    """As BERT: spaces between words, none before `##`."""
    texts = ("[UNK]", "the", "cat", "##s", ".", "é", "a")
    backend = tokenizers.Tokenizer(models.WordPiece({text: i for i, text in enumerate(texts)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]"])
    return Tokenizer(backend)


def word_end_bpe() -> Tokenizer:
    """As CLIP: `</w>` ends words."""
    texts = ("<unk>", "the</w>", "ca", "t</w>", ".</w>")
    backend = tokenizers.Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=[]))
    backend.decoder = decoders.BPEDecoder()
    return Tokenizer(backend)

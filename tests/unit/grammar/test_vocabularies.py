"""Grammars followed with tokenizers of each kind: what is written is what they spell, however a prompt is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from parleyd.generation import EngineRequest, SamplingParams
from parleyd.grammar.compiler import Clock, compile_grammar, load_tokenizer
from parleyd.grammar.formats import to_grammar
from parleyd.grammar.state import GrammarState
from parleyd.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import byte_level_tokenizer

TEXT = "e\u0301 \ufb01\u212b, <s>"


def composing() -> tokenizers.Tokenizer:
    """As Qwen's: composed characters alone are read."""
    backend = byte_level_tokenizer()
    backend.normalizer = normalizers.NFC()
    return backend


def prefixing() -> tokenizers.Tokenizer:
    """As BART's: a text is read as if behind a space."""
    backend = byte_level_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    return backend


def unigram_with_bytes() -> tokenizers.Tokenizer:
    pieces = [(text, -1.0) for text in ("<unk>", "▁", "▁<", "a", *(f"<0x{byte:02X}>" for byte in range(256)))]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


@pytest.mark.parametrize("make", [composing, prefixing, unigram_with_bytes])
def test_what_is_written_is_what_the_grammar_spells(tmp_path: Path, make: Callable[[], tokenizers.Tokenizer]) -> None:
    backend = make()
    end_id = backend.get_vocab_size()
    backend.add_special_tokens(["<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    size = end_id + 1
    tokenizer = load_tokenizer(str(tmp_path), size, [end_id])
    matcher = compile_grammar(tokenizer, to_grammar("choice", json.dumps([TEXT])))
    request = EngineRequest(key=1, prompt_ids=(0,), params=SamplingParams(max_new_tokens=99))
    state = GrammarState(tokenizer, matcher, Clock(), request, [end_id], size)
    written, mask = b"", np.zeros((1, -(-size // 32)), np.int32)
    text_of = Tokenizer.load(tmp_path).token_bytes
    token_id = -1
    while token_id != end_id:
        state.fill(mask, 0)
        token_id = int(np.unpackbits(mask.view(np.uint8), bitorder="little").argmax())
        if token_id != end_id:
            state.advance(token_id)
            written += text_of(token_id)
    assert (state.error, written.decode()) == (None, TEXT)

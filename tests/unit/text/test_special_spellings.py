"""What clients spell is never a special token once it is marked."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from parleyd.text.special_spellings import SpecialSpellings
from parleyd.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import byte_level_tokenizer
from tests.unit.text import vocabularies

MARK = "\ufdd0"
# Some begin within others or within themselves, or go on where others end.
TOKENS = ("<|a|>", "<|a", "|>b", "a|><", "<s>", "[X]", "«é»", "||", "aba", "user")
PIECES = (*TOKENS, "<", "|", "a", ">", "b", "é", MARK, "[", "X]", " ", "\n")


def tokenizer_of(*tokens: str) -> Tokenizer:
    """Its other ids are bytes."""
    backend = byte_level_tokenizer()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in tokens])
    return Tokenizer(backend)


TOKENIZER = tokenizer_of(*TOKENS)
SPELLINGS = SpecialSpellings(TOKENIZER)


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_ids_are_those_of_ordinary_text(text: str) -> None:
    marked = SPELLINGS.mark(text)
    assert marked.replace(MARK, "") == (plain := text.replace(MARK, ""))
    encoding = TOKENIZER.encode(marked)
    ids = SPELLINGS.without_marks(encoding.ids)
    assert len(ids) == len(encoding) - SPELLINGS.count(marked)
    words = {TOKENIZER.token_id("user"), TOKENIZER.token_id("aba")}  # are names too, so they stay tokens
    assert TOKENIZER.special_ids.intersection(ids) <= words
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == plain


def test_text_without_any_is_left_as_it_is() -> None:
    text = "a <b> | [Y] is < 3\n"
    assert SPELLINGS.mark(text) == text


def test_everything_that_a_template_gets_is_marked() -> None:
    given: dict[str, Any] = {"name": "<s>", "list": ["<s>", ("<s>", 1)], "<s>": {"deep": {"<s>": None, "n": 2.5}}}
    marked = str(SPELLINGS.mark(given)).replace("\\ufdd0", MARK)
    assert "<s>" not in marked
    assert marked.count(f"<{MARK}s>") == 5


def test_words_and_single_characters_are_left() -> None:
    message = {"role": "user", "content": "5 €"}
    assert SpecialSpellings(tokenizer_of("user", "€")).mark(message) == message


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
def test_tokenizers_of_every_kind_find_none(kind: str) -> None:
    tokenizer: Tokenizer = getattr(vocabularies, kind)()
    text = "".join(str(tokenizer.token(token_id)) for token_id in sorted(tokenizer.special_ids))
    assert tokenizer.special_ids.intersection(tokenizer.encode(text).ids)
    spellings = SpecialSpellings(tokenizer)
    ids = spellings.without_marks(tokenizer.encode(spellings.mark(text)).ids)
    # Pieces outside the vocabulary are the unknown token's, which is special itself.
    assert tokenizer.special_ids.intersection(ids) <= {tokenizer.token_id("<unk>")}


NORMALIZERS = {
    "Llama": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "Gemma": normalizers.Replace(" ", "▁"),
    "lower case": normalizers.Lowercase(),
    "NFKC": normalizers.NFKC(),
}


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_what_normalising_makes_a_special_token_is_none(name: str, splits: bool) -> None:
    tokens = ("</s>", "<|end of turn|>", "<|end▁of▁turn|>")
    backend = byte_level_tokenizer()
    backend.normalizer = NORMALIZERS[name]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=True) for token in tokens])
    backend.encode_special_tokens = splits
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()))
    spellings = SpecialSpellings(tokenizer)
    for text in (*tokens, "a</s>b", " </s>", "</S>", "<|END of turn|>", "＜/s＞", "<|end▁of turn|>"):
        ids = spellings.without_marks(tokenizer.encode(spellings.mark(text)).ids)
        assert not tokenizer.special_ids.intersection(ids), text
    for token in tokens:  # as a chat template writes it
        assert tokenizer.encode(token).ids == [tokenizer.token_id(token)]

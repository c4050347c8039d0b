"""Detokenizer against `Tokenizer.decode`, for arbitrary ids of every kind of vocabulary."""

from __future__ import annotations

import time
from itertools import chain

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parleyd.text.detokenizer import Detokenizer
from parleyd.text.tokenizer import Tokenizer
from tests.unit.text import vocabularies
from tests.unit.text.vocabularies import FIRST_BYTE_ID, FIRST_PIECE_ID

BYTE_LEVEL = vocabularies.byte_level()
BYTE_FALLBACK = {strips: vocabularies.byte_fallback(strips_first_space=strips) for strips in (True, False)}
WITHOUT_BYTES = [vocabularies.metaspace(), vocabularies.word_piece(), vocabularies.word_end_bpe()]

HARD_TEXTS = [
    "plain words",
    "naïve café",
    "日本語と中文",
    "👨‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽",
    "e\u0301 combining, \u0e01\u0e33 Thai, \u0928\u093f Devanagari",
    "\x00\n\t \u2028 \ufffd \U0010ffff",
]


def deltas(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [detokenizer.push(token_id) for token_id in ids]


# Ids that often meet inside a character: bytes of "€" and "😀", bytes that no UTF-8 holds, surrogates, overlong forms.
hard_bytes = st.sampled_from(list("€😀é A".encode() + b"\xff\xc0\xed\xa0\xe0\x80\xf4\x90"))


@given(st.lists(hard_bytes | st.integers(0, BYTE_LEVEL.vocab_size + 3)), st.booleans())
def test_byte_level_deltas_are_decode_without_a_half_character_at_the_end(ids: list[int], skip: bool) -> None:
    text = "".join(deltas(BYTE_LEVEL, ids, skip_special_tokens=skip))
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert whole in (text, text + "\ufffd")
    if whole != text:  # then, and only then, more bytes could still complete the character
        assert any(
            "\ufffd" not in BYTE_LEVEL.decode([*ids, *rest], skip_special_tokens=skip)[len(text) :]
            for rest in ([0x80], [0xBF], [0x80, 0x80], [0xBF, 0xBF], [0x80] * 3, [0xBF] * 3)
        )


@given(st.lists(st.sampled_from([*" éa", "Ġthe", "ĠÃ©"]), max_size=6))
def test_of_byte_level_texts_the_first_space_alone_goes_where_the_vocabulary_says_so(parts: list[str]) -> None:
    tokenizer = vocabularies.byte_level_without_first_space()
    half = tokenizer.token_id("ĠÃ")
    spelled = {"Ġthe": [tokenizer.token_id("Ġthe")], "ĠÃ©": [half, 0xA9]}
    ids = list(chain(*(spelled.get(part) or part.encode() for part in parts)))
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)
    [*before, last] = [ord("a"), *ids]  # in mid-text none does
    detokenizer = Detokenizer(tokenizer, id_before=ord("a"))
    assert "a" + "".join(map(detokenizer.push, ids)) == tokenizer.decode([*before, last])


# Segments between which no byte run goes on: pieces, special ids, whole characters in bytes, runs that start broken.
piece_id = st.integers(FIRST_PIECE_ID, FIRST_PIECE_ID + len(vocabularies.PIECES) - 1)
outside_id = st.integers(FIRST_PIECE_ID + len(vocabularies.PIECES), 1000)
pieces = st.tuples(st.lists(piece_id | outside_id, max_size=3), piece_id).map(lambda parts: [*parts[0], parts[1]])
special = st.lists(st.integers(0, FIRST_BYTE_ID - 1), max_size=2)
broken_bytes = st.lists(hard_bytes, max_size=4).map(lambda rest: [0x80, *rest]) | st.sampled_from(
    [[0xE2], [0xF0, 0x9F]]
)
byte_runs = (st.text(min_size=1).map(lambda text: list(text.encode())) | broken_bytes).map(
    lambda run: [FIRST_BYTE_ID + byte for byte in run]
)
segments = st.lists(st.tuples(special, byte_runs, special, pieces).map(lambda parts: [*chain(*parts)]), max_size=4)


@pytest.mark.parametrize("strips", [True, False])
@given(leading=pieces | st.just([]), segments=segments, skip=st.booleans())
@example(leading=[], segments=[[FIRST_BYTE_ID + ord(" "), FIRST_PIECE_ID + 4]], skip=False)
def test_byte_fallback_deltas_are_decode(
    strips: bool, leading: list[int], segments: list[list[int]], skip: bool
) -> None:
    tokenizer = BYTE_FALLBACK[strips]
    ids = [*leading, *chain(*segments)]
    assert "".join(deltas(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer", WITHOUT_BYTES, ids=["metaspace", "word_piece", "word_end_bpe"])
@given(ids=st.lists(st.integers(0, 20)), skip=st.booleans())
def test_deltas_of_vocabularies_without_bytes_are_decode(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(deltas(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize(("tokenizer", "first_byte_id"), [(BYTE_LEVEL, 0), (BYTE_FALLBACK[True], FIRST_BYTE_ID)])
def test_each_character_is_sent_with_its_last_byte(tokenizer: Tokenizer, first_byte_id: int, text: str) -> None:
    for char, sent in zip(text, _deltas_by_character(tokenizer, first_byte_id, text), strict=True):
        assert sent == [""] * (len(char.encode()) - 1) + [char]


def _deltas_by_character(tokenizer: Tokenizer, first_byte_id: int, text: str) -> list[list[str]]:
    detokenizer = Detokenizer(tokenizer)
    return [[detokenizer.push(first_byte_id + byte) for byte in char.encode()] for char in text]


def test_a_character_cut_off_by_the_end_is_never_sent() -> None:
    assert deltas(BYTE_LEVEL, list("a€".encode())[:-1]) == ["a", "", ""]
    assert deltas(BYTE_FALLBACK[True], [FIRST_BYTE_ID + byte for byte in "a€".encode()[:-1]]) == ["a", "", ""]


def test_a_broken_byte_at_the_end_is_sent_since_nothing_can_mend_it() -> None:
    assert deltas(BYTE_LEVEL, [0x61, 0xFF]) == ["a", "\ufffd"]


def test_half_a_surrogate_is_broken_as_soon_as_it_can_be_nothing_else() -> None:
    assert deltas(BYTE_LEVEL, [0xED, 0xA9, 0x61]) == ["", "\ufffd\ufffd", "a"]
    fallback = deltas(BYTE_FALLBACK[True], [FIRST_BYTE_ID + byte for byte in (0xED, 0xA9, 0x80)])
    assert fallback == ["", "\ufffd\ufffd", "\ufffd"]


def test_whole_characters_before_a_broken_byte_of_the_same_run_stay() -> None:
    ids = [FIRST_BYTE_ID + byte for byte in (*"€".encode(), 0xFF, 0x41)] + [FIRST_PIECE_ID + 4]
    assert deltas(BYTE_FALLBACK[True], ids) == ["", "", "€", "\ufffd", "\ufffd", "a"]


def test_special_tokens_in_the_middle_are_skipped_even_within_a_character() -> None:
    first, *rest = "€".encode()
    assert deltas(BYTE_LEVEL, [first, 257, *rest]) == ["", "", "", "€"]


def test_special_tokens_are_kept_on_demand() -> None:
    assert deltas(BYTE_LEVEL, [0x61, 258, 0x62], skip_special_tokens=False) == ["a", "<|im_end|>", "b"]


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    assert deltas(BYTE_LEVEL, [0x61, 100_000, 0x62]) == ["a", "", "b"]
    assert deltas(BYTE_FALLBACK[True], [FIRST_PIECE_ID + 1, 100_000, FIRST_PIECE_ID + 1]) == ["the", "", " the"]


@pytest.mark.parametrize(("tokenizer", "token_id"), [(BYTE_LEVEL, 0x80), (BYTE_FALLBACK[True], FIRST_BYTE_ID + 0x80)])
def test_time_per_id_does_not_grow_with_a_run_of_broken_bytes(tokenizer: Tokenizer, token_id: int) -> None:
    started = time.process_time()
    assert "".join(deltas(tokenizer, [token_id] * 50_000)) == "\ufffd" * 50_000
    assert time.process_time() - started < 2  # quadratic cost would take minutes


@pytest.mark.parametrize("tokenizer", [*BYTE_FALLBACK.values(), *WITHOUT_BYTES])
def test_what_goes_on_behind_an_id_is_what_decoding_both_adds(tokenizer: Tokenizer) -> None:
    ids = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.fallback_byte(token_id) is None]
    for before in ids:
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False, id_before=before)
        text = tokenizer.decode([before], skip_special_tokens=False)
        text += "".join(map(detokenizer.push, ids))
        assert text == tokenizer.decode([before, *ids], skip_special_tokens=False)


def test_the_first_space_is_told_behind_an_id_alone() -> None:
    tokenizer = BYTE_FALLBACK[True]
    ids = [token_id for piece in ("▁the", "▁the") if (token_id := tokenizer.token_id(piece)) is not None]
    for id_before, text in ((None, "the the"), (ids[0], " the the"), (0, " the the")):
        assert "".join(map(Detokenizer(tokenizer, id_before=id_before).push, ids)) == text

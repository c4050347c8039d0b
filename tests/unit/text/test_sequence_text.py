"""SequenceText: detokenizer and stop strings together, fed id by id."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parleyd.text.sequence_text import SequenceText
from tests.support.tiny_tokenizer import IM_END_ID
from tests.unit.text import vocabularies

TOKENIZER = vocabularies.byte_level()


def test_text_leaves_id_by_id_and_ends_before_the_stop_string() -> None:
    text = SequenceText(TOKENIZER, stop_strings=["€!"])
    assert [text.push(byte) for byte in "a€!".encode()] == [("a", None), ("", None), ("", None), ("", None), ("", "€!")]
    assert text.finish() == ""


def test_an_invisible_id_adds_nothing() -> None:
    text = SequenceText(TOKENIZER, skip_special_tokens=False)
    assert text.push(ord("a")) == ("a", None)
    assert text.push(ord("b"), visible=False) == ("", None)
    assert text.push(IM_END_ID) == ("<|im_end|>", None)


def test_finish_gives_the_held_text_without_half_a_character() -> None:
    text = SequenceText(TOKENIZER, stop_strings=["END"])
    assert "".join(text.push(byte).text for byte in "an EN€".encode()[:-1]) == "an "
    assert text.finish() == "EN"


def test_stop_strings_count_only_after_min_new_tokens() -> None:
    text = SequenceText(TOKENIZER, stop_strings=["ab"], min_new_tokens=3)
    assert [text.push(byte) for byte in b"abab"] == [("a", None), ("b", None), ("a", None), ("b", None)]
    assert [text.push(byte) for byte in b"ab"] == [("", None), ("", "ab")]


def test_invisible_ids_count_towards_min_new_tokens() -> None:
    text = SequenceText(TOKENIZER, stop_strings=["a"], min_new_tokens=1)
    text.push(IM_END_ID, visible=False)
    assert text.push(ord("a")) == ("", "a")


@given(
    st.lists(st.integers(0, 260), max_size=20),
    st.integers(0, 20),
    st.lists(st.text(min_size=1, max_size=2), max_size=2),
)
def test_text_after_n_ids_depends_on_these_alone(ids: list[int], n: int, stop_strings: list[str]) -> None:
    whole = SequenceText(TOKENIZER, stop_strings=stop_strings)
    part = SequenceText(TOKENIZER, stop_strings=stop_strings)
    assert [whole.push(token_id) for token_id in ids][:n] == [part.push(token_id) for token_id in ids[:n]]

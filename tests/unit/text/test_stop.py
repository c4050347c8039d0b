"""StopMatcher against a reference that looks at the whole text so far at every step."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parleyd.text.stop import StopMatcher, StopResult


def run(
    stop_strings: Sequence[str], pieces: Sequence[str], *, include: bool = False, skip: int = 0
) -> list[StopResult]:
    """Pushes all pieces, the first `skip` without searching, and finishes."""
    matcher = StopMatcher(stop_strings, include=include)
    results = [matcher.push(piece, searching=i >= skip) for i, piece in enumerate(pieces)]
    return [*results, StopResult(matcher.finish(), None)]


def reference(stop_strings: Sequence[str], pieces: Sequence[str], include: bool, skip: int) -> list[StopResult]:
    """The same by definition: at each step, search everything; send all but what may yet become a stop string."""
    results: list[StopResult] = []
    searched = sent = ""
    for i, piece in enumerate(pieces):
        if i < skip:
            results.append(StopResult(piece, None))
            continue
        searched += piece
        found = [(searched.find(s), n, s) for n, s in enumerate(stop_strings) if s in searched]
        if found:
            start, _, stop_string = min(found)
            end = start + len(stop_string) if include else start
            results.append(StopResult(searched[len(sent) : end], stop_string))
            return results + [StopResult("", None)] * (len(pieces) - i)
        held = max((n for s in stop_strings for n in range(len(s)) if searched.endswith(s[:n])), default=0)
        safe = searched[: len(searched) - held]
        results.append(StopResult(safe[len(sent) :], None))
        sent = safe
    return [*results, StopResult(searched[len(sent) :], None)]


small = st.text(alphabet="ab", max_size=4)


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=4),
    st.lists(small | st.text(alphabet="abc", max_size=9), max_size=12),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_step_is_as_defined(stop_strings: list[str], pieces: list[str], include: bool, skip: int) -> None:
    assert run(stop_strings, pieces, include=include, skip=skip) == reference(stop_strings, pieces, include, skip)


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3), st.lists(small, max_size=12))
def test_text_without_a_match_comes_out_whole(stop_strings: list[str], pieces: list[str]) -> None:
    results = run(stop_strings, pieces)
    if all(result.stop_string is None for result in results):
        assert "".join(result.text for result in results) == "".join(pieces)


def test_a_stop_string_over_several_pieces_is_never_sent_in_part() -> None:
    assert run(["END"], ["say E", "N", "D more"]) == [("say ", None), ("", None), ("", "END"), ("", None)]


def test_what_could_have_become_a_stop_string_is_sent_once_it_cannot() -> None:
    assert run(["aab"], ["aa", "a", "c"]) == [("", None), ("a", None), ("aac", None), ("", None)]


def test_the_held_text_is_sent_when_the_answer_ends() -> None:
    assert run(["END"], ["the E", "N"]) == [("the ", None), ("", None), ("EN", None)]


def test_the_earliest_start_wins_in_one_step() -> None:
    assert run(["cd", "bcde"], ["abcdef"])[0] == ("a", "bcde")


def test_the_first_listed_wins_at_the_same_start() -> None:
    assert run(["ab", "abc"], ["xabc"])[0] == ("x", "ab")
    assert run(["abc", "ab"], ["xabc"])[0] == ("x", "abc")


def test_the_first_to_complete_wins_over_an_earlier_start_in_a_later_step() -> None:
    assert run(["abcd", "bc"], ["abc", "d"])[0] == ("a", "bc")


def test_include_keeps_the_stop_string_and_nothing_after() -> None:
    assert run(["END"], ["say E", "ND more"], include=True) == [("say ", None), ("END", "END"), ("", None)]


def test_nothing_follows_a_match() -> None:
    assert run(["b"], ["abab", "a"]) == [("a", "b"), ("", None), ("", None)]


def test_text_that_is_not_searched_takes_no_part_in_a_match() -> None:
    assert run(["ab"], ["ab a", "b ab"], skip=1) == [("ab a", None), ("b ", "ab"), ("", None)]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError):
        StopMatcher([""])


def test_time_stays_linear_for_self_overlapping_stop_strings() -> None:
    matcher = StopMatcher(["a" * 255 + c for c in "bcdefghijklmnopq"])
    started = time.process_time()
    for _ in range(5_000):
        matcher.push("aaaa")
    assert time.process_time() - started < 2

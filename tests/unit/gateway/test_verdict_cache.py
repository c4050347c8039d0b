"""The cache of verdicts on grammars: bounded by their size, whatever their number."""

from __future__ import annotations

from parleyd.gateway.verdict_cache import VerdictCache
from parleyd.ipc.messages import GrammarChecked

_MIB = 2**20


def keys_in(cache: VerdictCache, num_put: int) -> list[int]:
    return [number for number in range(num_put) if cache.get(bytes([number])) is not None]


def verdict(num_bytes: int) -> GrammarChecked:
    return GrammarChecked(grammar="g" * num_bytes)


def test_large_verdicts_are_kept_as_far_as_they_fit() -> None:
    cache = VerdictCache(10 * _MIB)
    for number in range(5):
        cache.put(bytes([number]), verdict(3 * _MIB))
    assert keys_in(cache, 5) == [2, 3, 4]


def test_small_ones_count_too() -> None:
    cache = VerdictCache(_MIB)
    for number in range(5000):
        cache.put(number.to_bytes(2), verdict(1))
    assert cache.get(number.to_bytes(2)) is not None
    assert sum(cache.get(number.to_bytes(2)) is not None for number in range(5000)) <= 1024


def test_errors_count_as_grammars_do() -> None:
    cache = VerdictCache(10 * _MIB)
    for number in range(5):
        cache.put(bytes([number]), GrammarChecked(error="e", errors={"tools[0].parameters": "e" * 3 * _MIB}))
    assert keys_in(cache, 5) == [2, 3, 4]


def test_what_was_asked_for_longest_ago_goes_first() -> None:
    cache = VerdictCache(10 * _MIB)
    for number in range(3):
        cache.put(bytes([number]), verdict(3 * _MIB))
    cache.get(bytes([0]))
    cache.put(bytes([3]), verdict(3 * _MIB))
    assert keys_in(cache, 4) == [0, 2, 3]


def test_one_beyond_the_bound_is_not_kept_and_leaves_room() -> None:
    cache = VerdictCache(10 * _MIB)
    cache.put(bytes([0]), verdict(11 * _MIB))
    assert keys_in(cache, 1) == []
    for number in range(1, 4):
        cache.put(bytes([number]), verdict(3 * _MIB))
    assert keys_in(cache, 4) == [1, 2, 3]


def test_a_verdict_in_place_of_another_and_one_dropped_leave_its_room() -> None:
    cache = VerdictCache(10 * _MIB)
    for _ in range(9):
        cache.put(bytes([0]), verdict(3 * _MIB))
    cache.put(bytes([1]), verdict(3 * _MIB))
    cache.drop(bytes([0]))
    for number in (2, 3):
        cache.put(bytes([number]), verdict(3 * _MIB))
    assert keys_in(cache, 4) == [1, 2, 3]

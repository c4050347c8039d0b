"""The ledger of KV blocks: what is found again, what is evicted, and that every block is accounted for."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from parleyd.generation import EngineRequest, SamplingParams
from parleyd.scheduling.kv_cache import IntegrityError, KVLedger
from parleyd.scheduling.request import BlockCopy, Sequence

BLOCK_SIZE = 4


def sequence(*token_ids: int, salt: str = "") -> Sequence:
    request = EngineRequest(key=0, prompt_ids=token_ids, params=SamplingParams(max_new_tokens=50))
    made = Sequence(request, arrival=0, eos_token_ids=frozenset(), max_context_tokens=100)
    made.cache_salt = salt
    return made


def tokens(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


def admit(ledger: KVLedger, one: Sequence, num_reserved: int = 0) -> int:
    """Allocates and "computes" the whole sequence; returns how many of its tokens were found in the cache."""
    prefix = ledger.cached_prefix(one)
    assert ledger.can_allocate(one, prefix, num_reserved)
    ledger.allocate(one, prefix)
    num_cached = one.num_computed_tokens
    one.num_computed_tokens = len(one.token_ids)
    ledger.register(one, num_cached, len(one.token_ids))
    return num_cached


def num_found(ledger: KVLedger, *token_ids: int, salt: str = "") -> int:
    return len(ledger.cached_prefix(sequence(*token_ids, salt=salt)).block_ids)


def test_blocks_are_taken_for_whole_prompts_and_come_back() -> None:
    ledger = KVLedger(4, BLOCK_SIZE)
    one = sequence(*tokens(0, 9))
    admit(ledger, one)
    assert (len(one.block_ids), ledger.num_used, ledger.num_available) == (3, 3, 1)
    ledger.free(one)
    assert (len(one.block_ids), one.num_computed_tokens, ledger.num_used) == (0, 0, 0)
    ledger.check_integrity([])


def test_a_sequence_grows_by_a_block_when_its_last_is_full() -> None:
    ledger = KVLedger(2, BLOCK_SIZE)
    one = sequence(*tokens(0, 3))
    admit(ledger, one)
    ledger.append(one)
    assert len(one.block_ids) == 1
    one.num_computed_tokens = 4
    assert ledger.can_append(one)
    ledger.append(one)
    assert len(one.block_ids) == 2
    assert ledger.can_append(one), "its own last block has room, though no other is free"
    one.num_computed_tokens = 8
    assert not ledger.can_append(one)


def test_freeing_twice_changes_nothing() -> None:
    ledger = KVLedger(4, BLOCK_SIZE)
    one = sequence(*tokens(0, 9))
    admit(ledger, one)
    ledger.free(one)
    ledger.free(one)
    assert ledger.num_available == 4
    ledger.check_integrity([])


def test_full_blocks_of_a_common_prefix_are_shared_and_the_rest_is_not() -> None:
    ledger = KVLedger(10, BLOCK_SIZE)
    first, second = sequence(*tokens(0, 10)), sequence(*tokens(0, 9), 77, 78)
    assert admit(ledger, first) == 0
    assert admit(ledger, second) == 8
    assert first.block_ids[:2] == second.block_ids[:2]
    assert first.block_ids[2] != second.block_ids[2]
    assert ledger.num_used == 4
    ledger.free(first)
    assert ledger.num_used == 3
    ledger.check_integrity([second.block_ids])


def test_a_lookup_leaves_the_last_token_to_compute() -> None:
    ledger = KVLedger(10, BLOCK_SIZE)
    admit(ledger, sequence(*tokens(0, 8)))
    assert num_found(ledger, *tokens(0, 8)) == 1
    assert num_found(ledger, *tokens(0, 9)) == 2
    assert num_found(ledger, 0) == 0


def test_a_prefix_is_found_only_after_the_same_tokens_and_salt() -> None:
    ledger = KVLedger(10, BLOCK_SIZE)
    admit(ledger, sequence(*tokens(0, 12), salt="a"))
    assert num_found(ledger, *tokens(0, 12), 5, salt="a") == 3
    assert num_found(ledger, *tokens(0, 12), 5, salt="b") == 0
    assert num_found(ledger, *tokens(0, 12), 5) == 0
    assert num_found(ledger, 99, *tokens(1, 12), 5, salt="a") == 0, "same second block, other first one"
    assert num_found(ledger, *tokens(0, 4), 99, *tokens(5, 12), 5, salt="a") == 1


def test_blocks_that_are_not_computed_yet_are_not_found() -> None:
    ledger = KVLedger(10, BLOCK_SIZE)
    one = sequence(*tokens(0, 12))
    ledger.allocate(one, ledger.cached_prefix(one))
    assert num_found(ledger, *tokens(0, 12)) == 0
    ledger.register(one, 0, 7)
    assert num_found(ledger, *tokens(0, 12)) == 1
    ledger.register(one, 7, 8)
    assert num_found(ledger, *tokens(0, 12)) == 2


def test_what_two_sequences_compute_at_once_is_registered_once() -> None:
    ledger = KVLedger(10, BLOCK_SIZE)
    first, second = sequence(*tokens(0, 9)), sequence(*tokens(0, 9))
    for one in (first, second):
        ledger.allocate(one, ledger.cached_prefix(one))
    for one in (first, second):
        ledger.register(one, 0, 9)
    ledger.check_integrity([first.block_ids, second.block_ids])
    ledger.free(first)
    ledger.free(second)
    assert num_found(ledger, *tokens(0, 9)) == 2
    ledger.check_integrity([])


def copied(ledger: KVLedger, one: Sequence) -> BlockCopy | None:
    """Allocates; returns what is copied."""
    return ledger.allocate(one, ledger.cached_prefix(one))


@pytest.mark.parametrize("num_prompt", [2, 3, 4, 6, 8, 11, 12])
def test_of_a_prompt_that_is_there_all_but_its_last_token_is_found(num_prompt: int) -> None:
    ledger = KVLedger(10, BLOCK_SIZE)
    first, second = sequence(*tokens(0, num_prompt)), sequence(*tokens(0, num_prompt))
    admit(ledger, first)
    copy = copied(ledger, second)
    assert second.num_computed_tokens == num_prompt - 1
    assert copy == (first.block_ids[-1], second.block_ids[-1], (num_prompt - 1) % BLOCK_SIZE)
    assert copy.source != copy.target
    assert first.block_ids[:-1] == second.block_ids[:-1]
    ledger.check_integrity([first.block_ids, second.block_ids])


def test_a_prompt_is_found_while_its_last_block_goes_on_with_an_answer_and_after() -> None:
    ledger = KVLedger(10, BLOCK_SIZE)
    first = sequence(*tokens(0, 6))
    admit(ledger, first)
    first.token_ids.extend([90, 91, 92])
    ledger.register(first, 6, 9)
    assert admit(ledger, sequence(*tokens(0, 6))) == 5
    ledger.free(first)
    assert admit(ledger, sequence(*tokens(0, 6))) == 5
    assert num_found(ledger, *tokens(0, 6), 90, 91, 5) == 2, "the full block is found as well"


def test_an_answer_handed_over_computes_nothing_of_its_prompt_again() -> None:
    ledger = KVLedger(10, BLOCK_SIZE)
    admit(ledger, sequence(*tokens(0, 6)))
    handed_over = sequence(*tokens(0, 6))
    handed_over.token_ids.extend([90, 91, 92])
    assert copied(ledger, handed_over) is not None
    assert handed_over.num_computed_tokens == 6


def test_a_prompt_is_not_found_by_another_that_begins_or_ends_like_it() -> None:
    ledger = KVLedger(10, BLOCK_SIZE)
    admit(ledger, sequence(*tokens(0, 7), salt="a"))
    others = [tokens(0, 6), tokens(0, 8), (*tokens(0, 6), 99), (99, *tokens(1, 7))]
    for other in (sequence(*other, salt="a") for other in others):
        assert ledger.cached_prefix(other).copied_block_id is None
    assert ledger.cached_prefix(sequence(*tokens(0, 7))).num_tokens == 0
    assert ledger.cached_prefix(sequence(*tokens(0, 7), salt="a")).num_tokens == 6


def test_the_end_of_a_prompt_is_not_found_where_its_beginning_is_gone() -> None:
    ledger = KVLedger(6, BLOCK_SIZE)
    first, second = sequence(*tokens(0, 6)), sequence(*tokens(0, 6))
    for one in (first, second):
        copied(ledger, one)
    ledger.register(first, 0, 4)
    ledger.register(second, 0, 6)  # its end, behind a block that is registered as the first one's
    ledger.free(first)
    filler = sequence(*tokens(50, 66))
    admit(ledger, filler)
    assert ledger.cached_prefix(sequence(*tokens(0, 6))).num_tokens == 0
    ledger.check_integrity([second.block_ids, filler.block_ids])


def test_a_block_may_be_copied_onto_itself_where_there_is_no_other() -> None:
    ledger = KVLedger(1, BLOCK_SIZE)
    first, second = sequence(*tokens(0, 3)), sequence(*tokens(0, 3))
    admit(ledger, first)
    ledger.free(first)
    assert copied(ledger, second) == (0, 0, 2)
    assert second.num_computed_tokens == 2
    ledger.check_integrity([second.block_ids])


def test_copying_from_a_block_makes_it_recent() -> None:
    ledger = KVLedger(3, BLOCK_SIZE)
    for prompt in (tokens(0, 3), tokens(50, 53)):
        one = sequence(*prompt)
        admit(ledger, one)
        ledger.free(one)
    again = sequence(*tokens(0, 3))
    copied(ledger, again)
    copied(ledger, sequence(9))
    assert ledger.cached_prefix(sequence(*tokens(0, 3))).num_tokens == 2
    assert ledger.cached_prefix(sequence(*tokens(50, 53))).num_tokens == 0


def test_free_blocks_are_used_before_cached_ones_are_evicted() -> None:
    ledger = KVLedger(6, BLOCK_SIZE)
    one = sequence(*tokens(0, 9))
    admit(ledger, one)
    ledger.free(one)
    admit(ledger, sequence(*tokens(50, 65)))
    assert num_found(ledger, *tokens(0, 9)) == 2


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    ledger = KVLedger(5, BLOCK_SIZE)
    old, recent = sequence(*tokens(0, 8)), sequence(*tokens(50, 58))
    for one in (old, recent):
        admit(ledger, one)
        ledger.free(one)
    admit(ledger, sequence(1, 2, 3, 4, 5))
    assert num_found(ledger, *tokens(0, 9)) == 1
    assert num_found(ledger, *tokens(50, 59)) == 2


def test_using_a_prefix_makes_it_recent() -> None:
    ledger = KVLedger(5, BLOCK_SIZE)
    for one in (sequence(*tokens(0, 8)), sequence(*tokens(50, 58)), sequence(*tokens(0, 9))):
        admit(ledger, one)
        ledger.free(one)
    admit(ledger, sequence(1, 2, 3, 4, 5))
    assert num_found(ledger, *tokens(0, 9)) == 2
    assert num_found(ledger, *tokens(50, 59)) == 1


def test_a_held_block_is_never_evicted() -> None:
    ledger = KVLedger(4, BLOCK_SIZE)
    holder = sequence(*tokens(0, 9))
    admit(ledger, holder)
    other = sequence(*tokens(50, 55))
    assert not ledger.can_allocate(other, ledger.cached_prefix(other))
    ledger.check_integrity([holder.block_ids])


def test_room_counts_cached_blocks_that_the_sequence_itself_would_revive() -> None:
    ledger = KVLedger(3, BLOCK_SIZE)
    one = sequence(*tokens(0, 9))
    admit(ledger, one)
    ledger.free(one)
    longer = sequence(*tokens(0, 9), 20, 21, 22, 23)
    assert not ledger.can_allocate(longer, ledger.cached_prefix(longer)), "two cached, two new, but three in all"
    again = sequence(*tokens(0, 9))
    assert ledger.can_allocate(again, ledger.cached_prefix(again))
    assert not ledger.can_allocate(again, ledger.cached_prefix(again), num_reserved=1)


def _leak(ledger: KVLedger, held: Sequence) -> None:
    held.block_ids.pop()


def _hold_twice(ledger: KVLedger, held: Sequence) -> None:
    held.block_ids.append(held.block_ids[0])


def _free_twice(ledger: KVLedger, held: Sequence) -> None:
    ledger._free.append(ledger._free[0])


def _free_a_held_block(ledger: KVLedger, held: Sequence) -> None:
    ledger._free.append(held.block_ids[0])


def _cache_a_held_block(ledger: KVLedger, held: Sequence) -> None:
    ledger._cached[held.block_ids[0]] = None


def _lose_a_free_block(ledger: KVLedger, held: Sequence) -> None:
    ledger._free.pop()


def _forget_a_hash(ledger: KVLedger, held: Sequence) -> None:
    ledger._hashes[held.block_ids[0]] = ()


def _leave_a_hash_behind(ledger: KVLedger, held: Sequence) -> None:
    ledger._hashes[ledger._free[0]] = (b"stale",)


def _register_a_free_block(ledger: KVLedger, held: Sequence) -> None:
    _leave_a_hash_behind(ledger, held)
    ledger._registered[b"stale"] = ledger._free[0]


def _cache_a_block_without_a_hash(ledger: KVLedger, held: Sequence) -> None:
    ledger._cached[ledger._free.pop()] = None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_leak, "held 0 times but counted 1"),
        (_hold_twice, "held 2 times but counted 1"),
        (_free_twice, "are not 8, each once"),
        (_free_a_held_block, "are not 8, each once"),
        (_cache_a_held_block, "are not 8, each once"),
        (_lose_a_free_block, "are not 8, each once"),
        (_forget_a_hash, "disagree"),
        (_leave_a_hash_behind, "disagree"),
        (_register_a_free_block, "find a free block"),
        (_cache_a_block_without_a_hash, "or none a cached one"),
    ],
)
def test_damage_to_the_books_is_named(damage: Callable[[KVLedger, Sequence], None], message: str) -> None:
    ledger = KVLedger(8, BLOCK_SIZE)
    held, cached = sequence(*tokens(0, 9)), sequence(*tokens(50, 54))
    admit(ledger, held)
    admit(ledger, cached)
    ledger.free(cached)
    ledger.check_integrity([held.block_ids])
    damage(ledger, held)
    with pytest.raises(IntegrityError, match=message):
        ledger.check_integrity([held.block_ids])


def test_a_batch_in_flight_keeps_its_block_ids_when_they_are_freed() -> None:
    ledger = KVLedger(4, BLOCK_SIZE)
    one = sequence(*tokens(0, 9))
    admit(ledger, one)
    in_flight = one.block_ids
    ledger.free(one)
    assert len(in_flight) == 3
    assert one.block_ids == array("i")

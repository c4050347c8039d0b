"""Attention of decoding sequences, compiled: against the gathered one in float32, and what it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parleyd.cpu_kernels.decode import attend_head, paged_decode

BLOCK_SIZE, NUM_BLOCKS = 32, 40
LENGTHS = (1, 31, 32, 33, 64, 300)


def make_cache(num_kv_heads: int, head_dim: int, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values; the block table of sequences of LENGTHS, in no order and padded with 0; the lengths."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, NUM_BLOCKS, num_kv_heads, block_size, head_dim).bfloat16()
    free = torch.randperm(NUM_BLOCKS).tolist()
    table = torch.zeros(len(LENGTHS), 10, dtype=torch.int32)
    for row, length in enumerate(LENGTHS):
        for index in range(-(-length // BLOCK_SIZE)):
            table[row, index] = free.pop()
    return keys, values, table, torch.tensor(LENGTHS, dtype=torch.int32)


def attended(query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, length: int, scale: float) -> Tensor:
    """What one row, `[heads, head_dim]`, attends to, by the definition."""
    key, value = (of[blocks.long()].transpose(0, 1).flatten(1, 2)[:, :length].float() for of in (keys, values))
    grouped = query.float().view(len(key), -1, query.shape[-1])
    return ((grouped @ key.mT * scale).softmax(-1) @ value).view(query.shape)


@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim"), [(3, 3, 64), (1, 7, 128), (4, 1, 16), (2, 1, 96), (1, 12, 32)]
)
def test_each_row_attends_to_its_own_tokens(num_kv_heads: int, group: int, head_dim: int) -> None:
    keys, values, table, lengths = make_cache(num_kv_heads, head_dim)
    num_heads = num_kv_heads * group
    # As it comes from the fused layer: queries beside keys and values of the same row.
    query = torch.randn(len(LENGTHS), num_heads + 2 * num_kv_heads, head_dim).bfloat16()[:, :num_heads]
    result = paged_decode(query, keys, values, table, lengths, head_dim**-0.5)
    for row, length in enumerate(LENGTHS):
        expected = attended(query[row], keys, values, table[row], length, head_dim**-0.5)
        torch.testing.assert_close(result[row].float(), expected, rtol=0.01, atol=0.01)


def test_a_row_has_the_same_bits_alone_and_among_neighbours() -> None:
    keys, values, table, lengths = make_cache(3, 64)
    query = torch.randn(len(LENGTHS), 9, 64).bfloat16()
    together = paged_decode(query, keys, values, table, lengths, 0.125)
    for row in range(len(LENGTHS)):
        one = slice(row, row + 1)
        alone = paged_decode(query[one], keys, values, table[one], lengths[one], 0.125)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (8, 128), (12, 32), (3, 16)])
def test_rows_that_follow_each_other_attend_as_each_does_alone(group: int, head_dim: int) -> None:
    keys, values, _, _ = make_cache(2, head_dim)
    # A prompt; one that begins with the same block, and whose lengths go on where its end; one that decodes.
    rows = [((1, 2, 3), length) for length in range(20, 71)]
    rows += [((1, 5, 6), length) for length in (71, 72, 73)]
    rows += [((1, 5, 7), 73), ((9, 8, 4), 74), ((1, 5, 6), 74), ((1, 5, 6), 75)]
    # One with more tokens than are scored at a time.
    rows += [(range(10, 30), length) for length in range(500, 600)]
    table = torch.zeros(len(rows), 20, dtype=torch.int32)
    for row, (blocks, _) in enumerate(rows):
        table[row, : len(blocks)] = torch.tensor(blocks)
    lengths = torch.tensor([length for _, length in rows], dtype=torch.int32)
    query = torch.randn(len(rows), 2 * group, head_dim).bfloat16()
    together = paged_decode(query, keys, values, table, lengths, head_dim**-0.5)
    for row, (_, length) in enumerate(rows):
        one = slice(row, row + 1)
        alone = paged_decode(query[one], keys, values, table[one], lengths[one], head_dim**-0.5)
        assert torch.equal(alone[0], together[row])
        expected = attended(query[row], keys, values, table[row], length, head_dim**-0.5)
        torch.testing.assert_close(together[row].float(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(("group", "block_size"), [(7, 16), (25, 48), (2, 512)])
def test_rows_attend_together_whatever_the_group_and_the_blocks(group: int, block_size: int) -> None:
    keys, values, _, _ = make_cache(1, 32, block_size)
    lengths = torch.arange(520, 600, dtype=torch.int32)
    table = torch.randperm(NUM_BLOCKS)[: -(-600 // block_size)].int().repeat(len(lengths), 1)
    query = torch.randn(len(lengths), group, 32).bfloat16()
    together = paged_decode(query, keys, values, table, lengths, 0.2)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        assert torch.equal(paged_decode(query[one], keys, values, table[one], lengths[one], 0.2)[0], together[row])
        expected = attended(query[row], keys, values, table[row], length, 0.2)
        torch.testing.assert_close(together[row].float(), expected, rtol=0.01, atol=0.01)


def test_nothing_is_made_of_what_lies_behind_the_last_token() -> None:
    keys, values, table, lengths = make_cache(3, 64)
    query = torch.randn(len(LENGTHS), 9, 64).bfloat16()
    expected = paged_decode(query, keys, values, table, lengths, 0.125)
    for row, length in enumerate(LENGTHS):
        if within := length % BLOCK_SIZE:
            for of in (keys, values):
                of[table[row, length // BLOCK_SIZE], :, within:] = torch.nan
    assert torch.equal(paged_decode(query, keys, values, table, lengths, 0.125), expected)


@pytest.mark.parametrize("broken", ["keys", "values"])
def test_what_is_broken_in_a_sequence_stays_in_it(broken: str) -> None:
    keys, values, _, _ = make_cache(1, 64)
    (keys if broken == "keys" else values)[5] = torch.nan
    # The second goes on where the first ends, in a block of its own.
    table, lengths = torch.tensor([[1, 0], [1, 5]], dtype=torch.int32), torch.tensor([32, 33], dtype=torch.int32)
    result = paged_decode(torch.randn(2, 3, 64).bfloat16(), keys, values, table, lengths, 0.125)
    assert result[0].isfinite().all() and result[1].isnan().all()


def test_heads_that_fit_no_vectors_are_told() -> None:
    with pytest.raises(ValueError, match="heads of 24 numbers"):
        attend_head(3, 24, BLOCK_SIZE)


def test_scores_far_apart_are_no_trouble() -> None:
    keys, values, table, lengths = make_cache(3, 64)
    query = 100 * torch.randn(len(LENGTHS), 9, 64).bfloat16()
    result = paged_decode(query, keys, values, table, lengths, 1.0)
    for row, length in enumerate(LENGTHS):
        expected = attended(query[row], keys, values, table[row], length, 1.0)
        torch.testing.assert_close(result[row].float(), expected, rtol=0.01, atol=0.01)

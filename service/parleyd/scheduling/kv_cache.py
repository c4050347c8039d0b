"""The ledger of the paged KV cache: who holds which block, and which blocks hold a prefix worth keeping.

Only the scheduler writes to it. The tensors themselves are the model runner's.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

from parleyd.scheduling.request import BlockCopy, Sequence


class IntegrityError(RuntimeError):
    """The books do not add up: a bug of ours, after which no answer can be trusted."""


class CachedPrefix(NamedTuple):
    """The first `num_tokens` of a sequence: in full blocks that it can hold too, and in one that it must copy."""

    block_ids: array[int]
    num_tokens: int
    copied_block_id: int | None = None


class KVLedger:
    """Blocks of `block_size` tokens each: held by sequences, cached (nobody's, but with a known prefix), or free.

    A full block whose tokens are computed is registered under a hash of its tokens and all before them. Any sequence
    that begins with the same tokens and salt may then hold it too. What is registered is never written again: sequences
    only write behind it, and lookups leave at least the last token to compute into a block of its own.

    The block in which a prompt ends is registered under a hash of the prompt, full or not. A sequence with the same
    prompt and salt is given a copy: the one who holds it may be writing its answer there.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._hashes: list[tuple[bytes, ...]] = [()] * num_blocks
        self._registered: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that a sequence can be given: free, or cached and so evictable."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_available

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, sequence: Sequence) -> CachedPrefix:
        """The registered blocks that a sequence begins with, less what would leave none of its tokens to compute."""
        block_ids = array("i")
        num_blocks = (len(sequence.token_ids) - 1) // self.block_size
        self._hash_blocks(sequence, num_blocks)
        for index in range(num_blocks):
            block_id = self._registered.get(sequence.block_hashes[index])
            if block_id is None:
                break
            block_ids.append(block_id)
        num_tokens, num_prompt_tokens = len(block_ids) * self.block_size, sequence.num_prompt_tokens
        num_with_copy = min(num_prompt_tokens, len(sequence.token_ids) - 1)
        if len(block_ids) == (num_prompt_tokens - 1) // self.block_size:
            copied = self._registered.get(self._digest(sequence, num_prompt_tokens))
            if copied is not None:
                return CachedPrefix(block_ids, num_with_copy, copied)
        return CachedPrefix(block_ids, num_tokens)

    def can_allocate(self, sequence: Sequence, prefix: CachedPrefix, num_reserved: int = 0) -> bool:
        """Whether there are blocks for all of a sequence's tokens behind `prefix`, with `num_reserved` to spare."""
        num_revived = sum(self._ref_counts[block_id] == 0 for block_id in prefix.block_ids)
        num_new = self.num_blocks_for(len(sequence.token_ids)) - len(prefix.block_ids)
        return num_new + num_revived + num_reserved <= self.num_available

    def allocate(self, sequence: Sequence, prefix: CachedPrefix) -> BlockCopy | None:
        """Gives a sequence `prefix` (from `cached_prefix`) and new blocks for the rest of its tokens.

        Returns what is to be copied, if there is something. Its source is not kept for it: it may be what the next
        batch writes, or even the same block.
        """
        for block_id in prefix.block_ids:
            if self._ref_counts[block_id] == 0:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1
        copied = prefix.copied_block_id
        if copied is not None and copied in self._cached:
            self._cached.move_to_end(copied)
        block_ids = prefix.block_ids[:]
        for _ in range(self.num_blocks_for(len(sequence.token_ids)) - len(block_ids)):
            block_ids.append(self._take_block())
        sequence.block_ids = block_ids
        sequence.num_computed_tokens = prefix.num_tokens
        if copied is None:
            return None
        num_whole = len(prefix.block_ids)
        return BlockCopy(copied, block_ids[num_whole], prefix.num_tokens - num_whole * self.block_size)

    def can_append(self, sequence: Sequence) -> bool:
        """Whether the next token to compute has a slot or can be given one."""
        return sequence.num_computed_tokens < len(sequence.block_ids) * self.block_size or self.num_available > 0

    def append(self, sequence: Sequence) -> None:
        """Sees to it that the next token to compute has a slot."""
        if sequence.num_computed_tokens == len(sequence.block_ids) * self.block_size:
            sequence.block_ids.append(self._take_block())

    def register(self, sequence: Sequence, start: int, end: int) -> None:
        """Lets others find what filled up when the positions from `start` to before `end` were computed: blocks, and
        the prompt."""
        first, last = start // self.block_size, end // self.block_size
        num_prompt_tokens = sequence.num_prompt_tokens
        ends_prompt = start < num_prompt_tokens <= end
        if first == last and not ends_prompt:
            return
        self._hash_blocks(sequence, last)
        for index in range(first, last):
            self._register(sequence.block_hashes[index], sequence.block_ids[index])
        # Of a single token nothing would be saved: it is the one that is computed again.
        if ends_prompt and num_prompt_tokens % self.block_size > 1:
            block_id = sequence.block_ids[num_prompt_tokens // self.block_size]
            self._register(self._digest(sequence, num_prompt_tokens), block_id)

    def forget(self, sequence: Sequence) -> None:
        """Sees to it that nobody else finds the blocks of a sequence."""
        for block_id in sequence.block_ids:
            self._unregister(block_id)

    def free(self, sequence: Sequence) -> None:
        """Takes back all blocks of a sequence; the registered ones stay findable until their room is needed."""
        # Last block first, so that eviction shortens a cached prefix from its end and never cuts off what follows.
        for block_id in reversed(sequence.block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if self._hashes[block_id]:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)
        # A new array: a batch in flight may still read the old one.
        sequence.block_ids = array("i")
        sequence.num_computed_tokens = 0

    def check_integrity(self, holdings: Iterable[Iterable[int]]) -> None:
        """Raises IntegrityError unless every block is accounted for. `holdings`: the block ids of each sequence."""
        references = Counter(chain.from_iterable(holdings))
        counted = {block_id: count for block_id, count in enumerate(self._ref_counts) if count}
        if counted != dict(references):
            block_id, _ = min(counted.items() ^ references.items())
            count = self._ref_counts[block_id]
            raise IntegrityError(f"block {block_id} is held {references[block_id]} times but counted {count}")
        places = [*self._free, *self._cached, *references]
        if not len(places) == len(set(places)) == self.num_blocks:
            raise IntegrityError(
                f"{len(self._free)} free + {len(self._cached)} cached + {len(references)} held blocks are not "
                f"{self.num_blocks}, each once"
            )
        if self._registered != {digest: block_id for block_id, own in enumerate(self._hashes) for digest in own}:
            raise IntegrityError("the prefix cache and its blocks disagree about a hash")
        if not all(map(self._hashes.__getitem__, self._cached)) or any(map(self._hashes.__getitem__, self._free)):
            raise IntegrityError("a lookup would find a free block, or none a cached one")

    def _take_block(self) -> int:
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._unregister(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def _unregister(self, block_id: int) -> None:
        for digest in self._hashes[block_id]:
            del self._registered[digest]
        self._hashes[block_id] = ()

    def _register(self, digest: bytes, block_id: int) -> None:
        if digest not in self._registered:  # else a neighbour computed the same at the same time
            self._registered[digest] = block_id
            self._hashes[block_id] += (digest,)

    def _hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        """Hashes a sequence's leading blocks, each together with all before it."""
        hashes = sequence.block_hashes
        for index in range(len(hashes), num_blocks):
            hashes.append(self._digest(sequence, (index + 1) * self.block_size))

    def _digest(self, sequence: Sequence, end: int) -> bytes:
        """Of a sequence's tokens up to before `end`, where the full blocks before the last one are hashed.

        By a cryptographic hash: a collision would answer one conversation from another's memory.
        """
        index = (end - 1) // self.block_size
        salt = sequence.cache_salt.encode()
        parent = sequence.block_hashes[index - 1] if index else blake2b(salt, digest_size=32).digest()
        return blake2b(parent + sequence.token_ids[index * self.block_size : end].tobytes(), digest_size=32).digest()

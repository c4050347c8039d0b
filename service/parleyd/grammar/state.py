"""Where each sequence is in the grammar that it follows. Grammars are compiled in threads of their own, and kept.

Called by the engines; the sampler masks logits by it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from parleyd.generation import EngineRequest, ModelInfo
from parleyd.grammar.compiler import Clock, GrammarError, compile_grammar, load_tokenizer, raise_error, replay

_MAX_CACHED = 128
_NUM_THREADS = 2


class GrammarState:
    """Where one sequence is in its grammar. Lives as long as the sequence, and is advanced with each of its ids.

    End tokens and stop ids may be drawn exactly where the grammar allows an end, but for end tokens under `ignore_eos`
    and all of them before `min_new_tokens`. Where that leaves nothing to draw, an end token may be drawn after all.
    """

    def __init__(
        self,
        tokenizer: LLTokenizer,
        matcher: LLMatcher,
        clock: Clock,
        request: EngineRequest,
        eos_token_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        params = request.params
        self.error: str | None = None
        self.eos_token_id = eos_token_ids[0]
        self._tokenizer = tokenizer
        self._matcher = matcher
        self._clock = clock
        self._num_before_end = params.min_new_tokens - len(request.output_ids)  # ids yet to come before it may end
        self._eos_bits = _bits(eos_token_ids, vocab_size)
        stop_bits = _bits(params.stop_token_ids, vocab_size)
        self._ending_bits = self._eos_bits | stop_bits
        self._allowed_ending_bits = stop_bits if params.ignore_eos else self._ending_bits

    def advance(self, token_id: int) -> None:
        """Takes the sequence's next id, unless it is one that ends the sequence."""
        self._num_before_end -= 1
        if self.error is not None:
            return
        try:
            with self._clock.timing(num_tokens=1):
                if not self._matcher.consume_token(token_id):
                    raise_error(self._matcher)
                    raise GrammarError(f"id {token_id} is not allowed")
        except GrammarError as error:
            self._fail(error)

    def fill(self, mask: NDArray[np.int32], row: int) -> bool:
        """Sets the bits of the ids that may be drawn next. Returns whether an end is all there is.

        mask: [rows, vocab / 32].
        """
        bits = mask[row].view(np.uint8)
        try:
            with self._clock.timing():
                fill_next_token_bitmask(self._matcher, mask, row)
                raise_error(self._matcher)
                self._spell_out(bits)
        except (GrammarError, ValueError) as error:
            self._fail(error)
            bits[:] = 0
        may_end = bool((bits & self._eos_bits).any()) and self._num_before_end <= 0
        bits &= ~self._ending_bits
        if may_end:
            bits |= self._allowed_ending_bits
        if bits.any():
            return False
        bits |= self._eos_bits
        return True

    def _spell_out(self, bits: NDArray[np.uint8]) -> None:
        """Of text that nothing else may follow the library allows its first token alone, as its tokenizer reads it: for
        what spells a special token that token, which it then does not take."""
        if np.count_nonzero(bits) != 1:
            return
        place = int(bits.argmax())
        token_id = place * 8 + int(bits[place]).bit_length() - 1
        matcher, tokenizer = self._matcher, self._tokenizer
        if tokenizer.is_special_token(token_id) and not (matcher.is_accepting() or matcher.validate_tokens([token_id])):
            first, *_ = tokenizer.greedy_tokenize(matcher.compute_ff_bytes().decode(errors="ignore"))
            bits[place], bits[first // 8] = 0, 1 << first % 8

    def _fail(self, error: Exception) -> None:
        self.error = f"cannot be followed any further: {error}"


class GrammarCompiler:
    """Makes grammar states. Compiled grammars are kept, the last used longest."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._tokenizer: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, request: EngineRequest) -> Future[GrammarState]:
        """The state of a request that has a grammar, its output ids taken. Fails with GrammarError. Never waits."""
        tokenizer, compiled = self._compile(request.params.grammar)
        # Not by whoever asks: it may take a while, and no other thread can run while ids are replayed.
        # The grammar first: it fails after its tokenizer, and who asks again before both have failed gets the old one.
        return self._executor.submit(lambda: self._state_of(compiled.result(), tokenizer.result(), request))

    def _compile(self, grammar: str) -> tuple[Future[LLTokenizer], Future[LLMatcher]]:
        with self._lock:
            if self._tokenizer is None or _has_failed(self._tokenizer):
                # Only where grammars are used at all: it takes time and memory.
                info = self._info
                self._tokenizer = self._executor.submit(
                    load_tokenizer, info.tokenizer_dir, info.vocab_size, info.eos_token_ids
                )
            tokenizer = self._tokenizer
            compiled = self._compiled.pop(grammar, None)
            if compiled is None or _has_failed(compiled):
                compiled = self._executor.submit(lambda: compile_grammar(tokenizer.result(), grammar))
            self._compiled[grammar] = compiled
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
            return tokenizer, compiled

    def _state_of(self, compiled: LLMatcher, tokenizer: LLTokenizer, request: EngineRequest) -> GrammarState:
        matcher, clock = compiled.deep_copy(), Clock()
        if replay(matcher, request.output_ids, clock) < len(request.output_ids):
            raise GrammarError("does not allow the ids that are there already")
        info = self._info
        return GrammarState(tokenizer, matcher, clock, request, info.eos_token_ids, info.vocab_size)


def _has_failed(future: Future[Any]) -> bool:
    """Then it is tried again: a file that could not be opened, or memory that was short, may be there by now."""
    return future.done() and future.exception() is not None


def _bits(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.uint8]:
    """A mask of these ids, as llguidance packs it."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little")

"""Grammars made ready to steer one model's tokens, by llguidance.

Called by the checker process and by the engines: what the one accepts, the others can follow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from parleyd.text.tokenizer import Tokenizer

# What one grammar may take to compile, and a token of it. Typical ones need a thousandth of it.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


# What following it may take of a processor: so many seconds at once, and for each token. Typical ones take a quarter
# of it at most. Ambiguous ones take longer with every token, within any limit, while all other sequences wait.
_BURST_S, _TOKEN_S = 0.3, 0.002
_REPLAYED_AT_ONCE = 16  # in one call, which lets no other thread run


class GrammarError(Exception):
    """A grammar that cannot be compiled or followed; the message is for whoever wrote it."""


class UnknownTokenizer(Exception):
    """Grammars cannot be followed with this tokenizer."""


def load_tokenizer(folder: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokenizer in `folder`, padded to `vocab_size`. Takes about a second and some 80 MB.

    Raises UnknownTokenizer.
    """
    try:
        source = Tokenizer.load(Path(folder)).to_json(vocab_size)
        return LLTokenizer(source, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except Exception as error:  # the library raises whatever it has
        raise UnknownTokenizer(_one_line(str(error))) from error


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher that has seen nothing yet, to be copied for each sequence. Raises GrammarError."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    raise_error(matcher)
    return matcher


def raise_error(matcher: LLMatcher) -> None:
    """Raises GrammarError if the matcher has failed, for which it never raises itself."""
    if matcher.is_error():
        message = _one_line(matcher.get_error())
        raise GrammarError("no text matches it" if "NoExtensionBias" in message else message)


class Clock:
    """Sees to it that following a grammar along one sequence takes no longer than it may."""

    def __init__(self) -> None:
        self._left_s = _BURST_S

    @contextmanager
    def timing(self, num_tokens: int = 0) -> Iterator[None]:
        """Of what is done in the block for so many tokens. Raises GrammarError if it has taken too long."""
        started = time.thread_time()
        yield
        self._left_s = min(self._left_s + num_tokens * _TOKEN_S, _BURST_S) - (time.thread_time() - started)
        if self._left_s < 0.0:
            raise GrammarError("takes too long to follow: ambiguous rules may be why")


def replay(matcher: LLMatcher, token_ids: Sequence[int], clock: Clock) -> int:
    """Takes earlier ids, and tells how many of them the grammar allows. Raises GrammarError if that takes too long."""
    for start in range(0, len(token_ids), _REPLAYED_AT_ONCE):
        ids = list(token_ids[start : start + _REPLAYED_AT_ONCE])
        with clock.timing(len(ids)):
            num_taken = matcher.try_consume_tokens(ids)
        if num_taken < len(ids):
            return start + num_taken
    return len(token_ids)


def _one_line(message: str) -> str:
    return " ".join(message.replace("<non-verbose/>", "").split())

"""Grammars made ready to steer one model's tokens, by llguidance.

Called by the checker process and by the engines: what the one accepts, the others can follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# What one grammar may take. Within these a step's mask is made in a fraction of a second at the very worst, and one
# beyond them fails alone. Typical ones need a thousandth of it.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=25_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class GrammarError(Exception):
    """A grammar that cannot be compiled or followed; the message is for whoever wrote it."""


class UnknownTokenizer(Exception):
    """Grammars cannot be followed with this tokenizer."""


def load_tokenizer(folder: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokenizer.json of `folder`, padded to `vocab_size`. Takes the better part of a second and some 60 MB.

    Raises UnknownTokenizer.
    """
    try:
        source = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
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
        raise GrammarError(_one_line(matcher.get_error()))


def replay(matcher: LLMatcher, token_ids: Sequence[int]) -> int:
    """Takes ids made before, and tells how many of them the grammar allows."""
    return matcher.try_consume_tokens(list(token_ids))


def _one_line(message: str) -> str:
    return " ".join(message.replace("<non-verbose/>", "").split())

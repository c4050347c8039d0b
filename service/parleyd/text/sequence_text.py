"""The text of one generated sequence: its ids through the detokenizer, then past the stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from parleyd.text.detokenizer import Detokenizer
from parleyd.text.stop import StopMatcher, StopResult
from parleyd.text.tokenizer import Tokenizer


class SequenceText:
    """Fed every generated id in order, resumed ones included; what it returns depends on the ids alone."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_strings: Sequence[str] = (),
        include_stop_string: bool = False,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
        min_new_tokens: int = 0,
        id_before: int | None = None,
    ) -> None:
        """For `id_before` see Detokenizer."""
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, shown_ids=shown_ids, id_before=id_before
        )
        self._stop = StopMatcher(stop_strings, include=include_stop_string)
        self._num_unsearched = min_new_tokens

    def push(self, token_id: int, *, visible: bool = True) -> StopResult:
        """The text now safe to send and the stop string that this id completed, if any.

        Not `visible`: the id counts, but its text is left out, as for end tokens and stop ids.
        """
        searching = self._num_unsearched <= 0
        self._num_unsearched -= 1
        text = self._detokenizer.push(token_id) if visible else ""
        return self._stop.push(text, searching=searching)

    def finish(self) -> str:
        """The rest of the text, once no more ids come: what might have become a stop string. Empty after a match.

        A character that the end cut in half is dropped.
        """
        return self._stop.finish()

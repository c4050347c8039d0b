"""From token ids to what a client sees of one answer: its text, stop strings, why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from parley.v1 import generation_pb2
from parleyd.gateway.logprobs import to_token_logprob
from parleyd.gateway.streamer import Delta
from parleyd.generation import FinishReason
from parleyd.text.answer_parser import AnswerParser
from parleyd.text.parsed_text import ParsedText
from parleyd.text.sequence_text import SequenceText
from parleyd.text.tokenizer import Tokenizer


@dataclass
class AnswerDelta:
    """What is new of a choice: ids, their log-probabilities if asked for, and the text that is safe to send by now."""

    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[generation_pb2.TokenLogprob] = field(default_factory=list)
    text: ParsedText = field(default_factory=ParsedText)
    finish_reason: FinishReason | None = None
    stop_string: str | None = None


class Answer:
    """One answer in the making. Fed with every id in order, so that what is sent depends on the ids alone, not on how
    they were grouped on their way."""

    def __init__(
        self, tokenizer: Tokenizer, text: SequenceText, parser: AnswerParser, hidden_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._parser = parser
        self._hidden_ids = hidden_ids
        self.num_tokens = 0

    def resume(self, token_ids: Sequence[int], ending_ids: frozenset[int], num_at_most: int) -> AnswerDelta | None:
        """Takes the answer up after ids that the client has, with their text. The last delta, if they end the answer.

        `ending_ids` end it, and so do `num_at_most` ids.
        """
        for token_id in token_ids:
            ended = self.push(Delta([token_id], FinishReason.STOP if token_id in ending_ids else None))
            if ended.finish_reason is not None:
                self.num_tokens = len(token_ids)
                return AnswerDelta(finish_reason=ended.finish_reason, stop_string=ended.stop_string)
        return AnswerDelta(finish_reason=FinishReason.LENGTH) if len(token_ids) >= num_at_most else None

    def push(self, delta: Delta) -> AnswerDelta:
        """The client's delta for the engine's. Ids after a completed stop string are dropped, and the answer ends."""
        result = AnswerDelta(finish_reason=delta.finish_reason)
        texts = []
        for token_id, logprob in zip_longest(delta.token_ids, delta.logprobs):
            self.num_tokens += 1
            result.token_ids.append(token_id)
            if logprob is not None:
                result.logprobs.append(to_token_logprob(self._tokenizer, token_id, logprob))
            text, stop_string = self._text.push(token_id, visible=token_id not in self._hidden_ids)
            texts.append(text)
            if stop_string is not None:
                result.finish_reason, result.stop_string = FinishReason.STOP, stop_string
                break
        if result.finish_reason is not None:
            texts.append(self._text.finish())
        result.text = self._parser.push("".join(texts))
        if result.finish_reason is not None:
            result.text = ParsedText.join([result.text, self._parser.finish()])
        if result.finish_reason is FinishReason.STOP and self._parser.num_complete_calls:
            result.finish_reason = FinishReason.TOOL_CALLS
        return result

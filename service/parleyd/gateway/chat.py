"""The handlers of `parley.v1.ChatService`: check, admit, call, convert. Errors are the interceptor's."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc

from parley.v1 import chat_pb2, chat_pb2_grpc
from parleyd.errors import (
    DeadlineExceeded,
    InvalidRequest,
    PermissionDenied,
    PromptTooLong,
    Unsupported,
    Violation,
)
from parleyd.gateway import convert, tools
from parleyd.gateway.answer import Answer
from parleyd.gateway.batch import answer_batch
from parleyd.gateway.grammar_checker import GrammarChecker
from parleyd.gateway.prompt import Prompt, PromptBuilder
from parleyd.gateway.runner import Generation, Runner
from parleyd.gateway.served_model import ServedModel
from parleyd.gateway.stream_responses import StreamResponses
from parleyd.generation import SamplingParams
from parleyd.telemetry.call import Call, current_call
from parleyd.text.answer_parser import AnswerParser
from parleyd.text.parsed_text import ParsedText
from parleyd.text.sequence_text import SequenceText
from parleyd.text.tool_format.call_id import call_id

Context = grpc.aio.ServicerContext[Any, Any]

# Ids that a delta of a whole answer waits for, as nobody sees it before its end. Not where there are stop strings: of
# the ids behind one, each would have been made for nothing.
_WHOLE_INTERVAL = 16


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """Serves one model. `model` is None until the first worker is ready; the interceptor lets no call in before."""

    def __init__(
        self,
        prompts: PromptBuilder,
        grammars: GrammarChecker,
        runner: Runner,
        item_ended: Callable[[Call, str], None],
        *,
        stream_interval: int,
    ) -> None:
        self.model: ServedModel | None = None
        self._prompts = prompts
        self._grammars = grammars
        self._runner = runner
        self._item_ended = item_ended
        self._stream_interval = stream_interval

    async def Generate(self, request: chat_pb2.GenerateRequest, context: Context) -> chat_pb2.GenerateResponse:
        """See chat.proto."""
        return await self._respond(await self._prepare(request))

    async def GenerateStream(
        self, request: chat_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[chat_pb2.GenerateStreamResponse]:
        """See chat.proto."""
        generation = await self._prepare(request)
        generation.interval = self._stream_interval
        first: dict[str, Any] = {
            "request_id": current_call.get().request_id,
            "model": self._served.name,
            "seed": generation.params.seed,
        }
        responses = StreamResponses()
        async with aclosing(self._runner.run(generation)) as deltas:
            async for delta in deltas:
                response = responses.make(delta)
                if first:
                    response.MergeFrom(chat_pb2.GenerateStreamResponse(**first))
                    first = {}
                if generation.timings is not None:
                    response.MergeFrom(chat_pb2.GenerateStreamResponse(**_closing_fields(generation)))
                yield response

    async def GenerateBatch(
        self, request: chat_pb2.GenerateBatchRequest, context: Context
    ) -> AsyncGenerator[chat_pb2.GenerateBatchResponse]:
        """See chat.proto."""
        outcomes = answer_batch(
            request.requests, self._prepare, self._respond, self._item_ended, self._runner.max_running
        )
        async with aclosing(outcomes):
            async for outcome in outcomes:
                yield outcome

    async def CountTokens(self, request: chat_pb2.CountTokensRequest, context: Context) -> chat_pb2.CountTokensResponse:
        """See chat.proto."""
        await self._prompts.check(self._served.check_conversation, request)
        self._served.check_name(request.model)
        try:
            prompt_tokens = len((await self._prompts.build(self._served, request)).token_ids)
        except PromptTooLong as error:  # is counted all the same
            prompt_tokens = error.prompt_tokens
        return chat_pb2.CountTokensResponse(prompt_tokens=prompt_tokens)

    async def GetModel(self, request: chat_pb2.GetModelRequest, context: Context) -> chat_pb2.GetModelResponse:
        """See chat.proto."""
        self._served.check_name(request.model)
        return self._served.description

    @property
    def _served(self) -> ServedModel:
        assert self.model is not None
        return self.model

    async def _prepare(self, request: chat_pb2.GenerateRequest) -> Generation:
        """Checks in the contract's order: fields, model, prompt length."""
        if request.priority and not current_call.get().may_set_priority:
            raise PermissionDenied("this client may not set a priority")
        served = self._served
        params, question = await self._prompts.check(served.check_request, request)
        if question:
            params = replace(params, grammar=await self._grammars.check(question, current_call.get().identity))
        self._served.check_name(request.model)
        prompt = await self._prompts.build(served, request)
        if not prompt.token_ids:
            raise InvalidRequest([Violation("messages", "the model's chat template makes an empty prompt of them")])
        if convert.has_format(request.response_format) and prompt.opens_reasoning:
            raise Unsupported("response_format", _amid_reasoning(request))
        deadline = current_call.get().deadline
        if deadline is not None and deadline <= time.monotonic():
            raise DeadlineExceeded
        generation = Generation(
            prompt_ids=tuple(prompt.token_ids),
            params=params,
            answers=self._answers(request, params, prompt),
            priority=request.priority,
            deadline=deadline,
            grammar_field="tools" if tools.is_required(request.tool_choice) else "response_format",
            interval=1 if self._stop_strings(request) else _WHOLE_INTERVAL,
        )
        if request.resume.token_ids:
            await self._prompts.run(lambda: self._resume(generation, request.resume.token_ids))
        return generation

    def _resume(self, generation: Generation, token_ids: Sequence[int]) -> None:
        params, info = generation.params, self._served.info
        num_at_most = min(params.max_new_tokens, info.max_context_tokens - len(generation.prompt_ids))
        generation.resumed_ids = tuple(token_ids)
        generation.ending = generation.answers[0].resume(token_ids, self._served.ending_ids(params), num_at_most)

    def _stop_strings(self, request: chat_pb2.GenerateRequest) -> Sequence[str]:
        return request.generation_config.stop_strings or self._served.info.defaults.stop_strings

    def _answers(self, request: chat_pb2.GenerateRequest, params: SamplingParams, prompt: Prompt) -> list[Answer]:
        """One for each choice. What there may be thousands of in a request is looked through once for all."""
        config, answer_format = request.generation_config, self._served.answer_format
        tool_names = [tool.name for tool in tools.offered(request)]
        earlier_ids = [call.id for message in request.messages for call in message.tool_calls]
        taken_ids = frozenset(earlier_ids)
        skip_special_tokens = config.skip_special_tokens or not config.HasField("skip_special_tokens")
        # What has the form of response_format is content from its first token to its last.
        is_all_content = convert.has_format(request.response_format)
        markers = () if is_all_content else answer_format.markers(with_tools=bool(tool_names))
        hidden_ids = self._served.ending_ids(params) if skip_special_tokens else frozenset[int]()
        continued = convert.continued(request)

        def answer(choice: int) -> Answer:
            text = SequenceText(
                self._served.tokenizer,
                skip_special_tokens=skip_special_tokens,
                shown_ids=self._served.tokenizer.special_ids_of(markers),
                stop_strings=self._stop_strings(request),
                include_stop_string=config.include_stop_string,
                min_new_tokens=params.min_new_tokens,
                # What continues a text, or follows a grammar, is told to its first space.
                id_before=prompt.token_ids[-1] if request.continue_final_message or params.grammar else None,
            )
            parser = answer_format.parser(
                tool_names,
                lambda index: call_id(params.seed, choice, len(earlier_ids) + index, taken_ids),
                opens_reasoning=prompt.opens_reasoning,
                continued=continued,
            )
            return Answer(self._served.tokenizer, text, AnswerParser() if is_all_content else parser, hidden_ids)

        return [answer(choice) for choice in range(self._served.num_choices(request, params))]

    async def _respond(self, generation: Generation) -> chat_pb2.GenerateResponse:
        """The whole answer."""
        response = chat_pb2.GenerateResponse(
            request_id=current_call.get().request_id, model=self._served.name, seed=generation.params.seed
        )
        choices = [response.choices.add(index=index) for index in range(len(generation.answers))]
        texts: list[list[ParsedText]] = [[] for _ in choices]
        async with aclosing(self._runner.run(generation)) as deltas:
            async for delta in deltas:
                convert.add_to_choice(choices[delta.index], delta)
                texts[delta.index].append(delta.text)
        for choice, parts in zip(choices, texts, strict=True):
            choice.message.CopyFrom(convert.to_answer(ParsedText.join(parts)))
        response.MergeFrom(chat_pb2.GenerateResponse(**_closing_fields(generation)))
        return response


def _amid_reasoning(request: chat_pb2.GenerateRequest) -> str:
    if request.continue_final_message:
        return "the message to continue ends amid its reasoning"
    return "the chat template has this model's answer begin with its reasoning"


def _closing_fields(generation: Generation) -> dict[str, Any]:
    assert generation.timings is not None
    return {
        "usage": convert.to_usage(
            len(generation.prompt_ids), generation.completion_tokens, generation.cached_prompt_tokens
        ),
        "timings": convert.to_timings(generation.timings),
    }

"""Between the contract's messages and our own: sampling parameters in, answers out."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parleyd.errors import Violation
from parleyd.gateway import tools
from parleyd.gateway.answer import AnswerDelta
from parleyd.generation import FinishReason, ModelInfo, SamplingDefaults, SamplingParams
from parleyd.text.parsed_text import ParsedText

_ROLE_NAMES = {
    message_pb2.ROLE_SYSTEM: "system",
    message_pb2.ROLE_USER: "user",
    message_pb2.ROLE_ASSISTANT: "assistant",
    message_pb2.ROLE_TOOL: "tool",
}
_FINISH_REASONS = {
    None: generation_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: generation_pb2.FINISH_REASON_TOOL_CALLS,
}
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Timings:
    """Seconds from the request's arrival."""

    queue_s: float
    first_token_s: float
    total_s: float


def to_template_messages(messages: Sequence[message_pb2.Message]) -> list[dict[str, Any]]:
    """A conversation as chat templates take it: some look whether a key is there, not whether it holds anything."""
    names: dict[str, str] = {}  # of the tools that earlier messages call; later ones may use an id again
    converted = []
    for message in messages:
        further = _further_fields(message, names)
        converted.append({"role": _ROLE_NAMES[message.role], "content": message.content, **further})
        names.update({call.id: call.name for call in message.tool_calls if call.id})
    return converted


def _further_fields(message: message_pb2.Message, names_by_call_id: Mapping[str, str]) -> dict[str, Any]:
    fields = {
        "reasoning_content": message.reasoning_content,
        "tool_calls": tools.to_template_calls(message.tool_calls),
        "tool_call_id": message.tool_call_id,
        "name": message.name or names_by_call_id.get(message.tool_call_id),
    }
    return {name: value for name, value in fields.items() if value}


def continued(request: chat_pb2.GenerateRequest | chat_pb2.CountTokensRequest) -> str:
    """What the message to continue holds; empty where a new one is to be written."""
    return request.messages[-1].content if request.continue_final_message else ""


def to_template_kwargs(request: chat_pb2.GenerateRequest | chat_pb2.CountTokensRequest) -> dict[str, Any]:
    """The chat template's further variables; whole numbers become ints, which templates may compare or print."""
    values = json_format.MessageToDict(request.chat_template_kwargs)
    return {key: _whole_numbers_to_int(value) for key, value in values.items()}


def effective_defaults(info: ModelInfo, default_max_new_tokens: int) -> SamplingParams:
    """What unset fields mean here: the model's own defaults, then the neutral ones."""
    defaults = info.defaults
    given = {
        name: value for name in SamplingDefaults.__dataclass_fields__ if (value := getattr(defaults, name)) is not None
    }
    for name in ("stop_strings", "num_return_sequences"):  # the engine knows neither text nor other choices
        given.pop(name, None)
    max_new_tokens = min(given.pop("max_new_tokens", default_max_new_tokens), info.max_context_tokens)
    min_new_tokens = min(given.pop("min_new_tokens", 0), max_new_tokens)
    return SamplingParams(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, **given)


def to_sampling_params(config: generation_pb2.GenerationConfig, defaults: SamplingParams) -> SamplingParams:
    """A valid configuration with every unset field resolved; the seed drawn here if none is given."""

    def value(name: str) -> Any:
        return getattr(config, name) if config.HasField(name) else getattr(defaults, name)

    temperature, max_new_tokens = value("temperature"), value("max_new_tokens")
    # A request that wants less than the model's own fewest gets what it wants: it has said nothing wrong.
    min_by_default = min(defaults.min_new_tokens, max_new_tokens)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=config.min_new_tokens if config.HasField("min_new_tokens") else min_by_default,
        do_sample=_do_sample(config, defaults) and temperature > 0,
        temperature=temperature,
        top_p=value("top_p"),
        top_k=value("top_k"),
        min_p=value("min_p"),
        repetition_penalty=value("repetition_penalty"),
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        seed=config.seed if config.HasField("seed") else secrets.randbits(64),
        stop_token_ids=tuple(config.stop_token_ids),
        ignore_eos=config.ignore_eos,
        logit_bias=tuple(sorted(config.logit_bias.items())),
        logprobs=config.logprobs or config.top_logprobs > 0,
        top_logprobs=config.top_logprobs,
    )


def num_choices(config: generation_pb2.GenerationConfig, params: SamplingParams, defaults: SamplingDefaults) -> int:
    """How many answers a valid configuration asks for. `params`: its own, resolved; `defaults`: the model's."""
    # The model's own number gives way to 1 where answers would be alike: the request has said nothing wrong.
    by_default = defaults.num_return_sequences if params.do_sample else None
    return config.num_return_sequences or by_default or 1


def has_format(form: generation_pb2.ResponseFormat) -> bool:
    """Whether an answer must have a form; its source, which may be large, is not looked at."""
    return form.WhichOneof("format") not in (None, "text")


def to_format(form: generation_pb2.ResponseFormat) -> tuple[str, str] | None:
    """The kind of a response format and its source, as `grammar.formats` takes them; None for free text."""
    if not has_format(form):
        return None
    match form.WhichOneof("format"):
        case "json_object":
            return "json_object", ""
        case "choice":
            return "choice", json.dumps(list(form.choice.choices))
        case kind:
            return kind, getattr(form, kind)


def resolved_violations(
    request: chat_pb2.GenerateRequest, params: SamplingParams, num_choices: int
) -> Iterator[Violation]:
    """What contradicts itself once defaults are filled in."""
    if params.min_new_tokens > params.max_new_tokens:
        yield Violation(
            "generation_config.min_new_tokens",
            f"must be 0 to max_new_tokens ({params.max_new_tokens}), not {params.min_new_tokens}",
        )
    if len(request.resume.token_ids) > params.max_new_tokens:
        yield Violation("resume.token_ids", f"are more than max_new_tokens ({params.max_new_tokens})")
    if request.resume.token_ids and num_choices > 1:
        yield Violation("resume", "contradicts several return sequences")
    if num_choices > 1 and not params.do_sample:
        yield Violation(
            "generation_config.num_return_sequences",
            "more than 1 needs sampling, and this request is greedy: set a temperature above 0, and do_sample not to "
            "false",
        )


def to_generation_config(params: SamplingParams, defaults: SamplingDefaults) -> generation_pb2.GenerationConfig:
    """Defaults, as GetModel tells them: `params` those that the engine knows, `defaults` the model's."""
    config = generation_pb2.GenerationConfig(
        num_return_sequences=num_choices(generation_pb2.GenerationConfig(), params, defaults),
        skip_special_tokens=True,
        include_stop_string=False,
        stop_strings=defaults.stop_strings,
    )
    for name in (
        "max_new_tokens", "min_new_tokens", "do_sample", *_SAMPLING_FIELDS, "repetition_penalty", "presence_penalty",
        "frequency_penalty", "ignore_eos", "logprobs", "top_logprobs",
    ):  # fmt: skip
        setattr(config, name, getattr(params, name))
    return config


def fill_stream_response(response: chat_pb2.GenerateStreamResponse, delta: AnswerDelta) -> None:
    """Puts one delta of a choice into an empty message. What few deltas have is left alone: it takes time."""
    text = delta.text
    response.index = delta.index
    response.content = text.content
    response.token_ids.extend(delta.token_ids)
    if text.reasoning_content:
        response.reasoning_content = text.reasoning_content
    if text.tool_calls:
        response.tool_calls.extend(tools.to_deltas(text.tool_calls))
    if delta.logprobs:
        response.logprobs.extend(delta.logprobs)
    if delta.finish_reason:
        response.finish_reason = _FINISH_REASONS[delta.finish_reason]
        response.stop_string = delta.stop_string or ""


def add_to_choice(choice: chat_pb2.Choice, delta: AnswerDelta) -> None:
    """Takes all of a delta but its text. By and by: all at once would hold up the event loop for long."""
    choice.token_ids.extend(delta.token_ids)
    choice.logprobs.extend(delta.logprobs)
    choice.finish_reason = _FINISH_REASONS[delta.finish_reason]
    choice.stop_string = delta.stop_string or ""


def to_answer(text: ParsedText) -> message_pb2.Message:
    """The message of a whole choice."""
    return message_pb2.Message(
        role=message_pb2.ROLE_ASSISTANT,
        content=text.content,
        reasoning_content=text.reasoning_content,
        tool_calls=tools.to_calls(text.tool_calls),
    )


def to_usage(prompt_tokens: int, completion_tokens: int, cached_prompt_tokens: int) -> chat_pb2.Usage:
    """Token counts."""
    return chat_pb2.Usage(
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, cached_prompt_tokens=cached_prompt_tokens
    )


def to_timings(timings: Timings) -> chat_pb2.Timings:
    """Where the time went."""
    return chat_pb2.Timings(
        queue=_duration(timings.queue_s),
        time_to_first_token=_duration(timings.first_token_s),
        total=_duration(timings.total_s),
    )


def _do_sample(config: generation_pb2.GenerationConfig, defaults: SamplingParams) -> bool:
    if config.HasField("do_sample"):
        return config.do_sample
    return defaults.do_sample or any(config.HasField(name) for name in _SAMPLING_FIELDS)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def _whole_numbers_to_int(value: Any) -> Any:
    """A Struct knows only doubles: 3 arrives as 3.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole_numbers_to_int(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole_numbers_to_int(item) for key, item in value.items()}
    return value

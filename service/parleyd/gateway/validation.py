"""Checks of a request's fields: every violation at once, by field path, then what this build cannot do."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence

from google.protobuf import struct_pb2

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parleyd.errors import Unsupported, Violation
from parleyd.gateway import convert, tools
from parleyd.generation import RANGES, ModelInfo, Range
from parleyd.rpc.interceptors import REQUEST_ID_PATTERN

_MAX_MESSAGES = 4096
_MAX_STOP_STRINGS = 16
_MAX_STOP_STRING_CHARACTERS = 256
_MAX_STOP_TOKEN_IDS = 64
_MAX_LOGIT_BIAS = 1024
_MAX_FORMAT_CHARACTERS = {"json_schema": 65_536, "regex": 8_192, "grammar": 65_536}
_MAX_CHOICES = 1024
_MAX_CHOICE_CHARACTERS = 1024

_ROLES = frozenset(message_pb2.Role.values()) - {message_pb2.ROLE_UNSPECIFIED}


def request_violations(request: chat_pb2.GenerateRequest, info: ModelInfo) -> Iterator[Violation]:
    """What is wrong with a GenerateRequest, but for what needs the chat template or resolved defaults to tell."""
    yield from conversation_violations(request)
    yield from config_violations(request.generation_config, info)
    yield from tools.choice_violations(request)
    if request.HasField("response_format"):
        yield from _format_violations(request.response_format)
        if convert.has_format(request.response_format) and tools.is_required(request.tool_choice):
            yield Violation("response_format", "contradicts tool_choice")
    if request.request_id and not REQUEST_ID_PATTERN.fullmatch(request.request_id):
        yield Violation("request_id", "must be up to 128 of [A-Za-z0-9._:-]")
    yield from _ids_violations("resume.token_ids", request.resume.token_ids, info.max_context_tokens, info.vocab_size)


def conversation_violations(request: chat_pb2.GenerateRequest | chat_pb2.CountTokensRequest) -> Iterator[Violation]:
    """What is wrong with the messages, alone and together."""
    if not request.messages:
        yield Violation("messages", "must hold at least one message")
    if len(request.messages) > _MAX_MESSAGES:
        yield Violation("messages", f"must hold at most {_MAX_MESSAGES}, not {len(request.messages)}")
        return
    for i, message in enumerate(request.messages):
        if message.role == message_pb2.ROLE_UNSPECIFIED:
            yield Violation(f"messages[{i}].role", "must be set")
        elif message.role not in _ROLES:
            yield Violation(f"messages[{i}].role", f"is no role: {message.role}")
    yield from tools.violations(request)
    for key, value in request.chat_template_kwargs.fields.items():
        yield from _number_violations(f"chat_template_kwargs.{key}", value)
    if request.continue_final_message and request.messages:
        yield from _continuation_violations(request.messages[-1])


def config_violations(config: generation_pb2.GenerationConfig, info: ModelInfo) -> Iterator[Violation]:
    """What is out of range in a GenerationConfig."""
    ranges = RANGES | {"max_new_tokens": Range(1, info.max_context_tokens)}
    for name, allowed in ranges.items():
        if config.HasField(name) and (value := getattr(config, name)) not in allowed:
            yield Violation(f"generation_config.{name}", f"must be {allowed}, not {_spell(value)}")
    yield from _stop_string_violations(config.stop_strings)
    yield from _ids_violations(
        "generation_config.stop_token_ids", config.stop_token_ids, _MAX_STOP_TOKEN_IDS, info.vocab_size
    )
    yield from _logit_bias_violations(config, info.vocab_size)


def unsupported_in_request(request: chat_pb2.GenerateRequest, grammar_obstacle: str | None) -> Iterator[Unsupported]:
    """What a valid GenerateRequest asks for that this build cannot do. Nothing is ever silently ignored.

    `grammar_obstacle`: why answers can have no form other than free text, or None.
    """
    if convert.has_format(request.response_format):
        if grammar_obstacle:
            yield Unsupported("response_format", grammar_obstacle)
        if tools.offered(request):
            yield Unsupported("response_format", "not supported together with tools, unless tool_choice is MODE_NONE")


def unsupported_in_conversation(
    request: chat_pb2.GenerateRequest | chat_pb2.CountTokensRequest, *, reads_names: bool
) -> Iterator[Unsupported]:
    """What a valid conversation holds that the model's chat template would leave out."""
    for i, message in enumerate(request.messages):
        if message.name and message.role != message_pb2.ROLE_TOOL and not reads_names:
            yield Unsupported(f"messages[{i}].name", "the model's chat template knows no names")


def _continuation_violations(last: message_pb2.Message) -> Iterator[Violation]:
    if last.tool_calls:  # a chat template may leave them out, or write them after the content
        yield Violation("continue_final_message", "contradicts tool_calls in the last message")
    elif last.role != message_pb2.ROLE_ASSISTANT or not last.content:
        yield Violation("continue_final_message", "needs a last message of ROLE_ASSISTANT that is not empty")


def _stop_string_violations(stop_strings: Sequence[str]) -> Iterator[Violation]:
    path = "generation_config.stop_strings"
    if len(stop_strings) > _MAX_STOP_STRINGS:
        yield _too_many(path, len(stop_strings), _MAX_STOP_STRINGS)
        return
    for i, stop_string in enumerate(stop_strings):
        if not 1 <= len(stop_string) <= _MAX_STOP_STRING_CHARACTERS:
            yield Violation(
                f"{path}[{i}]", f"must have 1 to {_MAX_STOP_STRING_CHARACTERS} characters, not {len(stop_string)}"
            )


def _logit_bias_violations(config: generation_pb2.GenerationConfig, vocab_size: int) -> Iterator[Violation]:
    path = "generation_config.logit_bias"
    if len(config.logit_bias) > _MAX_LOGIT_BIAS:
        yield _too_many(path, len(config.logit_bias), _MAX_LOGIT_BIAS)
        return
    for token_id, bias in config.logit_bias.items():
        if token_id >= vocab_size:
            yield Violation(f"{path}[{token_id}]", f"is no token id: the vocabulary has {vocab_size}")
        if not -100 <= bias <= 100:
            yield Violation(f"{path}[{token_id}]", f"must be -100 to 100, not {_spell(bias)}")


def _spell(value: float) -> str:
    """A number as it was sent: a float32, which takes up to nine digits to tell from others, or an integer."""
    if isinstance(value, int):
        return str(value)
    short = f"{value:.6g}"
    return short if ctypes.c_float(float(short)).value == value else f"{value:.9g}"


def _ids_violations(path: str, token_ids: Sequence[int], limit: int, vocab_size: int) -> Iterator[Violation]:
    if len(token_ids) > limit:
        yield _too_many(path, len(token_ids), limit)
        return
    for i, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            yield Violation(f"{path}[{i}]", f"must be below {vocab_size}, not {token_id}")


def _too_many(path: str, number: int, limit: int) -> Violation:
    return Violation(path, f"must hold at most {limit}, not {number}")


def _number_violations(path: str, value: struct_pb2.Value) -> Iterator[Violation]:
    """NaN and infinities anywhere in a value: JSON has none, and neither may a Struct."""
    match value.WhichOneof("kind"):
        case "number_value" if not math.isfinite(value.number_value):
            yield Violation(path, f"must be finite, not {value.number_value}")
        case "list_value":
            for i, item in enumerate(value.list_value.values):
                yield from _number_violations(f"{path}[{i}]", item)
        case "struct_value":
            for key, item in value.struct_value.fields.items():
                yield from _number_violations(f"{path}.{key}", item)


def _format_violations(form: generation_pb2.ResponseFormat) -> Iterator[Violation]:
    kind = form.WhichOneof("format")
    if kind is None:
        yield Violation("response_format", "must name a format")
    elif kind == "choice":
        yield from _choice_violations("response_format.choice.choices", form.choice.choices)
    elif limit := _MAX_FORMAT_CHARACTERS.get(kind):
        length = len(getattr(form, kind))
        if not 1 <= length <= limit:
            yield Violation(f"response_format.{kind}", f"must have 1 to {limit:,} characters, not {length:,}")


def _choice_violations(path: str, choices: Sequence[str]) -> Iterator[Violation]:
    if not 1 <= len(choices) <= _MAX_CHOICES:
        yield Violation(path, f"must hold 1 to {_MAX_CHOICES:,}, not {len(choices):,}")
        return
    seen = set()
    for i, choice in enumerate(choices):
        if not 1 <= len(choice) <= _MAX_CHOICE_CHARACTERS:
            yield Violation(
                f"{path}[{i}]", f"must have 1 to {_MAX_CHOICE_CHARACTERS:,} characters, not {len(choice):,}"
            )
        elif choice in seen:
            yield Violation(f"{path}[{i}]", "is there twice")
        seen.add(choice)

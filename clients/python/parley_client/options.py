"""The keyword arguments of `chat` and `stream`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

from parley.v1 import generation_pb2, message_pb2
from parley_client.messages import AnyTool


class HasJsonSchema(Protocol):
    """What has a JSON Schema, such as a pydantic model."""

    def model_json_schema(self) -> dict[str, Any]: ...


class GenerationOptions(TypedDict, total=False):
    """How to generate: the fields of `parley.v1.GenerationConfig`, which documents ranges and defaults.

    Left out or None: the model's own default, as `model_info().default_generation_config` shows it.
    """

    max_new_tokens: int | None  # the most tokens to generate
    min_new_tokens: int | None  # the fewest
    do_sample: bool | None  # draw at random (True) or take the most likely token always (False)
    temperature: float | None  # 0 to 10; 0 takes the most likely token always
    top_p: float | None  # above 0, up to 1
    top_k: int | None  # 0 is off
    min_p: float | None  # 0 to 1
    repetition_penalty: float | None  # above 0, up to 10; 1 is off
    presence_penalty: float | None  # -2 to 2
    frequency_penalty: float | None  # -2 to 2
    seed: int | None  # makes the draws repeatable; the answer tells the one used
    stop_strings: str | Sequence[str] | None  # end the answer
    include_stop_string: bool | None  # keep the stop string in the text
    stop_token_ids: Sequence[int] | None  # end the answer
    ignore_eos: bool | None  # do not end at the model's end token
    logit_bias: Mapping[int, float] | None  # token id to -100 ... 100
    num_return_sequences: int | None  # how many answers
    logprobs: bool | None  # tell each token's log-probability
    top_logprobs: int | None  # tell as many most likely tokens' too
    skip_special_tokens: bool | None  # leave special tokens out of the text


class ChatOptions(GenerationOptions, total=False):
    """All that `chat` and `stream` take by keyword, beside `timeout`."""

    # The served model's name; default: whatever is served.
    model: str | None
    # Tools the model may call: `Tool`s, or {"name", "description", "parameters"} with the JSON Schema as a dict or as
    # JSON text, the same inside {"type": "function", "function": ...}, or protobuf messages.
    tools: Sequence[AnyTool] | None
    # "auto", "none", "required", or the name of the tool to call.
    tool_choice: str | message_pb2.ToolChoice | None
    # "text", "json_object", or one of {"json_schema": dict or JSON text}, {"regex": str}, {"grammar": GBNF text},
    # {"choice": [str, ...]}. A class with `model_json_schema()`, such as a pydantic model, stands for its JSON Schema.
    response_format: str | Mapping[str, Any] | HasJsonSchema | generation_pb2.ResponseFormat | None
    # Further variables for the chat template, such as {"enable_thinking": False}.
    chat_template_kwargs: Mapping[str, Any] | None
    # Continue the last message, an assistant's, instead of starting a new one; the answer holds only the continuation.
    continue_final_message: bool | None
    # A name for this request in answers and logs; default: made by the server.
    request_id: str | None
    # Higher leaves the server's queue sooner; default: 0.
    priority: int | None
    # Output token ids that you already have: the answer holds only what follows them. A request that samples needs the
    # seed that came with them. A stream that breaks does this by itself (see `max_resumes` of the client).
    resume: Sequence[int] | None

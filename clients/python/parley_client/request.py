"""Builds the protobuf requests from Python arguments, for both clients. Only what cannot be encoded is refused here;
whether a value makes sense is for the server to say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, Unpack

from google.protobuf.message import Message as ProtoMessage

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parley_client.encoding import check_kind, extend_field, join, refused, set_field, update_field
from parley_client.errors import InvalidRequest
from parley_client.messages import AnyTool, Message, Tool
from parley_client.options import ChatOptions, GenerationOptions, HasJsonSchema
from parley_client.reply import Reply

AnyMessage: TypeAlias = Message | Reply | message_pb2.Message
"""What stands in a conversation: a built message, a Reply to go on from, or a protobuf message."""

_MODES = {
    "auto": message_pb2.ToolChoice.MODE_AUTO,
    "none": message_pb2.ToolChoice.MODE_NONE,
    "required": message_pb2.ToolChoice.MODE_REQUIRED,
}


def generate(method: str, messages: Iterable[AnyMessage], options: ChatOptions) -> chat_pb2.GenerateRequest:
    """The request for `options`, the keyword arguments of the client's `method`.

    Raises:
        InvalidRequest: a value cannot be encoded.
        TypeError: a keyword argument that does not exist, or something that is no message.
    """
    unknown = sorted(options.keys() - ChatOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"{method}() got an unexpected keyword argument {unknown[0]!r}")
    request = chat_pb2.GenerateRequest()
    _set_prompt(
        request,
        messages,
        options.get("model"),
        options.get("tools"),
        options.get("chat_template_kwargs"),
        options.get("continue_final_message"),
    )
    config = {name: value for name, value in options.items() if name in GenerationOptions.__annotations__}
    _set_config(request.generation_config, config)
    _set_tool_choice(request, options.get("tool_choice"))
    _set_response_format(request, options.get("response_format"))
    if (resume := options.get("resume")) is not None:
        extend_field(request.resume, "token_ids", resume, "resume")
    for name in ("request_id", "priority"):
        if options.get(name) is not None:
            set_field(request, name, options.get(name), "")
    return request


def chat_request(messages: Iterable[AnyMessage], **options: Unpack[ChatOptions]) -> chat_pb2.GenerateRequest:
    """An item of a batch with options of its own. Raises as `generate`."""
    return generate("chat_request", messages, options)


def generate_batch(
    items: Iterable[Iterable[AnyMessage] | chat_pb2.GenerateRequest], options: ChatOptions
) -> chat_pb2.GenerateBatchRequest:
    """The request for a batch; `options` are for the items that are conversations. Raises as `generate`."""
    batch = chat_pb2.GenerateBatchRequest()
    for i, item in enumerate(items):
        if isinstance(item, chat_pb2.GenerateRequest):
            batch.requests.append(item)
            continue
        try:
            batch.requests.append(generate("generate_batch", item, options))
        except InvalidRequest as error:
            [violation] = error.violations
            raise InvalidRequest.at(join(f"requests[{i}]", violation.field), violation.description) from error
    return batch


def count_tokens(
    messages: Iterable[AnyMessage],
    model: str | None,
    tools: Sequence[AnyTool] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    continue_final_message: bool | None,
) -> chat_pb2.CountTokensRequest:
    """The request to count a prompt. Raises as `generate`."""
    request = chat_pb2.CountTokensRequest()
    _set_prompt(request, messages, model, tools, chat_template_kwargs, continue_final_message)
    return request


def get_model(model: str | None) -> chat_pb2.GetModelRequest:
    """The request for a model's description. Raises InvalidRequest if the name cannot be encoded."""
    request = chat_pb2.GetModelRequest()
    set_field(request, "model", model or "", "")
    return request


def _set_prompt(
    request: chat_pb2.GenerateRequest | chat_pb2.CountTokensRequest,
    messages: Iterable[AnyMessage],
    model: str | None,
    tools: Sequence[AnyTool] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    continue_final_message: bool | None,
) -> None:
    if isinstance(messages, (str, Message, Reply, ProtoMessage)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages: expected a sequence of messages, not one {type(messages).__name__}")
    request.messages.extend(_to_proto(message, f"messages[{i}]") for i, message in enumerate(messages))
    if tools is not None:
        check_kind(tools, Iterable, "tools")
        request.tools.extend(_to_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    if model is not None:
        set_field(request, "model", model, "")
    if chat_template_kwargs is not None:
        update_field(request, "chat_template_kwargs", chat_template_kwargs, "")
    if continue_final_message is not None:
        set_field(request, "continue_final_message", continue_final_message, "")


def _to_proto(message: AnyMessage, path: str) -> message_pb2.Message:
    if isinstance(message, message_pb2.Message):
        return message
    if isinstance(message, Reply):
        message = message.message
    if isinstance(message, Message):
        return message.to_proto(path)
    raise TypeError(f"{path}: expected a message such as user('Hello'), not {type(message).__name__}")


def _set_config(config: generation_pb2.GenerationConfig, options: Mapping[str, Any]) -> None:
    path = "generation_config"
    for name, value in options.items():
        if value is None:
            continue
        if name == "logit_bias":
            update_field(config, name, value, path)
        elif name in ("stop_strings", "stop_token_ids"):
            # A lone string would otherwise be taken apart into characters.
            extend_field(config, name, [value] if isinstance(value, str) else value, path)
        else:
            set_field(config, name, value, path)


def _to_tool(tool: AnyTool, path: str) -> message_pb2.Tool:
    if isinstance(tool, message_pb2.Tool):
        return tool
    if isinstance(tool, Tool):
        tool = {name: value for name, value in vars(tool).items() if value is not None}
    check_kind(tool, Mapping, path)
    fields = tool
    if tool.get("type") == "function" and isinstance(tool.get("function"), Mapping):
        fields, path = tool["function"], join(path, "function")
    proto = message_pb2.Tool()
    for name, value in fields.items():
        if name not in message_pb2.Tool.DESCRIPTOR.fields_by_name:
            raise InvalidRequest.at(join(path, name), "is no field of a tool")
        set_field(proto, name, _to_json(value, join(path, name)) if name == "parameters" else value, path)
    return proto


def _set_tool_choice(request: chat_pb2.GenerateRequest, choice: str | message_pb2.ToolChoice | None) -> None:
    if isinstance(choice, message_pb2.ToolChoice):
        request.tool_choice.CopyFrom(choice)
    elif isinstance(choice, str) and choice in _MODES:
        request.tool_choice.mode = _MODES[choice]
    elif choice is not None:
        set_field(request.tool_choice, "name", choice, "tool_choice")


def _set_response_format(
    request: chat_pb2.GenerateRequest,
    form: str | Mapping[str, Any] | HasJsonSchema | generation_pb2.ResponseFormat | None,
) -> None:
    if form is None:
        return
    path, proto = "response_format", request.response_format
    if isinstance(form, generation_pb2.ResponseFormat):
        proto.CopyFrom(form)
        return
    if isinstance(form, str):
        form = {form: None}
    elif hasattr(form, "model_json_schema"):
        form = {"json_schema": form}
    check_kind(form, Mapping, path)
    if len(form) != 1:
        raise InvalidRequest.at(path, f"takes exactly one form, not {len(form)}")
    [(kind, value)] = form.items()
    if kind == "text":
        proto.text.SetInParent()
    elif kind == "json_object":
        proto.json_object.SetInParent()
    elif kind == "choice":
        proto.choice.SetInParent()
        extend_field(proto.choice, "choices", value, join(path, kind))
    elif kind in ("json_schema", "regex", "grammar"):
        set_field(proto, kind, _to_json(value, join(path, kind)) if kind == "json_schema" else value, path)
    else:
        raise InvalidRequest.at(path, f"{kind!r} is no form; forms: {', '.join(proto.DESCRIPTOR.fields_by_name)}")


def _to_json(value: object, path: str) -> object:
    """JSON text of a JSON Schema that is given as a dict (or True) or by a class that has one; text stays as it is."""
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    try:
        # As it is: the server counts characters, and an escape would be six of them.
        return json.dumps(value, ensure_ascii=False) if isinstance(value, (Mapping, bool)) else value
    except (TypeError, ValueError, RecursionError) as error:
        raise refused(path, value, error) from error

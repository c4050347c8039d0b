"""Sets protobuf fields from Python values; a value that does not fit is an InvalidRequest that names the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message

from parley_client.errors import InvalidRequest

# What the protobuf runtimes raise for values of a wrong type, out of range, not encodable, or nested without end.
_REFUSALS = (TypeError, ValueError, OverflowError, RecursionError)
_KIND_NAMES: dict[type, str] = {Iterable: "a list", Mapping: "a dict"}


def set_field(proto: Message, name: str, value: object, path: str) -> None:
    """Sets a scalar field of the message that lies at `path` (empty for the request itself).

    Raises:
        InvalidRequest: the value does not fit.
    """
    try:
        setattr(proto, name, value)
    except _REFUSALS as error:
        raise refused(join(path, name), value, error) from error


def extend_field(proto: Message, name: str, values: Iterable[object], path: str) -> None:
    """Appends to a repeated scalar field; errors name the item. Raises as `set_field`."""
    check_kind(values, Iterable, join(path, name))
    field = getattr(proto, name)
    for i, value in enumerate(values):
        try:
            field.append(value)
        except _REFUSALS as error:
            raise refused(f"{join(path, name)}[{i}]", value, error) from error


def update_field(proto: Message, name: str, values: Mapping[Any, Any], path: str) -> None:
    """Adds to a map field or a Struct; errors name the key. Raises as `set_field`."""
    check_kind(values, Mapping, join(path, name))
    field = getattr(proto, name)
    for key, value in values.items():
        try:
            field.update({key: value})
        except _REFUSALS as error:
            raise refused(f"{join(path, name)}[{key!r}]", key, error) from error


def check_kind(value: object, kind: type, path: str) -> None:
    """Raises InvalidRequest if a value is of another kind. A text is no list here, although it can be taken apart."""
    if not isinstance(value, kind) or (kind is Iterable and isinstance(value, (str, bytes, Mapping))):
        name = _KIND_NAMES.get(kind) or f"a {kind.__name__}"
        raise InvalidRequest.at(path, f"must be {name}, not {type(value).__name__}")


def join(path: str, name: str) -> str:
    """The path of field `name` of the message at `path`."""
    return f"{path}.{name}" if path else name


def refused(path: str, value: object, error: Exception) -> InvalidRequest:
    """The InvalidRequest for a value that the protobuf runtime, or json, refused with `error`."""
    if isinstance(error, UnicodeEncodeError):
        code_point = f"U+{ord(error.object[error.start]):04X}"
        return InvalidRequest.at(
            path, f"is no valid text: the lone surrogate {code_point} at position {error.start} cannot be encoded"
        )
    if isinstance(error, TypeError) and "built-in operation" in str(error):  # protobuf's word for what is no text
        return InvalidRequest.at(path, f"must be text, not {type(value).__name__}")
    return InvalidRequest.at(path, str(error))

"""Sets protobuf fields from Python values; a value that does not fit is an InvalidRequest that names the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message

from parley_client.errors import InvalidRequest

# What the protobuf runtimes raise for values of a wrong type, out of range, or not encodable.
_REFUSALS = (TypeError, ValueError, OverflowError)


def set_field(proto: Message, name: str, value: object, path: str) -> None:
    """Sets a scalar field of the message that lies at `path` (empty for the request itself).

    Raises:
        InvalidRequest: the value does not fit.
    """
    try:
        setattr(proto, name, value)
    except _REFUSALS as error:
        raise refused(join(path, name), error) from error


def extend_field(proto: Message, name: str, values: Iterable[object], path: str) -> None:
    """Appends to a repeated scalar field; errors name the item. Raises as `set_field`."""
    field = getattr(proto, name)
    for i, value in enumerate(values):
        try:
            field.append(value)
        except _REFUSALS as error:
            raise refused(f"{join(path, name)}[{i}]", error) from error


def update_field(proto: Message, name: str, values: Mapping[Any, Any], path: str) -> None:
    """Adds to a map field or a Struct; errors name the key. Raises as `set_field`."""
    field = getattr(proto, name)
    for key, value in values.items():
        try:
            field.update({key: value})
        except _REFUSALS as error:
            raise refused(f"{join(path, name)}[{key!r}]", error) from error


def join(path: str, name: str) -> str:
    """The path of field `name` of the message at `path`."""
    return f"{path}.{name}" if path else name


def refused(path: str, error: Exception) -> InvalidRequest:
    """The InvalidRequest for a value that the protobuf runtime refused with `error`."""
    if isinstance(error, UnicodeEncodeError):
        code_point = f"U+{ord(error.object[error.start]):04X}"
        return InvalidRequest.at(
            path, f"is no valid text: the lone surrogate {code_point} at position {error.start} cannot be encoded"
        )
    return InvalidRequest.at(path, str(error))

"""Messages of any shape that protobuf can hold, sensible or not, for any message type: hypothesis strategies."""

from __future__ import annotations

from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_F = FieldDescriptor
_INTEGERS = {
    _F.TYPE_INT32: (-(2**31), 2**31 - 1),
    _F.TYPE_INT64: (-(2**63), 2**63 - 1),
    _F.TYPE_UINT32: (0, 2**32 - 1),
    _F.TYPE_UINT64: (0, 2**64 - 1),
}
_TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", "\0", "\u202e", "<|im_start|>", "<|im_end|>", "{{ 7 * 7 }}", "{% raw %}", "a" * 5000, "\U0010ffff"]
    ),
    st.sampled_from(
        ['{"type": "object"}', "root ::= root", "(a+)+$", "[", '{"$ref": "#"}', "scripted", "user", "auto"]
    ),
)
_FLOATS = st.one_of(
    st.floats(width=32),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e-38, 3e38, 0.5, 1.0, 2.0]),
)
_MAX_DEPTH = 4


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Messages of a type, each field unset, sensible or absurd."""
    if descriptor.full_name == "google.protobuf.Struct":
        return _structs()
    fields = {field.name: _field(field, depth) for field in descriptor.fields}
    chosen = st.sets(st.sampled_from(sorted(fields)), max_size=4) if fields else st.just(set())
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in sorted(names)}).map(
            lambda values: _build(descriptor, values)
        )
    )


def _build(descriptor: Descriptor, values: dict[str, Any]) -> Message:
    message = GetMessageClass(descriptor)()
    for name, value in values.items():
        field = descriptor.fields_by_name[name]
        target = getattr(message, name)
        if isinstance(value, dict):
            target.update(value)
        elif field.is_repeated:
            target.extend(value)
        elif isinstance(value, Message):
            target.CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


def _field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return st.dictionaries(_single(key, depth), _single(value, depth), max_size=5)
    if field.is_repeated:
        return st.lists(_single(field, depth), max_size=4)
    return _single(field, depth)


def _single(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    match field.type:
        case _F.TYPE_MESSAGE:
            nested = field.message_type
            return st.builds(GetMessageClass(nested)) if depth >= _MAX_DEPTH else messages(nested, depth + 1)
        case _F.TYPE_STRING:
            return _TEXTS
        case _F.TYPE_BYTES:
            return st.binary(max_size=50)
        case _F.TYPE_BOOL:
            return st.booleans()
        case _F.TYPE_FLOAT | _F.TYPE_DOUBLE:
            return _FLOATS
        case _F.TYPE_ENUM:
            return st.one_of(st.sampled_from([v.number for v in field.enum_type.values]), st.integers(-5, 2**31 - 1))
        case kind:
            lowest, highest = _INTEGERS[kind]
            return st.one_of(st.integers(0, 50).filter(lambda i: i >= lowest), st.integers(lowest, highest))


def _structs() -> st.SearchStrategy[struct_pb2.Struct]:
    json_values = st.recursive(
        st.one_of(st.none(), st.booleans(), _FLOATS, _TEXTS),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXTS, inner, max_size=3)),
        max_leaves=10,
    )

    def build(values: dict[str, Any]) -> struct_pb2.Struct:
        struct = struct_pb2.Struct()
        struct.update(values)
        return struct

    return st.dictionaries(_TEXTS, json_values, max_size=3).map(build)

"""Seeded JSON Schemas, of the keywords that docs/structured-output.md lists as followed."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("id", "name", "größe", "a b", "x_1", "$ref2", 'quo"te', "kind", "list", "value")
_PATTERNS = ("^[a-z]{2,5}$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$", "[0-9]{3}", "^(a|bc)+$", r"^\d{1,3}\.\d{2}$")
_FORMATS = ("date", "time", "date-time", "uuid", "email", "ipv4", "hostname")


def random_schema(seed: int) -> dict[str, Any]:
    """An object at the top, with definitions that it may refer to."""
    chance = random.Random(seed)
    definitions = {name: _value(chance, 1, ()) for name in ("first", "second")}
    return {**_object(chance, 3, tuple(definitions)), "$defs": definitions}


def _value(chance: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _enum, lambda *_: {"type": chance.choice(["boolean", "null"])}]
    if depth:
        kinds += [_object, _object, _array, _any_of]
    if names:
        kinds.append(lambda *_: {"$ref": f"#/$defs/{chance.choice(names)}"})
    made: dict[str, Any] = chance.choice(kinds)(chance, depth, names)
    return made


def _object(chance: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    keys = chance.sample(_WORDS, chance.randint(1, 4))
    return {
        "type": "object",
        "properties": {key: _value(chance, depth - 1, names) for key in keys},
        "required": chance.sample(keys, chance.randint(0, len(keys))),
        "additionalProperties": chance.random() < 0.2 and {"type": "integer"},
    }


def _array(chance: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    least = chance.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "items": _value(chance, depth - 1, names)}
    if chance.random() < 0.3:
        schema["prefixItems"] = [_value(chance, depth - 1, names)]
    return {**schema, "minItems": least, "maxItems": least + chance.randint(0, 3)}


def _any_of(chance: random.Random, depth: int, names: tuple[str, ...]) -> dict[str, Any]:
    return {"anyOf": [_value(chance, depth - 1, names) for _ in range(chance.randint(1, 3))]}


def _string(chance: random.Random, *_: object) -> dict[str, Any]:
    least = chance.randint(0, 4)
    return chance.choice(
        [
            {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 9)},
            {"type": "string", "pattern": chance.choice(_PATTERNS)},
            {"type": "string", "format": chance.choice(_FORMATS)},
        ]
    )


def _integer(chance: random.Random, *_: object) -> dict[str, Any]:
    low = chance.randint(-1000, 1000)
    schema = {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 5000)}
    return schema if chance.random() < 0.7 else {"type": "integer", "multipleOf": chance.choice([2, 5, 10])}


def _number(chance: random.Random, *_: object) -> dict[str, Any]:
    low = round(chance.uniform(-100, 100), 2)
    return {"type": "number", chance.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + 50}


def _enum(chance: random.Random, *_: object) -> dict[str, Any]:
    values = ["red", "größe", 'q"', 7, -1.5, True, None, ["x", 1], {"k": "v"}]
    return {"enum": chance.sample(values, chance.randint(1, 4))} if chance.random() < 0.7 else {"const": "only"}

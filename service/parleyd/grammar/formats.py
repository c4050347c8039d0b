"""From a request's `response_format` to a grammar in llguidance's own language, which is plain text.

The checker process calls it. Only how a format is written is checked here; compiler.py tells
whether it can be followed.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import ASTNode, GrammarParser, LiteralNode, RegexNode, resolve

from parleyd.grammar.compiler import GrammarError
from parleyd.grammar.tool_calls import to_lark

# Between JSON tokens: a space, or a line's end and what indents the next. Without a bound, models that have lost their
# way write blanks until they are cut off. The rest keeps schemas from choosing looser rules for themselves.
_JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(?: |\n[ \t]{0,40})",
    "coerce_one_of": False,
    "lenient": False,
}
_MAX_EXACT = 2**53
# Their members have names of the schema's own, not keywords.
_OF_NAMES = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_CLASS = re.compile(r"\\.|\[\^([]-]?)", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([][-])|.)", re.DOTALL)
# What stands for itself in GBNF, and cannot in Lark, or in its classes, where && and ~~ combine what is beside them.
_SPELLED_OUT = re.compile(r"[\x00-\x1f&~]")


def to_grammar(kind: str, source: str) -> str:
    """`kind` is a field of ResponseFormat, `source` its value: for `choice` a JSON array, for `json_object` nothing. Or
    `kind` is "tool_calls", and `source` a JSON object of the arguments of `tool_calls.to_lark`.

    Raises GrammarError.
    """
    match kind:
        case "json_object":
            return _from_json_schema('{"type": "object"}')
        case "json_schema":
            return _from_json_schema(source)
        case "regex":
            if (len(source) - len(source.rstrip("\\"))) % 2:  # the library would leave it out
                raise GrammarError("ends amid an escape")
            return LLMatcher.grammar_from_regex(source)
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in json.loads(source)))
        case "tool_calls":
            calls = json.loads(source, object_hook=_refuse_inexact)
            calls["tools"] = {name: (*around, _exact(schema)) for name, (*around, schema) in calls["tools"].items()}
            return LLMatcher.grammar_from_lark(to_lark(**calls, json_options=_JSON_OPTIONS))
        case "grammar":
            return _from_gbnf(source)
        case _:
            raise ValueError(f"{kind!r} is no format")


def _from_json_schema(source: str) -> str:
    try:
        schema = json.loads(source, object_hook=_refuse_inexact)
        exact = json.dumps(_exact(schema))
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"is not JSON: {error}") from error
    if schema is True:
        exact = "{}"
    elif not isinstance(schema, dict):
        raise GrammarError("is no JSON Schema that anything could match")
    try:
        return LLMatcher.grammar_from_json_schema(exact, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]
    except ValueError as error:
        raise GrammarError(str(error)) from error


def _refuse_inexact(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuses what llguidance, which reads all numbers as float64, would have another number stand for in answers."""
    values = [schema.get("const"), schema.get("enum")]
    while values:
        match values.pop():
            case dict() as members:
                values += members.values()
            case list() as items:
                values += items
            case int() as number if abs(number) > _MAX_EXACT:
                raise GrammarError(
                    f"const and enum cannot hold {number}: integers beyond 2**53 are not followed exactly"
                )
    return schema


def _exact(schema: Any, are_names: bool = False) -> Any:
    """The same, but that what a pattern's [^…] allows has no U+0000: in strings, llguidance takes what has all control
    characters, or all but a line's end, for what has quotes and backslashes too."""
    match schema:
        case list():
            return [_exact(one) for one in schema]
        case dict() if are_names:
            return {name: _exact(one) for name, one in schema.items()}
        case dict():
            exact = {
                key: one if key in ("const", "enum") else _exact(one, key in _OF_NAMES) for key, one in schema.items()
            }
            if isinstance(exact.get("pattern"), str):
                exact["pattern"] = _without_nul(exact["pattern"])
            if isinstance(named := exact.get("patternProperties"), dict):
                exact["patternProperties"] = {_without_nul(name): one for name, one in named.items()}
            return exact
    return schema


def _without_nul(pattern: str) -> str:
    # A bracket or a hyphen that comes first in a class is a character of it.
    return _CLASS.sub(
        lambda found: found[0] if found[1] is None else r"[^[\x00]" + (found[1] and f"\\{found[1]}"), pattern
    )


def _from_gbnf(source: str) -> str:
    try:
        return LLMatcher.grammar_from_lark(_gbnf_to_lark(_ESCAPE.sub(_rewrite_escape, source)))
    except (GrammarError, MemoryError):  # the one is told; the other ends the process, whose memory it was
        raise
    except Exception as error:  # the library raises bare Exception, and RecursionError where it is nested too deeply
        raise GrammarError(str(error)) from error


def _gbnf_to_lark(source: str) -> str:
    """As llguidance's own conversion, but that a grammar without recursion becomes one token of Lark, which is matched
    as a whole. Each token goes as far as it can: of two, the first would take what the second begins with."""
    rules = GrammarParser().parse(source)
    resolve(rules)
    for rule in rules.values():
        _mend(rule)
    lines, whole = [], "WHOLE"
    if rules["start"].alternatives.is_terminal():
        while whole in rules:
            whole += "_"
        rules["start"].name = whole
        lines.append(f"start: {whole}")
    return "\n".join([*lines, *map(str, rules.values())])


def _mend(node: ASTNode) -> None:
    """Has Lark read characters and classes as GBNF means them: a dot is a line's end too."""
    if isinstance(node, LiteralNode):
        node.value = _SPELLED_OUT.sub(_spell_out, node.value)
    elif isinstance(node, RegexNode):
        if "--" in node.rx:
            raise GrammarError(f"-- in {node.rx} may mean several things: write \\- for the character")
        node.rx = "(?s:.)" if node.rx == "." else _SPELLED_OUT.sub(_spell_out, node.rx)
    for child in node.children():
        _mend(child)


def _spell_out(character: re.Match[str]) -> str:
    return f"\\x{ord(character[0]):02x}"


def _rewrite_escape(escape: re.Match[str]) -> str:
    r"""Escapes that llguidance's conversion gets wrong (\u, \U, \[, \]) or does not know (\-), as ones that it gets
    right."""
    if escape[3]:
        return f"\\x{ord(escape[3]):02x}"
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise GrammarError(f"{escape[0]} is no character")
    return f"\\x{code:02x}" if code < 0x80 else chr(code)

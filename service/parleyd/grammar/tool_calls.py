"""The grammar of an answer that must call tools, in llguidance's Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_THOUGHT = r"""
thought[lazy]: /(?s:.*)<\/think>/
gap: /\n{0,2}/"""


def to_lark(
    *,
    opening: str,
    opening_id: int | None,
    before: str,
    between: str | None,
    after: str,
    arguments_key: str,
    tools: Mapping[str, Any],
    reasoning: str | None,
    json_options: Mapping[str, Any],
) -> str:
    """`tools` maps the names of tools that may be called to the schemas of their arguments. `opening_id`: its id, where
    that is a special token; `before`, `between` and `after` is what models write around the objects of calls, `between`
    None where there is one only. `reasoning`: "open" where the prompt opens it, "may" where the model may; else None.
    """
    start = {None: "calls", "open": "thought gap calls", "may": '("<think>" thought gap)? calls'}[reasoning]
    more = "" if between is None else f" ({_quoted(between)} call)*"
    opening_terms = [f"<[{opening_id}]>"] if opening_id is not None else [_quoted(opening)] if opening else []
    terms = [
        *opening_terms,
        *map(_quoted, filter(None, (before,))),
        f"call{more}",
        *map(_quoted, filter(None, (after,))),
    ]
    rules = [f"start: {start}", f"calls: {' '.join(terms)}", f"call: {_alternatives(len(tools))}"]
    for i, (name, schema) in enumerate(tools.items()):
        head = f'{{"name": {json.dumps(name)}, "{arguments_key}": '
        rules.append(f'call_{i}: {_quoted(head)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json.dumps({**schema, 'x-guidance': json_options})}")
    return "\n".join(rules) + (_THOUGHT if reasoning else "")


def _alternatives(number: int) -> str:
    return " | ".join(f"call_{i}" for i in range(number))


def _quoted(text: str) -> str:
    return json.dumps(text)

"""The grammar of an answer that must call tools, in llguidance's Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

_OPENING, _CLOSING = "<think>", "</think>"


def to_lark(
    *,
    before: str,
    between: str | None,
    after: str,
    tools: Mapping[str, tuple[str, str, Any]],
    special_ids: Mapping[str, int],
    reasoning: str | None,
    json_options: Mapping[str, Any],
) -> str:
    """`tools`: of each that may be called, what is written before its arguments and after them, and their schema.
    `before`, `between` and `after`: what is written around calls, `between` None where there is one only. In all these
    texts `special_ids` stand for special tokens. `reasoning`: "open" where the prompt opens it, "may" where the model
    may; else None. Its markers may be spelled out even where they are special tokens.
    """

    terms = partial(_terms, special_ids)
    opened = " | ".join(dict.fromkeys([json.dumps(_OPENING), *terms(_OPENING)]))
    start = {None: "calls", "open": "thought gap calls", "may": f"(({opened}) thought gap)? calls"}[reasoning]
    more = [] if between is None else ["(", *terms(between), "call )*"]
    rules = [
        f"start: {start}",
        f"calls: {' '.join([*terms(before), 'call', *more, *terms(after)])}",
        f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
    ]
    for i, (head, tail, schema) in enumerate(tools.values()):
        rules.append(f"call_{i}: {' '.join([*terms(head), f'arguments_{i}', *terms(tail)])}")
        rules.append(f"arguments_{i}: %json {json.dumps({**schema, 'x-guidance': json_options})}")
    if reasoning is not None:
        closed = f" | anything {' '.join(terms(_CLOSING))}" if _CLOSING in special_ids else ""
        rules += [f"thought: spelled{closed}", r"spelled[lazy]: /(?s:.*)<\/think>/", "anything: /(?s:.*)/"]
        rules.append(r"gap: /\n{0,2}/")
    return "\n".join(rules)


def _terms(special_ids: Mapping[str, int], text: str) -> Iterator[str]:
    for part in re.split(f"({'|'.join(map(re.escape, special_ids))})", text) if special_ids else [text]:
        if part:
            yield f"<[{special_ids[part]}]>" if part in special_ids else json.dumps(part)

"""`{"name": …, "parameters": {…}}`, bare or after `<|python_tag|>`: Llama 3.1, 3.2 and 3.3."""

from __future__ import annotations

from parleyd.text.tool_format.tool_format import SPACE, Spelling, ToolFormat

LLAMA3 = ToolFormat(
    name="llama3",
    opening="<|python_tag|>",
    arguments_key="parameters",
    next=rf"{SPACE};?{SPACE}",
    is_bare=True,
    spelling=Spelling("", None, ""),
)

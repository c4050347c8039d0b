"""`[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`: Mistral's models up to tokenizer version 7."""

from __future__ import annotations

from parleyd.text.tool_format.tool_format import SPACE, Spelling, ToolFormat

MISTRAL = ToolFormat(
    name="mistral",
    opening="[TOOL_CALLS]",
    closing="]",
    first=rf"{SPACE}\[{SPACE}",
    next=rf"{SPACE},{SPACE}",
    spelling=Spelling(" [", ", ", "]"),
)

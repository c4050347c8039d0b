"""`[TOOL_CALLS]name[ARGS]{…}`, once for each call: Mistral's models from tokenizer version 11 on."""

from __future__ import annotations

from parleyd.text.tool_format.tool_format import Spelling, ToolFormat

MISTRAL11 = ToolFormat(
    name="mistral11",
    opening="[TOOL_CALLS]",
    arguments_marker="[ARGS]",
    call_id_marker="[CALL_ID]",  # version 11 alone
    spelling=Spelling("", "[TOOL_CALLS]", ""),
)

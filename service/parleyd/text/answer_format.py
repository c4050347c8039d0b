"""How one model writes its answers: tool calls, reasoning. Found once, when the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parleyd.text import reasoning
from parleyd.text.answer_parser import AnswerParser
from parleyd.text.chat_template import ChatTemplate
from parleyd.text.reasoning import ReasoningParser
from parleyd.text.tokenizer import Tokenizer
from parleyd.text.tool_format import detection, hermes
from parleyd.text.tool_format.parser import ToolCallParser
from parleyd.text.tool_format.tool_format import ToolFormat


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """`tool_format` is None where tools cannot be used; `no_tools_because` then says why. `spells_out_tools`: the chat
    template knows none, so that messages have to say it all."""

    tool_format: ToolFormat | None
    no_tools_because: str
    spells_out_tools: bool
    has_reasoning: bool

    @classmethod
    def find(
        cls, template: ChatTemplate, tokenizer: Tokenizer, *, tool_format: str, reasoning_format: str
    ) -> AnswerFormat:
        """From the settings `tool_format` and `reasoning_format` and, where those say "auto", from the model."""
        template_knows_tools = detection.knows_tools(template)
        found, why = _find_tool_format(template, tool_format, template_knows_tools)
        return cls(
            tool_format=found,
            no_tools_because=why,
            spells_out_tools=found is hermes.HERMES and not template_knows_tools,
            has_reasoning=reasoning_format == "think"
            or (reasoning_format == "auto" and _has_reasoning(template, tokenizer)),
        )

    def for_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]:
        """Messages and tools as this model's chat template takes them."""
        if self.spells_out_tools:
            return hermes.spell_out(messages, tools), None
        return messages, tools or None

    def opens_reasoning(self, prompt: str, continued: str) -> bool:
        """Whether the answer to the prompt begins amid reasoning. `continued` is the message to continue, if any."""
        if not self.has_reasoning:
            return False
        begun = continued.lstrip().startswith(reasoning.OPENING) and reasoning.CLOSING not in continued
        return begun or prompt.rstrip().endswith(reasoning.OPENING)

    def parser(
        self, tool_names: Collection[str], call_id: Callable[[int], str], *, opens_reasoning: bool, continued: str
    ) -> AnswerParser:
        """For one answer, in which these tools may be called. `continued` is the message to continue, if any."""
        begun = continued.partition(reasoning.OPENING)[2] if opens_reasoning else ""
        return AnswerParser(
            ReasoningParser(is_open=opens_reasoning, begun=begun) if self.has_reasoning else None,
            ToolCallParser(self.tool_format, tool_names, call_id) if self.tool_format and tool_names else None,
        )

    def markers(self, *, with_tools: bool) -> Iterable[str]:
        """What the parser must see, even where the tokenizer calls it special."""
        if self.has_reasoning:
            yield from (reasoning.OPENING, reasoning.CLOSING)
        if self.tool_format and with_tools:
            yield from self.tool_format.markers


def _find_tool_format(
    template: ChatTemplate, setting: str, template_knows_tools: bool
) -> tuple[ToolFormat | None, str]:
    if setting == "none":
        return None, "this server is started with --tool-format none"
    if not template_knows_tools and setting != hermes.HERMES.name:
        return None, "the model's chat template knows no tools (with --tool-format hermes the service describes them)"
    found = detection.FORMATS.get(setting) or detection.detect(template)
    return found, "" if found else "it is not known how this model writes tool calls (--tool-format tells it)"


def _has_reasoning(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    markers = (reasoning.OPENING, reasoning.CLOSING)
    return any(marker in (template.source or "") or tokenizer.token_id(marker) is not None for marker in markers)

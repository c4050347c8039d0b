"""Messages to prompt text through the model's own chat template, exactly as `apply_chat_template` renders it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2.meta

from parleyd.errors import InvalidRequest, StartupError, Unsupported, Violation
from parleyd.text.tokenizer_config import NAMED_SPECIAL_TOKENS, TokenizerConfig

_MAX_QUOTED_CHARS = 300
_PROBE = "parley_probe"
_FILES = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}

# What the request itself or the tokenizer gives the template; clients cannot set these beside it.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self", *NAMED_SPECIAL_TOKENS}
)


@cache
def template_utils() -> ModuleType:
    """transformers' rendering of chat templates. Importing it takes over half a second, which the gateway spends in a
    thread while the worker loads its model."""
    from transformers.utils import chat_template_utils

    module: ModuleType = chat_template_utils
    return module


class ChatTemplate:
    """One model's chat template. Safe for many threads; rendering is pure Python, so it belongs in a thread pool.

    `variables` are the names that a client may set through `chat_template_kwargs`; `source` is the template's own text.
    `obstacle`: why there is none, and what to do; None where there is one.
    """

    def __init__(
        self, source: str | None, special_tokens: Mapping[str, str], way_out: str = "", tool_use: str | None = None
    ) -> None:
        """`source=None`: the model has none. `tool_use`: one that takes its place where there are tools.

        Raises StartupError where a template is not valid Jinja.
        """
        self.source = source
        self._tool_use = tool_use or source
        self.obstacle = f"has no chat template{way_out}" if source is None else None
        self._special_tokens = dict(special_tokens)
        parameters = inspect.signature(template_utils().render_jinja_template).parameters
        self._reserved = _RESERVED | parameters.keys() | special_tokens.keys()
        names = [_variables(one) for one in (source, tool_use) if one is not None]
        self.variables = frozenset().union(*names) - self._reserved

    @classmethod
    def load(cls, folder: Path, is_own_folder: bool = False) -> ChatTemplate:
        """Reads chat_template.jinja and additional_chat_templates/tool_use.jinja, else those of these names ("default",
        "tool_use") in tokenizer_config.json. `is_own_folder`: it is one that the operator may add files to.

        Raises StartupError where a file cannot be used.
        """
        config = TokenizerConfig.load(folder)
        files = {name: _read(path) for name, file in _FILES.items() if (path := folder / file).is_file()}
        templates = files or config.chat_templates
        way_out = " (a chat_template.jinja in its folder would be one)" if is_own_folder else ""
        special_tokens = {name: token.content for name, token in config.special_tokens.items()}
        return cls(templates.get("default"), special_tokens, way_out, templates.get("tool_use"))

    @cached_property
    def reads_names(self) -> bool:
        """Whether the template tells the model a message's `name`."""
        return self._shows(self._message({"role": "user", "content": "?", "name": _PROBE}, self.source), self.source)

    @cached_property
    def _taking_parts(self) -> frozenset[str | None]:
        """Those of the templates that find a message's text in a list of parts only, as of some models that see: a text
        that is no list would be left out without a word."""
        text, parts = ({"role": "user", "content": content} for content in (_PROBE, _parts(_PROBE)))
        sources = (self.source, self._tool_use)
        return frozenset(one for one in sources if not self._shows(text, one) and self._shows(parts, one))

    def _shows(self, message: Mapping[str, Any], source: str | None) -> bool:
        try:
            return _PROBE in self._render([message], chat_template=source)
        except Exception:  # whatever a model's template raises
            return False

    def kwarg_violations(self, names: Iterable[str]) -> list[Violation]:
        """One for each name that is reserved or that the template never reads. None where there is no template."""
        if self.source is None:
            return []  # render() says what is wrong
        known = ", ".join(sorted(self.variables)) or "none"
        violations = []
        for name in names:
            if name in self._reserved:
                why = "is set by the service itself"
            elif name not in self.variables:
                why = f"is not read by the model's chat template; it reads: {known}"
            else:
                continue
            violations.append(Violation(f"chat_template_kwargs.{name}", why))
        return violations

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text: up to where the assistant's next message begins or, with `continue_final_message`, up to
        the last message's own end. Keys of messages whose value is None count as absent.

        `kwargs` are such as `kwarg_violations` finds nothing wrong with. Raises Unsupported where the model has no chat
        template, InvalidRequest where the template refuses the messages or drops the one to continue.
        """
        if self.source is None:
            raise Unsupported("messages", f"this model {self.obstacle}, so it cannot answer conversations")
        source = self.source if tools is None else self._tool_use
        try:
            prompt = self._render(
                [self._message(message, source) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=source,
                continue_final_message=continue_final_message,
                add_generation_prompt=not continue_final_message,
                **(kwargs or {}),
            )
            prompt.encode()  # a lone surrogate, say from a JSON escape, has no tokens
        except Exception as error:  # whatever a model's template raises is about what it was given
            raise InvalidRequest([_refusal(error, continue_final_message)]) from error
        return prompt

    def _render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        rendered: list[str]
        # There is one for each conversation; the annotation is wrong.
        rendered, _ = template_utils().render_jinja_template([messages], **(self._special_tokens | options))
        return rendered[0]

    def _message(self, message: Mapping[str, Any], source: str | None) -> dict[str, Any]:
        given = {key: value for key, value in message.items() if value is not None}
        if source in self._taking_parts and isinstance(given.get("content"), str):
            given["content"] = _parts(given["content"])
        return given


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from error


def _variables(source: str) -> frozenset[str]:
    """The names that a template looks up beyond those it sets itself and Jinja's own."""
    try:
        # transformers' own environment, private as it is: only it parses the tags that it adds to Jinja.
        environment = template_utils()._compile_jinja_template(source).environment
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
    except Exception as error:  # Jinja's own, and what its parser and Python make of one that is nested too deeply
        raise StartupError(f"the model's chat template is not valid: {_one_line(str(error))}") from error


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _refusal(error: Exception, continue_final_message: bool) -> Violation:
    if continue_final_message and type(error) is ValueError and "continue_final_message" in str(error):
        # transformers' text quotes the whole conversation
        return Violation(
            "continue_final_message",
            "the model's chat template alters or drops the last message's text",
        )
    reason = _one_line(str(error)) or type(error).__name__
    return Violation("messages", f"the model's chat template refuses them: {reason}")


def _one_line(text: str) -> str:
    # cut first: what a template or a client wrote may be megabytes long
    text = " ".join(text[: 2 * _MAX_QUOTED_CHARS].split())
    return text if len(text) <= _MAX_QUOTED_CHARS else text[:_MAX_QUOTED_CHARS] + "…"

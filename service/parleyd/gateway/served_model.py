"""The served model as the gateway sees it: name, limits, defaults, tokenizer, template; checks requests by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

from parley.v1 import chat_pb2
from parleyd.config import Settings
from parleyd.errors import InvalidRequest, ModelNotFound, Unsupported, Violation
from parleyd.gateway import convert, tools, validation
from parleyd.generation import ModelInfo, SamplingParams
from parleyd.ipc.messages import CheckGrammar
from parleyd.text.answer_format import AnswerFormat
from parleyd.text.chat_template import ChatTemplate
from parleyd.text.special_spellings import SpecialSpellings
from parleyd.text.tokenizer import ByteCoding, Tokenizer

_MAX_VIOLATIONS = 200
_CAPABILITIES = (
    "chat", "stream", "batch", "count_tokens", "continue_final_message", "stop_strings", "seed", "penalties",
    "logit_bias", "logprobs", "num_return_sequences", "resume",
)  # fmt: skip
_FORMATS = ("json_object", "json_schema", "regex", "grammar", "choice")


@dataclass(frozen=True)
class ServedModel:
    """Made once the worker tells what it has loaded. `spellings`: None where those of special tokens are tokens."""

    name: str
    info: ModelInfo
    defaults: SamplingParams
    tokenizer: Tokenizer
    template: ChatTemplate
    answer_format: AnswerFormat
    spellings: SpecialSpellings | None
    grammar_obstacle: str | None
    description: chat_pb2.GetModelResponse

    @classmethod
    def load(cls, info: ModelInfo, settings: Settings) -> ServedModel:
        """Reads tokenizer and chat template from the model's folder."""
        name, server = settings.served_model_name, settings.server
        folder, is_own_folder = Path(info.tokenizer_dir), Path(settings.model.model).is_dir()
        tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder, is_own_folder)
        answer_format = AnswerFormat.find(
            template, tokenizer, tool_format=server.tool_format, reasoning_format=server.reasoning_format
        )
        spellings = SpecialSpellings(tokenizer) if server.split_special_tokens else None
        defaults = convert.effective_defaults(info, server.default_max_new_tokens)
        grammar_obstacle = _grammar_obstacle(info, tokenizer)
        description = chat_pb2.GetModelResponse(
            model=name,
            max_context_tokens=info.max_context_tokens,
            vocab_size=info.vocab_size,
            default_generation_config=convert.to_generation_config(defaults, info.defaults),
            capabilities=(
                *_CAPABILITIES,
                *_format_capabilities(answer_format),
                *(() if grammar_obstacle else _FORMATS),
            ),
            engine=info.engine,
            dtype=info.dtype,
            device=info.device,
        )
        return cls(name, info, defaults, tokenizer, template, answer_format, spellings, grammar_obstacle, description)

    def ending_ids(self, params: SamplingParams) -> frozenset[int]:
        """The ids that end an answer."""
        ignores_eos = params.ignore_eos and not params.grammar  # nothing can follow the end of a grammar
        return frozenset(params.stop_token_ids) | frozenset(() if ignores_eos else self.info.eos_token_ids)

    def num_choices(self, request: chat_pb2.GenerateRequest, params: SamplingParams) -> int:
        """How many answers a valid request asks for. `params`: its own, as `check_request` returns them."""
        return convert.num_choices(request.generation_config, params, self.info.defaults)

    def check_name(self, name: str) -> None:
        """Raises ModelNotFound where a request names another model."""
        if name not in ("", self.name):
            raise ModelNotFound(name, [self.name])

    def check_request(self, request: chat_pb2.GenerateRequest) -> tuple[SamplingParams, CheckGrammar | None]:
        """The request's sampling parameters, and what is left to ask the checker: None where any text will do.

        Raises InvalidRequest with every violation, or Unsupported; of another model, ModelNotFound in its place.
        """
        params = convert.to_sampling_params(request.generation_config, self.defaults)
        _refuse(
            validation.request_violations(request, self.info),
            convert.resolved_violations(request, params, self.num_choices(request, params)),
            self._kwarg_violations(request),
        )
        self._refuse_unsupported(request, validation.unsupported_in_request(request, self.grammar_obstacle))
        return params, self._grammar_question(request, params)

    def check_conversation(self, request: chat_pb2.CountTokensRequest) -> None:
        """Raises InvalidRequest with every violation, or Unsupported; of another model, ModelNotFound in its place."""
        _refuse(validation.conversation_violations(request), self._kwarg_violations(request))
        self._refuse_unsupported(request)

    def render(self, request: tools.AnyRequest) -> tuple[str, bool]:
        """A valid conversation after the chat template, and whether the answer to it begins amid reasoning.

        Raises InvalidRequest if the template refuses it.
        """
        mark = _as_it_is if self.spellings is None else self.spellings.mark
        messages, described = self.answer_format.for_template(
            mark(convert.to_template_messages(request.messages)), mark(tools.to_template_tools(tools.offered(request)))
        )
        text = self.template.render(
            messages,
            tools=described,
            continue_final_message=request.continue_final_message,
            kwargs=mark(convert.to_template_kwargs(request)),
        )
        return text, self.answer_format.opens_reasoning(text, convert.continued(request))

    def _grammar_question(self, request: chat_pb2.GenerateRequest, params: SamplingParams) -> CheckGrammar | None:
        form = convert.to_format(request.response_format)
        paths = {}
        if tools.is_required(request.tool_choice):
            form = "tool_calls", self._required_calls(request)
            paths = {tool.name: f"tools[{i}].parameters" for i, tool in enumerate(request.tools)}
        if form is None:
            return None
        endings = {*params.stop_token_ids, *self.info.eos_token_ids}
        resumed_ids = takewhile(lambda token_id: token_id not in endings, request.resume.token_ids)
        return CheckGrammar(self.info, *form, tuple(resumed_ids), paths)

    def _required_calls(self, request: chat_pb2.GenerateRequest) -> str:
        tool_format = self.answer_format.tool_format
        assert tool_format is not None
        special_ids = {
            marker: token_id
            for marker in self.answer_format.markers(with_tools=True)
            for token_id in self.tokenizer.special_ids_of([marker])
        }
        reasoning = None
        if self.answer_format.has_reasoning:
            reasoning = "open" if self.render(request)[1] else "may"
        return tools.required_calls(request, tool_format, special_ids, reasoning)

    def _refuse_unsupported(self, request: tools.AnyRequest, further: Iterable[Unsupported] = ()) -> None:
        in_conversation = validation.unsupported_in_conversation(request, reads_names=self.template.reads_names)
        for unsupported in chain(
            in_conversation, tools.unsupported(request, self.answer_format, self.grammar_obstacle), further
        ):
            self.check_name(request.model)  # nobody here knows what another one can do
            raise unsupported

    def _kwarg_violations(self, request: tools.AnyRequest) -> list[Violation]:
        return self.template.kwarg_violations(request.chat_template_kwargs.fields.keys())


def _as_it_is(value: Any) -> Any:
    return value


def _format_capabilities(answer_format: AnswerFormat) -> Iterator[str]:
    if answer_format.tool_format:
        yield "tools"
    if answer_format.has_reasoning:
        yield "reasoning"


def _grammar_obstacle(info: ModelInfo, tokenizer: Tokenizer) -> str | None:
    """Why answers can have no form other than free text, or None."""
    if find_spec("llguidance") is None:
        return "the library llguidance is not installed on this server"
    if tokenizer.byte_coding is ByteCoding.NONE:
        return "this model's tokens do not spell texts byte for byte"
    if not info.eos_token_ids:
        return "this model has no end token"
    return None


def _refuse(*violations: Iterable[Violation]) -> None:
    """Raises InvalidRequest if there is any violation. More than fit into a status are not even looked for."""
    if found := list(islice(chain(*violations), _MAX_VIOLATIONS + 1)):
        raise InvalidRequest(found, are_all=len(found) <= _MAX_VIOLATIONS)

"""What chat templates and the engine get of a request."""

from __future__ import annotations

from typing import Any

import pytest

from parley.v1 import generation_pb2
from parley.v1.chat_pb2 import CountTokensRequest
from parley.v1.message_pb2 import ROLE_ASSISTANT, ROLE_TOOL, ROLE_USER, Message, ToolCall
from parleyd.gateway.convert import effective_defaults, to_sampling_params, to_template_kwargs, to_template_messages
from parleyd.generation import ModelInfo, SamplingDefaults, SamplingParams

SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def params(do_sample_by_default: bool = False, **config: object) -> SamplingParams:
    defaults = SamplingParams(max_new_tokens=512, do_sample=do_sample_by_default, temperature=0.5)
    return to_sampling_params(generation_pb2.GenerationConfig(**config), defaults)  # type: ignore[arg-type]


@pytest.mark.parametrize("by_default", [False, True])
def test_do_sample_left_out_is_the_models_own(by_default: bool) -> None:
    assert params(by_default, max_new_tokens=3, repetition_penalty=2).do_sample is by_default


@pytest.mark.parametrize("field", SAMPLING)
def test_do_sample_left_out_is_true_where_the_request_says_how_to_sample(field: str) -> None:
    assert params(**{field: 1}).do_sample


@pytest.mark.parametrize("by_default", [False, True])
def test_do_sample_false_is_greedy_whatever_else_is_set(by_default: bool) -> None:
    assert not params(by_default, do_sample=False, **dict.fromkeys(SAMPLING, 1)).do_sample


@pytest.mark.parametrize("do_sample", [{}, {"do_sample": True}])
def test_temperature_0_is_greedy_even_if_do_sample_is_true(do_sample: dict[str, bool]) -> None:
    assert not params(True, temperature=0, **do_sample).do_sample


def test_a_seed_of_0_is_one_like_any_other() -> None:
    assert params(seed=0).seed == 0


def defaults_of(default_max_new_tokens: int, **own: Any) -> SamplingParams:
    """Those of a model with a context of 4,096 tokens."""
    info = ModelInfo(
        tokenizer_dir="", max_context_tokens=4096, vocab_size=8, eos_token_ids=(1,), dtype="", device="", engine="",
        max_running=1, defaults=SamplingDefaults(**own),
    )  # fmt: skip
    return effective_defaults(info, default_max_new_tokens)


@pytest.mark.parametrize("own", [{}, {"max_new_tokens": 5000}])
def test_no_answer_is_longer_than_the_context_by_default(own: dict[str, int]) -> None:
    assert defaults_of(5000, **own).max_new_tokens == 4096


def test_the_models_own_fewest_tokens_are_never_more_than_the_most_that_a_request_may_have() -> None:
    defaults = defaults_of(512, min_new_tokens=600)
    assert defaults.min_new_tokens == 512
    for config, expected in (({}, 512), ({"max_new_tokens": 5}, 5), ({"max_new_tokens": 5, "min_new_tokens": 9}, 9)):
        resolved = to_sampling_params(generation_pb2.GenerationConfig(**config), defaults)  # type: ignore[arg-type]
        assert resolved.min_new_tokens == expected


def call(tool: str, call_id: str) -> Message:
    return Message(role=ROLE_ASSISTANT, tool_calls=[ToolCall(id=call_id, name=tool, arguments="{}")])


def names_told(*messages: Message) -> list[str | None]:
    return [message.get("name") for message in to_template_messages(messages)]


def test_a_result_has_the_name_of_the_call_before_it_also_where_ids_are_used_again() -> None:
    first, second = (Message(role=ROLE_TOOL, tool_call_id="call_0") for _ in range(2))
    assert names_told(call("get_time", "call_0"), first, call("get_weather", "call_0"), second) == [
        None, "get_time", None, "get_weather"
    ]  # fmt: skip


def test_a_call_without_an_id_names_nobody() -> None:
    messages = [Message(role=ROLE_USER), call("get_time", ""), Message(role=ROLE_TOOL), Message(role=ROLE_USER)]
    assert names_told(*messages) == [None] * 4


def test_whole_numbers_of_template_variables_are_ints_at_any_depth() -> None:
    request = CountTokensRequest()
    request.chat_template_kwargs.update({"a": [1, 2.5, {"b": -4}]})
    assert repr(to_template_kwargs(request)) == "{'a': [1, 2.5, {'b': -4}]}"

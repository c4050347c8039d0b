"""The served real model against the same model called directly."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from parley.v1 import chat_pb2, generation_pb2
from tests.support.requests import ask
from tests.support.served import ServedProcess

PROMPTS: list[tuple[tuple[str, ...], str | None]] = [
    (("What is the capital of France?",), None),
    (("What is the capital of France?",), "Answer like a pirate."),
    (("Give me a short introduction to large language models.",), None),
    (("Write a haiku about the sea.",), "You are a poet."),
    (("List three prime numbers.",), None),
    (("Translate 'good morning' into Spanish.",), "You are a translator."),
    (("Wie heißt die Hauptstadt von Österreich? 🙂",), None),
    (("用中文说你好。",), None),
    (("My name is Ada.", "Hello Ada!", "What is my name?"), None),
    (("I like tea.", "Tea is lovely.", "And coffee.", "Coffee too.", "Which did I name first?"), "Be brief."),
]


@pytest.mark.parametrize(("contents", "system"), PROMPTS)
def test_greedy_ids_equal_model_generate(
    served: ServedProcess, oracle: Any, contents: tuple[str, ...], system: str | None
) -> None:
    model, tokenizer = oracle
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()

    response = served.stub.Generate(ask(*contents, system=system, max_new_tokens=16), timeout=120)
    assert list(response.choices[0].token_ids) == expected
    assert response.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert response.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True).removesuffix(
        "\ufffd"
    )


@pytest.mark.parametrize("text", ["Repeat: 🎉🎊 👩‍🚀", "Repeat: e\u0301a\u0308 नमस्ते", "重复：你好，世界"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 7}])
def test_stream_deltas_concatenate_to_the_unary_answer(
    served: ServedProcess, oracle: Any, text: str, sampling: dict[str, Any]
) -> None:
    request = ask(text, max_new_tokens=16, **sampling)
    unary = served.stub.Generate(request, timeout=120).choices[0]
    responses = list(served.stub.GenerateStream(request, timeout=120))
    assert "".join(r.content for r in responses) == unary.message.content
    assert [i for r in responses for i in r.token_ids] == list(unary.token_ids)
    assert not responses[-1].content.endswith("\ufffd")
    assert len(responses) > 5


def test_the_model_ends_its_answer_by_itself(served: ServedProcess) -> None:
    response = served.stub.Generate(ask("Say hello.", max_new_tokens=200), timeout=120)
    assert response.choices[0].finish_reason == generation_pb2.FINISH_REASON_STOP


def test_a_seed_repeats_an_answer_and_another_changes_it(served: ServedProcess) -> None:
    def content(seed: int) -> str:
        request = ask("Tell me a story.", max_new_tokens=12, temperature=1.2, seed=seed)
        return str(served.stub.Generate(request, timeout=120).choices[0].message.content)

    assert content(1) == content(1) != content(2)


def test_continue_final_message_goes_on_where_the_message_ends(served: ServedProcess, oracle: Any) -> None:
    model, tokenizer = oracle
    messages = [{"role": "user", "content": "Count to ten."}, {"role": "assistant", "content": "One, two,"}]
    inputs = tokenizer.apply_chat_template(messages, continue_final_message=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    request = ask("Count to ten.", "One, two,", continue_final_message=True, max_new_tokens=12)
    assert list(served.stub.Generate(request, timeout=120).choices[0].token_ids) == expected


def test_two_clients_at_once_get_their_own_answers(served: ServedProcess) -> None:
    requests = [ask(f"What is {n} plus {n}?", max_new_tokens=8) for n in (2, 7)]
    alone = [served.stub.Generate(request, timeout=120).choices for request in requests]
    together = [served.stub.Generate.future(request, timeout=120) for request in requests]
    assert [list(future.result().choices) for future in together] == [list(choices) for choices in alone]


def test_get_model_tells_what_is_served(served: ServedProcess) -> None:
    model = served.stub.GetModel(chat_pb2.GetModelRequest(), timeout=20)
    assert model.model == "smollm2-135m-instruct"
    assert (model.max_context_tokens, model.vocab_size) == (8192, 49152)
    assert model.engine in ("batching", "generate")
    assert (model.dtype, model.device) == ("float32", "cpu")


def test_a_prompt_longer_than_the_context_is_refused(served: ServedProcess) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        served.stub.Generate(ask("word " * 9000), timeout=60)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT

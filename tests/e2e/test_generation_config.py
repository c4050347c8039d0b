"""Fields of GenerationConfig and resuming, over the wire, with the real model in float32 behind either engine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from parley.v1 import chat_pb2
from tests.support.requests import ask
from tests.support.served import ServedProcess

QUESTION = "Tell me a very short story about a fox 🦊."
SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "seed": 2**63 + 5}
PENALISED: dict[str, Any] = {
    "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {198: 2.0, 28: -100.0},
}  # fmt: skip


def whole(served: ServedProcess, request: chat_pb2.GenerateRequest) -> chat_pb2.GenerateResponse:
    response: chat_pb2.GenerateResponse = served.stub.Generate(request, timeout=120)
    return response


def prompt_of(tokenizer: Any, request: chat_pb2.GenerateRequest) -> list[int]:
    messages = [{"role": "user", "content": message.content} for message in request.messages]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def test_greedy_ids_with_penalties_and_biases_are_those_of_a_plain_loop(served: ServedProcess, oracle: Any) -> None:
    import torch

    model, tokenizer = oracle
    request = ask(QUESTION, max_new_tokens=12, ignore_eos=True, **PENALISED)
    prompt, ids = prompt_of(tokenizer, request), list[int]()
    while len(ids) < 12:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]]), logits_to_keep=1).logits[0, -1]
        for token_id, bias in PENALISED["logit_bias"].items():
            logits[token_id] += bias
        for token_id in {*prompt, *ids}:
            logits[token_id] *= 1.2 if logits[token_id] < 0 else 1 / 1.2
        for token_id, count in Counter(ids).items():
            logits[token_id] -= 1.0 + 0.5 * count
        ids.append(int(logits.argmax()))
    assert list(whole(served, request).choices[0].token_ids) == ids
    assert ids != list(whole(served, ask(QUESTION, max_new_tokens=12, ignore_eos=True)).choices[0].token_ids)


@pytest.mark.parametrize("fields", [{}, {**SAMPLED, **PENALISED}], ids=["greedy", "sampled"])
def test_logprobs_are_the_log_softmax_of_the_models_logits(
    served: ServedProcess, oracle: Any, fields: dict[str, Any]
) -> None:
    import torch

    model, tokenizer = oracle
    request = ask(QUESTION, max_new_tokens=12, top_logprobs=20, **fields)
    (choice,) = whole(served, request).choices
    prompt, ids = prompt_of(tokenizer, request), list(choice.token_ids)
    with torch.no_grad():
        raw = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    values, top_ids = raw.topk(20)
    assert [one.token_id for one in choice.logprobs] == ids
    assert [one.logprob for one in choice.logprobs] == pytest.approx(
        [float(raw[position, token_id]) for position, token_id in enumerate(ids)], abs=1e-3
    )
    for position, one in enumerate(choice.logprobs):
        assert [top.logprob for top in one.top] == pytest.approx(values[position].tolist(), abs=1e-3)
        assert one.top[0].token_id == top_ids[position, 0]
        assert {top.token_id for top in one.top[:10]} <= set(top_ids[position].tolist())
    assert b"".join(one.bytes for one in choice.logprobs).decode(errors="ignore").startswith(choice.message.content)


def test_the_same_seed_gives_the_same_answer_alone_and_among_neighbours(served: ServedProcess) -> None:
    requests = [ask(f"Name a river in {c}.", max_new_tokens=8, **{**SAMPLED, "seed": n})
                for n, c in enumerate(("France", "Spain", "Peru"))]  # fmt: skip
    alone = [whole(served, request).choices[0] for request in requests]
    neighbours = [served.stub.Generate.future(ask(f"Count to {n}.", max_new_tokens=4 + n, temperature=1), timeout=120)
                  for n in range(4)]  # fmt: skip
    together = [served.stub.Generate.future(request, timeout=120) for request in requests]
    assert [future.result().choices[0] for future in together] == alone
    assert all(future.result().choices for future in neighbours)


def test_choices_differ_and_the_first_is_the_single_answer(served: ServedProcess) -> None:
    request = ask(QUESTION, max_new_tokens=8, **SAMPLED)
    single = whole(served, request)
    request.generation_config.num_return_sequences = 4
    several = whole(served, request)
    assert several.choices[0] == single.choices[0]
    assert len({choice.message.content for choice in several.choices}) == 4
    assert several.usage.prompt_tokens == single.usage.prompt_tokens
    assert several.usage.completion_tokens == sum(len(choice.token_ids) for choice in several.choices)


@pytest.mark.parametrize("fields", [{}, {**SAMPLED, **PENALISED}], ids=["greedy", "sampled"])
def test_the_delivered_and_the_resumed_part_are_the_uncut_answer(served: ServedProcess, fields: dict[str, Any]) -> None:
    request = ask(QUESTION, max_new_tokens=12, min_new_tokens=3, top_logprobs=2, stop_strings=["fox ran"], **fields)
    uncut = list(served.stub.GenerateStream(request, timeout=120))
    ids = [token_id for response in uncut for token_id in response.token_ids]
    logprobs = [one.logprob for response in uncut for one in response.logprobs]
    num_ids = 0
    for number, response in enumerate(uncut, 1):
        num_ids += len(response.token_ids)
        if number % 4 != 1 and number != len(uncut):
            continue
        request.resume.token_ids[:] = ids[:num_ids]
        rest = list(served.stub.GenerateStream(request, timeout=120))
        assert [token_id for r in rest for token_id in r.token_ids] == ids[num_ids:]
        assert [one.logprob for r in rest for one in r.logprobs] == pytest.approx(logprobs[num_ids:], abs=1e-3)
        assert "".join(r.content for r in [*uncut[:number], *rest]) == "".join(r.content for r in uncut)
        assert (rest[-1].finish_reason, rest[-1].stop_string) == (uncut[-1].finish_reason, uncut[-1].stop_string)
        assert rest[-1].usage.completion_tokens == uncut[-1].usage.completion_tokens == len(ids)

"""Log-probabilities over the wire: one entry for each id of the same message, text and bytes of every token."""

from __future__ import annotations

import asyncio

import pytest

from parley.v1 import generation_pb2
from parleyd.generation import SamplingParams
from tests.integration.conftest import StartGateway
from tests.support import scripted_worker, tiny_tokenizer
from tests.support.gateway import GatewayThread
from tests.support.requests import ask


def expected(token_id: int, num_top: int) -> generation_pb2.TokenLogprob:
    def fields(one: int, logprob: float) -> dict[str, object]:
        data = bytes([one]) if one < tiny_tokenizer.NUM_BYTES else tiny_tokenizer.IM_END.encode()
        return {"token_id": one, "token": data.decode(errors="replace"), "bytes": data, "logprob": logprob}

    scripted = scripted_worker.logprob(token_id, SamplingParams(max_new_tokens=1, logprobs=True, top_logprobs=num_top))
    top = [generation_pb2.TopLogprob(**fields(*one)) for one in scripted.top]  # type: ignore[arg-type]
    return generation_pb2.TokenLogprob(**fields(token_id, scripted.logprob), top=top)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fields", "num_top"), [({"logprobs": True}, 0), ({"top_logprobs": 20}, 20)])
def test_each_id_has_its_logprob_in_the_same_message(
    gateway: GatewayThread, fields: dict[str, object], num_top: int
) -> None:
    # The emoji's text waits for its last byte and "stop" may become a stop string: neither holds back a logprob.
    request = ask("ab😀 sto", stop_strings=["stop!"], **fields)
    (choice,) = gateway.stub.Generate(request, timeout=20).choices
    assert list(choice.token_ids) == [*"ab😀 sto".encode(), tiny_tokenizer.IM_END_ID]
    assert list(choice.logprobs) == [expected(token_id, num_top) for token_id in choice.token_ids]
    responses = list(gateway.stub.GenerateStream(request, timeout=20))
    assert all([one.token_id for one in r.logprobs] == list(r.token_ids) for r in responses)
    assert [one for r in responses for one in r.logprobs] == list(choice.logprobs)


def test_no_logprobs_unless_asked_for(gateway: GatewayThread) -> None:
    assert not gateway.stub.Generate(ask("hello", top_logprobs=0), timeout=20).choices[0].logprobs


def test_ids_after_a_stop_string_take_their_logprobs_with_them(gateway: GatewayThread) -> None:
    (choice,) = gateway.stub.Generate(ask("hello world", stop_strings=["lo"], logprobs=True), timeout=20).choices
    assert [one.token for one in choice.logprobs] == [*"hello"]


def test_a_slow_reader_loses_no_logprob(start_gateway: StartGateway) -> None:
    gateway = start_gateway()
    call = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=3000, top_logprobs=20), timeout=60)
    first = next(call)
    gateway.run(_worker_done(gateway))
    responses = [first, *call]
    assert len(responses) < 3000  # what had not been read was merged
    assert all([one.token_id for one in r.logprobs] == list(r.token_ids) for r in responses)
    assert sum(len(r.token_ids) for r in responses) == 3000


async def _worker_done(gateway: GatewayThread) -> None:
    while gateway.gateway.worker.num_open:
        await asyncio.sleep(0.01)

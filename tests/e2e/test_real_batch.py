"""GenerateBatch with the real model."""

from __future__ import annotations

import pytest

from parley.v1 import chat_pb2
from tests.support.requests import ask
from tests.support.served import ServedProcess

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("served", ["batching"], indirect=True)
def test_a_batch_answers_as_single_calls_do_and_duplicates_share_their_prompt(served: ServedProcess) -> None:
    long = "Tell me more about the river and the towns that it flows through, from its source to the sea. " * 12
    requests = [ask(text, max_new_tokens=8, do_sample=False) for text in (long, "Name a river.", long, long)]
    call = served.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=requests), timeout=120)
    answers = {outcome.index: outcome.response for outcome in call}
    alone = [served.stub.Generate(request, timeout=120).choices[0] for request in requests]
    assert [answers[i].choices[0] for i in range(4)] == alone
    assert max(answers[i].usage.cached_prompt_tokens for i in (0, 2, 3)) > 200

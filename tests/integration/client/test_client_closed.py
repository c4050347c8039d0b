"""A client that was closed tells so, whatever is called and whenever it was closed."""

from __future__ import annotations

import grpc
import pytest

from parley.v1 import chat_pb2
from parley_client import Cancelled, Client, user

QUESTION = [user("Hello?")]


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("chat", [QUESTION]),
        ("stream", [QUESTION]),
        ("generate_batch", [[QUESTION]]),
        ("count_tokens", [QUESTION]),
        ("model_info", []),
        ("health", []),
        ("wait_until_ready", []),
    ],
)
def test_every_call_of_a_closed_client_raises_cancelled(client, method, args):
    client.close()
    with pytest.raises(Cancelled, match="the client was closed"):
        list(getattr(client, method)(*args))


@pytest.mark.parametrize("method", ["chat", "stream"])
def test_a_client_that_is_closed_just_before_a_call_is_made_again_raises_cancelled(server, method):
    def break_off(request, context):
        yield chat_pb2.GenerateStreamResponse(content="Hello", token_ids=[1], request_id="request-1")
        context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    server.script["GenerateStream"] = break_off
    server.script["Generate"] = lambda request, context: server.fails(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY")

    def api_key():  # is asked for between the pause and the next call
        if server.requests:
            client.close()
        return "key"

    client = Client(server.target, api_key=api_key, insecure=True, max_attempts=1)
    with pytest.raises(Cancelled, match="the client was closed"):
        list(getattr(client, method)(QUESTION))
    assert len(server.requests) == 1

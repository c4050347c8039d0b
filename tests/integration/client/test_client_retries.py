"""A call is tried again while the server is unavailable, but never once a part of the answer has arrived."""

from __future__ import annotations

import grpc
import pytest

from parley_client import ConnectionFailed, NotReady, ParleyError, user

QUESTION = [user("Hello?")]
METHODS = pytest.mark.parametrize("method", ["chat", "stream"])


def ask(client, method):
    answer = getattr(client, method)(QUESTION)
    return "".join(str(piece) for piece in answer) if method == "stream" else answer.content


@pytest.fixture
def refuse_first(server):
    """The server refuses the first `num_refusals` calls with `code` and answers "Hello there" from then on."""

    def script(num_refusals, code=grpc.StatusCode.UNAVAILABLE):
        server.says("Hello", " there")

        def wrap(answer):
            def refuse_or_answer(request, context):
                if len(server.requests) <= num_refusals:
                    context.abort(code, "restarting")
                return answer(request, context)

            return refuse_or_answer

        for name in ("Generate", "GenerateStream"):
            server.script[name] = wrap(server.script[name])

    return script


@METHODS
def test_a_call_outlasts_two_refusals_of_an_unavailable_server(client, server, refuse_first, method):
    refuse_first(2)
    assert ask(client, method) == "Hello there"
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


@METHODS
def test_retries_end(client, server, refuse_first, method):
    refuse_first(100)
    with pytest.raises(ConnectionFailed, match="restarting"):
        ask(client, method)
    assert len(server.requests) == 4


@METHODS
def test_one_attempt_is_no_retry(connect, server, refuse_first, method):
    refuse_first(1)
    with connect(server.target, max_attempts=1) as client, pytest.raises(ConnectionFailed):
        ask(client, method)
    assert len(server.requests) == 1


@METHODS
def test_retries_keep_the_reason(client, server, method):
    server.script["Generate"] = server.script["GenerateStream"] = lambda request, context: server.fails(
        context, grpc.StatusCode.UNAVAILABLE, "NOT_READY"
    )
    with pytest.raises(NotReady):
        ask(client, method)
    assert len(server.requests) == 4


@METHODS
@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)]
)
def test_no_other_status_is_tried_again(client, server, refuse_first, method, code):
    refuse_first(1, code)
    with pytest.raises(ParleyError):
        ask(client, method)
    assert len(server.requests) == 1


def test_health_is_about_now_and_not_tried_again(client, server):
    server.script["Check"] = lambda request, context: context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
    with pytest.raises(ConnectionFailed):
        client.health()
    assert len(server.requests) == 1


@pytest.mark.parametrize("max_attempts", [0, 6])
def test_impossible_numbers_of_attempts_are_refused(connect, max_attempts):
    with pytest.raises(ValueError, match="max_attempts must be 1 to 5"):
        connect("localhost:1", max_attempts=max_attempts)

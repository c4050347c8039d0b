"""Every way a call can fail comes out as its own exception."""

from __future__ import annotations

from concurrent import futures

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

import parley_client
from parley.v1 import chat_pb2, errors_pb2, generation_pb2
from parley_client import (
    Cancelled,
    ConnectionFailed,
    IncompleteStream,
    Internal,
    InvalidRequest,
    MessageTooLarge,
    ModelNotFound,
    ParleyError,
    PromptTooLong,
    QueueFull,
    Unavailable,
    Unimplemented,
    Unsupported,
    Violation,
    user,
)

QUESTION = [user("Hello?")]
METHODS = pytest.mark.parametrize("method", ["chat", "stream"])

# reason: its gRPC code and exception, as the contract has them.
REASONS = {
    "INVALID_REQUEST": (grpc.StatusCode.INVALID_ARGUMENT, parley_client.InvalidRequest),
    "PROMPT_TOO_LONG": (grpc.StatusCode.INVALID_ARGUMENT, parley_client.PromptTooLong),
    "MODEL_NOT_FOUND": (grpc.StatusCode.NOT_FOUND, parley_client.ModelNotFound),
    "QUEUE_FULL": (grpc.StatusCode.RESOURCE_EXHAUSTED, parley_client.QueueFull),
    "DEADLINE_EXCEEDED": (grpc.StatusCode.DEADLINE_EXCEEDED, parley_client.DeadlineExceeded),
    "NOT_READY": (grpc.StatusCode.UNAVAILABLE, parley_client.NotReady),
    "DRAINING": (grpc.StatusCode.UNAVAILABLE, parley_client.Draining),
    "WORKER_LOST": (grpc.StatusCode.UNAVAILABLE, parley_client.WorkerLost),
    "UNSUPPORTED": (grpc.StatusCode.FAILED_PRECONDITION, parley_client.Unsupported),
    "UNAUTHENTICATED": (grpc.StatusCode.UNAUTHENTICATED, parley_client.Unauthenticated),
    "PERMISSION_DENIED": (grpc.StatusCode.PERMISSION_DENIED, parley_client.PermissionDenied),
    "INTERNAL": (grpc.StatusCode.INTERNAL, parley_client.Internal),
}


def ask(client, method):
    """Calls `method` to the end of its answer."""
    answer = getattr(client, method)(QUESTION)
    return list(answer) if method == "stream" else answer


@pytest.fixture
def fail(connect, server):
    """Asks, without retries, a server that fails as told; returns the exception."""

    def ask_in_vain(method, *args, **kwargs):
        def refuse(request, context):
            server.fails(context, *args, **kwargs)

        server.script["Generate"] = server.script["GenerateStream"] = refuse
        with connect(server.target, max_attempts=1, max_resumes=0) as client, pytest.raises(ParleyError) as caught:
            ask(client, method)
        assert isinstance(caught.value.__cause__, grpc.RpcError)
        return caught.value

    return ask_in_vain


def test_every_reason_of_the_contract_is_known():
    contract = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert REASONS.keys() == contract - {"UNSPECIFIED"}


@METHODS
@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_comes_out_as_its_own_exception(fail, method, reason):
    code, exception = REASONS[reason]
    error = fail(method, code, reason, message="it failed", metadata={"fact": "1"})
    assert type(error) is exception
    assert (error.code, error.reason, error.message, str(error)) == (code, reason, "it failed", "it failed")
    assert (error.metadata, error.request_id) == ({"fact": "1"}, "request-1")
    assert (error.violations, error.retry_after_s) == ((), None)


@METHODS
def test_an_invalid_request_names_every_violation(fail, method):
    violation = error_details_pb2.BadRequest.FieldViolation
    bad_request = error_details_pb2.BadRequest(
        field_violations=[
            violation(field="messages[1].role", description="is unset"),
            violation(field="generation_config.top_p", description="is 2"),
        ]
    )
    error = fail(method, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", details=(bad_request,))
    assert isinstance(error, InvalidRequest)
    assert error.violations == (
        Violation("messages[1].role", "is unset"),
        Violation("generation_config.top_p", "is 2"),
    )


@METHODS
def test_a_full_queue_tells_when_to_come_back(fail, method):
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    error = fail(method, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", details=(retry,))
    assert isinstance(error, QueueFull)
    assert error.retry_after_s == 1.5


@METHODS
def test_facts_of_a_reason_are_attributes(fail, method):
    numbers = {"prompt_tokens": "9000", "max_context_tokens": "8192"}
    too_long = fail(method, grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG", metadata=numbers)
    assert isinstance(too_long, PromptTooLong)
    assert (too_long.prompt_tokens, too_long.max_context_tokens) == (9000, 8192)
    not_found = fail(method, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", metadata={"served": "one,two"})
    assert isinstance(not_found, ModelNotFound)
    assert not_found.served == ("one", "two")
    unsupported = fail(method, grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED", metadata={"field": "tools"})
    assert isinstance(unsupported, Unsupported)
    assert unsupported.field == "tools"


@METHODS
def test_a_reason_newer_than_this_client_passes_for_no_other(fail, method):
    error = fail(method, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_USED_UP")
    assert (type(error), error.reason) == (ParleyError, "QUOTA_USED_UP")
    assert type(fail(method, grpc.StatusCode.UNAVAILABLE, "MOVED")) is Unavailable


@METHODS
def test_reasons_of_other_domains_are_not_ours(fail, method):
    error = fail(method, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", domain="proxy.example")
    assert (type(error), error.reason) == (MessageTooLarge, None)


@METHODS
@pytest.mark.parametrize(
    ("code", "exception"),
    [
        (grpc.StatusCode.UNAVAILABLE, ConnectionFailed),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.INTERNAL, Internal),
        (grpc.StatusCode.UNIMPLEMENTED, Unimplemented),
        (grpc.StatusCode.DATA_LOSS, ParleyError),
    ],
)
def test_statuses_without_details_are_told_apart_by_their_code(connect, server, method, code, exception):
    server.script["Generate"] = server.script["GenerateStream"] = lambda _, context: context.abort(code, "no details")
    with connect(server.target, max_attempts=1, max_resumes=0) as client, pytest.raises(ParleyError) as caught:
        ask(client, method)
    assert (type(caught.value), caught.value.code, caught.value.reason) == (exception, code, None)
    assert "no details" in caught.value.message


@METHODS
def test_mangled_details_do_not_hide_the_status(client, server, method):
    def refuse(request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "not here")

    server.script["Generate"] = server.script["GenerateStream"] = refuse
    with pytest.raises(ParleyError, match="not here") as caught:
        ask(client, method)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


@METHODS
def test_a_request_larger_than_the_server_takes_is_message_too_large(client, method):
    with pytest.raises(MessageTooLarge):
        list(getattr(client, method)([user("x" * (2 << 20))]))


@METHODS
def test_a_server_that_is_not_there_is_connection_failed(connect, method):
    with connect("localhost:1") as client, pytest.raises(ConnectionFailed, match="connection failed"):
        ask(client, method)


@METHODS
def test_a_server_of_another_kind_is_unimplemented(connect, method):
    with futures.ThreadPoolExecutor() as pool:
        other = grpc.server(pool)
        port = other.add_insecure_port("127.0.0.1:0")
        other.start()
        with connect(f"127.0.0.1:{port}") as client, pytest.raises(Unimplemented):
            ask(client, method)
        other.stop(None).wait()


@pytest.mark.parametrize("answers", [[], [b"\xff"]], ids=["none", "unreadable"])
@pytest.mark.parametrize("method", ["chat", "stream", "generate_batch", "count_tokens", "model_info", "health"])
def test_an_answer_that_is_missing_or_cannot_be_read_is_internal(connect, method, answers):
    class Strange(grpc.GenericRpcHandler):
        def service(self, handler_call_details):
            return grpc.unary_stream_rpc_method_handler(lambda request, context: iter(answers))

    arguments = {"generate_batch": [[QUESTION]], "model_info": [], "health": []}.get(method, [QUESTION])
    with futures.ThreadPoolExecutor() as pool:
        strange = grpc.server(pool, [Strange()])
        port = strange.add_insecure_port("127.0.0.1:0")
        strange.start()
        with connect(f"127.0.0.1:{port}") as client, pytest.raises(ParleyError) as caught:
            answer = getattr(client, method)(*arguments)
            if method in ("stream", "generate_batch"):
                list(answer)
        strange.stop(None).wait()
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INTERNAL, None)


def test_an_error_in_mid_stream_follows_the_pieces_before_it(client, server):
    def break_off(request, context):
        context.send_initial_metadata((("x-request-id", "request-2"),))
        yield chat_pb2.GenerateStreamResponse(content="Hel", token_ids=[1], request_id="request-2")
        context.abort(grpc.StatusCode.INTERNAL, "broken")

    server.script["GenerateStream"] = break_off
    stream = client.stream(QUESTION)
    assert next(stream).content == "Hel"
    with pytest.raises(Internal, match="broken") as caught:
        next(stream)
    assert caught.value.request_id == "request-2"
    assert (stream.reply.content, stream.reply.finish_reason) == ("Hel", None)


def test_a_failed_stream_tells_the_same_error_to_whoever_goes_on(client, server):
    server.script["GenerateStream"] = lambda request, context: server.fails(
        context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"
    )
    stream = client.stream(QUESTION)
    for _ in range(3):
        with pytest.raises(InvalidRequest, match="as scripted"):
            next(stream)


@pytest.mark.parametrize("num_finished", [0, 1])
def test_a_stream_that_ends_without_finish_reason_is_an_error(client, server, num_finished):
    def end_early(request, context):
        yield chat_pb2.GenerateStreamResponse(content="Hel", request_id="request-3")
        for index in range(num_finished):
            yield chat_pb2.GenerateStreamResponse(index=index, finish_reason=generation_pb2.FINISH_REASON_STOP)

    server.script["GenerateStream"] = end_early
    stream = client.stream(QUESTION, num_return_sequences=2)
    with pytest.raises(IncompleteStream) as caught:
        list(stream)
    assert caught.value.request_id == "request-3"
    assert stream.reply.content == "Hel"


def test_a_stream_without_any_message_is_an_error(client, server):
    server.script["GenerateStream"] = lambda request, context: iter(())
    with pytest.raises(IncompleteStream):
        list(client.stream(QUESTION))

"""API keys and tokens on real calls: every RPC is closed, what a key may do, revocation, limits, and what logs hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import h2.events
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from parley.v1 import chat_pb2
from parleyd.config import SecuritySettings
from parleyd.security.new_key import entry_for, new_key
from tests.integration.conftest import StartGateway
from tests.support import tokens
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.raw_http2 import RawConnection
from tests.support.requests import ask, reason_of, retry_delay_of

KEY, LIMITED = new_key(), new_key()
INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNAUTHENTICATED = "3", "8", "16"
RPCS = chat_pb2.DESCRIPTOR.services_by_name["ChatService"].methods

Start = Callable[..., GatewayThread]


def bearer(credential: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {credential}"),)


def write_keys(folder: Path, *entries: str) -> str:
    """Replaces the file at once, as a careful operator does."""
    (folder / "keys.new").write_text("".join(entries))
    (folder / "keys.new").rename(folder / "keys.toml")
    return str(folder / "keys.toml")


@pytest.fixture
def start(start_gateway: StartGateway, tmp_path: Path) -> Start:
    def start(rules: str = "", *, jwks: bool = False, **security: Any) -> GatewayThread:
        path = write_keys(tmp_path, entry_for("full", KEY), "priorities = true\n", entry_for("limited", LIMITED), rules)
        if jwks:
            (tmp_path / "jwks.json").write_text(tokens.key_set())
            about = {"jwt_issuer": tokens.ISSUER, "jwt_audience": tokens.AUDIENCE}
            security |= {"jwks": str(tmp_path / "jwks.json"), **about}
        return start_gateway(max_running=4, security=SecuritySettings(api_keys=path, **security))

    return start


def refusal(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        result = call()
        if isinstance(result, Iterator):
            next(result)
    return raised.value


def forgeries() -> list[str]:
    """Tokens that must open nothing, each with one thing wrong."""
    header, _, signature = tokens.token().split(".")
    return [
        tokens.token(exp=int(time.time()) - 60),
        tokens.token(nbf=int(time.time()) + 3600),
        tokens.token(iss="https://evil.example"),
        tokens.token(aud="another"),
        tokens.token(kid="unknown"),
        tokens.token(tokens.EC_KEY, "ES256", "rsa"),
        tokens.forged({"alg": "none", "kid": "rsa"}, None),
        tokens.forged({"alg": "HS256", "kid": "rsa"}, tokens.public_pem()),
        f"{header}.{tokens.token(sub='root').split('.')[1]}.{signature}",
        "Z2FyYmFnZQ.Z2FyYmFnZQ.Z2FyYmFnZQ",
    ]


def test_every_rpc_is_closed_without_credentials_and_says_no_more_than_that(start: Start) -> None:
    gateway = start(jwks=True)
    wrong = [
        (),
        bearer(new_key()),
        bearer(KEY[:-1]),
        bearer(""),
        bearer("a.b.c"),
        *map(bearer, forgeries()),
        (("authorization", KEY),),
        (("authorization", f"Basic {KEY}"),),
        (("x-api-key", KEY),),
        (*bearer(KEY), *bearer(KEY)),
        bearer("x" * 7_000),
    ]
    assert len(RPCS) >= 5
    answers = set()
    for rpc in RPCS:
        request = rpc.input_type._concrete_class()
        for metadata in wrong:
            method = getattr(gateway.stub, rpc.name)
            error: Any = refusal(lambda: method(request, timeout=10, metadata=metadata))  # noqa: B023
            assert reason_of(error) == "UNAUTHENTICATED"
            answers.add((error.code(), error.details()))
    assert answers == {(grpc.StatusCode.UNAUTHENTICATED, "no credentials, or wrong ones")}
    registry, refused = gateway.gateway.observer.metrics.registry, {"reason": "UNAUTHENTICATED"}
    num_refused = len(RPCS) * len(wrong)
    eventually(lambda: registry.get_sample_value("parley_rejected_requests_total", refused) == num_refused)
    gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(tokens.token()))


def test_keys_and_tokens_open_every_rpc(start: Start) -> None:
    gateway = start(jwks=True)
    valid = (KEY, LIMITED, tokens.token(), tokens.token(tokens.EC_KEY, "ES256", "ec"))
    for credential in valid:
        for rpc in RPCS:
            try:
                answer = getattr(gateway.stub, rpc.name)(
                    rpc.input_type._concrete_class(), timeout=10, metadata=bearer(credential)
                )
                if isinstance(answer, grpc.Call):
                    next(answer)
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
        assert gateway.stub.Generate(ask("Hi"), metadata=bearer(credential)).choices[0].message.content == "Hi"


def test_the_scheme_may_be_written_in_any_case(start: Start) -> None:
    gateway = start()
    gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=(("authorization", f"bearer {KEY}"),))


def test_what_a_stranger_sends_is_not_decoded(start: Start) -> None:
    gateway = start()
    send = gateway.channel.unary_unary("/parley.v1.ChatService/Generate")
    assert reason_of(refusal(lambda: send(b"\xff\xff\xff", timeout=10))) == "UNAUTHENTICATED"
    assert reason_of(refusal(lambda: send(b"\xff\xff\xff", timeout=10, metadata=bearer(KEY)))) == "INVALID_REQUEST"


def test_health_is_open_and_reflection_is_off_unless_asked_for(start: Start) -> None:
    gateway = start()
    assert gateway.health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    assert list_services(gateway, bearer(KEY)) is grpc.StatusCode.UNIMPLEMENTED


def test_reflection_that_was_asked_for_wants_credentials_too(start: Start) -> None:
    gateway = start(reflection=True)
    assert list_services(gateway, ()) is grpc.StatusCode.UNAUTHENTICATED
    assert list_services(gateway, bearer(KEY)) is grpc.StatusCode.OK


def test_reflection_can_be_off_where_nothing_is_asked_for(start_gateway: StartGateway) -> None:
    gateway = start_gateway(security=SecuritySettings(reflection=False))
    assert list_services(gateway, ()) is grpc.StatusCode.UNIMPLEMENTED


def list_services(gateway: GatewayThread, metadata: Any) -> grpc.StatusCode:
    stub = reflection_pb2_grpc.ServerReflectionStub(gateway.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]), timeout=10, metadata=metadata)
    try:
        list(call)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_a_key_may_be_confined_to_some_rpcs(start: Start) -> None:
    gateway = start('rpcs = ["CountTokens", "GetModel"]\n')
    gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(LIMITED))
    error: Any = refusal(lambda: gateway.stub.GenerateStream(ask("Hi"), timeout=10, metadata=bearer(LIMITED)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    gateway.stub.Generate(ask("Hi"), metadata=bearer(KEY))


def test_priorities_need_permission(start: Start, gateway: GatewayThread) -> None:
    secured = start(jwks=True)
    secured.stub.Generate(ask("Hi", priority=5), metadata=bearer(KEY))
    secured.stub.Generate(ask("Hi"), metadata=bearer(LIMITED))
    for credential in (LIMITED, tokens.token()):
        error: Any = refusal(lambda: secured.stub.Generate(ask("Hi", priority=-1), metadata=bearer(credential)))  # noqa: B023
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    gateway.stub.Generate(ask("Hi", priority=5))  # nobody is asked for credentials here


def test_in_a_batch_a_priority_without_permission_fails_its_item_alone(start: Start) -> None:
    gateway = start("requests_per_minute = 2\n")
    batch = chat_pb2.GenerateBatchRequest(requests=[ask("Hi", priority=1), ask("Hi")])
    outcomes = {outcome.index: outcome for outcome in gateway.stub.GenerateBatch(batch, metadata=bearer(LIMITED))}
    assert outcomes[0].error.code == grpc.StatusCode.PERMISSION_DENIED.value[0]
    assert outcomes[1].response.choices[0].message.content == "Hi"
    error: Any = refusal(lambda: gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(LIMITED)))
    assert reason_of(error) == "QUEUE_FULL"  # both of the batch counted
    outcomes = {outcome.index: outcome for outcome in gateway.stub.GenerateBatch(batch, metadata=bearer(KEY))}
    assert {outcome.WhichOneof("result") for outcome in outcomes.values()} == {"response"}


def test_a_batch_of_too_many_counts_as_one_call_and_the_largest_in_full(start: Start) -> None:
    gateway = start("requests_per_minute = 4\n")
    batch = chat_pb2.GenerateBatchRequest(requests=[ask("Hi", temperature=99)] * 1025)
    error: Any = refusal(lambda: list(gateway.stub.GenerateBatch(batch, metadata=bearer(LIMITED))))
    assert reason_of(error) == "INVALID_REQUEST"
    gateway.stub.Generate(ask("Hi"), metadata=bearer(LIMITED))
    del batch.requests[-1]
    assert len(list(gateway.stub.GenerateBatch(batch, metadata=bearer(LIMITED)))) == 1024
    error = refusal(lambda: gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(LIMITED)))
    assert reason_of(error) == "QUEUE_FULL"


def test_limits_are_each_clients_own(start: Start) -> None:
    gateway = start("max_open_calls = 1\nrequests_per_minute = 3\n")
    stream = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=4000), timeout=30, metadata=bearer(LIMITED))
    next(stream)
    error: Any = refusal(lambda: gateway.stub.Generate(ask("Hi"), timeout=10, metadata=bearer(LIMITED)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert retry_delay_of(error) == 1
    gateway.stub.Generate(ask("Hi"), timeout=10, metadata=bearer(KEY))
    stream.cancel()
    gateway.wait_idle()
    for _ in range(2):
        gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(LIMITED))
    error = refusal(lambda: gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(LIMITED)))
    assert reason_of(error) == "QUEUE_FULL"
    assert 0 < retry_delay_of(error) <= 20
    gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(KEY))


def test_without_credentials_limits_go_by_address(start_gateway: StartGateway) -> None:
    gateway = start_gateway(security=SecuritySettings(requests_per_minute=1))
    gateway.stub.GetModel(chat_pb2.GetModelRequest())
    with gateway.connect() as another_connection:
        send = another_connection.unary_unary("/parley.v1.ChatService/GetModel")
        assert reason_of(refusal(lambda: send(b"", timeout=10))) == "QUEUE_FULL"


def until_refused(call: Callable[[], Any], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            call()
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            return
        time.sleep(0.05)
    raise AssertionError("still let in")


def test_a_key_taken_out_of_the_file_opens_no_more_calls(start: Start, tmp_path: Path) -> None:
    gateway = start()
    stream = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=4000), timeout=30, metadata=bearer(KEY))
    next(stream)
    fresh = new_key()
    write_keys(tmp_path, entry_for("fresh", fresh))
    until_refused(lambda: gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(KEY)))
    gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(fresh))
    next(stream)  # open calls go on
    stream.cancel()
    gateway.wait_idle()


def test_a_broken_key_file_is_logged_and_changes_nothing(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = start()
    write_keys(tmp_path, "[[key")
    deadline = time.monotonic() + 10
    while "what was read before stays in use" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(KEY))


def test_a_key_taken_out_of_the_key_set_signs_no_more(start: Start, tmp_path: Path) -> None:
    gateway = start(jwks=True)
    token = tokens.token()
    gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(token))
    (tmp_path / "jwks.json").write_text(tokens.key_set(tokens.jwk(tokens.EC_KEY, kid="ec")))
    until_refused(lambda: gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(token)))


@pytest.mark.parametrize(
    "authorization",
    ["Bearer é".encode(), b"Bearer \xff\xfe", b"Bearer \x00", b"Bearer " + b"x" * 7_000, b"Bearer a.b.c", b""],
)
def test_odd_credentials_let_nobody_in_and_hurt_nobody(start: Start, authorization: bytes) -> None:
    gateway = start()
    status = call_raw(gateway.target, authorization)
    assert status == UNAUTHENTICATED
    assert call_raw(gateway.target, f"Bearer {KEY}".encode()) == "0"
    gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(KEY))


@pytest.mark.parametrize("path", ["/parley.v1.ChatService/Generate", "/grpc.health.v1.Health/Check"])
def test_metadata_beyond_what_grpc_takes_is_refused_before_the_message(start: Start, path: str) -> None:
    gateway = start()
    extra = {"authorization": f"Bearer {KEY}"} | {f"x-{number}": "x" * 1000 for number in range(20)}
    # It acknowledges no settings: gRPC then holds it to no limit.
    with RawConnection(gateway.target, answers_pings=False) as connection:
        stream = connection.begin(extra=extra, path=path)
        connection.flush()
        assert connection.status(stream) == INVALID_ARGUMENT
    with RawConnection(gateway.target) as connection:
        connection.receive_for(5, until=lambda: connection.saw(h2.events.SettingsAcknowledged))
        stream = connection.begin(extra=extra, path=path)
        connection.flush()
        assert connection.status(stream) == RESOURCE_EXHAUSTED  # gRPC's own limit
    gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(KEY))


def call_raw(target: str, authorization: bytes) -> str | None:
    with RawConnection(target) as connection:
        connection.call("GetModel", chat_pb2.GetModelRequest(), {"authorization": authorization})
        return connection.status()


@pytest.mark.parametrize("level", ["info", "debug"])
def test_no_prompt_answer_or_secret_is_logged(
    start: Start, level: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(level.upper())
    gateway = start(jwks=True)
    marker, token = "xyzzy-marker", tokens.token()
    stub, metadata = gateway.stub, bearer(KEY)
    assert stub.Generate(ask(marker), metadata=metadata).choices[0].message.content == marker
    list(stub.GenerateStream(ask(marker, system=marker), metadata=bearer(token)))
    wrong = new_key()
    refusal(lambda: stub.Generate(ask(marker), metadata=bearer(wrong)))
    refusal(lambda: stub.Generate(ask(marker, temperature=99), metadata=metadata))
    refusal(lambda: stub.Generate(ask("!fail", system=marker), metadata=metadata))
    refusal(lambda: stub.Generate(ask("x" * 5000 + marker), metadata=metadata))
    gateway.wait_idle()
    gateway.stop()
    written = caplog.text + "".join(capfd.readouterr())
    assert "unknown key" in written
    assert "Generate OK" in written
    for secret in (marker, KEY, wrong, token, token.split(".")[2]):
        assert secret not in written

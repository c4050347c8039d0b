"""Fixtures of the integration tests: the real gateway over loopback, with a worker process that answers by script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.requests import ask
from tests.support.tiny_tokenizer import write_tiny_tokenizer
from tests.support.tools import Families

StartGateway = Callable[..., GatewayThread]
FOREVER = ask("!forever", max_new_tokens=4000)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="session")
def shared_gateway(tokenizer_folder: Path) -> Iterator[GatewayThread]:
    """One gateway for all tests that leave it as they found it."""
    # Slow enough that a stream of thousands of tokens, of which a slow reader gets many in a message, is not over while
    # a test still holds it.
    command = scripted_command(tokenizer_folder, "--step-delay", "0.001")
    with GatewayThread(scripted_settings(max_running=4), command) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: GatewayThread) -> Iterator[GatewayThread]:
    """The shared gateway, found idle and left idle: no request, call or slot survives a test."""
    shared_gateway.wait_idle()
    yield shared_gateway
    shared_gateway.wait_idle()


@pytest.fixture
def start_gateway(tokenizer_folder: Path) -> Iterator[StartGateway]:
    """Starts gateways of a test's own; `worker` are the scripted worker's arguments, `folder` its tokenizer's."""
    with ExitStack() as stack:

        def start(
            *,
            worker: tuple[str, ...] = (),
            folder: Path = tokenizer_folder,
            wait_ready: bool = True,
            credentials: grpc.ChannelCredentials | None = None,
            **settings: Any,
        ) -> GatewayThread:
            command = scripted_command(folder, *worker)
            gateway = GatewayThread(
                scripted_settings(**settings), command, wait_ready=wait_ready, credentials=credentials
            )
            return stack.enter_context(gateway)

        yield start


@pytest.fixture
def single(start_gateway: StartGateway) -> Iterator[GatewayThread]:
    """A gateway whose engine takes one request at a time, slowly; it must end idle."""
    gateway = start_gateway(worker=("--step-delay", "0.005"), max_running=1, max_queue=2)
    yield gateway
    gateway.wait_idle()


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Families]:
    with ExitStack() as stack:
        yield Families(tmp_path_factory.mktemp("families"), stack)


def assert_answers(gateway: GatewayThread) -> None:
    """A request of one's own comes through."""
    assert gateway.stub.Generate(ask("ok"), timeout=30).choices[0].message.content == "ok"


@pytest.fixture
def the_next_good_request_succeeds(gateway: GatewayThread) -> Any:
    yield
    assert gateway.stub.Generate(ask("still here"), timeout=20).choices[0].message.content == "still here"

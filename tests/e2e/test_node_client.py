"""clients/node: it builds, its own tests pass, and so do those against a real service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.npm import CLIENTS, build, npm
from tests.support.secured import secured_gateway
from tests.support.served import ServedProcess

NODE_CLIENT = CLIENTS / "node"

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def built() -> None:
    build(NODE_CLIENT)


@pytest.mark.usefixtures("built")
def test_the_client_alone() -> None:
    npm(NODE_CLIENT, "test")


@pytest.mark.usefixtures("built")
def test_the_client_shows_its_certificate_and_its_key(tmp_path: Path) -> None:
    with secured_gateway(tmp_path) as gateway:
        npm(
            NODE_CLIENT,
            "run",
            "test:secured",
            PARLEY_TARGET=gateway.target,
            PARLEY_CA=gateway.ca,
            PARLEY_CERT=gateway.cert,
            PARLEY_KEY=gateway.key,
            PARLEY_API_KEY_FILE=gateway.api_key,
        )


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("served", ["batching"], indirect=True)
@pytest.mark.parametrize("script", ["test:live", "example"])
def test_the_client_and_a_real_service(served: ServedProcess, script: str) -> None:
    npm(NODE_CLIENT, "run", script, PARLEY_TARGET=served.target)

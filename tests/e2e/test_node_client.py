"""clients/node: it builds, its own tests pass, and so do those against a real service."""

from __future__ import annotations

import pytest

from tests.support.npm import CLIENTS, build, npm
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
@pytest.mark.parametrize("served", ["batching"], indirect=True)
@pytest.mark.parametrize("script", ["test:live", "example"])
def test_the_client_and_a_real_service(served: ServedProcess, script: str) -> None:
    npm(NODE_CLIENT, "run", script, PARLEY_TARGET=served.target)

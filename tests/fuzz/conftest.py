"""How long to fuzz: FUZZ_SECONDS for the whole folder, 30 unless said otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.support.replica import Replica
from tests.support.tiny_tokenizer import write_tiny_tokenizer

SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))
# Of each of the tests that draw messages, which share the time.
_EXAMPLES_PER_SECOND = 11

settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=max(20, int(SECONDS * _EXAMPLES_PER_SECOND)),
    derandomize="FUZZ_SECONDS" not in os.environ,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)

# gRPC's codes for what is the client's doing, or nobody's.
CLIENT_CODES = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


@pytest.fixture(scope="session")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A replica as a process; it must survive, and give back the memory that it took."""
    replica = Replica(write_tiny_tokenizer(tmp_path_factory.mktemp("fuzz")), "--step-delay", "0")
    before = memory_of(replica)
    yield replica
    assert replica.process.poll() is None, "it died"
    print(f"\nmemory of the gateway: {before / 1e6:.0f} MB before, {memory_of(replica) / 1e6:.0f} MB after")
    replica.stop()


@pytest.fixture(scope="session")
def channel(replica: Replica) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(replica.address) as channel:
        yield channel


def memory_of(replica: Replica) -> int:
    """Resident bytes of the gateway process."""
    rss: int = psutil.Process(replica.process.pid).memory_info().rss
    return rss

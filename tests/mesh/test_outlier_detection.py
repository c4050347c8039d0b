"""What Envoy's outlier detection takes a replica out for, and what it does not."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from parley_client import Client, user
from tests.support.envoy import Envoy
from tests.support.gateway import GatewayThread
from tests.support.raw_http2 import RawConnection, grpc_message
from tests.support.replica import Replica
from tests.support.requests import ask

NUM_ASKERS = 4
# The replicas are checked once, at the start: what happens later is between two checks. Out for long enough to be seen,
# and no longer at the second time.
SELDOM_CHECKED = {
    "  interval: 1s\n          no_traffic_interval: 1s": "  interval: 90s\n          no_traffic_interval: 90s",
    "base_ejection_time: 2s": "base_ejection_time: 4s\n        max_ejection_time: 4s",
}


@pytest.fixture
def envoy_between_checks(replicas: list[Replica], tmp_path: Path) -> Iterator[Envoy]:
    """Envoy in front of `replicas`, for which all is well by its health checks, whatever happens."""
    with Envoy(tmp_path, [replica.address for replica in replicas], SELDOM_CHECKED) as envoy:
        yield envoy


class Askers:
    """Threads that ask on and on, and hold each answer against what it must be."""

    def __init__(self, target: str, pool: ThreadPoolExecutor) -> None:
        self._target = target
        self._counter = itertools.count()
        self._is_over = threading.Event()
        self.num_answers = 0
        self.futures: list[Future[None]] = [pool.submit(self._ask_on) for _ in range(NUM_ASKERS)]

    def stop(self) -> None:
        """Raises what any of them met with."""
        self._is_over.set()
        for future in self.futures:
            future.result(30)

    def wait_answers(self, number: int) -> None:
        """Waits for so many more of them."""
        goal = self.num_answers + number
        wait_until(lambda: self.num_answers >= goal or any(future.done() for future in self.futures))
        assert self.num_answers >= goal, [future.exception() for future in self.futures if future.done()]

    def _ask_on(self) -> None:
        with Client(self._target) as client:
            while not self._is_over.is_set():
                text = f"answer {next(self._counter)}"
                assert client.chat([user(text)], timeout=20).content == text
                self.num_answers += 1


@contextmanager
def asking(envoy: Envoy) -> Iterator[Askers]:
    with ThreadPoolExecutor(NUM_ASKERS) as pool:
        askers = Askers(envoy.target, pool)
        try:
            yield askers
        finally:
            askers.stop()


def wait_until(is_so: Callable[[], bool], patience_s: float = 15.0) -> None:
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_replica_that_dies_between_two_checks_is_left_alone_until_it_is_back(
    envoy_between_checks: Envoy, replicas: list[Replica]
) -> None:
    envoy, dead = envoy_between_checks, replicas[0]
    with asking(envoy) as askers:
        askers.wait_answers(10)
        dead.kill()
        wait_until(lambda: envoy.flags(dead.port) == {"failed_outlier_check"}, 5)
        askers.wait_answers(2 * NUM_ASKERS)  # those that were under way
        num_tried = envoy.replica_stat(dead.port, "rq_error")
        askers.wait_answers(10)
        assert envoy.replica_stat(dead.port, "rq_error") == num_tried
        assert envoy.flags(dead.port) == {"failed_outlier_check"}
        dead.start()
        envoy.wait_healthy(2)
        num_answered = envoy.replica_stat(dead.port, "rq_success")
        wait_until(lambda: envoy.replica_stat(dead.port, "rq_success") > num_answered + 5)
    assert envoy.num_ejections() >= 1


def test_no_replica_is_taken_out_for_what_callers_do_wrong(envoy: Envoy, gateways: list[GatewayThread]) -> None:
    with RawConnection(envoy.target) as connection:
        for status, path, extra, text in (
            ("12", "/nobody.knows/This", {}, "x"),
            ("13", None, {}, "!fail"),
            ("4", None, {"grpc-timeout": "50m"}, "!forever"),
        ):
            for _ in range(12):  # six to each replica, where five errors in a row are too many for Envoy by default
                stream = connection.begin(extra=extra, path=path)
                connection.send(grpc_message(ask(text, max_new_tokens=4000).SerializeToString()), stream)
                assert connection.status(stream) == status
    assert envoy.num_ejections() == 0
    for gateway in gateways:
        gateway.wait_idle()

"""A Node service that has nothing but the .proto files gets all that the contract promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NODE_CLIENT = Path(__file__).resolve().parent.parent / "clients" / "node"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def seen(served: Any) -> dict[str, Any]:
    """What tests/clients/node/client.mjs saw of the service."""
    _install()
    command = [_program("node"), "client.mjs", served.target]
    result = subprocess.run(command, cwd=NODE_CLIENT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def _install() -> None:
    """`npm ci`, unless what is installed is what the lock file names."""
    lock = NODE_CLIENT / "package-lock.json"
    stamp = NODE_CLIENT / "node_modules" / ".installed"
    if stamp.exists() and stamp.read_text() == lock.read_text():
        return
    command = [_program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    result = subprocess.run(command, cwd=NODE_CLIENT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    stamp.write_text(lock.read_text())


def _program(name: str) -> str:
    """`node` or `npm` out of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def test_the_unary_answer_is_whole(seen: dict[str, Any]) -> None:
    answer = seen["unary"]
    assert answer["role"] == "ROLE_ASSISTANT"
    assert answer["content"].strip()
    assert answer["finish_reason"] in ("FINISH_REASON_STOP", "FINISH_REASON_LENGTH")
    assert answer["usage"]["prompt_tokens"] > 0
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])


def test_the_streams_deltas_concatenate_to_the_unary_answer(seen: dict[str, Any]) -> None:
    unary, stream = seen["unary"], seen["stream"]
    # The second of the two finds the first one's prompt in the prefix cache.
    for answer in (unary, stream):
        del answer["usage"]["cached_prompt_tokens"]
    assert stream == {key: unary[key] for key in ("content", "token_ids", "finish_reason", "usage")}


def test_cancelling_in_mid_stream_ends_the_call(seen: dict[str, Any]) -> None:
    assert seen["cancel"]["code"] == "CANCELLED"
    assert seen["cancel"]["messages"] >= 3


def test_a_deadline_ends_the_call(seen: dict[str, Any]) -> None:
    assert seen["deadline"] == {"code": "DEADLINE_EXCEEDED"}


def test_a_bad_request_tells_every_violation(seen: dict[str, Any]) -> None:
    error = seen["bad_request"]
    details = {detail["type"]: detail for detail in error["details"]}
    assert error["code"] == "INVALID_ARGUMENT"
    assert details["google.rpc.ErrorInfo"]["domain"] == "parley.v1"
    assert details["google.rpc.ErrorInfo"]["reason"] == "INVALID_REQUEST"
    violations = details["google.rpc.BadRequest"]["field_violations"]
    assert {violation["field"] for violation in violations} == {
        "generation_config.temperature",
        "generation_config.top_p",
    }


def test_an_unknown_model_tells_what_is_served(seen: dict[str, Any]) -> None:
    error = seen["model_not_found"]
    (info,) = [detail for detail in error["details"] if detail["type"] == "google.rpc.ErrorInfo"]
    assert error["code"] == "NOT_FOUND"
    assert info["reason"] == "MODEL_NOT_FOUND"
    assert info["metadata"]["served"]

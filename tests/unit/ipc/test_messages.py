"""What one process encodes the other decodes."""

from __future__ import annotations

import asyncio
import io
import socket

import msgspec
import pytest

from parleyd.config import ModelSettings
from parleyd.generation import (
    EngineRequest,
    EngineStats,
    FinishReason,
    ModelInfo,
    Output,
    SamplingDefaults,
    SamplingParams,
)
from parleyd.ipc import messages
from parleyd.ipc.framing import frame, read_frame, read_frame_async, send_frame

REQUEST = EngineRequest(
    key=2**63, prompt_ids=(1, 2, 3), output_ids=(4,), params=SamplingParams(max_new_tokens=5, seed=2**64 - 1)
)
INFO = ModelInfo(
    tokenizer_dir="/tmp", max_context_tokens=8, vocab_size=9, eos_token_ids=(1,), dtype="bfloat16", device="cpu",
    engine="generate", max_running=1, defaults=SamplingDefaults(temperature=0.6),
)  # fmt: skip
OUTPUTS = [Output(key=1, token_ids=(5,)), Output(key=2, finish_reason=FinishReason.STOP), Output(key=3, error="x")]


@pytest.mark.parametrize("message", [messages.Start(ModelSettings(model="x")), messages.Changes([REQUEST], [7])])
def test_messages_to_the_worker_arrive_as_they_were(message: messages.ToWorker) -> None:
    assert messages.decode_to_worker(messages.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        messages.Ready(INFO),
        messages.LoadFailed("why"),
        messages.Step(OUTPUTS),
        messages.Progress(EngineStats(num_running=1), 7),
    ],
)
def test_messages_to_the_gateway_arrive_as_they_were(message: messages.ToGateway) -> None:
    assert messages.decode_to_gateway(messages.encode(message)) == message


def test_a_message_of_the_wrong_direction_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        messages.decode_to_worker(messages.encode(messages.LoadFailed("x")))


def test_frames_are_read_one_by_one_until_the_other_end_is_gone() -> None:
    ours, theirs = socket.socketpair()
    payloads = [b"", b"x" * 70_000, b"last"]
    with ours, theirs.makefile("rb") as stream:
        for payload in payloads:
            send_frame(ours, payload)
            assert read_frame(stream) == payload
        ours.close()
        assert read_frame(stream) is None
    theirs.close()


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
async def test_a_frame_cut_short_is_the_end(cut: int) -> None:
    data = frame(b"hello")[:cut]
    assert read_frame(io.BytesIO(data)) is None
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    assert await read_frame_async(reader) is None

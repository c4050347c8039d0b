"""The batching engine, its worker killed, under traffic that is cancelled or runs out of time: no block is lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from parley.v1 import chat_pb2, chat_pb2_grpc
from parleyd.config import ModelSettings, ServerSettings, Settings
from parleyd.gateway.worker_link import WORKER_COMMAND
from tests.robustness.failpoints import kill_worker
from tests.robustness.traffic import Outcomes
from tests.robustness.validators import assert_idle, tasks_at_rest
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.requests import ask
from tests.support.tiny_models import make_model
from tests.support.tiny_tokenizer import VOCAB_SIZE, write_tiny_tokenizer

pytestmark = pytest.mark.timeout(0)

_NUM_REQUESTS = 60
_NUM_TOKENS = 60
_MAX_TRIES = 10


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    make_model("Llama", vocab_size=VOCAB_SIZE, max_position_embeddings=4096).save_pretrained(tmp_path)
    return write_tiny_tokenizer(tmp_path)


def test_no_kv_block_is_lost_whatever_ends_a_request(model_folder: Path, chance: random.Random) -> None:
    # Blocks for a few of the eight that may run: some are preempted too.
    model = ModelSettings(model=str(model_folder), max_running=8, max_batch_tokens=64, kv_cache_memory=0.001)
    server = ServerSettings(port=0, drain_delay=0.0, max_queue=_NUM_REQUESTS)
    with GatewayThread(Settings(server=server, model=model), WORKER_COMMAND) as gateway:
        at_rest = tasks_at_rest(gateway)
        outcomes = asyncio.run(_traffic(gateway, chance))
        assert outcomes.faults == []
        assert outcomes.num_ended == _NUM_REQUESTS
        assert gateway.gateway.supervisor.num_restarts == 1
        assert_idle(gateway, at_rest)
        engine = gateway.gateway.load().engine
        assert engine.num_generated_tokens > 0 and engine.num_blocks > 0


def test_a_worker_that_is_killed_amid_a_prefill_changes_no_answer(model_folder: Path) -> None:
    model = ModelSettings(model=str(model_folder), max_running=4, max_batch_tokens=8, kv_cache_memory=0.01)
    server = ServerSettings(port=0, drain_delay=0.0)
    with GatewayThread(Settings(server=server, model=model), WORKER_COMMAND) as gateway:
        at_rest = tasks_at_rest(gateway)
        pid = gateway.gateway.supervisor.worker_pid
        assert pid is not None
        request, disturbed = _stopped_amid_its_prefill(gateway, pid)
        os.kill(pid, signal.SIGKILL)
        (answer,) = disturbed.result().choices
        assert (len(answer.token_ids), gateway.gateway.supervisor.num_restarts) == (20, 1)
        (undisturbed,) = gateway.stub.Generate(request, timeout=100).choices
        assert answer.token_ids == undisturbed.token_ids
        logprobs = [[one.logprob for one in choice.logprobs] for choice in (answer, undisturbed)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)
        assert_idle(gateway, at_rest)


def _stopped_amid_its_prefill(gateway: GatewayThread, pid: int) -> tuple[chat_pb2.GenerateRequest, Any]:
    """A request and its call, whose worker has begun with the prompt, made no token yet, and been stopped."""
    for i in range(_MAX_TRIES):
        # A prompt of some 3,500 tokens takes more than 400 steps; still, the machine may keep us from being in time.
        request = ask(f"{i} " + "word " * 700, max_new_tokens=20, ignore_eos=True, logprobs=True)
        call = gateway.stub.Generate.future(request, timeout=100)
        eventually(lambda: gateway.gateway.load().engine.num_used_blocks > 0, "the prefill never began")
        os.kill(pid, signal.SIGSTOP)
        if [entry.num_made for entry in list(gateway.gateway.worker._open.values())] == [0]:
            return request, call
        os.kill(pid, signal.SIGCONT)
        call.cancel()
        eventually(lambda: gateway.gateway.load().engine.num_used_blocks == 0, "the call never ended")
    raise AssertionError("each prefill was over too soon")


async def _traffic(gateway: GatewayThread, chance: random.Random) -> Outcomes:
    outcomes = Outcomes()
    async with grpc.aio.insecure_channel(gateway.target) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)

        async def whole(text: str) -> None:
            request = ask(text, max_new_tokens=_NUM_TOKENS, ignore_eos=True, num_return_sequences=2, do_sample=True)
            choices = (await stub.Generate(request, timeout=100)).choices
            outcomes.expect("whole", [len(choice.token_ids) for choice in choices] == [_NUM_TOKENS] * 2, choices)

        async def cancelled(text: str) -> None:
            call = stub.GenerateStream(ask(text, max_new_tokens=300, ignore_eos=True))
            if chance.random() < 0.7:
                await call.read()
            call.cancel()
            outcomes.expect("cancelled", True, None)

        async def late(text: str) -> None:
            try:
                await stub.Generate(ask(text, max_new_tokens=400, ignore_eos=True), timeout=chance.uniform(0.01, 0.3))
            except grpc.RpcError as error:
                outcomes.expect("late", error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, error)
            else:
                outcomes.expect("late", True, None)

        async def stopped(text: str) -> None:
            (choice,) = (await stub.Generate(ask(text, max_new_tokens=300, stop_strings=list("abcdefgh")))).choices
            outcomes.expect("stopped", bool(choice.token_ids), choice)

        behaviours = [whole, cancelled, late, stopped]
        asking = [
            asyncio.create_task(behaviours[i % len(behaviours)](f"{i} " * chance.randint(1, 30)))
            for i in range(_NUM_REQUESTS)
        ]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        await kill_worker(gateway, chance)
        await asyncio.gather(*asking)
    return outcomes

"""What one client can learn of another: nothing, through the prefix cache, where clients show who they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from parley.v1 import chat_pb2_grpc
from parleyd.config import ModelSettings, SecuritySettings, ServerSettings, Settings
from parleyd.gateway.worker_link import WORKER_COMMAND
from parleyd.security.new_key import entry_for, new_key
from tests.support.gateway import GatewayThread
from tests.support.requests import ask
from tests.support.tiny_models import make_model
from tests.support.tiny_tokenizer import VOCAB_SIZE, write_tiny_tokenizer

PROMPT = "the merger is on friday at noon, tell nobody about it, " * 4
KEYS = {name: new_key() for name in ("one", "other")}

Start = Callable[[SecuritySettings], GatewayThread]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    folder = tmp_path / "model"
    make_model("Llama", vocab_size=VOCAB_SIZE, max_position_embeddings=512).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    model = ModelSettings(model=str(folder), kv_cache_memory=0.01)
    with ExitStack() as stack:
        yield lambda security: stack.enter_context(
            GatewayThread(
                Settings(server=ServerSettings(port=0, drain_delay=0.0), model=model, security=security), WORKER_COMMAND
            )
        )


def num_cached(gateway: GatewayThread, client: str) -> int:
    """Of the prompt, tokens that were in the cache."""
    with grpc.insecure_channel(gateway.target) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        metadata = [("authorization", f"Bearer {KEYS[client]}")]
        return stub.Generate(ask(PROMPT, max_new_tokens=2), metadata=metadata, timeout=60).usage.cached_prompt_tokens


def test_clients_with_credentials_find_their_own_prompts_in_the_cache_alone(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text("\n".join(entry_for(name, key) for name, key in KEYS.items()))
    gateway = start(SecuritySettings(api_keys=str(keys)))
    assert [num_cached(gateway, client) > 0 for client in ("one", "one", "other", "other")] == [False, True] * 2


def test_clients_without_any_share_the_cache(start: Start) -> None:
    gateway = start(SecuritySettings())
    assert [num_cached(gateway, client) > 0 for client in ("one", "other")] == [False, True]

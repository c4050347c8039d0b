"""An encoder-decoder served over gRPC: the encoder reads the conversation, the decoder writes the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration

from parley.v1 import chat_pb2_grpc
from parleyd.config import ModelSettings, ServerSettings, Settings
from parleyd.gateway.worker_link import WORKER_COMMAND
from tests.support.gateway import GatewayThread
from tests.support.requests import ask
from tests.support.tiny_tokenizer import IM_END_ID, VOCAB_SIZE, write_tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, initializer_factor=4.0,
        decoder_start_token_id=0, eos_token_id=IM_END_ID,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).save_pretrained(path)
    return write_tiny_tokenizer(path)


@pytest.fixture(scope="module")
def stub(folder: Path) -> Iterator[chat_pb2_grpc.ChatServiceStub]:
    settings = Settings(server=ServerSettings(port=0, drain_delay=0.0), model=ModelSettings(model=str(folder)))
    with (
        GatewayThread(settings, WORKER_COMMAND) as gateway,
        grpc.insecure_channel(gateway.target) as channel,
    ):
        yield chat_pb2_grpc.ChatServiceStub(channel)


def test_an_answer_is_that_of_model_generate(folder: Path, stub: chat_pb2_grpc.ChatServiceStub) -> None:
    model: Any = T5ForConditionalGeneration.from_pretrained(folder)
    messages = [{"role": "user", "content": "Who are you?"}]
    inputs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=12, decoder_start_token_id=0))
    response = stub.Generate(ask("Who are you?", max_new_tokens=12), timeout=60)
    assert list(response.choices[0].token_ids) == expected[0, 1:].tolist()
    assert response.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_a_stream_follows_a_format_and_goes_on_where_it_was_cut_off(stub: chat_pb2_grpc.ChatServiceStub) -> None:
    request = ask("Who are you?", max_new_tokens=40, seed=7, response_format={"regex": "I am (T5|[a-z]{9})!"})
    whole = list(stub.GenerateStream(request, timeout=60))
    text = "".join(response.content for response in whole)
    assert re.fullmatch("I am (T5|[a-z]{9})!", text)
    cut = whole[:4]
    request.resume.token_ids[:] = [token_id for response in cut for token_id in response.token_ids]
    rest = stub.GenerateStream(request, timeout=60)
    assert "".join(response.content for response in [*cut, *rest]) == text

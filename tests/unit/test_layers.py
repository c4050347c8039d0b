"""Rooms import only what they may (tools/verify_layers.py), and the check sees it when they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import verify_layers
from tools.verify_layers import verify_module


def test_our_packages_keep_to_their_rooms() -> None:
    assert [str(violation) for violation in verify_layers.verify_tree(verify_layers.ROOT)] == []


def test_the_check_reads_every_package() -> None:
    for shelf in verify_layers.SHELVES:
        assert list((verify_layers.ROOT / shelf).rglob("*.py"))


def test_a_violation_in_the_tree_is_found_with_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "service/parleyd/gateway"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "chat.py").write_text("import asyncio\n\nimport torch\n")

    violations = verify_layers.verify_tree(tmp_path)

    assert [str(violation) for violation in violations] == [
        "service/parleyd/gateway/chat.py:3: parleyd.gateway.chat must not import torch"
    ]


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("parley.v1.chat_pb2", "import parleyd.config"),
        ("parley_client.client", "import parleyd.errors"),
        ("parley_client.client", "import torch"),
        ("parley_client.client", "import msgspec"),
        ("parleyd.config", "import grpc"),
        ("parleyd.config", "import msgspec"),
        ("parleyd.errors", "from parleyd.rpc import status"),
        ("parleyd.ipc.messages", "import grpc"),
        ("parleyd.telemetry.logging", "import grpc"),
        ("parleyd.scheduling.scheduler", "import torch"),
        ("parleyd.scheduling.scheduler", "from parleyd.sampling import sampler"),
        ("parleyd.sampling.sampler", "from parleyd.engine.model_runner import ModelRunner"),
        ("parleyd.kernels.layout", "from parleyd.engine.batching import BatchingEngine"),
        ("parleyd.kernels.layout", "from parleyd.sampling import penalties"),
        ("parleyd.model.loader", "from parleyd.kernels import cache"),
        ("parleyd.scheduling.kv_cache", "from parleyd.engine.model_runner import ModelRunner"),
        ("parleyd.scheduling.request", "import numpy"),
        ("parleyd.gpu_kernels.varlen", "from parleyd.kernels.paged import Kernels"),
        ("parleyd.engine.model_runner", "from parleyd.config import ModelSettings"),
        ("parleyd.engine.cuda_graphs", "import triton"),
        ("parleyd.engine.generate", "import llguidance"),
        ("parleyd.engine.stock_forward", "import accelerate"),
        ("parleyd.model.loader", "import triton"),
        ("parleyd.model.tokenizer", "import llguidance"),
        ("parleyd.engine.model_runner", "import asyncio"),
        ("parleyd.engine.model_runner", "import grpc"),
        ("parleyd.engine.model_runner", "from parley.v1 import chat_pb2"),
        ("parleyd.model.loader", "from parleyd.text import tokenizer"),
        ("parleyd.model.loader", "from parleyd.gateway.server import serve"),
        ("parleyd.text.tokenizer", "import torch"),
        ("parleyd.text.tokenizer", "import grpc"),
        ("parleyd.text.tokenizer", "import transformers"),
        ("parleyd.text.tokenizer", "from transformers import AutoTokenizer"),
        ("parleyd.gateway.server", "import transformers"),
        ("parleyd.gateway.server", "from parleyd import engine"),
        ("parleyd.gateway.server", "from parleyd.model.loader import load_model"),
        ("parleyd.rpc.status", "from parleyd.worker import process"),
        ("parleyd.worker.process", "from parleyd.gateway import streamer"),
        ("parleyd.worker.process", "from parleyd.text import stop"),
        ("parleyd.worker.process", "import grpc"),
        ("parleyd.cli", "from parleyd.engine.engine import Engine"),
        ("parleyd.cli", "import torch"),
        ("parleyd.new_room.module", "import os"),
    ],
)
def test_an_import_across_a_wall_is_found(module: str, statement: str) -> None:
    assert len(verify_module(statement, module, f"{module.rpartition('.')[2]}.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def load():\n    import torch",
        "if TYPE_CHECKING:\n    from torch import Tensor",
        "torch = __import__('torch')",
        "import importlib\ntorch = importlib.import_module('torch')",
        "from importlib import import_module\ntorch = import_module('torch.nn')",
        "from ..engine import engine",
        "from .. import model",
        "from ..worker.process import *",
    ],
)
def test_lazy_and_relative_imports_count(source: str) -> None:
    assert len(verify_module(source, "parleyd.gateway.server", "server.py")) == 1


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("parleyd.gateway.server", "from . import chat"),
        ("parleyd.gateway.server", "from parleyd.text.tokenizer import Tokenizer"),
        ("parleyd.gateway.server", "from parley.v1 import chat_pb2"),
        ("parleyd.engine.model_runner", "from parleyd.scheduling.scheduler import Scheduler"),
        ("parleyd.scheduling.scheduler", "from parleyd.scheduling.kv_cache import KvCache"),
        ("parleyd.text.chat_template", "from transformers.utils import chat_template_utils"),
        ("parleyd.worker.process", "from parleyd.model.loader import load_model"),
    ],
)
def test_what_the_table_allows_passes(module: str, statement: str) -> None:
    assert verify_module(statement, module, "module.py") == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['HOME']",
        "import os as o\no.getenv('HOME')",
        "from os import environ",
        "import sys\nsys.argv",
        "def f():\n    import sys\n    return sys.argv[1:]",
    ],
)
def test_only_the_command_line_reads_arguments_and_environment(source: str) -> None:
    assert len(verify_module(source, "parleyd.gateway.server", "service/parleyd/gateway/server.py")) == 1
    assert verify_module(source, "parleyd.cli", "service/parleyd/cli.py") == []
    assert verify_module(source, "parleyd.worker.__main__", "service/parleyd/worker/__main__.py") == []


def test_the_gateway_runs_without_torch() -> None:
    """What the table cannot see: a library that imports torch behind our back."""
    assert _modules_after("parleyd.gateway.server") & {"torch", "accelerate", "parleyd.engine"} == set()


def test_the_client_runs_without_the_service() -> None:
    assert _modules_after("parley_client") & {"torch", "transformers", "parleyd", "msgspec"} == set()


def _modules_after(module: str) -> set[str]:
    """The modules that a new interpreter holds after importing one."""
    script = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())

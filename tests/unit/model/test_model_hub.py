"""What a Hub id can run into, as lines for the operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils._paths import filter_repo_objects

from parleyd.config import ModelSettings
from parleyd.model.loader import load_model
from tests.unit.model.conftest import startup_error


@pytest.mark.parametrize("model", ["a b", "name/-", "x" * 100, "a--b"])
def test_a_name_that_is_no_hub_id_is_told(model: str) -> None:
    assert "no such file or folder, and not a valid Hub id" in startup_error(model)


def test_an_unreachable_hub_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "the Hub cannot be reached" in startup_error("parley-tests/no-such-model")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (errors.GatedRepoError, "a gated model: ask for access on its Hub page, then log in"),
        (errors.RepositoryNotFoundError, "no such model on the Hub"),
        (errors.RevisionNotFoundError, "--revision v9 does not exist"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached"),
        (ConnectionError, "the download failed: ConnectionError"),
    ],
)
def test_what_the_hub_answers_is_told(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], text: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise kind.__new__(kind)  # their constructors want an HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert text in startup_error("some/model", revision="v9")


def test_a_full_disk_while_downloading_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "the download cannot be written: No space left on device" in startup_error("some/model")


@pytest.mark.parametrize("trusted", [False, True])
def test_a_download_takes_the_revision_and_leaves_code_and_pickles(
    monkeypatch: pytest.MonkeyPatch, llama_folder: Path, trusted: bool
) -> None:
    calls = []

    def snapshot_download(name: str, **kwargs: Any) -> str:
        calls.append((name, kwargs))
        return str(llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = load_model(ModelSettings(model="some/model", revision="v1", trust_remote_code=trusted))
    assert loaded.info.tokenizer_dir == str(llama_folder)
    [(name, kwargs)] = calls
    assert (name, kwargs["revision"]) == ("some/model", "v1")
    files = ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "merges.txt",
             "additional_chat_templates/tool_use.jinja", "modeling.py", "pytorch_model.bin", "onnx/model.safetensors",
             "original/params.json", "code/modeling.py", "consolidated.safetensors"]  # fmt: skip
    taken = list(
        filter_repo_objects(files, allow_patterns=kwargs["allow_patterns"], ignore_patterns=kwargs["ignore_patterns"])
    )
    assert taken == files[: 7 if trusted else 6]

"""Tokenizer against transformers' own tokenizer for the same folder."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from transformers import AutoTokenizer

from parleyd.errors import StartupError
from parleyd.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import END_OF_TEXT_ID, IM_START_ID, SPECIAL_IDS, write_tiny_tokenizer
from tests.unit.text import vocabularies

TEXT = "<|im_start|>user\nhé 日本 😀<img><|fim|> <pad> x\x00<|im_end|>\n"


def configure(folder: Path, **changes: Any) -> Path:
    """A tiny tokenizer's folder with changes to its tokenizer_config.json; None removes a key."""
    path = write_tiny_tokenizer(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    return folder


def test_encoding_adds_no_special_tokens_and_reads_those_in_the_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tiny_tokenizer(tmp_path))
    assert tokenizer.encode("<|im_start|>hé").ids == [IM_START_ID, *"hé".encode()]
    assert tokenizer.special_ids == SPECIAL_IDS
    assert tokenizer.decode([IM_START_ID, *"hé".encode()]) == "hé"
    assert tokenizer.decode([IM_START_ID, *"hé".encode()], skip_special_tokens=False) == "<|im_start|>hé"


ADDED = {"content": "<img>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pad_token": "<pad>"},
        {"pad_token": ADDED | {"content": "<pad>", "__type": "AddedToken", "lstrip": True}},
        {"additional_special_tokens": ["<|fim|>", ADDED | {"__type": "AddedToken", "special": True}]},
        {"extra_special_tokens": {"image_token": "<img>"}},
        {"image_token": "<img>"},
        pytest.param(
            {"extra_special_tokens": {"image_token": "<img>"}, "additional_special_tokens": ["<|fim|>"]},
            marks=pytest.mark.skipif(transformers.__version__.startswith("5.17."), reason="ordinary text there"),
        ),
        {
            "added_tokens_decoder": {
                "259": ADDED | {"special": True},
                "260": ADDED | {"content": "<|fim|>", "special": False},
            }
        },
        {"additional_special_tokens": ["<img>"], "added_tokens_decoder": {"259": ADDED | {"special": False}}},
        {"split_special_tokens": True},
    ],
    ids=lambda changes: "+".join(changes) or "plain",
)
def test_ids_text_and_special_ids_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = configure(tmp_path, **changes)
    tokenizer, oracle = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT).ids
    assert ids == oracle.encode(TEXT, add_special_tokens=False)
    assert tokenizer.vocab_size == len(oracle)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_special_tokens_map_json_counts_in_older_folders(tmp_path: Path) -> None:
    folder = configure(tmp_path, pad_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": ADDED}), encoding="utf-8")
    tokenizer, oracle = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("<img>").ids == oracle.encode("<img>", add_special_tokens=False) == [259]
    assert 259 in tokenizer.special_ids


@pytest.mark.parametrize("changes", [{}, {"added_tokens_decoder": {}}], ids=["older", "newer"])
def test_added_tokens_json_counts_in_older_folders(tmp_path: Path, changes: dict[str, Any]) -> None:
    """What tokenizer.json says of a token, here that it is special, counts for more."""
    folder = configure(tmp_path, additional_special_tokens=["<|fim|>"], **changes)
    added = {"<|fim|>": 260, "<img>": 259, "<|im_end|>": 258}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    tokenizer, oracle = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    text = "a<img>b <|fim|>c<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert (259 in ids and 260 in ids) == (not changes)
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.special_ids == {token_id for token_id, one in oracle.added_tokens_decoder.items() if one.special}


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    path = write_tiny_tokenizer(tmp_path) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(4)
    backend.enable_padding(pad_id=END_OF_TEXT_ID, length=8)
    backend.save(str(path))
    assert Tokenizer.load(tmp_path).encode("hello").ids == list(b"hello")


def test_token_bytes_are_what_each_id_adds() -> None:
    tokenizer = vocabularies.byte_level()
    assert [tokenizer.token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_bytes(IM_START_ID) == b"<|im_start|>"
    assert tokenizer.token_bytes(100_000) == b""
    fallback = vocabularies.byte_fallback()
    assert fallback.token_bytes(vocabularies.FIRST_BYTE_ID + 0xE2) == b"\xe2"


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        (vocabularies.byte_fallback(), {"▁the": " the", "▁": " ", "▁▁": "  ", "the": "the", "<s>": "<s>"}),
        (vocabularies.byte_fallback(strips_first_space=False), {"▁the": " the", "a": "a"}),
        (vocabularies.metaspace(), {"▁the": " the", "好": "好"}),
        (vocabularies.word_piece(), {"cat": " cat", "##s": "s", ".": "."}),
    ],
    ids=["llama", "gemma", "metaspace", "word_piece"],
)
def test_bytes_of_pieces_are_those_of_mid_text(tokenizer: Tokenizer, texts: dict[str, str]) -> None:
    for token, text in texts.items():
        token_id = tokenizer.token_id(token)
        assert token_id is not None and tokenizer.token_bytes(token_id) == text.encode()


def test_other_threads_run_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tiny_tokenizer(tmp_path))
    text = "hello world " * 100_000
    encoding = threading.Thread(target=tokenizer.encode, args=(text,))
    longest_pause_s, started = 0.0, time.perf_counter()
    encoding.start()
    before = started
    while encoding.is_alive():
        time.sleep(0)
        now = time.perf_counter()
        longest_pause_s, before = max(longest_pause_s, now - before), now
    assert longest_pause_s < (before - started) / 2


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_stops_the_start(tmp_path: Path, name: str) -> None:
    (write_tiny_tokenizer(tmp_path) / name).write_text("{", encoding="utf-8")
    with pytest.raises(StartupError, match=name):
        Tokenizer.load(tmp_path)


def test_a_configuration_nested_too_deep_stops_the_start(tmp_path: Path) -> None:
    nested = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    (write_tiny_tokenizer(tmp_path) / "tokenizer_config.json").write_text(nested, encoding="utf-8")
    with pytest.raises(StartupError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_special_tokens_that_are_no_object_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be used"):
        Tokenizer.load(configure(tmp_path, added_tokens_decoder=["<img>"]))

"""A byte-level tokenizer in a folder, made without network or weights: id == UTF-8 byte, and three special tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NUM_BYTES = 256
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 256, 257, 258
SPECIAL_IDS = frozenset({END_OF_TEXT_ID, IM_START_ID, IM_END_ID})
VOCAB_SIZE = 259

DEFAULT_SYSTEM_PROMPT = "You are a tiny assistant."
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM_PROMPT + "<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_tokenizer(
    folder: Path, *, chat_template: str | None = CHATML_TEMPLATE, further_specials: Sequence[str] = ()
) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder` and returns it.

    `chat_template=None` writes none, as in the folder of a base model; `further_specials` get the ids from VOCAB_SIZE.
    The folder is made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in further_specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": IM_START,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return folder


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE with no merges, so that encoding a text gives its UTF-8 bytes."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[byte]: byte for byte in range(NUM_BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (END_OF_TEXT, IM_START, IM_END)])
    return tokenizer


def _byte_alphabet() -> list[str]:
    """The printable stand-in of each byte: GPT-2's table, which the ByteLevel pre-tokenizer writes texts in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    stand_ins = {byte: chr(byte) for byte in printable} | {byte: chr(NUM_BYTES + n) for n, byte in enumerate(others)}
    return [stand_ins[byte] for byte in range(NUM_BYTES)]

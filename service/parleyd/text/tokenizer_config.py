"""What a tokenizer's folder says beside tokenizer.json; tokenizer.py and chat_template.py read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from parleyd.errors import StartupError

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """tokenizer_config.json, and what older folders say beside it, merged as transformers does it.

    `special_tokens` maps names such as `bos_token`, and names of the model's own such as `image_token`; chat templates
    see the texts of exactly these. `added_tokens` maps ids to the tokens that older tokenizer.json files left out;
    `older_added_tokens` does too, of added_tokens.json, against which tokenizer.json has the last word about an id.
    `chat_templates` are by name; one that has none is "default".
    """

    special_tokens: Mapping[str, AddedToken]
    extra_special_tokens: tuple[AddedToken, ...]
    added_tokens: Mapping[int, AddedToken]
    older_added_tokens: Mapping[int, AddedToken]
    split_special_tokens: bool
    chat_templates: Mapping[str, str]

    @classmethod
    def load(cls, folder: Path) -> TokenizerConfig:
        """Reads the folder; a missing file counts as an empty one.

        Raises StartupError where a file is there but not what it should be.
        """
        config = _read_object(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            # Newer folders repeat everything in tokenizer_config.json; transformers ignores these files there.
            config |= _read_object(folder / "special_tokens_map.json")
            config["older_added_tokens"] = _read_object(folder / "added_tokens.json")
        # Where older folders of models that see have it.
        config.setdefault("chat_template", _read_object(folder / "chat_template.json").get("chat_template"))
        try:
            return cls._from_config(config)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise StartupError(f"{folder / 'tokenizer_config.json'} cannot be used: {error!r}") from error

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> TokenizerConfig:
        additional = config.get("additional_special_tokens") or ()
        extra = config.get("extra_special_tokens") or additional
        own = dict(config.get("model_specific_special_tokens") or {})
        if isinstance(extra, dict):
            own, extra = own | extra, additional
        own |= {name: value for name, value in config.items() if name.endswith("_token")}
        named = {name: own.pop(name, None) for name in NAMED_SPECIAL_TOKENS}
        added = config.get("added_tokens_decoder") or {}
        special_tokens = {name: token for name, value in (named | own).items() if (token := _special_token(value))}
        extra_special_tokens = tuple(token for value in extra if (token := _special_token(value)))
        special = {token.content for token in (*special_tokens.values(), *extra_special_tokens)}
        return cls(
            special_tokens=special_tokens,
            extra_special_tokens=extra_special_tokens,
            added_tokens={int(key): _added_token(value) for key, value in added.items()},
            older_added_tokens={
                int(key): AddedToken(text, special=text in special, normalized=text not in special)
                for text, key in config.get("older_added_tokens", {}).items()
            },
            split_special_tokens=bool(config.get("split_special_tokens", False)),
            chat_templates=_by_name(config.get("chat_template")),
        )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} holds no JSON object")
    return value


def _special_token(value: Any) -> AddedToken | None:
    """From a string or a serialised AddedToken; None for anything else: `add_bos_token`, say, is a bool."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    return _added_token(value) if isinstance(value, dict) else None


def _added_token(value: Mapping[str, Any]) -> AddedToken:
    return AddedToken(**{name: item for name, item in value.items() if name != "__type"})


def _by_name(value: str | Iterable[Mapping[str, str]] | None) -> dict[str, str]:
    """`chat_template` is one template or, in older folders, a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    return {template["name"]: template["template"] for template in value}

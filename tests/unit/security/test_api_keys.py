"""API keys: their file, and finding out whose one is."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from parleyd.cli import main
from parleyd.errors import StartupError
from parleyd.security import api_keys
from parleyd.security.api_keys import ApiKeys
from parleyd.security.caller import Rules
from parleyd.security.new_key import entry_for, new_key

RPCS = ("Generate", "GetModel")


def read(folder: Path, content: str, defaults: Rules = Rules()) -> ApiKeys:  # noqa: B008 - frozen
    path = folder / "keys.toml"
    path.write_text(content, encoding="latin-1")
    return ApiKeys.read(str(path), RPCS, defaults)


def test_a_key_is_found_by_itself_alone(tmp_path: Path) -> None:
    a, b = new_key(), new_key()
    keys = read(tmp_path, entry_for("a", a) + entry_for("b", b))
    caller = keys.find(b)
    assert caller is not None
    assert caller.identity == "key:b"
    assert caller.rules == Rules()
    for wrong in ("", new_key(), a[:-1], a + "x", a.upper(), "é"):
        assert keys.find(wrong) is None


def test_every_hash_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [new_key() for _ in range(3)]
    keys = read(tmp_path, "".join(entry_for(f"client-{i}", key) for i, key in enumerate(listed)))
    compared: list[object] = []

    constant_time = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return constant_time(a, b)

    monkeypatch.setattr(api_keys.hmac, "compare_digest", compare)
    for key in (listed[0], listed[2], "wrong"):
        compared.clear()
        keys.find(key)
        assert len(compared) == 3


def test_an_entry_says_what_its_client_may(tmp_path: Path) -> None:
    key = new_key()
    rules = 'rpcs = ["Generate"]\npriorities = true\nmax_open_calls = 2\n'
    caller = read(tmp_path, entry_for("a", key) + rules, Rules(max_open_calls=9, requests_per_minute=60)).find(key)
    assert caller is not None
    assert caller.rules == Rules(frozenset(["Generate"]), True, 2, 60)


def test_the_command_line_makes_a_key_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "--name", "billing"]) == 0
    shown = capsys.readouterr()
    key = shown.err.strip()
    assert key not in shown.out
    caller = read(tmp_path, shown.out).find(key)
    assert caller is not None
    assert caller.identity == "key:billing"
    with pytest.raises(SystemExit, match="2"):
        main(["keys", "new", "--name", 'a"\nsha256 = "0'])


HASH = "0" * 64


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "missing required field `key`"),
        ("key = []", "holds no key"),
        ("[[key]]\nname = 1", "Expected `str`"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\ncolour = 1', "colour"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nrpcs = ["Genrate"]', "Genrate"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nmax_open_calls = 0', "max_open_calls"),
        (f'[[key]]\nname = "a\\nb"\nsha256 = "{HASH}"', "printable"),
        ('[[key]]\nname = "a"\nsha256 = "123"', "64 hexadecimal"),
        (f'[[key]]\nname = "a"\nsha256 = "{"z" * 64}"', "64 hexadecimal"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\n[[key]]\nname = "b"\nsha256 = "{HASH}"', "twice"),
        ("[[key", "array declaration"),
        ("key = " + "[" * 10_000, "recursion"),
        ("# \xe9", "can't decode"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, what: str) -> None:
    with pytest.raises(StartupError, match=r"--api-keys .*keys\.toml") as raised:
        read(tmp_path, content)
    assert what in str(raised.value)
    assert HASH not in str(raised.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(StartupError, match="--api-keys /nowhere cannot be read"):
        ApiKeys.read("/nowhere", RPCS, Rules())

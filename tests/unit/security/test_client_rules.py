"""Rules by identity: which entry fits whom, and files that are broken."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from parleyd.errors import StartupError
from parleyd.security.caller import Rules
from parleyd.security.client_rules import ClientRules

RPCS = ("Generate", "GetModel")
DEFAULTS = Rules(max_open_calls=9, requests_per_minute=60)


def read(folder: Path, content: str) -> ClientRules:
    path = folder / "rules.toml"
    path.write_text(content, encoding="latin-1")
    return ClientRules.read(str(path), RPCS, DEFAULTS)


def test_an_entry_says_what_its_clients_may_and_the_settings_the_rest(tmp_path: Path) -> None:
    entries = (
        '[[client]]\nidentity = "jwt:a"\nrpcs = ["Generate"]\nmax_open_calls = 2\n',
        '[[client]]\nidentity = "jwt:b"\nrequests_per_minute = 3\n',
    )
    rules = read(tmp_path, "".join(entries))
    assert rules.find("jwt:a") == Rules(frozenset(["Generate"]), False, 2, 60)
    assert rules.find("jwt:b") == Rules(None, False, 9, 3)
    assert rules.find("jwt:c") == DEFAULTS


@pytest.mark.parametrize(
    ("pattern", "fits", "others"),
    [
        ("jwt:a", ["jwt:a"], ["jwt:ab", "jwt:A", "cert:a", "jwt:jwt:a"]),
        ("jwt:auth0|*", ["jwt:auth0|", "jwt:auth0|1"], ["jwt:auth0", "jwt:a"]),
        ("cert:spiffe://a/*/sa/b", ["cert:spiffe://a/x/y/sa/b"], ["cert:spiffe://a/sa/b", "cert:spiffe://a/x/sa/bc"]),
        ("cert:*.a.example", ["cert:b.a.example"], ["cert:a.example", "cert:b.aXexample", "cert:b.a.example.evil"]),
        ("jwt:[a-z]?", ["jwt:[a-z]?"], ["jwt:ab", "jwt:a"]),
        ("jwt:*a*b*a", ["jwt:aba", "jwt:xaxbxa", "jwt:aabbaa"], ["jwt:ab", "jwt:ba", "jwt:aa", "jwt:abab"]),
        ("jwt:**", ["jwt:", "jwt:a"], ["cert:a"]),
    ],
)
def test_a_star_stands_for_anything_and_the_rest_for_itself(
    tmp_path: Path, pattern: str, fits: list[str], others: list[str]
) -> None:
    rules = read(tmp_path, f'[[client]]\nidentity = "{pattern}"\nrpcs = []\n')
    assert all(rules.find(identity).rpcs == frozenset() for identity in fits)
    assert all(rules.find(identity) == DEFAULTS for identity in others)


def test_an_identity_made_for_a_pattern_of_many_stars_takes_no_time(tmp_path: Path) -> None:
    rules = read(tmp_path, '[[client]]\nidentity = "jwt:*-*-*-*-*-*-*-*x"\nrpcs = []\n')
    started = time.thread_time()
    assert rules.find("jwt:" + "-" * 252) == DEFAULTS
    assert time.thread_time() - started < 0.1


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "missing required field `client`"),
        ("[[client", "array declaration"),
        ("client = " + "[" * 10_000, "recursion"),
        ("# \xe9", "can't decode"),
        ("[[client]]\nrpcs = []", "missing required field `identity`"),
        ('[[client]]\nidentity = "jwt:a"\npriority = true', "unknown field `priority`"),
        ('[[client]]\nidentity = "jwt:a"\nrpcs = ["Genrate"]', "Genrate"),
        ('[[client]]\nidentity = "jwt:a"\nrequests_per_minute = 0', "requests_per_minute must be 1 or more"),
        ('[[client]]\nidentity = "key:a"', "must begin with one of cert:, jwt:"),
        ('[[client]]\nidentity = "*"', "must begin with one of cert:, jwt:"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, what: str) -> None:
    with pytest.raises(StartupError, match=r"--client-rules .*rules\.toml") as raised:
        read(tmp_path, content)
    assert what in str(raised.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(StartupError, match="--client-rules /nowhere cannot be read"):
        ClientRules.read("/nowhere", RPCS, DEFAULTS)

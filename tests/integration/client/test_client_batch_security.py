"""`parley batch` shows the credentials that its flags name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parley_client.cli import main
from tests.support.secured import secured_gateway


def test_parley_batch_shows_its_certificate_and_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"messages": [{"role": "ROLE_USER", "content": "Hi"}]}\n')
    with secured_gateway(tmp_path) as gateway:
        batch = ["batch", str(source), str(results), "--target", gateway.target, "--tls-ca", gateway.ca]
        certificate = ["--client-cert", gateway.cert, "--client-key", gateway.key]
        assert main([*batch, "--api-key-file", gateway.api_key]) == 1
        assert "connection failed" in capsys.readouterr().err
        assert main([*batch, *certificate]) == 1
        assert "no credentials" in capsys.readouterr().err
        assert main([*batch, *certificate, "--api-key-file", gateway.api_key]) == 0
    assert json.loads(results.read_text())["response"]["choices"][0]["message"]["content"] == "Hi"

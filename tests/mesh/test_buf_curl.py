"""`buf curl` over reflection alone, as docs/mesh.md shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from parleyd.config import SecuritySettings
from parleyd.security.new_key import entry_for, new_key
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings

BUF = Path(sys.executable).parent / "buf"


def curl(target: str, method: str, request: dict[str, object], *flags: str) -> list[dict[str, object]]:
    """The messages that come back."""
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(request), *flags]
    result = subprocess.run(
        [*command, f"http://{target}/parley.v1.ChatService/{method}"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    decoder, text, messages = json.JSONDecoder(), result.stdout.strip(), []
    while text:
        message, end = decoder.raw_decode(text)
        messages.append(message)
        text = text[end:].lstrip()
    return messages


def test_unary_and_stream(gateways: list[GatewayThread]) -> None:
    target = gateways[0].target
    request = {"messages": [{"role": "ROLE_USER", "content": "over curl"}], "generation_config": {"seed": "7"}}
    (response,) = curl(target, "Generate", request)
    assert response["choices"][0]["message"]["content"] == "over curl"  # type: ignore[index]
    deltas = curl(target, "GenerateStream", request)
    assert "".join(str(delta.get("content", "")) for delta in deltas) == "over curl"
    assert deltas[-1]["finishReason"] == "FINISH_REASON_STOP"


def test_with_a_key(tokenizer_folder: Path, tmp_path: Path) -> None:
    keys, api_key = tmp_path / "keys.toml", new_key()
    keys.write_text(entry_for("client", api_key))
    security = SecuritySettings(api_keys=str(keys), reflection=True)
    request = {"messages": [{"role": "ROLE_USER", "content": "over curl"}]}
    flags = ["-H", f"authorization: Bearer {api_key}", "--reflect-header", "*"]
    with GatewayThread(scripted_settings(security=security), scripted_command(tokenizer_folder)) as gateway:
        (response,) = curl(gateway.target, "Generate", request, *flags)
    assert response["choices"][0]["message"]["content"] == "over curl"  # type: ignore[index]

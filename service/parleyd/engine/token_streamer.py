"""Streams token ids out of `model.generate`, as `TextIteratorStreamer` does text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.generation.streamers import BaseStreamer


class TokenStreamer(BaseStreamer):  # type: ignore[misc]
    """Calls `on_token` with each generated id. `generate` puts the prompt first, then the ids one by one."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._is_prompt_next = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt (`[1, prompt]`), then each id (`[1]`)."""
        if self._is_prompt_next:
            self._is_prompt_next = False
            return
        self._on_token(int(value))

    def end(self) -> None:
        """Nothing is held back, so nothing is left to send."""

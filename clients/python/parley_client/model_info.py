"""What a server serves."""

from __future__ import annotations

from typing import Any

from parley.v1 import chat_pb2


class ModelInfo:
    """The served model, its limits and its defaults; `proto` is the protobuf message."""

    def __init__(self, proto: chat_pb2.GetModelResponse) -> None:
        self.proto = proto

    def __repr__(self) -> str:
        return f"ModelInfo(model={self.model!r}, max_context_tokens={self.max_context_tokens}, device={self.device!r})"

    @property
    def model(self) -> str:
        """The served name."""
        return self.proto.model

    @property
    def max_context_tokens(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return self.proto.max_context_tokens

    @property
    def vocab_size(self) -> int:
        """Number of token ids: 0 to `vocab_size` - 1."""
        return self.proto.vocab_size

    @property
    def default_generation_config(self) -> dict[str, Any]:
        """What generation options mean when they are left out, by name; not listed is off."""
        plain = {"logit_bias": dict, "stop_strings": list, "stop_token_ids": list}  # of protobuf's own containers
        return {
            field.name: plain[field.name](value) if field.name in plain else value
            for field, value in self.proto.default_generation_config.ListFields()
        }

    @property
    def capabilities(self) -> list[str]:
        """What this model can do on this server, such as "chat", "stream"."""
        return list(self.proto.capabilities)

    @property
    def engine(self) -> str:
        """The engine that generates."""
        return self.proto.engine

    @property
    def dtype(self) -> str:
        """The type of the weights, such as "bfloat16"."""
        return self.proto.dtype

    @property
    def device(self) -> str:
        """Where the model runs, such as "cpu" or "cuda:0"."""
        return self.proto.device

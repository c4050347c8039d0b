"""Log-probabilities of generated tokens."""

from __future__ import annotations

from dataclasses import dataclass

from parley.v1 import generation_pb2


@dataclass(frozen=True)
class TopLogprob:
    """One of the most likely tokens of a position. `token` has U+FFFD where `bytes` are no whole characters."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """A generated token: natural logarithm of its probability by the model's own distribution (log-softmax of the raw
    logits), and the most likely tokens of its position (`top_logprobs`), best first."""

    top: tuple[TopLogprob, ...] = ()

    @classmethod
    def from_proto(cls, proto: generation_pb2.TokenLogprob) -> TokenLogprob:
        """The values of a protobuf message."""
        top = tuple(TopLogprob(one.token_id, one.token, one.bytes, one.logprob) for one in proto.top)
        return cls(proto.token_id, proto.token, proto.bytes, proto.logprob, top)

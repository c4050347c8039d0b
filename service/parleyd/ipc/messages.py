"""The messages between the processes, in MessagePack: for all requests together, one a step back, and there one for all
that changes in a turn of the event loop, unless that is long.
"""

from __future__ import annotations

import msgspec

from parleyd.config import ModelSettings
from parleyd.generation import EngineRequest, EngineStats, ModelInfo, Output, TokenLogprob


class Start(msgspec.Struct, tag=True, frozen=True):
    """Gateway to worker, first: what to load."""

    settings: ModelSettings
    log_level: str = "info"
    log_format: str = "text"


class Changes(msgspec.Struct, tag=True, frozen=True):
    """Gateway to worker: generate what is `submitted`, and nothing more of those whose keys are `aborted`.

    What is aborted is answered by nothing: outputs already on their way are to be ignored.
    """

    submitted: list[EngineRequest]
    aborted: list[int]


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Worker to gateway: the model is loaded and warm."""

    info: ModelInfo


class LoadFailed(msgspec.Struct, tag=True, frozen=True):
    """Worker to gateway, last: the model cannot be loaded; `message` is one line."""

    message: str


class Step(msgspec.Struct, tag=True, frozen=True):
    """Worker to gateway: what one step made, for all requests together."""

    outputs: list[Output]


class Progress(msgspec.Struct, tag=True, frozen=True):
    """Worker to gateway, now and then while it works: it is alive, even if a long prompt has made no token yet.

    `progress` is the engine's. At least one with a new number comes after each submission, aborted or not; one with the
    number of the last only tells that the stats have changed, as they do where a request joins others behind a hang.
    """

    stats: EngineStats
    progress: int


class CheckGrammar(msgspec.Struct, tag=True, frozen=True):
    """Gateway to checker: can the model follow this? `kind` and `source` are those of `grammar.formats`; `output_ids`
    those that the client has; `paths` of kind "tool_calls" the field that holds each tool's schema, by its name."""

    info: ModelInfo
    kind: str
    source: str
    output_ids: tuple[int, ...] = ()
    paths: dict[str, str] = {}


class GrammarChecked(msgspec.Struct, tag=True, frozen=True):
    """Checker to gateway: the grammar for the engine, or why there is none. `breaks_off`: it forbids the output ids.
    `errors`: of tools whose schemas are why, by their paths."""

    grammar: str = ""
    error: str = ""
    errors: dict[str, str] = {}
    unsupported: str = ""
    breaks_off: bool = False


ToWorker = Start | Changes
ToGateway = Ready | LoadFailed | Step | Progress | GrammarChecked

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_checker = msgspec.msgpack.Decoder(CheckGrammar).decode
decode_to_gateway = msgspec.msgpack.Decoder(ToGateway).decode
decode_logprob = msgspec.msgpack.Decoder(TokenLogprob).decode

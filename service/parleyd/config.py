"""Settings, frozen at start. Each field is at once a flag, an environment variable and a row of docs/configuration.md.

cli.py fills them from argv and the environment; nobody else reads those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EMBEDDED_MODEL = "smollm2-135m-instruct"

_MAX_KEEPALIVE_S = 1_000_000  # gRPC counts them in milliseconds, up to 2**31


def _option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
) -> Any:
    """A settings field with what cli.py and the documentation need to know about it."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model to load, how, and which engine drives it. Sent to the worker as a whole."""

    model: str = _option(
        EMBEDDED_MODEL,
        "What to serve: a local folder, a .gguf file, or a Hub id such as Qwen/Qwen2.5-7B-Instruct.",
        metavar="MODEL",
    )
    revision: str | None = _option(None, "Branch, tag or commit of a Hub model.", metavar="REV")
    engine: str = _option(
        "batching",
        "The engine that generates: batching serves many requests at once, generate one at a time.",
        choices=("batching", "generate"),
    )
    dtype: str = _option(
        "auto", "Type of the weights; auto is the checkpoint's own.", choices=("auto", "float32", "bfloat16", "float16")
    )
    quantization: str = _option(
        "auto",
        "How to quantise the weights while they load, with a package of that name; auto keeps what the checkpoint has, "
        "also AWQ, GPTQ and compressed-tensors.",
        choices=("auto", "torchao-int8", "torchao-int4", "bitsandbytes-8bit", "bitsandbytes-4bit"),
    )
    device_map: str = _option(
        "auto",
        "Where accelerate places the model, such as cpu or cuda:0; auto: on one GPU, or on all if none has the room.",
        metavar="MAP",
    )
    attn_implementation: str = _option(
        "auto",
        "Attention of transformers under engine generate; auto lets it choose. Engine batching has its own.",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    allow_pickle: bool = _option(
        False, "Load pickled weights (pytorch_model.bin) of a local folder that has no safetensors files."
    )
    trust_remote_code: bool = _option(False, "Run Python code that comes with the model. Only for models you trust.")
    cache: str | None = _option(
        None, "Folder for converted models. Default: $XDG_CACHE_HOME/parley or ~/.cache/parley.", metavar="DIR"
    )
    max_running: int | None = _option(
        None,
        "Most requests that generate at the same time. Default: 64 with engine batching; engine generate runs one.",
        minimum=1,
    )
    max_context_tokens: int | None = _option(
        None,
        "Longest prompt and answer together. Default: the model's own context; less than that takes less memory.",
        minimum=16,
    )
    max_batch_tokens: int = _option(512, "Most tokens that engine batching computes in one step.", minimum=64)
    kv_cache_memory: float | None = _option(
        None, "GiB for the keys and values of engine batching. Default: a share of what is free.", minimum=0.001
    )
    attention: str = _option(
        "auto",
        "Attention of engine batching: auto takes the fastest kernels that work on the device; gather works on any.",
        choices=("auto", "gather", "triton", "varlen"),
    )
    cuda_graphs: bool = _option(True, "On a GPU, replay decode steps as CUDA graphs.")
    overlap: bool = _option(True, "On a GPU, launch each step before the tokens of the one ahead have arrived.")
    lean_layers: bool = _option(True, "Run the Llama, Mistral and Qwen families without transformers' own modules.")
    cpu_kernels: bool = _option(True, "On a CPU, compute in bfloat16 with kernels compiled for it.")
    bind_threads: bool = _option(
        True, "Bind the threads that compute on a CPU to a processor each, where there are as many."
    )
    packed_linear: bool = _option(True, "Lay bfloat16 weights out for the CPU, or widen them where it computes none.")
    four_bit_linear: bool = _option(
        True, "On a CPU, compute with the 4- and 8-bit weights of a .gguf file as they stand, where that is faster."
    )


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The gateway's own settings. Times are in seconds."""

    host: str = _option("127.0.0.1", "Address to listen on.", metavar="HOST")
    port: int = _option(50051, "Port to listen on; 0 takes a free one.", minimum=0, maximum=65535)
    served_model_name: str | None = _option(
        None,
        "Name under which the model is served. Default: the Hub id, or the folder's or file's base name.",
        metavar="NAME",
    )
    max_queue: int = _option(256, "Most requests that wait; 0 refuses whatever cannot start at once.", minimum=0)
    max_queue_tokens: int = _option(
        1_000_000, "Most tokens, of prompts and resumed output, that waiting requests have together.", minimum=1
    )
    refuse_late: bool = _option(
        True, "Refuse at once what cannot have a first token by its deadline, judged by how long recent requests took."
    )
    stream_interval: int = _option(
        1,
        "Tokens that each message of a stream waits for, except the first and the last message. Larger values save "
        "server and clients processor time where many answers stream fast.",
        minimum=1,
        maximum=256,
    )
    slow_reader_timeout: float = _option(
        60.0, "Seconds after which a client that reads nothing of its answer is cut off.", minimum=0.1
    )
    default_max_new_tokens: int = _option(
        512, "max_new_tokens of requests that set none, where the model sets none.", minimum=1
    )
    tool_format: str = _option(
        "auto",
        "How the model writes tool calls. auto: as its chat template does; none: no tools. hermes also serves models "
        "whose template knows no tools, by describing them in the system message.",
        choices=("auto", "hermes", "llama3", "mistral", "mistral11", "none"),
    )
    reasoning_format: str = _option(
        "auto",
        "How the model marks reasoning. think: <think>…</think>; none: all text is content; auto: think where the "
        "model's chat template or vocabulary has these markers.",
        choices=("auto", "think", "none"),
    )
    split_special_tokens: bool = _option(
        False,
        "Take special tokens that requests spell, such as <|im_end|>, as ordinary text, so that text cannot pose as "
        "another turn where those mark turns. By default they are tokens, as in transformers.",
    )
    drain_delay: float = _option(
        1.0, "After SIGTERM, seconds in which new calls are still served, for load balancers to notice.", minimum=0
    )
    drain_timeout: float = _option(30.0, "After that, seconds for open streams to finish.", minimum=0)
    max_message_bytes: int = _option(4 * 1024 * 1024, "Largest request message.", minimum=1024, maximum=2**31 - 1)
    keepalive_time: float = _option(
        30.0, "Seconds without traffic until the server pings a connection.", minimum=1, maximum=_MAX_KEEPALIVE_S
    )
    keepalive_timeout: float = _option(
        10.0, "Seconds until an unanswered ping closes the connection.", minimum=1, maximum=_MAX_KEEPALIVE_S
    )
    max_worker_restarts: int = _option(
        5, "Workers lost one after the other, without a token in between, until the service gives up.", minimum=0
    )
    worker_timeout: float = _option(
        60.0, "Seconds without progress, with work pending, after which a worker is taken as dead.", minimum=0.5
    )
    spare_worker: bool = _option(
        False,
        "Keep a second worker loaded, so that a dead one is replaced at once. Takes the model's memory twice; on a GPU "
        "give --kv-cache-memory too, since the first worker's cache takes most of what is free.",
    )
    admin_port: int | None = _option(
        None, "Port for /metrics, /healthz and /readyz over HTTP; 0 takes a free one.", minimum=0, maximum=65535
    )
    admin_host: str = _option(
        "127.0.0.1",
        "Address of the admin port, which has neither TLS nor credentials: one beyond this machine needs --insecure.",
        metavar="HOST",
    )
    otlp_endpoint: str | None = _option(
        None,
        "Where traces go: an OpenTelemetry collector that speaks gRPC, such as http://localhost:4317.",
        metavar="URL",
    )
    log_format: str = _option("text", "One line of text or one JSON object for each event.", choices=("text", "json"))
    log_level: str = _option("info", "How much to log on stderr.", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True, kw_only=True)
class SecuritySettings:
    """Who may connect and call: see security.md. Files are read again when they change."""

    tls_cert: str | None = _option(
        None, "PEM file with the server's certificate and those between it and its authority.", metavar="FILE"
    )
    tls_key: str | None = _option(None, "PEM file with that certificate's private key.", metavar="FILE")
    tls_client_ca: str | None = _option(
        None, "PEM file with authorities; every client must then show a certificate of theirs.", metavar="FILE"
    )
    api_keys: str | None = _option(
        None, "TOML file with the hashes of API keys; every call must then carry one.", metavar="FILE"
    )
    jwks: str | None = _option(
        None, "JSON Web Key Set; every call must then carry a token signed by one, or an API key.", metavar="FILE"
    )
    jwt_issuer: str | None = _option(None, "The issuer that tokens must name.", metavar="ISSUER")
    jwt_audience: str | None = _option(None, "The audience that tokens must name.", metavar="AUDIENCE")
    client_rules: str | None = _option(
        None, "TOML file with rules for clients that a certificate, a token or their address names.", metavar="FILE"
    )
    max_open_calls: int | None = _option(
        None, "Most calls that one client may have open. Default: no limit but the server's.", minimum=1
    )
    requests_per_minute: int | None = _option(
        None, "Most requests that one client may make in a minute. Default: no limit.", minimum=1
    )
    allow_priorities: bool = _option(
        False,
        "Let every client set a priority. Without credentials asked for, all may; with them, those whose rules say so.",
    )
    reflection: bool | None = _option(
        None, "Describe the service to those who ask. Default: only where no credentials are asked for."
    )
    insecure: bool = _option(False, "Listen in plain text even where others can reach the port.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of `parleyd serve`."""

    server: ServerSettings = field(default_factory=ServerSettings)
    security: SecuritySettings = field(default_factory=SecuritySettings)
    model: ModelSettings = field(default_factory=ModelSettings)

    @property
    def served_model_name(self) -> str:
        """The name clients see: the one given, else the Hub id, else the folder's or file's base name."""
        if self.server.served_model_name:
            return self.server.served_model_name
        path = Path(self.model.model)
        return path.resolve().name if path.exists() else self.model.model

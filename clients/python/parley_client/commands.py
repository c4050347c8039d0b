"""The commands of `parley` that do one thing and end: generate, model, health."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TextIO, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message as ProtoMessage

from parley_client.client import Client, Stream
from parley_client.credentials import PlainTextKey, channel_credentials, tls_credentials
from parley_client.errors import ConnectionFailed, DeadlineExceeded, ParleyError, Unauthenticated
from parley_client.health import HealthStatus
from parley_client.messages import Message, system, user
from parley_client.options import ChatOptions

T = TypeVar("T")

_INTERRUPT_CHECK_S = 0.1
_DIM, _NOT_DIM = "\x1b[2m", "\x1b[22m"
# As less shows them. A text may move the cursor by tabs and line ends alone.
_SHOWN = {code: f"^{code ^ 0x40:c}" for code in (*range(0x20), 0x7F) if code not in b"\t\n"}
_SHOWN |= {code: f"<U+{code:04X}>" for code in range(0x80, 0xA0)}


def connection(args: Namespace) -> dict[str, Any]:
    """A client's arguments, from the connection flags. Flags that make no sense end the program."""
    try:
        files = {"ca": args.tls_ca, "cert": args.client_cert, "key": args.client_key}
        credentials = tls_credentials(**files) if _has_tls(args) else None
        api_key = Path(args.api_key_file).read_text(errors="replace").strip() if args.api_key_file else args.api_key
        channel_credentials(args.target, credentials, api_key, args.insecure)
    except PlainTextKey as error:
        refusal = PlainTextKey(args.target, "connect with --tls or --tls-ca, or say --insecure")
        raise SystemExit(f"parley: error: {refusal}") from error
    except (OSError, ValueError) as error:
        raise SystemExit(f"parley: error: {error}") from error
    return {
        "target": args.target,
        "timeout": args.timeout,
        "credentials": credentials,
        "api_key": api_key,
        "insecure": args.insecure,
    }


@contextmanager
def connected(args: Namespace) -> Iterator[Client]:
    """A client for the connection flags, closed in the end."""
    client = Client(**connection(args))
    try:
        yield client
    finally:
        aside(client.close)


def _has_tls(args: Namespace) -> bool:
    return bool(args.tls or args.tls_ca or args.client_cert or args.client_key)


def generate(args: Namespace) -> int:
    """`parley generate PROMPT`: the answer's text as it is made, or the whole answer as JSON."""
    options = chat_options(args)
    options["num_return_sequences"], options["top_logprobs"] = args.num_return_sequences, args.top_logprobs
    options["response_format"] = {"choice": args.choice} if args.choice else args.response_format
    if not args.json and (args.num_return_sequences is not None or args.top_logprobs is not None):
        args.usage_error("--num-return-sequences and --top-logprobs need --json")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    messages = [*opening(args), user(prompt)]
    with connected(args) as client:
        if args.json:
            print_json(to_json(aside(lambda: client.chat(messages, **options)).proto))
            return 0
        print_pieces(aside(lambda: client.stream(messages, **options)))
    return 0


def model(args: Namespace) -> int:
    """`parley model`: what is served."""
    with connected(args) as client:
        info = aside(client.model_info)
    if args.json:
        print_json(to_json(info.proto))
        return 0
    defaults = ", ".join(f"{name}={value}" for name, value in info.default_generation_config.items())
    for label, value in (
        ("model", info.model),
        ("engine", info.engine),
        ("dtype", info.dtype),
        ("device", info.device),
        ("max context tokens", info.max_context_tokens),
        ("vocabulary size", info.vocab_size),
        ("capabilities", ", ".join(info.capabilities)),
        ("generation defaults", defaults),
    ):
        print(f"{label + ':':<20} {shown(str(value), sys.stdout)}")
    return 0


def health(args: Namespace) -> int:
    """`parley health`: whether the server takes calls; the exit code is 0 only then."""
    with connected(args) as client:
        status = aside(client.health)
    if args.json:
        print_json({"status": status.value})
    else:
        print(status)
    return 0 if status is HealthStatus.SERVING else 1


def opening(args: Namespace) -> list[Message]:
    """The messages that a conversation starts with."""
    return [] if args.system is None else [system(args.system)]


def chat_options(args: Namespace) -> ChatOptions:
    """The options of `chat` and `stream` from the generation flags."""
    return {
        "model": args.model,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "seed": args.seed,
        "stop_strings": args.stop,
    }


def print_pieces(stream: Stream) -> None:
    """Prints the text as it is made, and a line's end however it ends, so that an error's line stands alone.

    A terminal shows the model's reasoning too, dimmed, before the answer.
    """
    shows_reasoning, was_reasoning = sys.stdout.isatty(), False
    try:
        while (piece := aside(lambda: next(stream, None))) is not None:
            if shows_reasoning and piece.reasoning_content:
                print(_DIM + shown(piece.reasoning_content, sys.stdout), end=_NOT_DIM, flush=True)
                was_reasoning = True
            if was_reasoning and piece.content:
                print(end="\n\n")
                was_reasoning = False
            print(shown(piece.content, sys.stdout), end="", flush=True)
    except BaseException:
        if stream.reply.content or was_reasoning:
            print(flush=True)
        raise
    finally:
        aside(stream.cancel)
    print(flush=True)


def shown(text: str, stream: TextIO) -> str:
    """Text from elsewhere as `stream` may have it: a terminal is not to obey what a model or a server says."""
    return text.translate(_SHOWN) if stream.isatty() else text


def aside(call: Callable[[], T]) -> T:
    """What a call returns or raises, made in another thread.

    Ctrl-C strikes the main thread wherever it is: within gRPC it can leave a lock held that every later call of the
    channel waits for; here it leaves at most one that nobody else needs.
    """
    outcome: Future[T] = Future()

    def make() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    Thread(target=make, daemon=True).start()
    while not wait([outcome], _INTERRUPT_CHECK_S).done:  # a Ctrl-C just before the wait is only seen after it
        pass
    return outcome.result()


def to_json(proto: ProtoMessage) -> dict[str, Any]:
    """Protobuf's own JSON mapping under the contract's field names, so that any language's protobuf reads it back."""
    return json_format.MessageToDict(proto, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_json(value: dict[str, Any]) -> None:
    """Prints one line of JSON."""
    print(json.dumps(value))


def print_error(error: ParleyError, args: Namespace) -> None:
    """Tells on stderr, in one line, what went wrong, and which flag may help."""
    message = " ".join(f"{error.message}{_hint(error, args)}".split())
    print("parley: error:", shown(message, sys.stderr), file=sys.stderr)


def _hint(error: ParleyError, args: Namespace) -> str:
    match error:
        case ConnectionFailed():
            return f" ({_connection_hint(error.message, args)})"
        case DeadlineExceeded() if args.timeout:
            return f" ({'; '.join([f'--timeout is {args.timeout:g} s', *getattr(error, '__notes__', ())])})"
        case Unauthenticated():
            return " (show a key with --api-key-file or $PARLEY_API_KEY)"
    return ""


def _connection_hint(message: str, args: Namespace) -> str:
    if "certificate has expired" in message or "certificate is not yet valid" in message:
        return "that is the server's certificate, by this machine's clock"
    if "CERTIFICATE_VERIFY_FAILED" in message:
        return "give the authority of the server's certificate with --tls-ca"
    if "Hostname Verification" in message:
        return f"the server's certificate is not for the name in --target {args.target}"
    if _has_tls(args) and "Socket closed" in message:
        another = "another certificate than that of" if args.client_cert else "a certificate:"
        return f"the server may want {another} --client-cert and --client-key"
    # Of a name with several addresses the last one's error is told, which may be that nobody listens there.
    kind = "with TLS, and of an authority that --tls-ca names" if _has_tls(args) else "in plain text"
    return f"does a server listen at {args.target}, {kind}? --target names another"

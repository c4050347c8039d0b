"""The `parley` command: reads argv and the environment, runs a command of commands.py, turns failures into one line."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from parley_client import batch_job, commands, conversation
from parley_client.batch import MAX_REQUESTS
from parley_client.channel import DEFAULT_TARGET, check_target
from parley_client.errors import ParleyError

EXIT_FAILED = 1
EXIT_USAGE = 2  # as argparse itself
EXIT_INTERRUPTED = 130  # what shells give for a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `parley` with these arguments (default: the process's own) and returns its exit code."""
    _open_what_is_closed()
    try:
        args = build_parser().parse_args(argv)
        _tolerate_odd_characters()
        return _run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # then whoever read the output has gone, as with `| head`
            print(f"parley: error: the output cannot be written: {error.strerror}", file=sys.stderr)
        # The interpreter flushes once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _run(args: argparse.Namespace) -> int:
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except ParleyError as error:
        commands.print_error(error, args)
        return EXIT_FAILED


def _open_what_is_closed() -> None:
    # A standard stream that whoever started us has closed is None here, and its number would go to the next connection.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - stays open


def _tolerate_odd_characters() -> None:
    # An answer may hold characters that a terminal cannot show; that is no reason to die in its middle. Input that is
    # no text is the request's fault, and said as such when the request is built.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


class _Parser(argparse.ArgumentParser):
    """Tells wrong usage in one line, and where all the flags are."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # of --help: as the interpreter ends, `main` could no longer tell that it failed
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `parley`."""
    parser = _Parser(prog="parley", description="Chat with the model of a Parley server.")
    parser.add_argument("--version", action="version", version=f"parley {metadata.version('parley')}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    chat = subparsers.add_parser(
        "chat",
        help="talk with the model",
        description="Talk with the model: a line is a message, the answer appears as it is made. Ctrl-C stops an "
        "answer, Ctrl-D or /exit ends the program, /reset forgets the conversation. Reads from a pipe too.",
    )
    _add_connection(chat, timeout_help="seconds that each answer may take (default: no limit)")
    _add_generation(chat)
    chat.set_defaults(run=conversation.chat)

    generate = subparsers.add_parser(
        "generate",
        help="answer one prompt",
        description="Answer one prompt, printing the text as it is made.",
    )
    generate.add_argument("prompt", metavar="PROMPT", help='what to answer; "-" reads it from stdin')
    _add_connection(generate, timeout_help="seconds that the answer may take (default: no limit)")
    _add_generation(generate)
    _add_format(generate)
    generate.add_argument("--num-return-sequences", metavar="N", type=int, help="how many answers; needs --json")
    generate.add_argument("--top-logprobs", metavar="N", type=int, help="tell log-probabilities; needs --json")
    _add_json(generate, "print the whole answer as one JSON object, with token ids, usage and timings")
    generate.set_defaults(run=commands.generate, usage_error=generate.error)

    batch = subparsers.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer the requests in INPUT, one JSON object a line, and write a line with the result of each to "
        "OUTPUT as it finishes. Stopped and started again, it goes on with what has no answer yet. The exit code is 0 "
        "only if every request has been answered.",
        epilog='A line is a parley.v1.GenerateRequest in protobuf\'s JSON mapping, such as {"messages": [{"role": '
        '"ROLE_USER", "content": "Hi"}], "generation_config": {"max_new_tokens": 32}}, and may have an "id" beside its '
        'fields, which the result repeats. A result has the number of the input\'s "line", and "response" or "error".',
    )
    batch.add_argument("input", metavar="INPUT", type=_file_path, help="JSONL file of requests")
    batch.add_argument("output", metavar="OUTPUT", type=_file_path, help="JSONL file of results")
    batch.add_argument(
        "--chunk",
        metavar="N",
        type=_chunk_size,
        default=256,
        help="most requests of one call, 1 to 1024 (default: %(default)s)",
    )
    _add_connection(batch, timeout_help="seconds that each call may take (default: no limit)")
    batch.set_defaults(run=batch_job.batch)

    model = subparsers.add_parser("model", help="tell what is served", description="Tell what is served.")
    _add_connection(model, timeout_help="seconds to wait (default: %(default)g)", timeout=10.0)
    _add_json(model, "print one JSON object")
    model.set_defaults(run=commands.model)

    health = subparsers.add_parser(
        "health",
        help="tell whether the server takes calls",
        description="Tell whether the server takes calls. The exit code is 0 only if it is SERVING.",
    )
    _add_connection(health, timeout_help="seconds to wait (default: %(default)g)", timeout=10.0)
    _add_json(health, "print one JSON object")
    health.set_defaults(run=commands.health)
    return parser


def _add_connection(parser: argparse.ArgumentParser, timeout_help: str, timeout: float | None = None) -> None:
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--target",
        metavar="HOST:PORT",
        type=_target,
        default=os.environ.get("PARLEY_TARGET") or DEFAULT_TARGET,
        help=f"where the server listens (default: $PARLEY_TARGET, else {DEFAULT_TARGET})",
    )
    group.add_argument("--tls", action="store_true", help="connect with TLS; --tls-ca and --client-cert imply it")
    for flag, help_text in (
        ("--tls-ca", "PEM file with the authorities that the server's certificate may come from"),
        ("--client-cert", "PEM file with a certificate to show the server"),
        ("--client-key", "PEM file with that certificate's private key"),
    ):
        variable = "PARLEY_" + flag[2:].replace("-", "_").upper()
        default = os.environ.get(variable) or None
        group.add_argument(flag, metavar="FILE", default=default, help=f"{help_text} (default: ${variable})")
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with an API key or token to show the server (default: the one in $PARLEY_API_KEY)",
    )
    parser.set_defaults(api_key=os.environ.get("PARLEY_API_KEY") or None)
    group.add_argument("--insecure", action="store_true", help="let the API key cross the network in plain text")
    group.add_argument("--timeout", metavar="SECONDS", type=_seconds, default=timeout, help=timeout_help)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation", "Left out: the model's own defaults (`parley model` shows them).")
    group.add_argument("--system", metavar="TEXT", help="instructions to the model")
    group.add_argument("--model", metavar="NAME", help="the served model's name (default: whatever is served)")
    group.add_argument("--max-new-tokens", metavar="N", type=int, help="the most tokens to generate")
    group.add_argument("--temperature", metavar="X", type=float, help="0 to 10; 0 takes the most likely token always")
    group.add_argument("--top-p", metavar="X", type=float, help="draw among the most likely tokens up to this sum")
    group.add_argument("--top-k", metavar="N", type=int, help="draw among this many most likely tokens; 0 is off")
    group.add_argument("--min-p", metavar="X", type=float, help="draw among tokens at least this relatively likely")
    group.add_argument("--repetition-penalty", metavar="X", type=float, help="above 1 avoids repetition")
    group.add_argument("--presence-penalty", metavar="X", type=float, help="-2 to 2; above 0 avoids used tokens")
    group.add_argument("--frequency-penalty", metavar="X", type=float, help="-2 to 2; above 0 avoids frequent tokens")
    group.add_argument("--seed", metavar="N", type=int, help="makes the draws repeatable")
    group.add_argument("--stop", metavar="TEXT", action="append", help="ends the answer; may be given several times")


def _add_format(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("form of the answer", "Left out: free text.").add_mutually_exclusive_group()
    form: dict[str, Any] = {"dest": "response_format"}
    group.add_argument("--json-object", action="store_const", const="json_object", help="any JSON object", **form)
    group.add_argument(
        "--json-schema",
        metavar="FILE",
        type=lambda path: {"json_schema": _file_text(path)},
        help="JSON of the JSON Schema in this file",
        **form,
    )
    group.add_argument(
        "--regex", metavar="REGEX", type=lambda regex: {"regex": regex}, help="text that matches as a whole", **form
    )
    group.add_argument(
        "--grammar",
        metavar="FILE",
        type=lambda path: {"grammar": _file_text(path)},
        help="text of the GBNF grammar in this file",
        **form,
    )
    group.add_argument("--choice", metavar="TEXT", action="append", help="one of the texts given so")


def _target(text: str) -> str:
    try:
        check_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _file_path(text: str) -> Path:
    if text == "-":
        raise argparse.ArgumentTypeError("'-' is no file: a batch is read twice, and its results are looked through")
    return Path(text)


def _file_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from error


def _add_json(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--json", action="store_true", help=help_text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return seconds


def _chunk_size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_REQUESTS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MAX_REQUESTS}")
    return int(text)

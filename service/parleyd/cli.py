"""`parleyd serve`: flags and environment to settings, then the gateway. The only reader of argv and environment."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from parleyd.config import ModelSettings, SecuritySettings, ServerSettings, Settings
from parleyd.errors import StartupError

_logger = logging.getLogger("parleyd")

BOOLEANS: tuple[Any, ...] = (bool, bool | None)
_NUMBERS: dict[Any, type] = {int: int, int | None: int, float: float, float | None: float}
_CLIENTS_VARIABLES = {"PARLEY_" + name for name in ("TARGET", "API_KEY", "TLS_CA", "CLIENT_CERT", "CLIENT_KEY")}
# Kubernetes tells every pod of each service in its namespace, such as "parley", "parley-canary" or "parley-admin".
_SERVICE_VARIABLE = re.compile(
    r"PARLEY_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_LINK = re.compile("(tcp|udp|sctp)://")  # the value of the one variable that may have a setting's name
_UTF_8 = re.compile(r"[^\ud800-\udfff]*")  # what can be sent on; else it holds halves of surrogate pairs
_MAX_NUMBER = 2**31 - 1  # of settings without a limit of their own: what they go to can count no further, or less
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Exit code: 0 after a clean shutdown, 1 if the service could not run, 2 for usage."""
    _open_what_is_closed()
    try:
        arguments = vars(build_parser(os.environ).parse_args(argv))
        if arguments["command"] == "keys":
            return _new_key(arguments["name"])
        arguments["cache"] = arguments["cache"] or _default_cache_dir(os.environ)
        settings = Settings(
            server=_pick(ServerSettings, arguments),
            security=_pick(SecuritySettings, arguments),
            model=_pick(ModelSettings, arguments),
        )
        _run(settings)
    except StartupError as error:
        print(f"parleyd: error: {error}", file=sys.stderr)
        return 1
    return 0


def _open_what_is_closed() -> None:
    # A standard stream that whoever started us has closed is None here, and its number would go to the next connection.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - stays open


class _Parser(argparse.ArgumentParser):
    """Tells wrong usage in one line, and where all the flags are.

    `complaint` is about the environment: told where the command that it is for runs, not where another or help is asked
    for.
    """

    complaint: str | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        if self.complaint:
            self.error(self.complaint)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        try:
            sys.stdout.flush()  # of --help: as the interpreter ends, nobody could tell any more that it failed
        except OSError as error:
            _let_output_go_nowhere()
            is_unread = isinstance(error, BrokenPipeError)  # as with `| head`
            message = None if is_unread else f"parleyd: error: the output cannot be written: {error.strerror}\n"
            status = 1
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """The parser; defaults come from `environ` where it has them, and a bad value there is a usage error of
    `serve` too."""
    parser = _Parser(prog="parleyd", description="Serves chat with a Hugging Face model over gRPC.")
    parser.add_argument("--version", action="version", version=f"parleyd {metadata.version('parley')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model",
        description="Serves a model until SIGTERM. Prints one line, `listening on HOST:PORT`, once the port is bound; "
        "whether the model is loaded is the health service's to tell.",
        epilog="Every flag can also be given as an environment variable: --max-queue as PARLEY_MAX_QUEUE.",
    )
    keys = commands.add_parser("keys", help="make API keys").add_subparsers(required=True, metavar="COMMAND")
    new = keys.add_parser(
        "new",
        help="make an API key",
        description="Makes an API key. Prints what the file of --api-keys must hold on stdout and the key, which is "
        "shown this once, on stderr: `parleyd keys new --name billing >> keys.toml`.",
    )
    new.add_argument("--name", required=True, type=_parse_name, metavar="NAME", help="whose key it is")
    known: set[str] = set()
    for title, settings in (("model", ModelSettings), ("server", ServerSettings), ("security", SecuritySettings)):
        group = serve.add_argument_group(title)
        for option in fields(settings):
            _add_option(group, serve, option, get_type_hints(settings)[option.name], environ)
            known.add(variable_of(option.name))
    for name in environ:
        if name.startswith("PARLEY_") and name not in known and not _is_others(name, environ[name]):
            serve.complaint = f"environment variable {name}: there is no such setting"
    return parser


def _is_others(name: str, value: str) -> bool:
    """Whether a variable is no setting of ours although it begins like one, or is named like one."""
    is_link = name.endswith("_PORT") and _SERVICE_LINK.match(value)
    return bool(is_link or name in _CLIENTS_VARIABLES or _SERVICE_VARIABLE.fullmatch(name))


def _add_option(group: Any, parser: _Parser, option: Field[Any], hint: Any, environ: Mapping[str, str]) -> None:
    flag, variable = flag_of(option.name), variable_of(option.name)
    about = dict(option.metadata)
    parse = _parser_of(hint, about)
    default = option.default
    if variable in environ and not _is_others(variable, environ[variable]):
        try:
            default = parse(environ[variable])
        except argparse.ArgumentTypeError as error:
            parser.complaint = f"environment variable {variable}: {error}"
    text = about["help"].replace("%", "%%") + ("" if default is None else f" (default: {default})")
    if hint in BOOLEANS:
        group.add_argument(flag, dest=option.name, action=argparse.BooleanOptionalAction, default=default, help=text)
    else:
        metavar = "|".join(about["choices"]) if about["choices"] else about["metavar"] or "N"
        group.add_argument(flag, dest=option.name, type=parse, default=default, metavar=metavar, help=text)


def flag_of(name: str) -> str:
    """The flag of a settings field."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a settings field."""
    return "PARLEY_" + name.upper()


def _parser_of(hint: Any, about: dict[str, Any]) -> Any:
    """A function from text to the option's value, which raises ArgumentTypeError with the allowed range."""
    if hint in BOOLEANS:
        return _parse_bool
    if (kind := _NUMBERS.get(hint)) is not None:
        return lambda text: _parse_number(text, kind, about["minimum"], about["maximum"])
    if about["choices"]:
        return lambda text: _parse_choice(text, about["choices"])
    return _parse_host if about["metavar"] == "HOST" else str


def _parse_bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_TRUE + _FALSE)}")
    return text.lower() in _TRUE


def _parse_number(text: str, kind: type, minimum: float | None, maximum: float | None) -> float:
    low = -math.inf if minimum is None else minimum
    high = _MAX_NUMBER if maximum is None else maximum
    allowed = f"{kind.__name__} of {low} to {high}"
    try:
        value: float = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no {allowed}") from error
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is no {allowed}")
    return value


def _parse_choice(text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
    return text


def _parse_host(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _parse_name(text: str) -> str:
    if not re.fullmatch(r"[\w.@:/-]{1,256}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 256 letters, digits, and any of . _ @ : / -")
    return text


def _new_key(name: str) -> int:
    from parleyd.security.new_key import entry_for, new_key

    key = new_key()
    try:
        print(entry_for(name, key), flush=True)
    except OSError as error:
        _let_output_go_nowhere()
        raise StartupError(f"the key's entry cannot be written: {error.strerror}") from error
    print(key, file=sys.stderr)
    return 0


def _pick(settings: type[Any], arguments: dict[str, Any]) -> Any:
    values = {option.name: arguments[option.name] for option in fields(settings)}
    for name, value in values.items():
        if isinstance(value, str) and not _UTF_8.fullmatch(value):
            raise StartupError(f"{flag_of(name)} {value!r} is no UTF-8")
    return settings(**values)


def _default_cache_dir(environ: Mapping[str, str]) -> str:
    try:
        return str(Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parley")
    except RuntimeError as error:
        raise StartupError("HOME is not set: name a folder for converted models with --cache") from error


def _run(settings: Settings) -> None:
    _silence_libraries(settings.server.log_format)
    # The tokenizers library would begin a thread for each processor, for batches of one, and panic where it gets none:
    # no `except Exception` sees that, and the call would never end.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        os.getcwd()  # transformers asks for it
    except FileNotFoundError as error:
        raise StartupError("the folder that it is started in has been removed: start it in another") from error
    try:
        from parleyd.gateway.server import serve
    except ModuleNotFoundError as error:
        raise StartupError(
            f"module {error.name} is missing: run `pip install '.[service]'` in Parley's folder"
        ) from error
    from parleyd.telemetry import logging as telemetry_logging

    telemetry_logging.configure(settings.server.log_level, settings.server.log_format)
    try:
        asyncio.run(serve(settings, announce=_announce))
    except StartupError as error:
        if settings.server.log_format == "text":
            telemetry_logging.tell(f"parleyd: error: {error}")
        else:
            _logger.error("%s", error)
        sys.exit(1)


def _silence_libraries(log_format: str) -> None:
    """stderr is for events, each a line of text or JSON. Libraries look at these as they are imported, here and in the
    worker."""
    # One line for each handshake that fails, for example; what we must know gRPC raises as well.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if log_format == "json" or not sys.stderr.isatty():
        # Progress bars, of downloads and conversions.
        os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")


def _announce(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError as error:  # whoever started us may have read the first line, and gone
        _logger.warning("stdout cannot be written (%s): %s", error.strerror, line)
        _let_output_go_nowhere()


def _let_output_go_nowhere() -> None:
    # The interpreter flushes once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

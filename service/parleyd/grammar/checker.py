"""Tells the gateway whether a request's grammar can be followed, in a process that may die of it.

Compilers recurse and multiply: some short grammars take minutes, gigabytes or the whole stack. Here that costs a
process that is started again, and neither the streams of the worker nor the gateway.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
from functools import lru_cache
from typing import Any

from parleyd.grammar.compiler import (
    Clock,
    GrammarError,
    UnknownTokenizer,
    compile_grammar,
    load_tokenizer,
    raise_error,
    replay,
)
from parleyd.grammar.formats import to_grammar
from parleyd.ipc.framing import read_frame, send_frame
from parleyd.ipc.messages import CheckGrammar, GrammarChecked, decode_to_checker, encode

# Less than threads have in the worker, so that what fits here fits there.
_STACK_BYTES = 1024 * 1024

_tokenizer: Any = lru_cache(maxsize=1)(load_tokenizer)


def run(fd: int) -> None:
    """Answers one message after the other until the gateway goes away."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a service manager's reach all; the gateway decides when we go
    threading.stack_size(_STACK_BYTES)
    sock = socket.socket(fileno=fd)
    stream = sock.makefile("rb")
    thread = threading.Thread(target=_serve, args=(sock, stream), daemon=True)
    thread.start()
    thread.join()


def _serve(sock: socket.socket, stream: Any) -> None:
    while (payload := read_frame(stream)) is not None:
        send_frame(sock, encode(check(decode_to_checker(payload))))


def check(message: CheckGrammar) -> GrammarChecked:
    """Compiles the grammar, makes the mask of its first token, and replays the ids that the client already has."""
    info = message.info
    try:
        tokenizer = _tokenizer(info.tokenizer_dir, info.vocab_size, info.eos_token_ids)
        grammar = to_grammar(message.kind, message.source)
        matcher = compile_grammar(tokenizer, grammar)
        clock = Clock()
        with clock.timing():
            matcher.compute_bitmask()
            raise_error(matcher)
        num_replayed = replay(matcher, message.output_ids, clock)
    except UnknownTokenizer as error:
        return GrammarChecked(unsupported=str(error))
    except GrammarError as error:
        return GrammarChecked(error=str(error), errors=_errors_of_tools(tokenizer, message))
    if num_replayed < len(message.output_ids):
        return GrammarChecked(breaks_off=True)
    return GrammarChecked(grammar=grammar)


def _errors_of_tools(tokenizer: Any, message: CheckGrammar) -> dict[str, str]:
    errors = {}
    tools = json.loads(message.source)["tools"] if message.paths else {}
    for name, (_, _, schema) in tools.items():
        try:
            compile_grammar(tokenizer, to_grammar("json_schema", json.dumps(schema)))
        except GrammarError as error:
            errors[message.paths[name]] = str(error)
    return errors

"""`parley chat`: a conversation on the terminal, or over a pipe."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace

from parley_client import commands
from parley_client.client import Client
from parley_client.errors import ParleyError
from parley_client.messages import user
from parley_client.request import AnyMessage


def chat(args: Namespace) -> int:
    """`parley chat`: answers line after line until the input ends.

    On a terminal a failed answer is told and the conversation goes on without it; a pipe has nobody to react, so there
    the first failure ends the program.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and history)
    with Client(args.target, timeout=args.timeout) as client:
        conversation = Conversation(client, args)
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D quits)" if interactive else "")
                continue
            if line == "/exit":
                return 0
            if line == "/reset":
                conversation.reset()
            elif line:
                try:
                    conversation.answer(line)
                except ParleyError as error:
                    if not interactive:
                        raise
                    commands.print_error(error)
        if interactive:
            print()
    return 0


class Conversation:
    """The messages so far, and how the next answer is made."""

    def __init__(self, client: Client, args: Namespace) -> None:
        self._client = client
        self._opening = commands.opening(args)
        self._options = commands.chat_options(args)
        self.messages: list[AnyMessage] = []
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the instructions."""
        self.messages = list(self._opening)

    def answer(self, text: str) -> None:
        """Prints the answer to `text` as it is made. Ctrl-C stops it; what was shown by then counts as said.

        Raises:
            ParleyError: there is no answer; the conversation is as before.
        """
        question = user(text)
        stream = self._client.stream([*self.messages, question], **self._options)
        try:
            with stream:
                for piece in stream:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        finally:
            print(flush=True)
        if stream.reply.content:
            self.messages += [question, stream.reply]

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
    with commands.connected(args) as client:
        conversation = Conversation(client, args)
        while True:
            try:
                if not _take_turn(conversation, input("> " if interactive else "").strip()):
                    return 0
            except EOFError:
                print(end="\n" if interactive else "")
                return 0
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\n(Ctrl-D or /exit quits)")
            except ParleyError as error:
                if not interactive:
                    raise
                commands.print_error(error, args)


def _take_turn(conversation: Conversation, line: str) -> bool:
    """Does what the line asks for; whether the conversation goes on."""
    if line == "/exit":
        return False
    if line == "/reset":
        conversation.reset()
    elif line:
        conversation.answer(line)
    return True


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
        """Prints the answer to `text` as it is made. Ctrl-C stops it; what had arrived by then counts as said.

        Raises:
            ParleyError: there is no answer; the conversation is as before.
        """
        question = user(text)
        stream = commands.aside(lambda: self._client.stream([*self.messages, question], **self._options))
        with contextlib.suppress(KeyboardInterrupt):
            commands.print_pieces(stream)
        if (reply := stream.reply).content:
            self.messages += [question, reply]

"""The TCP connections of the gRPC server, which gRPC itself lets nobody at."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import psutil  # type: ignore[import-untyped]


def hang_up(port: int) -> None:
    """Sends the end of every connection that clients have with our `port`, after what is on its way to them.

    To be called before `grpc.aio.Server.stop`: that one drops calls that arrive before their client has noticed, which
    then end with CANCELLED, a status that nobody tries again. A connection that ends makes them UNAVAILABLE.
    """
    for connection in psutil.Process().net_connections("tcp"):
        if connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED:
            # Its client may have ended it meanwhile.
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as ours:
                ours.shutdown(socket.SHUT_WR)

"""The TCP connections of the gRPC server, which gRPC itself lets nobody at."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import psutil  # type: ignore[import-untyped]


def hang_up(port: int) -> None:
    """Lets nobody connect to our `port` any more, and sends the end of every connection after what is on its way.

    To be called before `grpc.aio.Server.stop`: that one drops calls that arrive before their client has noticed, which
    then end with CANCELLED, a status that nobody tries again. A connection that ends makes them UNAVAILABLE.
    """
    # First: a client whose connection ends comes back at once. gRPC's log calls it an error of `accept4`.
    _shut_down(port, psutil.CONN_LISTEN, socket.SHUT_RD)
    _shut_down(port, psutil.CONN_ESTABLISHED, socket.SHUT_WR)


def _shut_down(port: int, status: str, how: int) -> None:
    for connection in psutil.Process().net_connections("tcp"):
        if connection.laddr.port == port and connection.status == status:
            # Its client may have ended it meanwhile.
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as ours:
                ours.shutdown(how)

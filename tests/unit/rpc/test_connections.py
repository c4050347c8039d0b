from __future__ import annotations

import asyncio
import socket

import grpc.aio
import pytest

from parleyd.rpc.connections import hang_up


def test_connections_end_and_none_is_made_after() -> None:
    asyncio.run(_hang_up_on_one())


async def _hang_up_on_one() -> None:
    others = socket.create_server(("127.0.0.1", 0))  # as the admin port is
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read(1)  # the server's settings: gRPC knows of the connection
        await asyncio.to_thread(hang_up, port)
        await asyncio.wait_for(reader.read(), 5)
        writer.close()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
            pass
        socket.create_connection(others.getsockname(), 5).close()
    finally:
        others.close()
        await server.stop(None)

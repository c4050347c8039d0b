"""Server reflection under both of its names, so that old and new tools find it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

from parley.v1 import errors_pb2  # noqa: F401 - what no other file imports can be asked for too

_V1_SERVICE = "grpc.reflection.v1.ServerReflection"


def add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Serves `services` and reflection itself. v1 has v1alpha's messages under another name."""
    _add_v1_descriptor()
    pool = _PoolWithMethods()
    names = (*services, reflection.SERVICE_NAME, _V1_SERVICE)
    reflection.enable_server_reflection(names, server, pool)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names, pool).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(_V1_SERVICE, {"ServerReflectionInfo": handler})]
    )


class _PoolWithMethods:
    """The default pool, in which methods are symbols too, as the protocol wants it."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """See DescriptorPool."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


def _add_v1_descriptor() -> None:
    """Tells the descriptor pool of the v1 name, so that the service can describe itself under both."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    renamed = text_format.MessageToString(file).replace("v1alpha", "v1")
    file = text_format.Parse(renamed, descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())

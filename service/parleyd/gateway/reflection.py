"""Server reflection under both of its names, so that old and new tools find it."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

_V1_SERVICE = "grpc.reflection.v1.ServerReflection"


def add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Serves `services` and reflection itself. v1 has v1alpha's messages under another name."""
    _add_v1_descriptor()
    names = (*services, reflection.SERVICE_NAME, _V1_SERVICE)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(_V1_SERVICE, {"ServerReflectionInfo": handler})]
    )


def _add_v1_descriptor() -> None:
    """Tells the descriptor pool of the v1 name, so that the service can describe itself under both."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    renamed = text_format.MessageToString(file).replace("v1alpha", "v1")
    file = text_format.Parse(renamed, descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())

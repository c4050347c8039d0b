"""`OrcaLoadReport` as cncf/xds has it, whatever service/parleyd/rpc/load_report.py takes it to be."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_DESCRIPTOR = Path(__file__).parents[1] / "data" / "orca_load_report.binpb"

_file = descriptor_pb2.FileDescriptorProto.FromString(_DESCRIPTOR.read_bytes())
del _file.dependency[:]  # rules of validation, which only its options use
_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(_file.SerializeToString())

OrcaLoadReport = message_factory.GetMessageClass(_pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport"))

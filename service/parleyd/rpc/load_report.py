"""`xds.data.orca.v3.OrcaLoadReport`, the load report that weighted balancers read (https://github.com/cncf/xds).

Described here, not imported from xds-protos: that package brings files of googleapis-common-protos and of
opentelemetry-proto in other versions, and which of them win is left to the order in which pip installs them.
"""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

# Of the trailing metadata that holds one, serialised.
LOAD_REPORT_KEY = "endpoint-load-metrics-bin"

_FIELD = descriptor_pb2.FieldDescriptorProto
_DOUBLES = {"mem_utilization": 2, "rps_fractional": 6, "eps": 7, "application_utilization": 9}
_NAMED_METRICS = 8


def _describe() -> type[Message]:
    """The fields that we set, in a pool of their own, where they collide with nobody's."""
    file = descriptor_pb2.FileDescriptorProto(
        name="xds/data/orca/v3/orca_load_report.proto", package="xds.data.orca.v3", syntax="proto3"
    )
    report = file.message_type.add(name="OrcaLoadReport")
    for name, number in _DOUBLES.items():
        report.field.add(name=name, number=number, type=_FIELD.TYPE_DOUBLE, label=_FIELD.LABEL_OPTIONAL)
    entry = report.nested_type.add(name="NamedMetricsEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=_FIELD.TYPE_DOUBLE, label=_FIELD.LABEL_OPTIONAL)
    report.field.add(
        name="named_metrics",
        number=_NAMED_METRICS,
        type=_FIELD.TYPE_MESSAGE,
        type_name=".xds.data.orca.v3.OrcaLoadReport.NamedMetricsEntry",
        label=_FIELD.LABEL_REPEATED,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport"))


OrcaLoadReport = _describe()

"""The protobuf messages of remote-write 1.0, as prometheus/prompb numbers their fields.

Owns: the descriptors. A request keeps its series as bytes (on the wire an embedded message and a
byte string are the same), so that each can be looked at before it is parsed. Metadata, exemplars
and native histograms are fields we do not name, which protobuf skips.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def _message_classes() -> tuple[Any, Any]:
    """Return (request with its series as bytes, series), as prometheus/prompb defines them."""
    kinds = descriptor_pb2.FieldDescriptorProto
    package = "fleetcast.prometheus.wire"
    file = descriptor_pb2.FileDescriptorProto(name="remote_write.proto", package=package, syntax="proto3")

    def message(name: str, *fields: tuple[str, int, bool, str]) -> None:
        made = file.message_type.add(name=name)
        for number, (field, kind, is_repeated, type_name) in enumerate(fields, start=1):
            made.field.add(
                name=field,
                number=number,
                type=kind,
                label=kinds.LABEL_REPEATED if is_repeated else kinds.LABEL_OPTIONAL,
                type_name=type_name or None,
            )

    message("Label", ("name", kinds.TYPE_STRING, False, ""), ("value", kinds.TYPE_STRING, False, ""))
    message("Sample", ("value", kinds.TYPE_DOUBLE, False, ""), ("timestamp", kinds.TYPE_INT64, False, ""))
    message(
        "TimeSeries",
        ("labels", kinds.TYPE_MESSAGE, True, f".{package}.Label"),
        ("samples", kinds.TYPE_MESSAGE, True, f".{package}.Sample"),
    )
    message("WriteRequest", ("timeseries", kinds.TYPE_BYTES, True, ""))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    request = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.WriteRequest"))
    series = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.TimeSeries"))
    return request, series


WriteRequestMessage, TimeSeriesMessage = _message_classes()

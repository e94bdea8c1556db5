"""A collector of traces and metrics on loopback, as OpenTelemetry's protocol has it."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_api
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_api
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """Keeps what it is sent while entered. `tokens` are the authorizations that came with it."""

    def __init__(self) -> None:
        self.traces: list[trace_api.ExportTraceServiceRequest] = []
        self.metrics: list[metrics_api.ExportMetricsServiceRequest] = []
        self.tokens: set[str] = set()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_grpc.add_TraceServiceServicer_to_server(_Traces(self), self._server)  # type: ignore[no-untyped-call]
        metrics_grpc.add_MetricsServiceServicer_to_server(_Metrics(self), self._server)  # type: ignore[no-untyped-call]
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()

    def note(self, context: Any) -> None:
        """Notes with which authorization something came."""
        self.tokens |= {str(value) for key, value in context.invocation_metadata() if key == "authorization"}

    @property
    def bytes(self) -> bytes:
        """All that was received."""
        return b"".join(request.SerializeToString() for request in [*self.traces, *self.metrics])

    @property
    def spans(self) -> list[Span]:
        """All spans."""
        return [
            span
            for request in self.traces
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def names(self) -> set[str]:
        """The names of all metrics."""
        return {
            metric.name
            for request in self.metrics
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


class _Traces(trace_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> trace_api.ExportTraceServiceResponse:
        self._collector.note(context)
        self._collector.traces.append(request)
        return trace_api.ExportTraceServiceResponse()


class _Metrics(metrics_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> metrics_api.ExportMetricsServiceResponse:
        self._collector.note(context)
        self._collector.metrics.append(request)
        return metrics_api.ExportMetricsServiceResponse()


def values(attributes: Iterable[KeyValue]) -> dict[str, object]:
    """Attributes as a mapping."""
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None

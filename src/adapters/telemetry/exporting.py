"""Where measures go: to a collector by OTLP, to whoever scrapes the Prometheus page. Never in a turn's way."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import NoOpTracerProvider
from opentelemetry.trace import TracerProvider as Tracers
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

_log = logging.getLogger(__name__)

_LAST_WORDS = 2.0
"""Seconds that a stop gives to what has not been delivered."""


class ExportsError(Exception):
    """Something in the OTEL_ settings can't be used. Quotes none of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """What goes where. `endpoint` is a collector's URL, `page` the host and port of the Prometheus page."""

    service: str
    endpoint: str | None = None
    traces: bool = True
    metrics: bool = True
    page: tuple[str, int] | None = None


class Exporting:
    """The providers of metrics and traces, from its making to `aclose`.

    What the settings leave open the OpenTelemetry SDK reads from the OTEL_ variables: samplers, headers,
    certificates, intervals. Raises ExportsError, and OSError where the page's address can't be listened on.
    """

    def __init__(self, exports: Exports) -> None:
        # It says each time what Delivery says once.
        logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
        resource = Resource.create({SERVICE_NAME: exports.service, SERVICE_INSTANCE_ID: str(uuid4())})
        self._ends: list[Callable[[], object]] = []
        self._cuts: list[Callable[[], object]] = []
        self.page: int | None = None
        """The port of the Prometheus page."""
        with _named():
            self.tracers = self._tracers(exports, resource)
            readers = self._pushed(exports)
        if exports.page is not None:
            readers.append(self._paged(exports.page))
        with _named():
            self.meters = MeterProvider(readers, resource, shutdown_on_exit=False)
        self._ends.append(self.meters.shutdown)

    async def aclose(self) -> None:
        """Delivers what is left, within two seconds. Nothing that is told later counts."""
        loop = asyncio.get_running_loop()
        ended = [self._end(end, loop) for end in self._ends]
        _, late = await asyncio.wait(ended, timeout=_LAST_WORDS) if ended else ((), ())
        if late:
            _log.warning("the last metrics and traces could not be delivered")
        for cut in self._cuts:
            cut()
        for future in late:
            future.cancel()

    def _end(self, end: Callable[[], object], loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
        """Runs in a thread that keeps nobody from leaving."""
        future = loop.create_future()

        def tell() -> None:
            if not future.done():
                future.set_result(None)

        def run() -> None:
            try:
                end()
            except Exception as error:  # noqa: BLE001 - the library's own, in its own words
                _log.warning("metrics or traces could not be ended: %s", type(error).__name__)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(tell)

        threading.Thread(target=run, name="telemetry-end", daemon=True).start()
        return future

    def _tracers(self, exports: Exports, resource: Resource) -> Tracers:
        if exports.endpoint is None or not exports.traces:
            return NoOpTracerProvider()
        exporter = _Spans(endpoint=exports.endpoint)
        self._cuts.append(exporter.shutdown)
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._ends.append(provider.shutdown)
        return provider

    def _pushed(self, exports: Exports) -> list[MetricReader]:
        if exports.endpoint is None or not exports.metrics:
            return []
        exporter = _Metrics(endpoint=exports.endpoint)
        self._cuts.append(exporter.shutdown)
        return [PeriodicExportingMetricReader(exporter)]

    def _paged(self, address: tuple[str, int]) -> MetricReader:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        reader = PrometheusMetricReader(scope_info_enabled=False, registry=registry)
        host, port = address
        server, _ = start_http_server(port, host, registry)
        self.page = server.server_port

        def close() -> None:
            server.shutdown()
            server.server_close()

        self._ends.append(close)
        return reader


@contextmanager
def _named() -> Iterator[None]:
    """Names what is at fault. Each setting has an exception of its own, OSError for a file among them."""
    try:
        yield
    except Exception as error:
        raise ExportsError("an OTEL_ setting can't be used") from error


class _Delivery:
    """Says once that nothing arrives, and once that it does again."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._failing = False

    def told(self, arrived: bool) -> None:
        """How a delivery went."""
        if not arrived and not self._failing:
            _log.warning("%s can't be delivered: the collector does not take them", self._what)
        elif arrived and self._failing:
            _log.info("%s are delivered again", self._what)
        self._failing = not arrived


class _Spans(OTLPSpanExporter):
    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint=endpoint)
        self._delivery = _Delivery("traces")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        self._delivery.told(result is SpanExportResult.SUCCESS)
        return result


class _Metrics(OTLPMetricExporter):
    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint=endpoint)
        self._delivery = _Delivery("metrics")

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        result = super().export(metrics_data, timeout_millis, **kwargs)
        self._delivery.told(result is MetricExportResult.SUCCESS)
        return result

"""Measuring, where that is configured. Without it nothing of OpenTelemetry is imported."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from core.ports.telemetry import UNMEASURED, Telemetry
from entrypoints.settings import OtelExporter, Settings, SettingsError

_log = logging.getLogger(__name__)


@asynccontextmanager
async def measuring(settings: Settings) -> AsyncIterator[Telemetry]:
    """Measures until left, and then delivers what is left of it, within two seconds.

    Raises SettingsError, also where the libraries are not there or the metrics' address can't be listened on.
    """
    if not settings.measured:
        yield UNMEASURED
        return
    try:
        from adapters.telemetry import Exporting, Exports, ExportsError, Moments
    except ModuleNotFoundError as error:
        raise SettingsError(["OTEL_, VIDA_METRICS_LISTEN: need the extra `otel` of this package"]) from error
    exports = Exports(
        service=settings.otel_service_name,
        endpoint=settings.otel_endpoint,
        traces=settings.otel_traces is OtelExporter.OTLP,
        metrics=settings.otel_metrics is OtelExporter.OTLP,
        page=settings.metrics_address,
    )
    try:
        exporting = Exporting(exports)
    except ExportsError as error:
        raise SettingsError([str(error)]) from error
    except OSError as error:
        raise SettingsError([f"VIDA_METRICS_LISTEN: can't listen there ({type(error).__name__})"]) from error
    if exporting.page is not None:
        _log.info("metrics are on port %d", exporting.page)
    try:
        yield Moments(exporting.meters, exporting.tracers)
    finally:
        await exporting.aclose()

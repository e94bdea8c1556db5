"""Metrics and traces by OpenTelemetry, with its conventions for generative AI. Imported only where configured."""

from adapters.telemetry.exporting import Exporting, Exports, ExportsError
from adapters.telemetry.moments import Moments

__all__ = ["Exporting", "Exports", "ExportsError", "Moments"]

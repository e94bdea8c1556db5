"""A provider for the tests: Responses and Conversations over HTTP on loopback, with faults on demand."""

from fake_provider.script import (
    Answer,
    Break,
    Call,
    Ending,
    ErrorEvent,
    Failed,
    Gate,
    HttpError,
    Incomplete,
    Pause,
    Reasoning,
    Text,
    rate_limited,
)
from fake_provider.server import FakeProvider
from fake_provider.wire import Request

__all__ = [
    "Answer",
    "Break",
    "Call",
    "Ending",
    "ErrorEvent",
    "Failed",
    "FakeProvider",
    "Gate",
    "HttpError",
    "Incomplete",
    "Pause",
    "Reasoning",
    "Request",
    "Text",
    "rate_limited",
]

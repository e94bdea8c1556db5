"""A provider for the tests: Responses and Conversations over HTTP on loopback, with faults on demand."""

from fake_provider.faults import Rule, fault, rule
from fake_provider.script import (
    Answer,
    At,
    Break,
    Call,
    Ending,
    ErrorEvent,
    Failed,
    Gate,
    HttpError,
    Incomplete,
    Load,
    Pause,
    Reasoning,
    Text,
    rate_limited,
)
from fake_provider.server import FakeProvider
from fake_provider.wire import Request

__all__ = [
    "Answer",
    "At",
    "Break",
    "Call",
    "Ending",
    "ErrorEvent",
    "Failed",
    "FakeProvider",
    "Gate",
    "HttpError",
    "Incomplete",
    "Load",
    "Pause",
    "Reasoning",
    "Request",
    "Rule",
    "Text",
    "fault",
    "rate_limited",
    "rule",
]

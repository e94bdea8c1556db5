"""What goes wrong at the provider, what it means for a turn, and what may be done about it."""

import json
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from typing import Any

import anyio
import httpx2
import openai

from core.model.turn import TurnReason
from core.ports.agent import AgentFailed


class Remedy(Enum):
    """What can help."""

    NONE = auto()
    RETRY = auto()
    """The same request, a little later: this one was refused."""
    LOOK = auto()
    """The same request, once it is known what has become of this one."""
    WAIT = auto()
    """The conversation is busy with another request."""
    REBUILD = auto()
    """The provider's copy of the thread is gone or out of step."""
    SHRINK = auto()
    """Less of the thread."""


class ProviderFault(AgentFailed):
    """The provider failed a request. Holds what may be logged: nothing that was said, no exception's text."""

    def __init__(
        self,
        reason: TurnReason,
        remedy: Remedy = Remedy.NONE,
        *,
        status: int | None = None,
        code: str = "",
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(reason)
        self.remedy = remedy
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.request_id = request_id

    @property
    def is_outage(self) -> bool:
        """Whether any other request would have failed as well."""
        mute = self.reason in (TurnReason.PROVIDER_UNAVAILABLE, TurnReason.PROVIDER_TIMEOUT)
        refused = self.status is not None and self.status < 500
        return mute and not refused and self.remedy in (Remedy.RETRY, Remedy.LOOK)


@dataclass(slots=True)
class Exchange:
    """One request and how far its answer has come: `opened` with its headers, `started` with its first event."""

    opened: bool = False
    started: bool = False
    request_id: str = ""


_LOCKED = frozenset({"conversation_locked"})
_TOO_LONG = frozenset({"context_length_exceeded"})
_FILTERED = frozenset(
    {
        "bio_policy",
        "content_filter",
        "content_policy_violation",
        "image_content_policy_violation",
        "invalid_prompt",  # "flagged as potentially violating our usage policy"
        "misalignment_policy_violation",
    }
)
_QUOTA = frozenset({"billing_hard_limit_reached", "insufficient_quota", "usage_not_included"})
_LIMITED = frozenset({"rate_limit_exceeded"})
_OVERLOADED = frozenset({"overloaded", "server_error", "server_is_overloaded", "slow_down"})
_GONE = frozenset({"conversation_not_found", "not_found", "previous_response_not_found"})
_CODE = re.compile(r"[\w.-]{1,64}", re.ASCII)
_NO_ROOM = re.compile(r"context (?:window|length|size)|max_model_len")
_TRY_AGAIN = re.compile(r"try again in (?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+(?:\.[0-9]+)?) ?(ms|s))?\b")


def fault_of(error: Exception, exchange: Exchange) -> ProviderFault | None:
    """What an exception of the SDK, of its HTTP client or of its parsers means; None for any other."""
    match error:
        case openai.APIStatusError():
            fault = _fault_of_status(error)
        case openai.APIConnectionError() if isinstance(error.__cause__, Exception):
            # The SDK's own class doesn't tell whether the request was sent; the cause does.
            return fault_of(error.__cause__, exchange) or _cut(exchange)
        case httpx2.ConnectError():
            fault = ProviderFault(TurnReason.PROVIDER_UNAVAILABLE, Remedy.RETRY)
        case httpx2.ConnectTimeout():
            fault = ProviderFault(TurnReason.PROVIDER_TIMEOUT, Remedy.RETRY)
        case httpx2.PoolTimeout():
            fault = ProviderFault(TurnReason.PROVIDER_UNAVAILABLE)
        case TimeoutError() | openai.APITimeoutError() | httpx2.TimeoutException():
            reason = TurnReason.PROVIDER_STALLED if exchange.started else TurnReason.PROVIDER_TIMEOUT
            fault = ProviderFault(reason, Remedy.LOOK)
        case openai.APIResponseValidationError() | httpx2.DecodingError():
            fault = ProviderFault(TurnReason.PROVIDER_PROTOCOL)
        case json.JSONDecodeError() | UnicodeDecodeError() | RecursionError():
            fault = ProviderFault(TurnReason.PROVIDER_PROTOCOL)
        case httpx2.UnsupportedProtocol() | httpx2.InvalidURL() | httpx2.TooManyRedirects():
            fault = ProviderFault(TurnReason.PROVIDER_CONFIG)
        case httpx2.HTTPError() | httpx2.StreamError() | ssl.SSLError() | anyio.EndOfStream():
            fault = _cut(exchange)
        case openai.APIError():
            fault = _cut(exchange)
        case openai.OpenAIError():
            fault = ProviderFault(TurnReason.PROVIDER_CONFIG)
        case _:
            return None
    fault.request_id = fault.request_id or exchange.request_id
    return fault


@contextmanager
def translated(exchange: Exchange) -> Iterator[None]:
    """Turns the exceptions of the SDK and below into ProviderFault."""
    try:
        yield
    except ProviderFault as fault:
        fault.request_id = fault.request_id or exchange.request_id
        raise
    except Exception as error:
        fault_or_none = fault_of(error, exchange)
        if fault_or_none is None:
            raise
        raise fault_or_none from error


def fault_in_stream(error: object) -> ProviderFault:
    """What an error means that arrives within a stream: `error` events and failed responses."""
    facts: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    code = _text(facts.get("code")) or _text(facts.get("type"))
    message = _text(facts.get("message"))
    # Some servers put the HTTP status there, because it is too late to send it.
    status = int(code) if re.fullmatch(r"[45][0-9]{2}", code) else None
    if facts.get("type") == "invalid_request_error":
        status = status or 400
    return classified(status, code, message, _text(facts.get("param")), _asked_for(message))


def classified(
    status: int | None, code: str, message: str, param: str, retry_after: float | None = None
) -> ProviderFault:
    """The one table of what providers say. `status` is None for an error within a stream."""
    reason, remedy = _meaning(status, code, message.lower(), param)
    return ProviderFault(
        reason,
        remedy,
        status=status,
        code=code if _CODE.fullmatch(code) else "",
        retry_after=retry_after,
    )


def _meaning(status: int | None, code: str, message: str, param: str) -> tuple[TurnReason, Remedy]:
    if code in _LOCKED or status == 409:
        return TurnReason.PROVIDER_UNAVAILABLE, Remedy.WAIT
    if code in _TOO_LONG or status == 413:
        return TurnReason.CONTEXT_TOO_LONG, Remedy.SHRINK
    if status in (None, 400) and _NO_ROOM.search(message):
        return TurnReason.CONTEXT_TOO_LONG, Remedy.SHRINK  # compatible servers have no code for it
    if code in _FILTERED:
        return TurnReason.CONTENT_FILTERED, Remedy.NONE
    if code in _QUOTA or "request too large" in message:
        return TurnReason.PROVIDER_RATE_LIMITED, Remedy.NONE
    if code in _LIMITED or status == 429:
        return TurnReason.PROVIDER_RATE_LIMITED, Remedy.RETRY
    if status == 408:
        return TurnReason.PROVIDER_TIMEOUT, Remedy.RETRY
    if code in _OVERLOADED or (status is not None and status >= 500):
        return TurnReason.PROVIDER_UNAVAILABLE, Remedy.RETRY
    if code == "model_not_found" or param == "model":
        return TurnReason.PROVIDER_CONFIG, Remedy.NONE
    if code in _GONE or status == 404:
        return TurnReason.PROVIDER_CONFIG, Remedy.REBUILD
    if status in (None, 400) and ("no tool output found" in message or "no tool call found" in message):
        return TurnReason.PROVIDER_PROTOCOL, Remedy.REBUILD
    if status is not None and 300 <= status < 500:  # redirects are not followed
        return TurnReason.PROVIDER_CONFIG, Remedy.NONE
    return TurnReason.PROVIDER_UNAVAILABLE, Remedy.NONE


def _fault_of_status(error: openai.APIStatusError) -> ProviderFault:
    message = _text(error.message)
    wait = _retry_after(error.response.headers)
    fault = classified(
        error.status_code,
        error.code or "",
        message,
        _text(error.param),
        _asked_for(message) if wait is None else wait,
    )
    fault.request_id = error.request_id or ""
    return fault


def _cut(exchange: Exchange) -> ProviderFault:
    reason = TurnReason.PROVIDER_TRUNCATED if exchange.opened else TurnReason.PROVIDER_UNAVAILABLE
    return ProviderFault(reason, Remedy.LOOK)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the headers ask for. A date counts from the provider's own, so that no clock need be right."""
    wait = _number(headers.get("retry-after-ms"), 0.001)
    if wait is None:
        wait = _number(headers.get("retry-after"), 1.0)
    if wait is None and (until := _date(headers.get("retry-after"))) is not None:
        now = _date(headers.get("date")) or datetime.now(UTC)
        wait = max((until - now).total_seconds(), 0.0)
    return wait


def _date(text: str | None) -> datetime | None:
    try:
        found = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _asked_for(message: str) -> float | None:
    """Seconds that a rate limit's message asks for (`20ms`, `1.2s`, `7m12s`, `1h3m`); within a stream there is no
    header to say it."""
    found = _TRY_AGAIN.search(message.lower())
    if found is None or not any(found.groups()):
        return None
    hours, minutes, rest = (float(part or 0) for part in found.group(1, 2, 3))
    return hours * 3_600 + minutes * 60 + rest * (0.001 if found[4] == "ms" else 1.0)


def _number(text: str | None, unit: float) -> float | None:
    return float(text) * unit if text and re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,9})?", text) else None


def _text(value: object) -> str:
    return "" if value is None else str(value)

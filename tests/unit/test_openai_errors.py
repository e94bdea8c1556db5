"""What the provider's errors mean."""

import json
import ssl

import anyio
import httpx2
import openai
import pytest

from adapters.openai.errors import (
    Exchange,
    ProviderFault,
    Remedy,
    classified,
    fault_in_stream,
    fault_of,
    translated,
)
from core.model.turn import TurnReason as R

REQUEST = httpx2.Request("POST", "http://127.0.0.1/v1/responses")
LOCKED = "conversation_locked"
NONE, RETRY, LOOK, WAIT = Remedy.NONE, Remedy.RETRY, Remedy.LOOK, Remedy.WAIT
REBUILD, SHRINK = Remedy.REBUILD, Remedy.SHRINK


@pytest.mark.parametrize(
    ("status", "code", "message", "param", "reason", "remedy"),
    [
        (400, LOCKED, "Another process is currently operating", "conversation", R.PROVIDER_UNAVAILABLE, WAIT),
        (400, "context_length_exceeded", "", "input", R.CONTEXT_TOO_LONG, SHRINK),
        (400, "", "This model's maximum context length is 4096 tokens.", "", R.CONTEXT_TOO_LONG, SHRINK),
        (400, "", "The prompt length 9 exceeds the max_model_len 8.", "input", R.CONTEXT_TOO_LONG, SHRINK),
        (400, "", "The request exceeds the available context size.", "", R.CONTEXT_TOO_LONG, SHRINK),
        (400, "", "Your input exceeds the context window of this model.", "", R.CONTEXT_TOO_LONG, SHRINK),
        (None, "", "More tokens than the context length.", "", R.CONTEXT_TOO_LONG, SHRINK),
        (413, "", "", "", R.CONTEXT_TOO_LONG, SHRINK),
        (307, "", "", "", R.PROVIDER_CONFIG, NONE),
        (400, "content_filter", "", "", R.CONTENT_FILTERED, NONE),
        (400, "invalid_prompt", "flagged", "", R.CONTENT_FILTERED, NONE),
        (400, "content_policy_violation", "", "", R.CONTENT_FILTERED, NONE),
        (None, "image_content_policy_violation", "", "", R.CONTENT_FILTERED, NONE),
        (None, "bio_policy", "", "", R.CONTENT_FILTERED, NONE),
        (None, "misalignment_policy_violation", "", "", R.CONTENT_FILTERED, NONE),
        (400, "model_not_found", "", "model", R.PROVIDER_CONFIG, NONE),
        (404, "model_not_found", "", "", R.PROVIDER_CONFIG, NONE),
        (404, "", "The model does not exist.", "model", R.PROVIDER_CONFIG, NONE),
        (404, "", "Conversation with id 'conv_1' not found.", "", R.PROVIDER_CONFIG, REBUILD),
        (400, "previous_response_not_found", "", "", R.PROVIDER_CONFIG, REBUILD),
        (400, "", "No tool output found for function call call_1.", "input", R.PROVIDER_PROTOCOL, REBUILD),
        (400, "", "No tool call found for function call output.", "input", R.PROVIDER_PROTOCOL, REBUILD),
        (400, "unsupported_parameter", "", "temperature", R.PROVIDER_CONFIG, NONE),
        (401, "invalid_api_key", "", "", R.PROVIDER_CONFIG, NONE),
        (403, "", "", "", R.PROVIDER_CONFIG, NONE),
        (422, "", "", "", R.PROVIDER_CONFIG, NONE),
        (409, "", "", "", R.PROVIDER_UNAVAILABLE, WAIT),
        (429, "rate_limit_exceeded", "Please try again in 1s.", "", R.PROVIDER_RATE_LIMITED, RETRY),
        (429, "rate_limit_exceeded", "Request too large for gpt-6-luna", "", R.PROVIDER_RATE_LIMITED, NONE),
        (429, "insufficient_quota", "", "", R.PROVIDER_RATE_LIMITED, NONE),
        (429, "billing_hard_limit_reached", "", "", R.PROVIDER_RATE_LIMITED, NONE),
        (None, "usage_not_included", "", "", R.PROVIDER_RATE_LIMITED, NONE),
        (429, "", "", "", R.PROVIDER_RATE_LIMITED, RETRY),
        (408, "", "", "", R.PROVIDER_TIMEOUT, RETRY),
        (500, "server_error", "", "", R.PROVIDER_UNAVAILABLE, RETRY),
        (502, "", "", "", R.PROVIDER_UNAVAILABLE, RETRY),
        (503, "server_is_overloaded", "", "", R.PROVIDER_UNAVAILABLE, RETRY),
        (None, "slow_down", "", "", R.PROVIDER_UNAVAILABLE, RETRY),
        (None, "overloaded", "", "", R.PROVIDER_UNAVAILABLE, RETRY),
        (529, "", "", "", R.PROVIDER_UNAVAILABLE, RETRY),
        (None, "something_new", "", "", R.PROVIDER_UNAVAILABLE, NONE),
    ],
)
def test_the_table(status: int | None, code: str, message: str, param: str, reason: R, remedy: Remedy) -> None:
    fault = classified(status, code, message, param)
    assert (fault.reason, fault.remedy) == (reason, remedy)
    assert fault.status == status


@pytest.mark.parametrize(
    ("error", "opened", "started", "reason", "remedy"),
    [
        (httpx2.ConnectError("refused"), False, False, R.PROVIDER_UNAVAILABLE, RETRY),
        (httpx2.ConnectTimeout("slow"), False, False, R.PROVIDER_TIMEOUT, RETRY),
        (httpx2.PoolTimeout("full"), False, False, R.PROVIDER_UNAVAILABLE, NONE),
        (httpx2.ReadTimeout("slow"), False, False, R.PROVIDER_TIMEOUT, LOOK),
        (httpx2.WriteTimeout("slow"), False, False, R.PROVIDER_TIMEOUT, LOOK),
        (httpx2.ReadTimeout("slow"), True, True, R.PROVIDER_STALLED, LOOK),
        (TimeoutError(), True, False, R.PROVIDER_TIMEOUT, LOOK),
        (TimeoutError(), True, True, R.PROVIDER_STALLED, LOOK),
        (httpx2.RemoteProtocolError("gone"), False, False, R.PROVIDER_UNAVAILABLE, LOOK),
        (httpx2.RemoteProtocolError("cut"), True, False, R.PROVIDER_TRUNCATED, LOOK),
        (httpx2.ReadError("reset"), True, True, R.PROVIDER_TRUNCATED, LOOK),
        (ssl.SSLError("odd"), True, True, R.PROVIDER_TRUNCATED, LOOK),
        (anyio.EndOfStream(), True, True, R.PROVIDER_TRUNCATED, LOOK),
        (httpx2.DecodingError("gzip"), True, True, R.PROVIDER_PROTOCOL, NONE),
        (httpx2.UnsupportedProtocol("ftp"), False, False, R.PROVIDER_CONFIG, NONE),
        (json.JSONDecodeError("bad", "{", 1), True, False, R.PROVIDER_PROTOCOL, NONE),
        (openai.APITimeoutError(REQUEST), False, False, R.PROVIDER_TIMEOUT, LOOK),
        (openai.APIConnectionError(request=REQUEST), False, False, R.PROVIDER_UNAVAILABLE, LOOK),
        (openai.OpenAIError("no key"), False, False, R.PROVIDER_CONFIG, NONE),
    ],
)
def test_exceptions(error: Exception, opened: bool, started: bool, reason: R, remedy: Remedy) -> None:
    fault = fault_of(error, Exchange(opened=opened, started=started))
    assert fault is not None
    assert (fault.reason, fault.remedy) == (reason, remedy)


def test_the_cause_of_a_connection_error_decides() -> None:
    error = openai.APIConnectionError(request=REQUEST)
    error.__cause__ = httpx2.ConnectError("refused")
    fault = fault_of(error, Exchange())
    assert fault is not None
    assert fault.remedy is Remedy.RETRY


def status_error(status: int, headers: dict[str, str], body: object = None) -> openai.APIStatusError:
    response = httpx2.Response(status, headers=headers, request=REQUEST)
    return openai.APIStatusError("Please try again in 20ms.", response=response, body=body)


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:09 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 9.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, 0.02),
        ({"retry-after": "nan"}, 0.02),
        ({"retry-after": "Wed, 21 Oct 99999999999999999999 07:28:00 GMT"}, 0.02),
        ({}, 0.02),
    ],
)
def test_how_long_the_provider_asks_to_wait(headers: dict[str, str], wait: float) -> None:
    fault = fault_of(status_error(429, headers), Exchange())
    assert fault is not None
    assert fault.retry_after == pytest.approx(wait)


@pytest.mark.parametrize(
    ("asked", "wait"),
    [
        ("Please try again in 1.2s. Visit the dashboard.", 1.2),
        ("Please try again in 20ms.", 0.02),
        ("Please try again in 6m0s.", 360.0),
        ("Please try again in 7m12s. Visit the dashboard.", 432.0),
        ("Please try again in 1m26.4s.", 86.4),
        ("Please try again in 1h3m.", 3_780.0),
        ("Please try again in a few seconds.", None),
        ("Please try again in 5 minutes.", None),
        ("Please try again later.", None),
    ],
)
def test_how_long_a_message_asks_to_wait(asked: str, wait: float | None) -> None:
    message = f"Rate limit reached on requests per day (RPD): Limit 200, Used 200, Requested 1. {asked}"
    fault = fault_in_stream({"code": "rate_limit_exceeded", "message": message})
    assert fault.reason is R.PROVIDER_RATE_LIMITED
    assert fault.retry_after == (None if wait is None else pytest.approx(wait))


def test_what_is_kept_of_an_error_is_safe_to_log() -> None:
    body = {"code": "a code with words of the user", "message": "secret", "param": {"x": "secret"}}
    fault = fault_of(status_error(400, {"x-request-id": "req_1"}, body), Exchange())
    assert fault is not None
    assert (fault.code, fault.status, fault.request_id) == ("", 400, "req_1")
    assert "secret" not in str(fault)


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        ({"code": "server_error", "message": "m"}, R.PROVIDER_UNAVAILABLE, RETRY),
        ({"type": "error", "code": "rate_limit_exceeded"}, R.PROVIDER_RATE_LIMITED, RETRY),
        ({"type": "invalid_request_error", "code": None, "message": "m"}, R.PROVIDER_CONFIG, NONE),
        ({"type": "invalid_request_error", "code": LOCKED}, R.PROVIDER_UNAVAILABLE, WAIT),
        ({"code": "404", "message": "Conversation not found"}, R.PROVIDER_CONFIG, REBUILD),
        ({"code": 500}, R.PROVIDER_UNAVAILABLE, RETRY),
        ({"code": "context_length_exceeded"}, R.CONTEXT_TOO_LONG, SHRINK),
        (None, R.PROVIDER_UNAVAILABLE, NONE),
        ("words", R.PROVIDER_UNAVAILABLE, NONE),
    ],
)
def test_errors_within_a_stream(error: object, reason: R, remedy: Remedy) -> None:
    fault = fault_in_stream(error)
    assert (fault.reason, fault.remedy) == (reason, remedy)


def test_other_exceptions_are_nobody_elses_fault() -> None:
    with pytest.raises(LookupError), translated(Exchange()):
        raise LookupError


@pytest.mark.parametrize(
    ("fault", "is_outage"),
    [
        (classified(503, "", "", ""), True),
        (classified(500, "server_error", "", ""), True),
        (classified(None, "server_is_overloaded", "", ""), True),
        (fault_of(httpx2.ConnectError("refused"), Exchange()), True),
        (fault_of(httpx2.ConnectTimeout("slow"), Exchange()), True),
        (fault_of(httpx2.ReadTimeout("slow"), Exchange()), True),
        (fault_of(httpx2.RemoteProtocolError("gone"), Exchange()), True),
        (fault_of(httpx2.RemoteProtocolError("cut"), Exchange(opened=True)), False),
        (fault_of(httpx2.ReadTimeout("slow"), Exchange(opened=True, started=True)), False),
        (fault_of(httpx2.PoolTimeout("full"), Exchange()), False),
        (classified(408, "", "", ""), False),
        (classified(409, "", "", ""), False),
        (classified(429, "rate_limit_exceeded", "", ""), False),
        (classified(429, "insufficient_quota", "", ""), False),
        (classified(400, LOCKED, "", ""), False),
        (classified(401, "", "", ""), False),
        (classified(404, "", "", ""), False),
        (classified(None, "something_new", "", ""), False),
    ],
)
def test_what_would_have_befallen_any_request(fault: ProviderFault | None, is_outage: bool) -> None:
    assert fault is not None
    assert fault.is_outage is is_outage

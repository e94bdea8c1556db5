"""All faults by name, and the rules that say which requests for responses they befall.

This is the one table of faults: `--help` prints it, scripts, the command line and control over HTTP use its names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, get_args

from fake_provider.script import (
    Answer,
    At,
    Break,
    ErrorEvent,
    Failed,
    HttpError,
    Incomplete,
    Load,
    Step,
)

Effect = HttpError | Break | Incomplete | Failed | ErrorEvent
PLACES: tuple[str, ...] = get_args(At)

_LOCKED = "Another process is currently operating on this conversation. Please retry in a few seconds."
_TOO_LONG = "Your input exceeds the context window of this model. Please adjust your input and try again."
_QUOTA = "You exceeded your current quota, please check your plan and billing details."
_LIMIT = (
    "Rate limit reached for tokens per min (TPM): Limit 30000, Used 29999, Requested 100. Please try again in 1s."
)
_TOO_LARGE = "Request too large for model on tokens per min (TPM): Limit 30000, Requested 50000."
_CALL = "No tool output found for function call call_x."
_HTML = b"<html><head><title>502 Bad Gateway</title></head><body>cloudflare</body></html>"


def _http(
    status: int, code: str | None, message: str, kind: str = "invalid_request_error", **more: Any
) -> HttpError:
    return HttpError(status=status, code=code, message=message, type=kind, **more)


def _limited(status: int, code: str, message: str, kind: str = "tokens") -> HttpError:
    headers = {"x-ratelimit-limit-tokens": "30000", "x-ratelimit-remaining-tokens": "0"}
    return _http(status, code, message, kind, headers={**headers, "x-ratelimit-reset-tokens": "1s"})


REFUSALS: Mapping[str, tuple[HttpError, str]] = {
    "rate_limit": (_limited(429, "rate_limit_exceeded", _LIMIT), "429 that passes by itself"),
    "insufficient_quota": (
        _http(429, "insufficient_quota", _QUOTA, "insufficient_quota"),
        "429 that does not: nobody has paid",
    ),
    "request_too_large": (_limited(429, "rate_limit_exceeded", _TOO_LARGE), "429 with the code of a rate limit"),
    "request_timeout": (_http(408, None, "Request timed out.", "timeout"), "408"),
    "conflict": (_http(409, None, "Conflict.", "conflict"), "409"),
    "unprocessable": (_http(422, None, "Unprocessable entity."), "422"),
    "server_error": (
        _http(500, "server_error", "The server had an error while processing your request.", "server_error"),
        "500",
    ),
    "bad_gateway": (
        HttpError(status=502, body=_HTML, headers={"content-type": "text/html"}),
        "502 of a proxy: HTML",
    ),
    "unavailable": (_http(503, None, "Service unavailable.", "server_error"), "503"),
    "overloaded": (
        _http(503, "server_is_overloaded", "Our servers are overloaded.", "service_unavailable_error"),
        "503",
    ),
    "slow_down": (_http(503, "slow_down", "Please slow down.", "service_unavailable_error"), "503"),
    "overloaded_529": (_http(529, None, "Overloaded.", "overloaded_error"), "529 of some gateways"),
    "invalid_key": (_http(401, "invalid_api_key", "Incorrect API key provided."), "401"),
    "forbidden": (
        _http(403, "unsupported_country_region_territory", "Country not supported.", "request_forbidden"),
        "403",
    ),
    "not_found": (_http(404, None, "Not found."), "404"),
    "model_not_found": (
        _http(404, "model_not_found", "The model does not exist or you do not have access to it.", param="model"),
        "404",
    ),
    "conversation_locked": (_http(400, "conversation_locked", _LOCKED, param="conversation"), "400"),
    "context_too_long": (_http(400, "context_length_exceeded", _TOO_LONG, param="input"), "400"),
    "no_tool_output": (_http(400, None, _CALL, param="input"), "400: a call of a function has no answer"),
    "reset": (HttpError(reset=True), "the connection is reset and the request not looked at"),
}
"""What is answered instead of a response."""

BREAKS: Mapping[str, str] = {
    "eof": "the body ends as if it were whole; at `header` the connection is closed",
    "half": "the body ends as if it were whole, in the middle of an event",
    "cut": "the connection is reset, in the middle of an event",
    "stall": "silence, for `seconds`, until released or the reader leaves; at `header` not even a header",
    "comments": "the same, but with SSE comments",
    "malformed": "an event that is not JSON is slipped in",
    "unknown": "an event of an unheard-of type is slipped in",
    "duplicate": "an event comes twice, with the same number",
    "gap": "an event is left out, with its number",
    "unnumbered": "from here on events carry no numbers",
    "huge": "a delta of 20 MB",
    "slow": "from here on byte by byte, with `seconds` in between",
}
"""What befalls a stream."""

ENDINGS: Mapping[str, tuple[Callable[..., Incomplete | Failed | ErrorEvent], str]] = {
    "failed": (Failed, "`response.failed`; options: code, message"),
    "error": (ErrorEvent, "the `error` event as documented, flat; options: code, message"),
    "error_nested": (
        lambda **given: ErrorEvent(nested=True, **given),
        "the `error` event as also seen, nested; options: code, message, type",
    ),
    "incomplete": (Incomplete, "`response.incomplete`; option: reason (max_output_tokens, content_filter)"),
}
"""How a reply may end before its time."""


def fault(name: str, **options: Any) -> Effect:
    """A fault by its name. Raises ValueError for a name or an option that there is not."""
    try:
        if name in REFUSALS:
            return _refusal(name, **options)
        if name in BREAKS:
            return Break(how=name, **_placed(options))  # type: ignore[arg-type]
        if name in ENDINGS:
            return ENDINGS[name][0](**_placed(options))
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    raise ValueError(f"no such fault: {name}")


def _placed(options: dict[str, Any]) -> dict[str, Any]:
    if "after" in options:
        return options
    placed = {"at": "middle", **options}
    if placed["at"] not in PLACES:
        raise ValueError(f"no such place: {placed['at']}")
    return placed


def _refusal(
    name: str,
    *,
    retry_after: float | str | None = None,
    retry_after_ms: int | None = None,
    status: int | None = None,
    code: str | None = None,
    message: str | None = None,
) -> HttpError:
    known = REFUSALS[name][0]
    headers = dict(known.headers)
    for header, value in (("retry-after", retry_after), ("retry-after-ms", retry_after_ms)):
        if value is not None:
            headers[header] = str(value)
    changes = {"status": status, "code": code, "message": message}
    return replace(known, name=name, headers=headers, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]


@dataclass(slots=True, kw_only=True)
class Rule:
    """A fault, and the requests for responses that it befalls: of those that fit, from the `nth` on, `times`
    (None: all of them).

    A request fits if it belongs to `conversation` (an id), and if `text` stands anywhere in what the model is
    given: as it stays there, that is all later requests of a conversation too, in whichever way its state is kept.
    `seen` counts the requests that fitted, `applied` those that the fault was given to.
    """

    name: str
    effect: Effect
    nth: int = 1
    times: int | None = 1
    text: str | None = None
    conversation: str | None = None
    seen: int = 0
    applied: int = 0

    def takes(self, conversation: str | None, words: Callable[[], str]) -> bool:
        """Whether it befalls this request, which is counted."""
        if self.conversation is not None and self.conversation != conversation:
            return False
        if self.text is not None and self.text not in words():
            return False
        self.seen += 1
        if self.seen < self.nth or (self.times is not None and self.applied >= self.times):
            return False
        self.applied += 1
        return True

    def apply(self, step: Answer | Load) -> Step:
        """What the request gets instead."""
        match self.effect:
            case HttpError():
                return self.effect
            case Break():
                # A fresh gate each time: every stall is one of its own.
                return replace(step, fault=replace(self.effect, gate=type(self.effect.gate)()))
            case _:
                return replace(step.as_answer() if isinstance(step, Load) else step, ending=self.effect)

    def as_json(self) -> dict[str, Any]:
        """What it says and what became of it."""
        names = ("name", "nth", "times", "text", "conversation", "seen", "applied")
        return {name: getattr(self, name) for name in names}


_OF_THE_RULE = frozenset(signature(Rule).parameters) - {"name", "effect", "seen", "applied"}


def rule(name: str, **options: Any) -> Rule:
    """A rule from the name of a fault, the fault's own options and the rule's. Raises ValueError."""
    own = {key: options.pop(key) for key in _OF_THE_RULE & options.keys()}
    if own.get("times") == "all":
        own["times"] = None
    return Rule(name=name, effect=fault(name, **options), **own)


def rule_from(given: object) -> Rule:
    """A rule from JSON (`{"fault": "stall", "at": "middle", …}`) or from its short form, `stall@middle,nth=2`.

    Raises ValueError.
    """
    if isinstance(given, str):
        first, *pairs = given.split(",")
        name, _, at = first.partition("@")
        options: dict[str, Any] = {"at": at} if at else {}
        for pair in pairs:
            key, found, value = pair.partition("=")
            if not found:
                raise ValueError(f"{pair!r} is not of the form KEY=VALUE")
            options[key] = _number(value)
        return rule(name, **options)
    if isinstance(given, dict) and isinstance(given.get("fault"), str):
        return rule(given["fault"], **{key: value for key, value in given.items() if key != "fault"})
    raise ValueError('a fault is a string or an object with the key "fault"')


def _number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def table() -> str:
    """All faults, for people."""
    lines = ["instead of a response (options: retry_after, retry_after_ms, status, code, message)"]
    lines += [f"  {name:20}{text}" for name, (_, text) in REFUSALS.items()]
    lines += ["", "in a stream (options: at or after, seconds)"]
    lines += [f"  {name:20}{text}" for name, text in BREAKS.items()]
    lines += ["", "as its end (option: at)"]
    lines += [f"  {name:20}{text}" for name, (_, text) in ENDINGS.items()]
    return "\n".join(lines)

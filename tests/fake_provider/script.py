"""What the provider is told to do with each request for a response, one step per request."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


class Gate:
    """A place where the provider stops: the test waits for `reached` and sets `released`."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.released = asyncio.Event()


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A message. Without `text` it cites the last input; `pieces` are its deltas, else it is cut evenly.

    `deltas`, `done` and `in_item` say which of the events that carry the text are sent.
    """

    text: str | None = None
    pieces: tuple[str, ...] | None = None
    refusal: bool = False
    deltas: bool = True
    done: bool = True
    in_item: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function."""

    name: str
    arguments: str = "{}"
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A reasoning item with a summary."""

    summary: str = "Thinking."


@dataclass(frozen=True, slots=True)
class Incomplete:
    """Ends with `response.incomplete`."""

    reason: str = "max_output_tokens"


@dataclass(frozen=True, slots=True)
class Failed:
    """Ends with `response.failed`."""

    code: str = "server_error"
    message: str = "The model failed."


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """Ends with an `error` event, in the shape that is documented or in the one that is also seen."""

    code: str = "server_error"
    message: str = "Something failed."
    nested: bool = False
    type: str = "server_error"


Ending = Literal["completed"] | Incomplete | Failed | ErrorEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """Something goes wrong behind the `after`-th delta of text (0: before the first event of all).

    `eof` ends the body as if it were whole, `half` does so in the middle of an event, `cut` resets the
    connection there; `malformed` slips in an event that is no JSON; `stall` waits for the gate, `comments`
    sends nothing but comments until then.
    """

    how: Literal["eof", "half", "cut", "malformed", "stall", "comments"]
    after: int = 1
    gate: Gate = field(default_factory=Gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """In the background the model itself halts behind the `after`-th delta of text (0: before the first), whoever
    reads, until the gate is released."""

    after: int = 1
    gate: Gate = field(default_factory=Gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response, and how its bytes travel. `fault` befalls the connection on which it was asked for."""

    output: tuple[Text | Call | Reasoning, ...] = (Text(),)
    ending: Ending = "completed"
    fault: Break | None = None
    pauses: tuple[Pause, ...] = ()
    headers_gate: Gate | None = None
    sequence_numbers: bool = True
    event_names: bool = True
    output_in_terminal: bool = True
    twice: bool = False
    unknown_events: bool = False
    comments: bool = False
    newline: Literal["\n", "\r\n", "\r"] = "\n"
    byte_by_byte: bool = False
    response_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpError:
    """An error instead of an answer. `body` replaces the envelope; `reset` closes without any; `gate` keeps it
    back."""

    status: int = 500
    code: str | None = None
    message: str = "Failed."
    type: str = "invalid_request_error"
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    reset: bool = False
    gate: Gate | None = None


Step = Answer | HttpError


def rate_limited(retry_after: str | None = None) -> HttpError:
    """The 429 that passes by itself."""
    return HttpError(
        status=429,
        code="rate_limit_exceeded",
        type="requests",
        message="Rate limit reached. Please try again in 1s.",
        headers={} if retry_after is None else {"retry-after": retry_after},
    )

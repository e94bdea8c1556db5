"""What the provider is told to do with each request for a response, one step per request."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

At = Literal["header", "start", "before_text", "middle", "after_text", "end"]
"""A place in a streamed answer: before the HTTP header, before the first event, before the first delta of text,
behind half of the deltas, behind the last one, before the terminal event with all items done. Where there is no
text, deltas of arguments count instead; where there is none of either, the last four are one."""


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
    at: At = "end"


@dataclass(frozen=True, slots=True)
class Failed:
    """Ends with `response.failed`."""

    code: str = "server_error"
    message: str = "The model failed."
    at: At = "end"


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """Ends with an `error` event, in the shape that is documented or in the one that is also seen."""

    code: str = "server_error"
    message: str = "Something failed."
    nested: bool = False
    type: str = "server_error"
    at: At = "end"


Ending = Literal["completed"] | Incomplete | Failed | ErrorEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """Something goes wrong behind the `after`-th delta of text (0: before the first event), or `at` a place.

    `eof` ends the body as if it were whole, `half` does so in the middle of an event, `cut` resets the connection
    there. `stall` waits for the gate, `comments` sends nothing but a comment `every` so many seconds until then;
    with `seconds` the gate opens by itself. `malformed` slips in an event that is no JSON. Of the next event,
    `duplicate` sends two and `gap` none; `unnumbered` leaves out the numbers from here on, `slow` sends every byte
    by itself, with `seconds` in between. `unknown` is an event of an unheard-of type, `huge` a delta of 20 MB:
    these two are parts of the reply. Before the header there are only `eof`, `cut` and `stall`.
    """

    how: Literal[
        "eof",
        "half",
        "cut",
        "malformed",
        "stall",
        "comments",
        "duplicate",
        "gap",
        "unnumbered",
        "slow",
        "unknown",
        "huge",
    ]
    after: int = 1
    at: At | None = None
    seconds: float | None = None
    every: float = 0.005
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        if self.at == "header" and self.how not in ("eof", "cut", "stall"):
            raise ValueError(f"{self.how} cannot strike before the header")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """In the background the model itself halts behind the `after`-th delta of text (0: before the first), whoever
    reads, until the gate is released."""

    after: int = 1
    gate: Gate = field(default_factory=Gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response, and how its bytes travel. `fault` befalls the connection on which it was asked for.

    `pace` is deltas per second; `kept_when_aborted` says that a response whose reader leaves is finished and kept
    all the same, as has been seen at OpenAI. `used_when_cancelled` is the `usage` of one that is cancelled.
    """

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
    pace: float | None = None
    kept_when_aborted: bool = False
    used_when_cancelled: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A long reply for measuring: `deltas` times `piece`.

    With `pace` it sends that many deltas a second on a schedule, without one it sends them in large writes as fast
    as they are read. `stamps` begins every delta of a paced reply with the time of sending: nanoseconds of
    CLOCK_MONOTONIC, which all processes of a machine share, in 20 digits and a blank.
    """

    deltas: int = 200
    piece: str = "word "
    pace: float | None = None
    stamps: bool = False
    fault: Break | None = None

    def __post_init__(self) -> None:
        if self.stamps and self.pace is None:
            raise ValueError("stamps need a pace: what is sent flat out is rendered before")

    def as_answer(self) -> Answer:
        """The same text for those who do not stream it in one go. Without stamps."""
        return Answer(output=(Text(pieces=(self.piece,) * self.deltas),), pace=self.pace, fault=self.fault)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpError:
    """An error instead of an answer. `body` replaces the envelope; `reset` closes without any; `gate` keeps it
    back. `name` is what it is counted as."""

    status: int = 500
    code: str | None = None
    message: str = "Failed."
    type: str = "invalid_request_error"
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    reset: bool = False
    gate: Gate | None = None
    name: str = ""


Step = Answer | Load | HttpError


def rate_limited(retry_after: str | None = None) -> HttpError:
    """The 429 that passes by itself."""
    return HttpError(
        status=429,
        code="rate_limit_exceeded",
        type="requests",
        message="Rate limit reached. Please try again in 1s.",
        headers={} if retry_after is None else {"retry-after": retry_after},
    )

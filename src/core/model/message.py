"""Messages: the lines of a transcript."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from core.model.errors import InvalidField

MAX_PARTS = 32
MAX_TEXT = 65_536
"""Code points of text in one user message."""


class Role(StrEnum):
    """Who a line is from."""

    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class TextPart:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class RefusalPart:
    """The coach's refusal to answer, in its own words."""

    text: str


ContentPart = TextPart | RefusalPart


@dataclass(frozen=True, slots=True)
class ToolExchange:
    """A call of a tool and its answer. `arguments_json` is what the model wrote, valid JSON or not."""

    call_id: str
    name: str
    arguments_json: str
    output: str
    is_error: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A line of a thread's transcript.

    `index` is its place in the thread, dense from 1. `tool` is set in TOOL messages and only there.
    """

    id: str
    thread_id: str
    turn_id: str
    index: int
    role: Role
    content: tuple[ContentPart, ...]
    partial: bool
    created_at: datetime
    tool: ToolExchange | None = None

    @property
    def text(self) -> str:
        """All text and refusals, concatenated."""
        return "".join(part.text for part in self.content)


def check_user_content(content: tuple[ContentPart, ...]) -> None:
    """Refuses what a user may not send.

    Raises InvalidField: no part or more than MAX_PARTS, more than MAX_TEXT code points in all, only white
    space, U+0000, a refusal.
    """
    if not content:
        raise InvalidField("content", "must have at least one part")
    if len(content) > MAX_PARTS:
        raise InvalidField("content", f"must have at most {MAX_PARTS} parts")
    for number, part in enumerate(content):
        if isinstance(part, RefusalPart):
            raise InvalidField(f"content[{number}].refusal", "is not for users to send")
        if "\0" in part.text:
            raise InvalidField(f"content[{number}].text", "must not contain U+0000")
    if sum(len(part.text) for part in content) > MAX_TEXT:
        raise InvalidField("content", f"must have at most {MAX_TEXT} code points of text")
    if not any(part.text.strip() for part in content):
        raise InvalidField("content", "must not be only white space")

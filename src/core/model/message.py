"""Messages: the lines of a transcript."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from core.model.attachment import MAX_DATA, FilePart, ImagePart, checked, size_of
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


ReplyPart = TextPart | RefusalPart
ContentPart = ReplyPart | ImagePart | FilePart


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
        return "".join(part.text for part in self.content if isinstance(part, ReplyPart))


def readable(messages: Iterable[Message], most: int) -> list[str]:
    """The turns of the messages with bytes attached, in their order, up to the first with which they would be more
    than `most` in all."""
    found = []
    for message in messages:
        size = sum(map(size_of, message.content))
        most -= size
        if most < 0:
            break
        if size:
            found.append(message.turn_id)
    return found


def checked_user_content(content: tuple[ContentPart, ...]) -> tuple[ContentPart, ...]:
    """What a user sends, each attachment with the media type that its bytes have.

    Raises InvalidField: no part or more than MAX_PARTS, more than MAX_TEXT code points or MAX_DATA bytes in all,
    only white space and no attachment, U+0000, a refusal, an attachment that `checked` refuses.
    """
    if not content:
        raise InvalidField("content", "must have at least one part")
    if len(content) > MAX_PARTS:
        raise InvalidField("content", f"must have at most {MAX_PARTS} parts")
    for number, part in enumerate(content):
        if isinstance(part, RefusalPart):
            raise InvalidField(f"content[{number}].refusal", "is not for users to send")
        if isinstance(part, TextPart) and "\0" in part.text:
            raise InvalidField(f"content[{number}].text", "must not contain U+0000")
    texts = [part.text for part in content if isinstance(part, TextPart)]
    if sum(map(len, texts)) > MAX_TEXT:
        raise InvalidField("content", f"must have at most {MAX_TEXT} code points of text")
    if len(texts) == len(content):
        if not any(text.strip() for text in texts):
            raise InvalidField("content", "must not be only white space")
        return content
    if sum(map(size_of, content)) > MAX_DATA:
        raise InvalidField("content", f"must have at most {MAX_DATA} bytes of images and files")
    return tuple(_checked(number, part) for number, part in enumerate(content))


def _checked(number: int, part: ContentPart) -> ContentPart:
    match part:
        case ImagePart():
            return checked(part, f"content[{number}].image")
        case FilePart():
            return checked(part, f"content[{number}].file")
        case _:
            return part

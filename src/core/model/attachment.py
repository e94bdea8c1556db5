"""What a user's message may bring along beside text: images and files, as bytes or as a URL."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeVar, assert_never
from urllib.parse import urlsplit

from core.model.errors import InvalidField
from core.model.media import IMAGE_TYPES, PDF, PLAIN_TEXT, document_type, image_type, is_text_type

MAX_IMAGE = 15_000_000
"""Bytes of an image. OpenAI takes one as a data URL of at most 20,971,520 characters, four for three bytes."""
MAX_DATA = 25_000_000
"""Bytes of images and files in a message: half of what OpenAI takes of files in a request (50 MB), so that as much
of the history goes with them."""
MAX_URL = 2_048
MAX_FILENAME = 255


@dataclass(frozen=True, slots=True)
class Unread:
    """Bytes that are on record and were not read along."""

    size: int


Source = bytes | str | Unread
"""The thing itself, or the URL where the provider finds it, or what is known of bytes that were not read."""


class Detail(StrEnum):
    """How closely an image is looked at."""

    AUTO = "auto"
    LOW = "low"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image. Of one behind a URL the media type may be unknown: empty."""

    source: Source = field(repr=False)
    mime_type: str = ""
    detail: Detail = Detail.AUTO


@dataclass(frozen=True, slots=True)
class FilePart:
    """A PDF document or a text, with a name to show, perhaps empty. The media type is as in `ImagePart`."""

    source: Source = field(repr=False)
    filename: str = field(default="", repr=False)
    mime_type: str = ""


Attachment = ImagePart | FilePart
P = TypeVar("P")


def size_of(part: object) -> int:
    """Bytes of an attachment, read or not; 0 for whatever has none of its own."""
    match part:
        case ImagePart(source=source) | FilePart(source=source):
            return source.size if isinstance(source, Unread) else len(source) if isinstance(source, bytes) else 0
        case _:
            return 0


def data_of(content: tuple[P, ...]) -> dict[int, bytes]:
    """The bytes in a content, by the number of their part."""
    return {
        number: part.source
        for number, part in enumerate(content)
        if isinstance(part, ImagePart | FilePart) and isinstance(part.source, bytes)
    }


def is_unread(content: tuple[P, ...]) -> bool:
    """Whether there are bytes on record that the content lacks."""
    return any(isinstance(part, ImagePart | FilePart) and isinstance(part.source, Unread) for part in content)


def without_data(content: tuple[P, ...]) -> tuple[P, ...]:
    """The same content with no more than the size of its bytes."""
    if not data_of(content):
        return content
    return tuple(
        replace(part, source=Unread(len(part.source)))
        if isinstance(part, ImagePart | FilePart) and isinstance(part.source, bytes)
        else part
        for part in content
    )


def unread(content: tuple[P, ...]) -> tuple[P, ...]:
    """The same content as if nothing attached had been read, behind a URL or not."""
    return tuple(
        replace(part, source=Unread(size_of(part))) if isinstance(part, ImagePart | FilePart) else part
        for part in content
    )


def with_data(content: tuple[P, ...], data: Mapping[int, bytes]) -> tuple[P, ...]:
    """The same content with its bytes, by the number of their part. Raises KeyError where some are missing."""
    return tuple(
        replace(part, source=data[number])
        if isinstance(part, ImagePart | FilePart) and isinstance(part.source, Unread)
        else part
        for number, part in enumerate(content)
    )


def checked(part: Attachment, path: str) -> Attachment:
    """The attachment with the media type that its bytes have.

    Raises InvalidField, with the path of the field in the request: no bytes, too many, or not of the kind that is
    declared or of any that is taken; a URL that is not one for others to fetch; an unfit name.
    """
    match part:
        case ImagePart():
            return replace(part, mime_type=_image_type(part, path))
        case FilePart():
            if len(part.filename) > MAX_FILENAME:
                raise InvalidField(f"{path}.filename", f"must have at most {MAX_FILENAME} characters")
            if any(character < " " or character == "\x7f" for character in part.filename):
                raise InvalidField(f"{path}.filename", "must not contain control characters")
            return replace(part, mime_type=_file_type(part, path))
        case _:
            assert_never(part)


def _image_type(part: ImagePart, path: str) -> str:
    declared = part.mime_type.lower()
    if declared and declared not in IMAGE_TYPES:
        raise InvalidField(f"{path}.mime_type", "must be image/png, image/jpeg, image/webp or image/gif")
    if isinstance(part.source, str):
        _check_url(part.source, f"{path}.url")
        return declared
    data = _bytes(part.source, path, MAX_IMAGE)
    found = image_type(data)
    if found is None:
        raise InvalidField(f"{path}.data", "must be a PNG, JPEG, WebP or GIF image")
    if declared not in ("", found):
        raise InvalidField(f"{path}.mime_type", "is not what the data are")
    return found


def _file_type(part: FilePart, path: str) -> str:
    declared = part.mime_type.lower()
    if declared and declared != PDF and not is_text_type(declared):
        raise InvalidField(f"{path}.mime_type", "must be application/pdf, application/json or a type of text")
    if isinstance(part.source, str):
        _check_url(part.source, f"{path}.url")
        return declared
    found = document_type(_bytes(part.source, path, MAX_DATA))
    if found is None:
        raise InvalidField(f"{path}.data", "must be a PDF document, or text in UTF-8 without U+0000")
    if declared and (declared == PDF) != (found == PDF):
        raise InvalidField(f"{path}.mime_type", "is not what the data are")
    return declared if found == PLAIN_TEXT and declared else found


def _bytes(source: Source, path: str, most: int) -> bytes:
    if not isinstance(source, bytes) or not source:
        raise InvalidField(f"{path}.data", "must not be empty")
    if len(source) > most:
        raise InvalidField(f"{path}.data", f"must have at most {most} bytes")
    return source


def _check_url(url: str, path: str) -> None:
    """Refuses what the provider should not be sent to. Nobody here ever fetches it."""
    if len(url) > MAX_URL:
        raise InvalidField(path, f"must have at most {MAX_URL} characters")
    if not all("!" <= character <= "~" for character in url) or "\\" in url:
        raise InvalidField(path, "must be printable ASCII without spaces and backslashes")
    try:
        parts = urlsplit(url)
        whole = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise InvalidField(path, "must begin with https:// and name a host")
    if "@" in parts.netloc:
        raise InvalidField(path, "must not contain credentials")

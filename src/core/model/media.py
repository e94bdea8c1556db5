"""What bytes are, by what they begin with: kinds of images, PDF documents, text."""

import re

PDF = "application/pdf"
PLAIN_TEXT = "text/plain"

_TEXT_TYPE = re.compile(r"text/[a-z0-9][a-z0-9.+-]{0,62}|application/json")


def image_type(data: bytes) -> str | None:
    """The media type of an image, None for anything else.

    PNG (W3C PNG 5.2 and 11.2.1), JPEG (ITU T.81 B.1.1.2), GIF (87a and 89a), WebP (RFC 9649, 2.4).
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    return None


IMAGE_TYPES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})


def document_type(data: bytes) -> str | None:
    """`PDF` (ISO 32000-1, 7.5.2), `PLAIN_TEXT` for UTF-8 without U+0000, None for anything else."""
    if data.startswith(b"%PDF-"):
        return PDF
    if b"\0" in data:
        return None
    try:
        data.decode()
    except UnicodeDecodeError:
        return None
    return PLAIN_TEXT


def is_text_type(mime_type: str) -> bool:
    """Whether a media type, in lower case and without parameters, is one of text."""
    return _TEXT_TYPE.fullmatch(mime_type) is not None

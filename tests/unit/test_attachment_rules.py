"""What users may attach: decided by the bytes, refused with the path of the field."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core.model.attachment import (
    MAX_DATA,
    MAX_FILENAME,
    MAX_IMAGE,
    MAX_URL,
    Attachment,
    Detail,
    FilePart,
    ImagePart,
    Unread,
    data_of,
    is_unread,
    size_of,
    with_data,
    without_data,
)
from core.model.errors import InvalidField
from core.model.media import document_type, image_type, is_text_type
from core.model.message import MAX_PARTS, ContentPart, TextPart, checked_user_content
from core.use_cases.accept_message import IncomingMessage
from samples import GIF, IMAGES, JPEG, PDF, PNG, TEXT, WEBP, photo

URL = "https://pictures.example.org/a/b.png?size=2&x=%20#top"

# --- what bytes are

MAGIC = {
    "image/png": range(16),
    "image/jpeg": range(3),
    "image/gif": range(6),
    "image/webp": (*range(4), *range(8, 12)),
}


@pytest.mark.parametrize("mime_type", IMAGES)
def test_a_kind_is_known_by_its_first_bytes_all_of_them(mime_type: str) -> None:
    data = IMAGES[mime_type]
    assert image_type(data) == mime_type
    first = max(MAGIC[mime_type]) + 1
    assert image_type(data[:first]) == mime_type
    for length in range(first):
        assert image_type(data[:length]) is None
    for place in MAGIC[mime_type]:
        for value in {*range(256)} - {data[place]}:
            mutated = data[:place] + bytes([value]) + data[place + 1 :]
            assert image_type(mutated) == ("image/gif" if mutated.startswith(b"GIF87a") else None)


def test_the_older_version_of_gif() -> None:
    assert image_type(GIF.replace(b"89a", b"87a")) == "image/gif"


@given(st.sampled_from(sorted(IMAGES)), st.binary(min_size=1, max_size=16))
def test_nothing_may_stand_before_an_image(mime_type: str, before: bytes) -> None:
    assume(image_type(before + bytes(16)) is None)
    assert image_type(before + IMAGES[mime_type]) is None


@given(st.binary())
def test_bytes_of_no_kind_are_refused_and_nothing_else_happens(data: bytes) -> None:
    assume(image_type(data) is None and data)
    with pytest.raises(InvalidField) as refused:
        checked_user_content((ImagePart(data),))
    assert refused.value.field == "content[0].image.data"


def test_documents() -> None:
    assert document_type(PDF) == "application/pdf"
    for length in range(5):
        assert document_type(PDF[:length]) == "text/plain"  # which it is
    assert document_type(b"\n" + PDF) == "text/plain"
    assert document_type(TEXT) == "text/plain"
    for image in (PNG, JPEG, WEBP):
        assert document_type(image) is None
    for bad in (b"a\0b", TEXT[:-2], "é".encode("latin-1"), "text".encode("utf-16"), b"\xed\xa0\x80"):
        assert document_type(bad) is None


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_every_text_without_nul_is_one(text: str) -> None:
    assert document_type(text.encode()) == ("application/pdf" if text.startswith("%PDF-") else "text/plain")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.sampled_from("é€👋"))
def test_a_text_cut_within_a_character_is_none(text: str, last: str) -> None:
    data = f"x{text}{last}".encode()
    for cut in range(1, len(last.encode())):
        assert document_type(data[:-cut]) is None


@pytest.mark.parametrize(
    "mime_type", ["text/plain", "text/markdown", "text/x-c++src", "text/csv", "application/json"]
)
def test_types_of_text(mime_type: str) -> None:
    assert is_text_type(mime_type)


@pytest.mark.parametrize(
    "mime_type",
    ["", "text/", "text", "text/plain; charset=utf-8", "application/pdf", "text/a\n", "text/.a", "x/text/a"],
)
def test_other_types(mime_type: str) -> None:
    assert not is_text_type(mime_type)


# --- what is accepted


def accepted(*parts: ContentPart) -> tuple[ContentPart, ...]:
    return checked_user_content(parts)


@pytest.mark.parametrize("mime_type", IMAGES)
def test_an_image_gets_the_type_that_it_has(mime_type: str) -> None:
    data = IMAGES[mime_type]
    for declared in ("", mime_type, mime_type.upper()):
        (part,) = accepted(ImagePart(data, declared, Detail.LOW))
        assert part == ImagePart(data, mime_type, Detail.LOW)


@pytest.mark.parametrize(
    ("part", "kept"),
    [
        (FilePart(PDF), "application/pdf"),
        (FilePart(PDF, "cv.pdf", "Application/PDF"), "application/pdf"),
        (FilePart(TEXT, "notes"), "text/plain"),
        (FilePart(TEXT, "notes.md", "text/markdown"), "text/markdown"),
        (FilePart(b"{}", "x" * MAX_FILENAME, "application/json"), "application/json"),
        (FilePart(URL), ""),
        (FilePart(URL, "cv", "application/pdf"), "application/pdf"),
        (ImagePart(URL), ""),
        (ImagePart("https://127.0.0.1:8443/x", "image/gif"), "image/gif"),  # nobody here goes there
        (ImagePart("HTTPS://" + "x" * (MAX_URL - 8)), ""),
        (ImagePart(photo(MAX_IMAGE)), "image/png"),
        (FilePart(b"x" * MAX_DATA), "text/plain"),
    ],
)
def test_what_may_be_attached(part: Attachment, kept: str) -> None:
    assert accepted(part) == (replace(part, mime_type=kept),)
    assert accepted(TextPart(" "), part)[0] == TextPart(" ")


BAD: list[tuple[Attachment, str]] = [
    (ImagePart(b""), "image.data"),
    (ImagePart(Unread(3)), "image.data"),
    (ImagePart(PDF), "image.data"),
    (ImagePart(TEXT), "image.data"),
    (ImagePart(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/png"), "image.data"),
    (ImagePart(photo(MAX_IMAGE + 1)), "image.data"),
    (ImagePart(PNG, "image/jpeg"), "image.mime_type"),
    (ImagePart(PNG, "image/jpg"), "image.mime_type"),
    (ImagePart(PNG, "image/png; x=y"), "image.mime_type"),
    (ImagePart(PNG, "text/plain"), "image.mime_type"),
    (ImagePart(URL, "image/svg+xml"), "image.mime_type"),
    (FilePart(b""), "file.data"),
    (FilePart(PNG), "file.data"),
    (FilePart(b"\x7fELF\0", "a.out"), "file.data"),
    (FilePart(b"x" * (MAX_DATA + 1)), "content"),
    (FilePart(PDF, "", "text/plain"), "file.mime_type"),
    (FilePart(TEXT, "", "application/pdf"), "file.mime_type"),
    (FilePart(TEXT, "", "application/zip"), "file.mime_type"),
    (FilePart(URL, "", "image/png"), "file.mime_type"),
    (FilePart(PDF, "x" * (MAX_FILENAME + 1)), "file.filename"),
    (FilePart(PDF, "a\0"), "file.filename"),
    (FilePart(URL, "a\nb"), "file.filename"),
    (FilePart("ftp://example.org/x"), "file.url"),
]
BAD_URLS = [
    "",
    "http://example.org/x.png",
    "HTTP://example.org",
    "file:///etc/passwd",
    "data:image/png;base64,AAAA",
    "//example.org/x",
    "https:example.org",
    "https://",
    "https:///x",
    "https://:443/x",
    "https://example.org:port/",
    "https://example.org:99999/",
    "https://example.org:0/",
    "https://[::1/x",
    "https://ada@example.org/x",
    "https://ada:secret@example.org/x",
    "https://@example.org/x",
    "https://example.org\\@evil.example/x",
    "https://example.org/a b",
    " https://example.org/",
    "https://example.org/\t",
    "https://example.org/\0",
    "https://ex\u00e4mple.org/",
    "https://" + "x" * (MAX_URL - 7),
]


@pytest.mark.parametrize(
    ("part", "field"),
    [*BAD, *((ImagePart(url), "image.url") for url in BAD_URLS)],
)
def test_what_may_not_be_attached(part: Attachment, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        accepted(TextPart("Look"), part)
    assert refused.value.field == (field if field == "content" else f"content[1].{field}")
    for secret in ("secret", "passwd", "example", "svg"):
        assert secret not in f"{refused.value.problem} {refused.value}"


def test_the_bounds_of_a_message() -> None:
    half = photo(MAX_DATA // 2)
    assert len(accepted(ImagePart(half), FilePart(b"x" * (MAX_DATA - len(half))))) == 2
    with pytest.raises(InvalidField) as refused:
        accepted(ImagePart(half), FilePart(b"x" * (MAX_DATA - len(half) + 1)))
    assert refused.value.field == "content"
    assert len(accepted(*[ImagePart(PNG)] * MAX_PARTS)) == MAX_PARTS
    with pytest.raises(InvalidField):
        accepted(*[ImagePart(PNG)] * (MAX_PARTS + 1))
    with pytest.raises(InvalidField):
        accepted(ImagePart(PNG), TextPart("x" * 65_537))
    with pytest.raises(InvalidField):
        accepted(ImagePart(PNG), TextPart("\0"))


def test_text_alone_is_kept_as_it_is() -> None:
    content = (TextPart("a"), TextPart(""))
    assert checked_user_content(content) is content
    message = IncomingMessage(user_id="ada", content=content)
    assert message.checked() is message


# --- with and without bytes

parts = st.one_of(
    st.builds(TextPart, st.text()),
    st.builds(ImagePart, st.binary(min_size=1) | st.just(URL), st.just("image/png"), st.sampled_from(Detail)),
    st.builds(FilePart, st.binary(min_size=1) | st.just(URL), st.text(), st.just("text/plain")),
)


@given(st.lists(parts).map(tuple))
def test_bytes_go_and_come_back(content: tuple[ContentPart, ...]) -> None:
    left = without_data(content)
    assert data_of(left) == {}
    assert sum(map(size_of, left)) == sum(map(len, data_of(content).values()))
    assert is_unread(left) == bool(data_of(content))
    assert with_data(left, data_of(content)) == content
    assert with_data(content, {}) == content


def test_missing_bytes_are_noticed() -> None:
    with pytest.raises(KeyError):
        with_data((ImagePart(Unread(1)),), {})


def test_what_is_attached_is_not_in_representations() -> None:
    shown = repr([ImagePart(b"secret"), FilePart("https://secret.example", "secret.pdf")])
    assert "secret" not in shown


# --- fingerprints


def fingerprint(*content: ContentPart, **more: str) -> str:
    return IncomingMessage(user_id="ada", content=content, **more).checked().fingerprint()  # type: ignore[arg-type]


def test_fingerprints_on_record_stay_what_they_are() -> None:
    """Computed by the version before images and files."""
    assert fingerprint(TextPart("Hello"), TextPart("é👋")) == (
        "d25bde4030b8eec3e6ec2107e9b1a821bd6ba99c8cca40989db07dfe6351495b"
    )
    assert fingerprint(TextPart("Hello"), thread_id="t") == (
        "9ffad95c792e1dd60a75ab9f0baa75c2701e0232571b4164f600ac963108efa1"
    )


def test_a_fingerprint_covers_all_that_is_attached() -> None:
    different: list[tuple[ContentPart, ...]] = [
        (ImagePart(PNG),),
        (ImagePart(PNG + b"x"),),
        (ImagePart(PNG + b"y"),),
        (ImagePart(JPEG),),
        (ImagePart(PNG, detail=Detail.HIGH),),
        (ImagePart(URL),),
        (ImagePart(URL + "x"),),
        (ImagePart(URL, "image/png"),),
        (FilePart(URL),),
        (FilePart(TEXT),),
        (FilePart(TEXT, "a"),),
        (FilePart(TEXT, "", "text/markdown"),),
        (ImagePart(PNG), ImagePart(PNG)),
        (ImagePart(PNG), TextPart("a")),
        (TextPart("a"), ImagePart(PNG)),
    ]
    assert len({fingerprint(*content) for content in different}) == len(different)
    assert fingerprint(ImagePart(PNG)) == fingerprint(ImagePart(PNG, "image/png"))  # the same, declared or not

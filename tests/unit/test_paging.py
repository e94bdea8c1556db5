"""Page tokens: only what was made here, for this query, is taken."""

import base64
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.model.errors import InvalidField
from core.use_cases.paging import DEFAULT_PAGE, MAX_PAGE, make_token, page_size, read_token

QUERY = ["threads", "ada", None, ["active"]]
PLACE = ["2026-01-01T00:00:00.000001+00:00", "01a2"]
KINDS = [str, str]


@pytest.mark.parametrize(
    ("asked", "given_"),
    [(0, DEFAULT_PAGE), (1, 1), (49, 49), (MAX_PAGE, MAX_PAGE), (MAX_PAGE + 1, MAX_PAGE), (2**31 - 1, MAX_PAGE)],
)
def test_page_sizes(asked: int, given_: int) -> None:
    assert (DEFAULT_PAGE, MAX_PAGE) == (50, 200)
    assert page_size(asked) == given_


@pytest.mark.parametrize("asked", [-1, -(2**31)])
def test_a_negative_page_size_is_refused(asked: int) -> None:
    with pytest.raises(InvalidField) as error:
        page_size(asked)
    assert error.value.field == "page_size"


@given(
    st.lists(st.one_of(st.text(), st.none(), st.integers()), max_size=4),
    st.lists(st.one_of(st.text(max_size=40), st.integers(-(2**60), 2**60)), max_size=3),
)
def test_a_token_gives_back_its_place(query: list[object], place: list[str | int]) -> None:
    token = make_token(query, place)
    assert token.isascii()
    assert not set(token) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert read_token(token, query, [type(value) for value in place]) == place


def test_no_token_is_the_first_page() -> None:
    assert read_token("", QUERY, KINDS) is None


def packed(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


TOKEN = make_token(QUERY, PLACE)


@pytest.mark.parametrize(
    "token",
    {
        "garbage": "garbage",
        "not base64": "$$$$",
        "not ASCII": "é" * 8,
        "not JSON": base64.urlsafe_b64encode(b"\xff\xfe{").decode(),
        "not a list": packed({"a": 1}),
        "nothing": packed([]),
        "no digest": packed(PLACE),
        "other digest": packed(["0" * 16, *PLACE]),
        "number": packed(7),
        "deep": base64.urlsafe_b64encode(b"[" * 700).decode(),
        "long": "A" * 2_000_000,
        "truncated": TOKEN[:-3],
        "half": TOKEN[: len(TOKEN) // 2],
        "one more": TOKEN + "A",
        "padded": TOKEN + "====",
        "spaced": TOKEN[:9] + " " + TOKEN[9:],
        "twice": TOKEN + TOKEN,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_token_not_made_here_is_refused(token: tuple[str, str]) -> None:
    with pytest.raises(InvalidField) as error:
        read_token(token[1], QUERY, KINDS)
    assert error.value.field == "page_token"


@pytest.mark.parametrize(
    "change",
    {
        "kind": lambda query: ["messages", *query[1:]],
        "user": lambda query: [query[0], "eve", *query[2:]],
        "domain": lambda query: [*query[:2], "career", query[3]],
        "states": lambda query: [*query[:3], ["inactive"]],
        "more": lambda query: [*query, None],
    }.items(),
    ids=lambda item: item[0],
)
def test_a_token_of_another_query_is_refused(
    change: tuple[str, Callable[[list[object]], list[object]]],
) -> None:
    with pytest.raises(InvalidField):
        read_token(TOKEN, change[1](list(QUERY)), KINDS)


def test_a_token_with_a_flipped_bit_is_refused() -> None:
    accepted = []
    for number in range(len(TOKEN)):
        for bit in range(7):
            flipped = TOKEN[:number] + chr(ord(TOKEN[number]) ^ 1 << bit) + TOKEN[number + 1 :]
            try:
                place = read_token(flipped, QUERY, KINDS)
            except InvalidField:
                continue
            if place != PLACE:
                accepted.append((flipped, place))
    assert accepted == []


@pytest.mark.parametrize("kinds", [[int, str], [str], [str, str, str], [bool, str]], ids=str)
def test_a_place_of_another_kind_is_refused(kinds: list[type]) -> None:
    with pytest.raises(InvalidField):
        read_token(TOKEN, QUERY, kinds)
    with pytest.raises(InvalidField):  # bool is no int here
        read_token(make_token(QUERY, [True]), QUERY, [int])

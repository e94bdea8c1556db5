"""A growing text is what was added to it."""

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from core.model.growing import GrowingText


@given(st.text(), st.lists(st.text(max_size=3), max_size=200))
def test_it_is_all_that_was_added(first: str, pieces: list[str]) -> None:
    text = GrowingText(first)
    for piece in pieces:
        text.add(piece)
    assert str(text) == first + "".join(pieces)


def test_it_takes_little_more_than_its_letters() -> None:
    text = GrowingText()
    tracemalloc.start()
    try:
        for number in range(5_000):
            text.add(f" w{number:03}")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(text)) <= held < 2 * len(str(text))

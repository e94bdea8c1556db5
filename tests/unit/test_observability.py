"""What is written of what libraries have to say."""

import json
import logging

import pytest

from core.model.trail import Trail, begin_trail
from entrypoints.observability import Hearing, JsonFormatter, PlainFormatter, set_up_logging
from entrypoints.settings import load_settings
from loud import loud_logging


def record(name: str, level: int = logging.ERROR) -> logging.LogRecord:
    return logging.LogRecord(name, level, __file__, 1, "too bad", (), None)


@pytest.mark.parametrize("formatter", [PlainFormatter(), JsonFormatter()])
def test_a_librarys_flood_is_left_out_and_counted(formatter: logging.Formatter) -> None:
    now = 0.0
    hearing = Hearing(lambda: now)
    assert [hearing(record("grpc.aio")) for _ in range(500)] == [True] * 20 + [False] * 480
    assert hearing(record("asyncio")), "another logger's lines are its own"
    assert all(hearing(record("core.use_cases.x", logging.INFO)) for _ in range(500)), "ours have no bound"
    assert not hearing(record("asyncio", logging.INFO))
    now = 61.0
    first, second = record("grpc.aio"), record("grpc.aio")
    assert hearing(first)
    assert hearing(second)
    line = formatter.format(first)
    if isinstance(formatter, JsonFormatter):
        assert json.loads(line)["left_out"] == 480
    else:
        assert line.endswith("too bad (480 lines before this one were left out)")
    assert "left" not in formatter.format(second)


def failure() -> BaseException:
    """What went wrong, and why."""
    try:
        try:
            raise KeyError("canary")
        except KeyError as error:
            raise ValueError("canary") from error
    except ValueError as error:
        return error


async def test_a_line_has_the_ids_of_what_it_is_about_and_an_exceptions_places() -> None:
    error = failure()
    about = logging.LogRecord(
        "core.x", logging.ERROR, __file__, 1, "%s failed", ("it",), (type(error), error, None)
    )
    begin_trail(Trail(request_id="r", caller="c", turn_id="t", thread_id="h"))
    fields = json.loads(JsonFormatter().format(about))
    places = fields.pop("exception")
    assert fields.pop("time")
    assert fields == {
        "level": "ERROR",
        "logger": "core.x",
        "message": "it failed",
        "request_id": "r",
        "caller": "c",
        "turn_id": "t",
        "thread_id": "h",
    }
    told, cause = places.splitlines()
    assert told.startswith("  builtins.ValueError at ")
    assert cause.startswith(f"  builtins.KeyError at {__file__}:")
    assert cause.endswith(" failure")
    line, _, rest = PlainFormatter().format(about).partition("\n")
    assert line.endswith(" ERROR core.x it failed request_id=r caller=c turn_id=t thread_id=h")
    assert rest == places
    assert "canary" not in places
    begin_trail(Trail())
    assert PlainFormatter().format(record("core.x")).endswith(" ERROR core.x too bad")


@pytest.mark.parametrize(
    ("level", "ours", "theirs"),
    [
        ("debug", "DEBUG INFO WARNING ERROR", "WARNING ERROR"),
        ("warning", "WARNING ERROR", "WARNING ERROR"),
        ("error", "ERROR", "ERROR"),
    ],
)
def test_the_level_that_is_set_is_that_of_our_own_lines(
    level: str, ours: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loud_logging(monkeypatch) as written:
        monkeypatch.setenv("VIDA_LOG_LEVEL", level)
        set_up_logging(load_settings())
        for name in ("core.x", "adapters.x", "entrypoints.x", "library"):
            for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
                logging.getLogger(name).log(number, "too bad")
    heard: dict[str, list[str]] = {}
    for line in written.getvalue().splitlines():
        _, _, word, name, *_ = line.split()
        heard.setdefault(name, []).append(word)
    assert heard.pop("library") == theirs.split()
    assert heard == dict.fromkeys(("core.x", "adapters.x", "entrypoints.x"), ours.split())

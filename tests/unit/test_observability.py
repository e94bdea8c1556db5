"""What is written of what libraries have to say."""

import json
import logging

import pytest

from entrypoints.observability import Hearing, JsonFormatter, PlainFormatter


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

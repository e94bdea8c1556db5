"""The service's own logging at its most talkative, where a test can read it."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from entrypoints.observability import set_up_logging
from entrypoints.settings import load_settings


@contextmanager
def loud_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Sets logging up as a process does, at `debug` and in the form that is set, and yields what is written."""
    monkeypatch.setenv("VIDA_LOG_LEVEL", "debug")
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in list(root.manager.loggerDict)}
    # pytest's own handlers would format records first, and closing them is not ours to do.
    root.handlers.clear()
    set_up_logging(load_settings())
    try:
        yield written
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name in list(root.manager.loggerDict):
            logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))

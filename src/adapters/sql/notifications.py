"""Telling other processes which turns have changed, and hearing it from them, by PostgreSQL's notifications."""

import threading
from collections.abc import Callable, Set
from contextlib import suppress

import psycopg
from sqlalchemy import ARRAY, Text, bindparam, func, select, true

from adapters.sql.engines import session_engine
from adapters.sql.errors import FAULTS
from adapters.sql.session import Session
from adapters.sql.statement import Statement
from adapters.sql.watchdog import Line, Watchdog, line_of

_CHANNEL = "vida_turns"
_IDS_IN_A_PAYLOAD = 200
"""PostgreSQL takes less than 8,000 bytes; an id has 36, and a comma."""
_RETRY_FIRST = 0.1
_RETRY_MAX = 2.0
_LAST_STEPS = 1.0

_payload = func.unnest(bindparam("payloads", type_=ARRAY(Text))).column_valued("payload")
# Notifications are committed one after the other in the whole server. A hint need not survive a crash: without a
# wait for the disk nobody holds the others up.
_NOTIFY = Statement(
    select(func.pg_notify(_CHANNEL, _payload), func.set_config("synchronous_commit", "off", true()))
)


def announce(session: Session, sender: str, changed: Set[str]) -> None:
    """Tells the other processes which turns have been changed."""
    if session.is_server and changed:
        ids = sorted(changed)
        parts = [ids[start : start + _IDS_IN_A_PAYLOAD] for start in range(0, len(ids), _IDS_IN_A_PAYLOAD)]
        session.tell(_NOTIFY, {"payloads": [",".join([sender, *part]) for part in parts]})


class Listener:
    """Calls `heard`, in a thread of its own, with the ids in each announcement that another sender has made.

    An empty set follows every connection: what was said before it has not been heard.
    """

    def __init__(self, url: str, sender: str, watchdog: Watchdog, heard: Callable[[frozenset[str]], None]) -> None:
        self._sender = sender
        self._heard = heard
        self._engine = session_engine(url)
        watchdog.watch(self._engine)
        self._retry = _RETRY_FIRST
        self._line: Line | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-listen", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it, whatever it is waiting for."""
        self._closed.set()
        with self._lock:
            if self._line is not None:
                self._line.cut()
        self._thread.join(_LAST_STEPS)  # one that is just connecting ends by itself, in vain

    def _run(self) -> None:
        while not self._closed.is_set():
            with suppress(*FAULTS):
                self._listen()
            self._closed.wait(self._retry)
            self._retry = min(_RETRY_MAX, self._retry * 2)

    def _listen(self) -> None:
        with self._engine.connect() as connection:
            try:
                line = line_of(connection)
                with line:
                    connection.exec_driver_sql(f"LISTEN {_CHANNEL}")
                driver = connection.connection.driver_connection
                assert isinstance(driver, psycopg.Connection)
                assert isinstance(line, Line)
                with self._lock:
                    if self._closed.is_set():
                        return
                    self._line = line
                self._retry = _RETRY_FIRST
                self._heard(frozenset())
                for notification in driver.notifies():
                    sender, *ids = notification.payload.split(",")
                    if sender != self._sender:
                        self._heard(frozenset(ids))
            finally:
                with self._lock:
                    self._line = None
                connection.invalidate()  # it must not be asked anything more, and least of all wait for it

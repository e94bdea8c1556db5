"""PostgreSQL without a wait for every statement: what nobody reads travels with what somebody does."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from psycopg import Connection, OperationalError, errors
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

from adapters.sql.driver import Column, Driver, Values
from adapters.sql.fiber import Readiness

_log = logging.getLogger(__name__)

_DONE = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)


class Pipeline(Driver):
    """The statements of one connection. Each group ends with a sync, so that the server never looks busy while it
    waits for this process: its limit on idle transactions holds.
    """

    def __init__(self, connection: Connection[Any], line: AbstractContextManager[None]) -> None:
        self.answered = False
        self._server = connection.pgconn
        self._line = line
        self._values = Transformer(connection)
        self._result: PGresult | None = None
        self._prepared: dict[str, bytes] = {}
        self._preparing: dict[str, bytes] = {}
        self._names = 0
        self._waiting: list[str | None] = []
        """For each result to come, the statement that is prepared; None where one is run."""
        self._told: list[list[str | None]] = []
        """The same for what is on its way by itself."""
        self._failed = False
        self._answer = Readiness(self._server.socket, or_to_write=False)
        self._answer_or_room = Readiness(self._server.socket, or_to_write=True)
        self._server.enter_pipeline_mode()

    def begin(self, sql: str) -> None:
        self.answered = self._failed = False
        self._send(sql)
        self._server.flush()  # it holds nothing by this, and is awake when the rest comes

    def run(self, sql: str, values: Values = ()) -> None:
        self._send(sql, values)

    def count(self, sql: str, *values: Values) -> int:
        for each in values:
            self._send(sql, each)
        return sum(result.command_tuples or 0 for result in self._settle()[-len(values) :])

    def rows(self, sql: str, values: Values = ()) -> Sequence[Sequence[Any]]:
        self._send(sql, values)
        self._result = result = self._settle()[-1]
        self._values.set_pgresult(result)
        return self._values.load_rows(0, result.ntuples, tuple)

    def columns(self) -> Sequence[Column]:
        result = self._result
        assert result is not None
        return [((result.fname(n) or b"").decode(), result.ftype(n)) for n in range(result.nfields)]

    def settle(self) -> None:
        if self._waiting or self._told:
            self._settle()

    def tell(self, sql: str, values: Values = ()) -> None:
        self._send(sql, values)
        self._server.pipeline_sync()
        self._server.flush()  # what does not go now goes with what comes next
        self._told.append(self._waiting)
        self._waiting = []

    def roll_back_to(self, savepoint: str) -> None:
        self._empty()
        if self._server.transaction_status == TransactionStatus.IDLE:
            raise OperationalError("the transaction is gone")
        self._send(f"ROLLBACK TO SAVEPOINT {savepoint}")

    def commit(self) -> None:
        self._send("COMMIT")
        done = self._settle()[-1].command_status
        if done != b"COMMIT":
            raise self._out_of_step(f"COMMIT was answered with {done!r}")

    def rollback(self) -> None:
        self._empty()
        if self._server.transaction_status != TransactionStatus.IDLE:
            self._send("ROLLBACK")
            self._settle()

    def _send(self, sql: str, values: Values = ()) -> None:
        if self._failed:
            raise errors.InFailedSqlTransaction("an earlier statement has failed")
        dumped = self._values.dump_sequence(values, [PyFormat.TEXT] * len(values)) if values else ()
        name = self._prepared.get(sql) or self._preparing.get(sql)
        if name is None:
            self._names += 1
            name = self._preparing[sql] = f"s{self._names}".encode()
            self._server.send_prepare(name, sql.encode())
            self._waiting.append(sql)
        self._server.send_query_prepared(name, dumped)
        self._waiting.append(None)

    def _settle(self) -> list[PGresult]:
        """Has everything done that was sent; returns the results of what was run. Raises the first error."""
        waiting, self._waiting = self._waiting, []
        told, self._told = self._told, []
        self._failed = True  # until it is known to be otherwise
        with self._line:
            self._server.pipeline_sync()
            while self._server.flush():
                self._answer_or_room.wait()
                self._server.consume_input()
            for each in told:
                # One more than was sent says that committing it has failed, which happens at the sync.
                self._learn(each, self._receive()[: len(each)])
            results = self._receive()
        self.answered = True
        ran = self._learn(waiting, results)
        self._preparing.clear()
        for result in results:
            if result.status not in _DONE:
                raise errors.error_from_result(result)
        self._failed = False
        return ran

    def _learn(self, waiting: Sequence[str | None], results: Sequence[PGresult]) -> list[PGresult]:
        """Keeps what has been prepared; returns the results of what was run."""
        if len(waiting) != len(results):
            raise self._out_of_step(f"{len(results)} results for {len(waiting)} statements")
        ran = []
        for sql, result in zip(waiting, results, strict=True):
            if sql is None:
                ran.append(result)
            elif result.status == ExecStatus.COMMAND_OK:
                self._prepared[sql] = self._preparing[sql]
        return ran

    def _out_of_step(self, how: str) -> OperationalError:
        """Gives up a connection whose answers are not those to what was asked: nobody knows what has been done."""
        _log.error("a connection to the database is out of step: %s", how)
        self.answered = True
        self._server.finish()
        return OperationalError("the connection is out of step")

    def _receive(self) -> list[PGresult]:
        """The results up to the next sync."""
        server = self._server
        results: list[PGresult] = []
        while True:
            while server.is_busy():
                self._answer.wait()
                server.consume_input()
            result = server.get_result()
            if result is None:
                if server.status == ConnStatus.BAD:
                    raise OperationalError("the connection is lost")
            elif result.status == ExecStatus.PIPELINE_SYNC:
                return results
            else:
                results.append(result)

    def _empty(self) -> None:
        """Leaves nothing that was sent without its result, whatever that is."""
        if self._waiting:
            with suppress(errors.Error):
                self._settle()
            if self._server.status == ConnStatus.BAD:
                raise OperationalError("the connection is lost")
        self._failed = False

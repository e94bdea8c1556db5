"""All repositories on one session."""

from datetime import datetime

from adapters.sql import repositories as r
from adapters.sql.session import Session
from core.ports import store


class SqlTransaction(store.Transaction):
    """The repositories on one session. It serves one transaction after another, as the session does."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._users = r.Users(session)
        self._agents = r.AgentVersions(session)
        self._threads = r.Threads(session)
        self._messages = r.Messages(session)
        self._turns = r.Turns(session)
        self._log = r.TurnLog(session)
        self._goals = r.Goals(session)
        self._ledger = r.Ledger(session)
        self._leases = r.Leases(session)
        self._erasures = r.Erasures(session)
        self._copies = r.Copies(session)

    @property
    def users(self) -> r.Users:
        return self._users

    @property
    def agents(self) -> r.AgentVersions:
        return self._agents

    @property
    def threads(self) -> r.Threads:
        return self._threads

    @property
    def messages(self) -> r.Messages:
        return self._messages

    @property
    def turns(self) -> r.Turns:
        return self._turns

    @property
    def log(self) -> r.TurnLog:
        return self._log

    @property
    def goals(self) -> r.Goals:
        return self._goals

    @property
    def ledger(self) -> r.Ledger:
        return self._ledger

    @property
    def leases(self) -> r.Leases:
        return self._leases

    @property
    def erasures(self) -> r.Erasures:
        return self._erasures

    @property
    def copies(self) -> r.Copies:
        return self._copies

    def now(self) -> datetime:
        return self.session.now()

    def about_now(self) -> datetime:
        return self.session.about_now()

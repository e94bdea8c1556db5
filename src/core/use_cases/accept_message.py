"""Accepting a message: one short transaction makes it durable and claims its turn."""

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from core.model.agent import AgentDefinition, Catalog, Domain
from core.model.errors import (
    AgentNotFound,
    CoreError,
    InvalidField,
    NotSupported,
    RequestIdReused,
    StoreUnavailable,
    ThreadNotFound,
    TurnInProgress,
)
from core.model.events import TurnStarted
from core.model.message import ContentPart, Role, TextPart, check_user_content
from core.model.thread import Thread, ThreadState, check_metadata
from core.model.turn import BusyPolicy, Turn, TurnState, Usage
from core.model.user import check_user_id
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.ports.threads import NewMessage
from core.ports.turns import RequestKey
from core.use_cases.turn_engine import ClaimedTurn, TurnEngine

MAX_REQUEST_ID = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingMessage:
    """A message to a coach. `thread_id` empty: a new thread. `request_id` empty: no idempotency."""

    user_id: str
    content: tuple[ContentPart, ...]
    caller: str = "local"
    thread_id: str = ""
    domain: Domain | None = None
    request_id: str = ""
    on_busy: BusyPolicy = BusyPolicy.REJECT
    metadata: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raises InvalidField or NotSupported for what breaks a rule whatever the store holds."""
        check_user_id(self.user_id)
        if len(self.request_id) > MAX_REQUEST_ID:
            raise InvalidField("request_id", f"must have at most {MAX_REQUEST_ID} characters")
        if "\0" in self.request_id:
            raise InvalidField("request_id", "must not contain U+0000")
        check_user_content(self.content)
        check_metadata(self.metadata, "metadata")
        if self.thread_id and self.metadata:
            raise InvalidField("metadata", "is for new threads; use UpdateThread")
        if self.on_busy is not BusyPolicy.REJECT:
            raise NotSupported("on_busy")

    def fingerprint(self) -> str:
        """SHA-256 of thread, domain and content: what a repeat with the same request id must share."""
        domain = self.domain or (None if self.thread_id else Domain.GENERAL)
        content = [["t" if isinstance(part, TextPart) else "r", part.text] for part in self.content]
        canonical = json.dumps([self.thread_id, domain, content], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The turn of a message. `attached` says that an earlier call had started it."""

    turn: Turn
    attached: bool


class AcceptMessage:
    """Accepts messages and sets their turns running in this process."""

    def __init__(self, *, store: Store, engine: TurnEngine, catalog: Catalog, ids: Ids, owner: str) -> None:
        self._store = store
        self._engine = engine
        self._catalog = catalog
        self._ids = ids
        self._owner = owner
        self._definitions = {definition.id: definition for definition in catalog.agents()}
        self._tasks: set[asyncio.Task[Accepted]] = set()

    async def __call__(self, message: IncomingMessage) -> Accepted:
        """Makes the message durable and its turn running; a repeated request id attaches instead.

        Cancelling the caller does not undo or stop anything. Raises the errors of contract's accept path.
        """
        message.check()
        task = asyncio.create_task(self._accept(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Waits for messages that are being accepted."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, message: IncomingMessage) -> Accepted:
        refusal = self._engine.reserve(message.user_id)
        turn_id = self._ids.new()
        outcome: Turn | ClaimedTurn | None = None
        try:
            outcome = await self._store.write(lambda tx: self._record(tx, message, refusal, turn_id))
        except StoreUnavailable:
            if refusal is None:
                self._engine.disown(turn_id)
            raise
        finally:
            if refusal is None and not isinstance(outcome, ClaimedTurn):
                self._engine.release(message.user_id)
        if isinstance(outcome, Turn):
            return Accepted(outcome, attached=True)
        self._engine.run(outcome)
        return Accepted(outcome.turn, attached=False)

    def _record(
        self, tx: Transaction, message: IncomingMessage, refusal: CoreError | None, turn_id: str
    ) -> Turn | ClaimedTurn:
        """Finds the turn of a repeat, or records a new one."""
        request = RequestKey(
            caller=message.caller,
            user_id=message.user_id,
            request_id=message.request_id,
            fingerprint=message.fingerprint(),
        )
        if request.request_id:
            earlier = tx.turns.by_request(request.caller, request.user_id, request.request_id)
            if earlier is not None:
                turn, fingerprint = earlier
                if fingerprint != request.fingerprint:
                    raise RequestIdReused
                return turn
        now = tx.now()
        if message.thread_id:
            thread, definition = self._existing(tx, message)
            if refusal is not None:
                raise refusal
        else:
            if refusal is not None:
                raise refusal
            thread, definition = self._begin(tx, message, now)
        turn = Turn(
            id=turn_id,
            thread_id=thread.id,
            user_id=message.user_id,
            agent_id=definition.id,
            state=TurnState.RUNNING,
            attempt=1,
            epoch=1,
            last_position=1,
            usage=Usage(),
            reason=None,
            model=self._engine.agent.model(definition),
            provider=self._engine.agent.provider,
            accepted_at=now,
        )
        tx.turns.add(turn, self._owner, request)
        tx.log.begin(turn.id, [TurnStarted(turn.id, thread.id, definition.id)])
        line = NewMessage(
            id=self._ids.new(), turn_id=turn.id, role=Role.USER, content=message.content, created_at=now
        )
        (stored,) = tx.messages.append(thread.id, [line])
        return ClaimedTurn(
            turn=turn,
            thread=thread,
            message=stored,
            definition=definition,
            state=tx.threads.provider_state(thread.id) if message.thread_id else None,
        )

    def _existing(self, tx: Transaction, message: IncomingMessage) -> tuple[Thread, AgentDefinition]:
        thread = tx.threads.lock(message.user_id, message.thread_id)
        if thread is None:
            raise ThreadNotFound
        if message.domain not in (None, thread.domain):
            raise InvalidField("domain", "is not the thread's")
        if busy := tx.turns.in_the_way(thread.id):
            raise TurnInProgress(busy.id)
        return thread, self._definition(tx, thread.agent_id)

    def _begin(self, tx: Transaction, message: IncomingMessage, now: datetime) -> tuple[Thread, AgentDefinition]:
        domain = message.domain or Domain.GENERAL
        definition = self._catalog.by_domain.get(domain)
        if definition is None:
            raise AgentNotFound
        thread = Thread(
            id=self._ids.new(),
            user_id=message.user_id,
            domain=domain,
            agent_id=definition.id,
            title="",
            state=ThreadState.ACTIVE,
            metadata=dict(message.metadata),
            last_message_at=now,
            created_at=now,
            message_count=0,
        )
        tx.users.ensure(message.user_id, now)
        tx.threads.add(thread)
        return thread, definition

    def _definition(self, tx: Transaction, agent_id: str) -> AgentDefinition:
        definition = self._definitions.get(agent_id) or tx.agents.get(agent_id)
        if definition is None:
            raise AgentNotFound
        self._definitions[agent_id] = definition
        return definition

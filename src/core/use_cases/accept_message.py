"""Accepting a message: one short transaction makes it durable and claims its turn."""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import assert_never

from core.model.agent import AgentDefinition, Catalog, Domain
from core.model.attachment import FilePart, ImagePart, Source, data_of
from core.model.errors import (
    AgentNotFound,
    CoreError,
    Draining,
    InvalidField,
    Overloaded,
    ProviderUnavailable,
    QueueFull,
    QuotaExceeded,
    RequestIdReused,
    ThreadNotFound,
    TurnInProgress,
)
from core.model.events import TurnStarted, place
from core.model.ledger import UNLIMITED, Quotas
from core.model.message import ContentPart, RefusalPart, Role, TextPart, checked_user_content
from core.model.thread import Thread, ThreadState, check_metadata
from core.model.turn import BusyPolicy, Turn, TurnReason, TurnState, Usage
from core.model.user import check_user_id
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.ports.telemetry import UNMEASURED, Telemetry
from core.ports.threads import NewMessage
from core.ports.turns import RequestKey
from core.use_cases.claim_turn import ClaimedTurn
from core.use_cases.definitions import Definitions
from core.use_cases.detached import Detached
from core.use_cases.end_turn import Ended, Ending, end_turn
from core.use_cases.quota import spent_quota
from core.use_cases.turn_engine import TurnEngine

MAX_REQUEST_ID = 128
MAX_WAITING = 8
"""Messages that may wait in one thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingMessage:
    """A message to a coach. `thread_id` empty: a new thread. `request_id` empty: no idempotency. `traceparent` is
    the W3C trace that the call belongs to."""

    user_id: str
    content: tuple[ContentPart, ...]
    caller: str = "local"
    thread_id: str = ""
    domain: Domain | None = None
    request_id: str = ""
    on_busy: BusyPolicy = BusyPolicy.REJECT
    metadata: Mapping[str, str] = field(default_factory=dict)
    traceparent: str = ""

    def checked(self) -> "IncomingMessage":
        """The message as it is kept. Raises InvalidField for what breaks a rule whatever the store holds."""
        check_user_id(self.user_id)
        if len(self.request_id) > MAX_REQUEST_ID:
            raise InvalidField("request_id", f"must have at most {MAX_REQUEST_ID} characters")
        if "\0" in self.request_id:
            raise InvalidField("request_id", "must not contain U+0000")
        content = checked_user_content(self.content)
        check_metadata(self.metadata, "metadata")
        if self.thread_id and self.metadata:
            raise InvalidField("metadata", "is for new threads; use UpdateThread")
        return self if content is self.content else replace(self, content=content)

    def fingerprint(self) -> str:
        """SHA-256 of thread, domain and content: what a repeat with the same request id must share."""
        domain = self.domain or (None if self.thread_id else Domain.GENERAL)
        content = [_part_facts(part) for part in self.content]
        canonical = json.dumps([self.thread_id, domain, content], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def request(self) -> RequestKey:
        """What a repeat is known by."""
        return RequestKey(
            caller=self.caller,
            user_id=self.user_id,
            request_id=self.request_id,
            fingerprint=self.fingerprint() if self.request_id else "",
        )


def _part_facts(part: ContentPart) -> list[str]:
    """What makes a part another one. The fingerprints on record hang on it."""
    match part:
        case TextPart(text):
            return ["t", text]
        case RefusalPart(text):
            return ["r", text]
        case ImagePart(source, mime_type, detail):
            return ["i", _source_facts(source), mime_type, detail]
        case FilePart(source, filename, mime_type):
            return ["f", _source_facts(source), mime_type, filename]
        case _:
            assert_never(part)


def _source_facts(source: Source) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    assert isinstance(source, str)  # nobody sends what has not been read
    return source


@dataclass(frozen=True, slots=True)
class Accepted:
    """The turn of a message. `attached` says that an earlier call had started it."""

    turn: Turn
    attached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """What the transaction did: found the turn of a repeat, or stored one and perhaps ended others for it."""

    turn: Turn
    attached: bool = False
    claimed: ClaimedTurn | None = None
    interrupted: tuple[Ended, ...] = ()


class AcceptMessage:
    """Accepts messages and sets their turns running in this process."""

    def __init__(
        self,
        *,
        store: Store,
        engine: TurnEngine,
        catalog: Catalog,
        definitions: Definitions,
        ids: Ids,
        quotas: Quotas = UNLIMITED,
        telemetry: Telemetry = UNMEASURED,
    ) -> None:
        self._store = store
        self._engine = engine
        self._catalog = catalog
        self._definitions = definitions
        self._ids = ids
        self._quotas = quotas
        self._telemetry = telemetry
        self._detached: Detached[Accepted] = Detached()

    async def __call__(self, message: IncomingMessage) -> Accepted:
        """Makes the message durable and its turn running or waiting; a repeated request id attaches instead.

        Cancelling the caller does not undo or stop anything. Raises the errors of contract's accept path. After
        StoreUnavailable it is unknown whether the message is on record; if it is, its turn is found and run.
        """
        try:
            if data_of(message.content):
                checked = await asyncio.to_thread(_checked, message)  # too much to look through in the event loop
            else:
                checked = _checked(message)
            return await self._detached.run(self._accept(*checked))
        except CoreError as error:
            self._telemetry.refused(type(error))
            raise

    async def settle(self) -> None:
        """Waits for messages that are being accepted."""
        await self._detached.settle()

    async def _accept(self, message: IncomingMessage, request: RequestKey) -> Accepted:
        begun = self._telemetry.time()
        refusal = self._engine.reserve(message.user_id)
        turn_id = self._ids.new()
        recorded: _Recorded | None = None
        with self._engine.expecting(turn_id):
            try:
                recorded = await self._store.write(lambda tx: self._record(tx, message, request, refusal, turn_id))
            finally:
                if refusal is None and (recorded is None or recorded.claimed is None):
                    self._engine.release(message.user_id)
            for interrupted in recorded.interrupted:
                self._engine.abandon(interrupted.turn.id)
                self._engine.ended(interrupted)
            if recorded.claimed is not None:
                if refusal is not None:
                    self._engine.reserve_anyway(message.user_id)
                self._engine.run(recorded.claimed)
        self._telemetry.accepted(recorded.turn, self._telemetry.time() - begun, attached=recorded.attached)
        return Accepted(recorded.turn, recorded.attached)

    def _record(
        self,
        tx: Transaction,
        message: IncomingMessage,
        request: RequestKey,
        refusal: CoreError | None,
        turn_id: str,
    ) -> _Recorded:
        """Finds the turn of a repeat, or records a new one."""
        if earlier := self._earlier(tx, request):
            return _Recorded(turn=earlier, attached=True)
        interrupted: tuple[Ended, ...] = ()
        if not message.thread_id:
            if refusal is not None:
                raise refusal
            now = tx.about_now()
            tx.users.ensure(message.user_id, now)
            if earlier := self._within_quotas(tx, request, now):
                return _Recorded(turn=earlier, attached=True)
            thread, definition = self._begin(tx, message, now)
            return self._start(tx, message, request, turn_id, thread, definition, now)
        thread, definition = self._existing(tx, message)
        now = tx.now()  # within the thread's lock: later turns of a thread are never older
        unfinished = tx.turns.unfinished(thread.id)
        if earlier := self._within_quotas(tx, request, now):
            return _Recorded(turn=earlier, attached=True)
        if unfinished:
            if earlier := self._earlier(tx, request):
                return _Recorded(turn=earlier, attached=True)  # another process was faster with the same message
            match message.on_busy:
                case BusyPolicy.REJECT:
                    raise TurnInProgress(unfinished[0].id)
                case BusyPolicy.QUEUE:
                    if isinstance(refusal, Draining | ProviderUnavailable):
                        raise refusal
                    return self._enqueue(tx, message, request, turn_id, thread, definition, unfinished, now)
                case BusyPolicy.INTERRUPT:
                    # The new turn takes the place of one at work here: a bound on their number is no hindrance.
                    replaces = any(map(self._engine.knows, (turn.id for turn in unfinished)))
                    if refusal is not None and not (replaces and isinstance(refusal, QuotaExceeded | Overloaded)):
                        raise refusal
                    ending = Ending(reason=TurnReason.INTERRUPTED, cancelled=True)
                    interrupted = tuple(end_turn(tx, self._ids, turn.id, ending) for turn in unfinished)
        elif refusal is not None:
            raise refusal
        recorded = self._start(tx, message, request, turn_id, thread, definition, now)
        return replace(recorded, interrupted=interrupted)

    def _within_quotas(self, tx: Transaction, request: RequestKey, now: datetime) -> Turn | None:
        """Raises QuotaSpent where a quota of the user is. A repeat of what another process has accepted meanwhile
        attaches: returns its turn."""
        spent = spent_quota(tx, self._quotas, request.user_id, now)
        if spent is None:
            return None
        if earlier := self._earlier(tx, request):
            return earlier
        raise spent

    def _earlier(self, tx: Transaction, request: RequestKey) -> Turn | None:
        if not request.request_id:
            return None
        earlier = tx.turns.by_request(request.caller, request.user_id, request.request_id)
        if earlier is None:
            return None
        turn, fingerprint = earlier
        if fingerprint != request.fingerprint:
            raise RequestIdReused
        return turn

    def _start(
        self,
        tx: Transaction,
        message: IncomingMessage,
        request: RequestKey,
        turn_id: str,
        thread: Thread,
        definition: AgentDefinition,
        now: datetime,
    ) -> _Recorded:
        """Records a turn that this process has claimed, and its message."""
        model, provider = self._engine.claimant.served_by(definition)
        turn = replace(
            _accepted(message, turn_id, thread, now),
            state=TurnState.RUNNING,
            epoch=1,
            model=model,
            provider=provider,
            claimed_at=now,
        )
        started = TurnStarted(turn.id, thread.id, definition.id, message.traceparent)
        tx.turns.add(turn, request, owner=self._engine.claimant.owner)
        tx.turns.attach(turn.id, message.content)
        tx.log.begin(turn.id, [started])
        line = self._line(message, turn_id, now)
        stored = (
            tx.messages.append(thread.id, [line])[0] if message.thread_id else tx.messages.begin(thread.id, line)
        )
        claimed = ClaimedTurn(
            turn=turn,
            thread=thread,
            message=stored,
            definition=definition,
            state=tx.threads.provider_state(thread.id) if message.thread_id else None,
            log=place([started], 0),
            budget_left=self._engine.claimant.budget,
        )
        return _Recorded(turn=turn, claimed=claimed)

    def _enqueue(
        self,
        tx: Transaction,
        message: IncomingMessage,
        request: RequestKey,
        turn_id: str,
        thread: Thread,
        definition: AgentDefinition,
        unfinished: Sequence[Turn],
        now: datetime,
    ) -> _Recorded:
        """Records a turn that waits. Its message joins the transcript when its turn comes."""
        if sum(turn.state is TurnState.ACCEPTED for turn in unfinished) >= MAX_WAITING:
            raise QueueFull
        turn = _accepted(message, turn_id, thread, now)
        tx.turns.add(turn, request, waiting=self._line(message, turn_id, now))
        tx.turns.attach(turn.id, message.content)
        tx.log.begin(turn.id, [TurnStarted(turn.id, thread.id, definition.id, message.traceparent)])
        tx.threads.touch(thread.id, now)
        return _Recorded(turn=turn)

    def _line(self, message: IncomingMessage, turn_id: str, now: datetime) -> NewMessage:
        return NewMessage(
            id=self._ids.new(), turn_id=turn_id, role=Role.USER, content=message.content, created_at=now
        )

    def _existing(self, tx: Transaction, message: IncomingMessage) -> tuple[Thread, AgentDefinition]:
        thread = tx.threads.lock(message.user_id, message.thread_id)
        if thread is None:
            raise ThreadNotFound
        if message.domain not in (None, thread.domain):
            raise InvalidField("domain", "is not the thread's")
        return thread, self._definitions.of(tx, thread.agent_id)

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
            message_count=1,
        )
        tx.threads.add(thread)
        return thread, definition


def _checked(message: IncomingMessage) -> tuple[IncomingMessage, RequestKey]:
    """The message as it is kept, and what a repeat of it is known by. Raises InvalidField."""
    message = message.checked()
    return message, message.request()


def _accepted(message: IncomingMessage, turn_id: str, thread: Thread, now: datetime) -> Turn:
    """A turn that nobody has claimed."""
    return Turn(
        id=turn_id,
        thread_id=thread.id,
        user_id=message.user_id,
        agent_id=thread.agent_id,
        state=TurnState.ACCEPTED,
        attempt=1,
        epoch=0,
        last_position=1,
        usage=Usage(),
        reason=None,
        model="",
        provider="",
        accepted_at=now,
    )

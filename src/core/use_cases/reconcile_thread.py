"""Reconciling: an operator has the provider's copy of a thread brought into step with the transcript now."""

import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from core.model.errors import AgentNotFound, ProviderUnavailable, ThreadNotFound, TurnInProgress
from core.model.message import Message, Role
from core.model.thread import UNSYNCED, ProviderState, Thread
from core.ports.agent import Agent, AgentFailed, CopyFound, ReplyRequest, Standing
from core.ports.store import Store, Transaction

_log = logging.getLogger(__name__)

_RETRY_AFTER = 5.0


class Action(StrEnum):
    """What was done with a copy."""

    NOTHING = "NOTHING"
    REPAIRED = "REPAIRED"
    """What was wrong in it was replaced."""
    REBUILT = "REBUILT"
    """Another one took its place."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """How a copy stood, and what was done, or, with a dry run, would be."""

    found: CopyFound
    action: Action


class ReconcileThread:
    """Compares, and repairs or rebuilds, while nothing goes on in the thread.

    From the beginning to the end the copy is put aside: a turn that begins meanwhile finds none and makes its own,
    and TurnInProgress is raised. So the two never change the same one. After a crash here the next turn makes one
    as well. What was put aside, and not put back, is deleted at the provider with the thread.
    """

    def __init__(self, store: Store, agent: Callable[[], Agent]) -> None:
        self._store = store
        self._agent = agent

    async def __call__(self, thread_id: str, *, dry_run: bool = False) -> Reconciled:
        """Raises ThreadNotFound, TurnInProgress where a turn has not ended or begins meanwhile, and
        ProviderUnavailable."""
        agent = self._agent()
        begin = partial(self._begin, thread_id, agent.provider, not dry_run)
        request = await (self._store.read(begin) if dry_run else self._store.write(begin))
        found = CopyFound(Standing.NO_COPY)
        state = request.state
        try:
            async with aclosing(agent.reconcile(request, dry_run=dry_run)) as steps:
                async for step in steps:
                    if isinstance(step, CopyFound):
                        found = step
                    else:
                        state = step.state
                        await self._store.write(partial(_keep, request, state))
        except AgentFailed as failure:
            _log.warning("the copy of thread %s can't be reconciled: %s", thread_id, failure.reason.value)
            if state is not None and not dry_run:
                await self._put_back(request, replace(state, synced_to=UNSYNCED))
            raise ProviderUnavailable(_RETRY_AFTER) from failure
        if dry_run:
            return Reconciled(found, _planned(found))
        if state is not None:
            await self._put_back(request, state)
        return Reconciled(found, _done(found, request.state, state))

    async def _put_back(self, request: ReplyRequest, state: ProviderState) -> None:
        if turn_id := await self._store.write(partial(_save, request, state)):
            raise TurnInProgress(turn_id)

    def _begin(self, thread_id: str, provider: str, aside: bool, tx: Transaction) -> ReplyRequest:
        """The request that the next message would be answered with. With `aside`, puts the copy there."""
        thread = tx.threads.find(thread_id)
        if thread is None or (aside and tx.threads.lock(thread.user_id, thread_id) is None):
            raise ThreadNotFound
        if unfinished := tx.turns.unfinished(thread_id):
            raise TurnInProgress(unfinished[0].id)
        definition = tx.agents.get(thread.agent_id)
        if definition is None:
            raise AgentNotFound
        state = tx.threads.provider_state(thread_id)
        if state is not None and state.provider != provider:
            state = None  # another provider's, which nobody here can look at
        if aside and state is not None:
            tx.threads.save_provider_state(thread_id, _aside(provider))
        message = _next_line(thread)
        return ReplyRequest(
            turn_id="",
            thread_id=thread_id,
            user_id=thread.user_id,
            domain=thread.domain,
            definition=definition,
            message=message,
            history=partial(self._history, message),
            tools=(),
            state=state,
        )

    async def _history(self, message: Message, data: int = 0) -> Sequence[Message]:
        """The lines before a message, as `History` promises, whatever has been said since."""

        def read(tx: Transaction) -> Sequence[Message]:
            return tx.messages.list(
                message.thread_id, after=message.index, newest_first=True, limit=None, data=data
            )

        lines = await self._store.read(read)
        return lines[::-1]


def _aside(provider: str) -> ProviderState:
    """What is on record of a copy that was put aside."""
    return ProviderState(provider=provider, synced_to=UNSYNCED)


def _next_line(thread: Thread) -> Message:
    return Message(
        id="",
        thread_id=thread.id,
        turn_id="",
        index=thread.message_count + 1,
        role=Role.USER,
        content=(),
        partial=False,
        created_at=thread.last_message_at,
    )


def _keep(request: ReplyRequest, state: ProviderState, tx: Transaction) -> None:
    """Notes what the provider has, whatever becomes of the thread."""
    tx.copies.keep(request.thread_id, state.provider, state.refs)


def _save(request: ReplyRequest, state: ProviderState, tx: Transaction) -> str:
    """Puts the copy back. Returns the id of a turn that has begun since, empty if none has: its own copy stays."""
    thread = tx.threads.lock(request.user_id, request.thread_id)
    if thread is None:
        raise ThreadNotFound
    if unfinished := tx.turns.unfinished(request.thread_id):
        return unfinished[0].id
    if thread.message_count < request.message.index:
        # Unless an operator did the same meanwhile, and was done first.
        if tx.threads.provider_state(request.thread_id) == _aside(state.provider):
            tx.threads.save_provider_state(request.thread_id, state)
        return ""
    (newest,) = tx.messages.list(request.thread_id, after=None, newest_first=True, limit=1)
    return newest.turn_id


def _planned(found: CopyFound) -> Action:
    match found.standing:
        case Standing.OUT_OF_STEP:
            return Action.REPAIRED
        case Standing.UNKNOWN | Standing.GONE:
            return Action.REBUILT
        case _:
            return Action.NOTHING


def _done(found: CopyFound, before: ProviderState | None, after: ProviderState | None) -> Action:
    if before is not None and after is not None and before.conversation_id != after.conversation_id:
        return Action.REBUILT
    return Action.REPAIRED if found.standing is Standing.OUT_OF_STEP else Action.NOTHING

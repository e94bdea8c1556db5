"""A thread of the OpenAI agent as the engine would keep it, for tests of the agent alone."""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from adapters.openai.agent import OpenAIAgent
from core.model.agent import AgentDefinition, Domain
from core.model.attachment import without_data
from core.model.events import TextDelta, ToolCalled
from core.model.message import Message, Role, TextPart, ToolExchange, readable
from core.model.thread import ProviderState
from core.model.turn import TurnReason
from core.ports.agent import (
    AgentEvent,
    AgentFailed,
    Begun,
    ReplyRequest,
    RoundFinished,
    StateChanged,
    Stored,
    ToolRound,
)
from core.ports.tools import ToolSpec

KEY = "sk-very-secret"
USER_KEY = "key-of-users"
COACH = AgentDefinition(
    slug="career",
    version=1,
    domain=Domain.CAREER,
    name="Career coach",
    instructions="Be kind.",
    effort="none",
    verbosity="low",
    tools=("goals",),
)
GOALS = ToolSpec(name="goals", description="Lists goals.", parameters={"type": "object", "properties": {}})


class Naps:
    """Stands in for asyncio.sleep and takes no time."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)


@dataclass
class ThreadOfTest:
    """A thread as the engine would keep it: the transcript, what the agent last said of its copy, the handles of
    what was begun, and the ids of all that the provider keeps."""

    agent: OpenAIAgent
    messages: list[Message] = field(default_factory=list)
    state: ProviderState | None = None
    ahead: ProviderState | None = None
    begun: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    turns: int = 0
    definition: AgentDefinition = COACH
    tools: Sequence[ToolSpec] = (GOALS,)

    def add(self, role: Role, text: str, tool: ToolExchange | None = None, **more: Any) -> Message:
        index = len(self.messages) + 1
        message = Message(
            id=f"m{index}",
            thread_id="thread-1",
            turn_id=f"turn-{self.turns}",
            index=index,
            role=role,
            content=more.pop("content", (TextPart(text),) if text else ()),
            partial=more.pop("partial", False),
            created_at=datetime(2026, 11, 22, tzinfo=UTC),
            tool=tool,
        )
        self.messages.append(message)
        return message

    def begin(self, text: str) -> ReplyRequest:
        """Accepts a user's message."""
        self.turns += 1
        self.ahead = None
        message = self.add(Role.USER, text)
        before = tuple(self.messages[:-1])

        async def history(data: int = 0) -> Sequence[Message]:
            whole = set(readable(before[::-1], data))
            return [
                line if line.turn_id in whole else replace(line, content=without_data(line.content))
                for line in before
            ]

        return ReplyRequest(
            turn_id=f"turn-{self.turns}",
            thread_id="thread-1",
            user_id="ann@example.org",
            domain=Domain.CAREER,
            definition=self.definition,
            message=message,
            history=history,
            tools=self.tools,
            state=self.state,
        )

    async def round(self, request: ReplyRequest) -> list[AgentEvent]:
        """Runs one round to its end, storing what the agent says of its copy."""
        events: list[AgentEvent] = []
        async with aclosing(self.agent.reply(self.handed(request))) as reply:
            async for event in reply:
                self.note(event)
                events.append(event)
        return events

    def handed(self, request: ReplyRequest) -> ReplyRequest:
        """The request with the copy that is on record, or that came with the round before in this process."""
        follows = self.ahead if request.rounds and request.resume is None else None
        return replace(request, state=follows or self.state)

    def note(self, event: AgentEvent) -> None:
        """Keeps what the engine would store at once, or hand to the next round."""
        if isinstance(event, StateChanged):
            self.state, self.ahead = event.state, None
            self.kept += [ref for ref in event.state.refs if ref not in self.kept]
        elif isinstance(event, RoundFinished):
            self.ahead = event.copy
        elif isinstance(event, Begun):
            self.begun.append(event.handle)
            self.kept.append(event.handle)
        elif isinstance(event, Stored):
            self.kept.append(event.ref)

    async def say(self, text: str) -> str:
        """Runs a turn to its end and returns the reply."""
        request = self.begin(text)
        said = ""
        while True:
            events = await self.round(request)
            text_of_round = "".join(event.text for event in events if isinstance(event, TextDelta))
            said += text_of_round
            calls = [event for event in events if isinstance(event, ToolCalled)]
            if not calls:
                break
            exchanges = tuple(
                ToolExchange(c.call_id, c.name, c.arguments_json, f"answer to {c.name}", False) for c in calls
            )
            for exchange in exchanges:
                self.add(Role.TOOL, "", exchange)
            done = ToolRound(text_of_round, exchanges)
            request = replace(request, rounds=(*request.rounds, done))
        self.add(Role.ASSISTANT, said)
        finished = events[-1]
        assert isinstance(finished, RoundFinished)
        if finished.copy is not None:
            self.state = replace(finished.copy, synced_to=len(self.messages))
        return said


def said(events: Sequence[AgentEvent]) -> str:
    """The text of a round."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def fails(thread: ThreadOfTest, text: str = "Hello") -> tuple[TurnReason, str]:
    """Runs a round that must fail; returns why, and the text that came before."""
    events: list[AgentEvent] = []

    async def run() -> None:
        async with aclosing(thread.agent.reply(thread.begin(text))) as reply:
            async for event in reply:
                thread.note(event)
                events.append(event)

    with pytest.raises(AgentFailed) as caught:
        await run()
    return caught.value.reason, said(events)


def words(items: Sequence[dict[str, Any]]) -> list[str]:
    """Conversation items in short."""
    short = []
    for item in items:
        match item["type"]:
            case "message":
                parts = [part.get("text", part.get("refusal")) for part in item["content"]]
                short.append(f"{item['role']}: {' | '.join(parts)}")
            case "function_call":
                short.append(f"call {item['call_id']}: {item['name']}")
            case "function_call_output":
                short.append(f"answer {item['call_id']}: {item['output']}")
    return short

"""A coach whose reply is a pure function of the message, and two tools with an effect that lasts.

A message is words like `words:20`; what is no such pair is ignored, and makes one message differ from the next:

- `words:N` words in the reply's last round, `before:N` words before the tool is called;
- `pace:N` words a second (0: no pause), `slow-start:S` seconds before the first event and `slow-end:S` after
  the last;
- `tool:idempotent` or `tool:plain` calls that tool once, which takes `linger:S` seconds after its effect;
- `state:1` changes the provider's copy before the first word.
"""

import asyncio
import hashlib
import json
import os
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.tools.definition import ToolFunction, tool
from core.model.agent import AgentDefinition, Catalog, Domain
from core.model.errors import NotSupported
from core.model.events import TextDelta, ToolCalled
from core.model.thread import ProviderState
from core.model.turn import Usage
from core.ports.agent import Agent, AgentEvent, JsonAnswer, JsonRequest, ReplyRequest, RoundFinished, StateChanged
from core.ports.tools import ToolContext

_STEMS = ("fern", "Öl", "тень", "🌱", "naïve", "石", "e\u0301tude", "a\u200db", "𝄞lm", "step")


@dataclass(frozen=True)
class Plan:
    """What a message asks for."""

    message: str
    words: int
    before: int
    pace: float
    slow_start: float
    slow_end: float
    tool: str
    linger: float
    state: bool

    @classmethod
    def of(cls, message: str) -> "Plan":
        """Reads a message."""
        asked = dict(word.split(":", 1) for word in message.split() if ":" in word)
        return cls(
            message=message,
            words=int(asked.get("words", "5")),
            before=int(asked.get("before", "0")),
            pace=float(asked.get("pace", "0")),
            slow_start=float(asked.get("slow-start", "0")),
            slow_end=float(asked.get("slow-end", "0")),
            tool=asked.get("tool", ""),
            linger=float(asked.get("linger", "0")),
            state=asked.get("state", "") == "1",
        )

    def said(self, first: int, count: int) -> Iterator[str]:
        """Words of the reply, from the one numbered `first`."""
        digest = hashlib.sha256(self.message.encode()).digest()
        for number in range(first, first + count):
            stem = _STEMS[digest[number % len(digest)] % len(_STEMS)]
            yield f"{stem}{number:x}{digest[(number * 7) % len(digest)]:x} "


def expected(message: str) -> str:
    """The reply to a message."""
    plan = Plan.of(message)
    return "".join(plan.said(0, plan.before + plan.words))


class ScriptedCoach(Agent):
    """Replies as its messages ask."""

    @property
    def provider(self) -> str:
        return "scripted"

    def model(self, definition: AgentDefinition) -> str:
        return "scripted-1"

    def refusal(self) -> float | None:
        return None

    async def complete_json(self, request: JsonRequest[Any]) -> JsonAnswer[Any]:
        raise NotSupported("provider")

    async def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        plan = Plan.of(request.message.text)
        last_round = bool(request.rounds) or not plan.tool
        if not request.rounds:
            await asyncio.sleep(plan.slow_start)
            if plan.state:
                yield StateChanged(ProviderState(provider="scripted", conversation_id=f"conv_{request.thread_id}"))
            async for event in self._say(plan, 0, plan.before):
                yield event
            if plan.tool:
                # As from a real provider: another id each time that it is asked.
                arguments = json.dumps({"linger": plan.linger})
                yield ToolCalled(f"call_{uuid.uuid4().hex}", plan.tool, arguments)
        if last_round:
            async for event in self._say(plan, plan.before, plan.words):
                yield event
            await asyncio.sleep(plan.slow_end)
        # Whose work the reply is can be read from the turn's usage.
        yield RoundFinished(Usage(input_tokens=os.getpid() if last_round else 0, output_tokens=plan.words))

    async def _say(self, plan: Plan, first: int, count: int) -> AsyncGenerator[TextDelta, None]:
        for word in plan.said(first, count):
            yield TextDelta(word)
            if plan.pace:
                await asyncio.sleep(1 / plan.pace)

    async def stop(self, handle: str) -> None:
        """There is nothing that goes on by itself."""

    async def aclose(self) -> None:
        """Holds nothing."""


CATALOG = Catalog(
    {
        domain: AgentDefinition(
            slug=f"scripted-{domain.value}",
            version=1,
            domain=domain,
            name="Scripted",
            instructions="Follow the script.",
            tools=("idempotent", "plain"),
        )
        for domain in Domain
    }
)


class Effects:
    """What tools did, in a file: a line `called NAME KEY` for each call, and `took NAME KEY` for each effect."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def lines(self, key: str = "") -> list[str]:
        """The lines so far, of one idempotency key or of the keys that begin so."""
        text = self._file.read_text() if self._file.exists() else ""
        return [line for line in text.splitlines() if line.split(" ")[-1].startswith(key)]

    def note(self, line: str) -> None:
        """Adds a line for good."""
        with self._file.open("a") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())


def tools(effects: Effects) -> list[ToolFunction]:
    """`idempotent`, which takes effect once for each key, and `plain`, which does so each time."""

    @tool(idempotent=True)
    async def idempotent(context: ToolContext, linger: float) -> str:
        """Takes effect once."""
        effects.note(f"called idempotent {context.idempotency_key}")
        took = f"took idempotent {context.idempotency_key}"
        before_effect(context.turn_id)
        if took not in effects.lines(context.idempotency_key):
            effects.note(took)
        after_effect(context.turn_id)
        await asyncio.sleep(linger)
        return "done"

    @tool
    async def plain(context: ToolContext, linger: float) -> str:
        """Takes effect each time."""
        effects.note(f"called plain {context.idempotency_key}")
        before_effect(context.turn_id)
        effects.note(f"took plain {context.idempotency_key}")
        after_effect(context.turn_id)
        await asyncio.sleep(linger)
        return "done"

    return [idempotent, plain]


def before_effect(turn_id: str) -> None:
    """Passed by a tool that has been called and has done nothing yet."""


def after_effect(turn_id: str) -> None:
    """Passed by a tool that has taken effect and has not answered yet."""

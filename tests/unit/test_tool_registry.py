"""Tools: schemas from signatures, calls that never fail, and where tools are found."""

import asyncio
import json
import logging
import math
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import date
from enum import Enum
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from adapters.memory.store import MemoryStore
from adapters.tools import loading, registry
from adapters.tools.definition import ToolDefinitionError, tool
from adapters.tools.goals import SHOWN, goal_tools
from adapters.tools.loading import load_tools
from adapters.tools.registry import MAX_ARGUMENTS, MAX_OUTPUT, Registry
from core.model.agent import Domain
from core.model.errors import LeaseLost
from core.model.goal import MAX_GOAL
from core.model.turn import Turn, TurnState, Usage
from core.ports.store import Transaction
from core.ports.tools import ToolContext, ToolOutput
from core.ports.turns import RequestKey
from doubles import ManualClock

SECRET = "sk-secret-4711"
CONTEXT = ToolContext(user_id="ada", thread_id="th", turn_id="tu", epoch=1, call_id="c1", domain=Domain.HEALTH)


class Mood(Enum):
    """For a schema."""

    GOOD = "good"
    BAD = "bad"


class Plan(BaseModel):
    """A nested argument."""

    title: str
    steps: list[str] = []


async def everything(
    context: ToolContext,
    text: str,
    day: date,
    mood: Mood,
    tags: list[str],
    plan: Plan,
    kind: Literal["a", "b"] = "a",
    count: Annotated[int, Field(ge=1, le=5)] = 1,
    note: str | None = None,
    schema: bool = False,
) -> dict[str, Any]:
    """Takes everything.

    Use it for tests.

    Args:
        context: never described
        text: What was said,
            on two lines.
        day (date): A day.

    Returns:
        What it took.
    """
    return {
        "user": context.user_id,
        "text": text,
        "day": day,
        "mood": mood,
        "tags": tags,
        "steps": plan.steps,
        "kind": kind,
        "count": count,
        "note": note,
        "schema": schema,
    }


GOOD = {"text": "hi", "day": "2026-12-01", "mood": "bad", "tags": ["x"], "plan": {"title": "t", "steps": ["one"]}}


async def call(function: Callable[..., Awaitable[Any]], arguments: object) -> ToolOutput:
    tools = Registry([function])
    (name,) = tools.names
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return await tools.call(name, text, CONTEXT)


def error_of(output: ToolOutput) -> str:
    assert output.is_error
    return str(json.loads(output.text)["error"])


def test_the_schema_comes_from_the_signature() -> None:
    (spec,) = Registry([everything]).specs(["everything"])
    assert spec.name == "everything"
    assert spec.description.startswith("Takes everything.\n\nUse it for tests.")
    assert "Args:" not in spec.description
    assert not spec.idempotent
    schema = spec.parameters
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["text", "day", "mood", "tags", "plan"]
    properties = schema["properties"]
    assert properties["text"] == {"type": "string", "description": "What was said, on two lines."}
    assert properties["day"] == {"type": "string", "format": "date", "description": "A day."}
    assert properties["tags"] == {"type": "array", "items": {"type": "string"}}
    assert properties["kind"]["enum"] == ["a", "b"]
    assert properties["count"] == {"type": "integer", "minimum": 1, "maximum": 5, "default": 1}
    assert properties["note"] == {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    assert properties["schema"] == {"type": "boolean", "default": False}
    assert schema["$defs"]["Mood"]["enum"] == ["good", "bad"]
    assert "title" not in schema
    assert "title" in schema["$defs"]["Plan"]["properties"]


def test_the_context_is_never_in_the_schema() -> None:
    (spec,) = Registry([everything]).specs(["everything"])
    assert "context" not in spec.parameters["properties"]
    assert "user" not in json.dumps(spec.parameters)
    json.dumps(spec.parameters)


def test_a_tool_without_arguments_has_an_empty_schema() -> None:
    async def ping(context: ToolContext) -> str:
        """Pings."""
        return context.user_id

    (spec,) = Registry([ping]).specs(["ping"])
    assert spec.parameters == {"type": "object", "properties": {}, "additionalProperties": False}


async def test_a_call_gets_typed_arguments_and_the_context() -> None:
    output = await call(everything, GOOD)
    assert not output.is_error
    assert json.loads(output.text) == {
        "user": "ada",
        "text": "hi",
        "day": "2026-12-01",
        "mood": "bad",
        "tags": ["x"],
        "steps": ["one"],
        "kind": "a",
        "count": 1,
        "note": None,
        "schema": False,
    }


async def test_the_model_can_not_set_the_context() -> None:
    output = await call(everything, {**GOOD, "context": {"user_id": "eve"}})
    assert error_of(output) == "The arguments are invalid."
    assert "eve" not in output.text


@pytest.mark.parametrize(
    ("arguments", "field", "problem"),
    [
        ({**GOOD, "day": SECRET}, "day", "date_from_datetime_parsing"),
        ({**GOOD, "count": 9}, "count", "less_than_equal"),
        ({key: value for key, value in GOOD.items() if key != "text"}, "text", "missing"),
        ({**GOOD, SECRET: 1}, "", "extra_forbidden"),
        ({**GOOD, "plan": {"title": "t", SECRET: 1, "steps": SECRET}}, "plan", "list_type"),
        ([], "", "model_type"),
    ],
)
async def test_invalid_arguments_name_the_field_and_no_value(arguments: object, field: str, problem: str) -> None:
    output = await call(everything, arguments)
    assert error_of(output) == "The arguments are invalid."
    assert {"field": field, "problem": problem} in json.loads(output.text)["fields"]
    assert SECRET not in output.text


async def test_of_many_wrong_fields_some_are_named() -> None:
    output = await call(everything, {**GOOD, **{f"field {number}": 1 for number in range(1_000)}})
    assert error_of(output) == "The arguments are invalid."
    assert len(json.loads(output.text)["fields"]) == 20


@pytest.mark.parametrize("arguments", ["", "{", '{"text": }', "[" * 10_000, '{"text": "\ud800'])
async def test_what_is_not_json_is_said_to_be_so(arguments: str) -> None:
    output = await call(everything, arguments)
    assert error_of(output) == "The arguments are not valid JSON."


@pytest.mark.parametrize("letter", ["x", "\u20ac"])
async def test_arguments_are_bounded_in_bytes(letter: str) -> None:
    size = len(letter.encode())
    output = await call(everything, json.dumps({"text": letter * (MAX_ARGUMENTS // size)}, ensure_ascii=False))
    assert error_of(output) == "The arguments are too large."


async def test_an_unknown_tool_is_an_error() -> None:
    assert error_of(await Registry().call("nope", "{}", CONTEXT)) == "There is no such tool."


def test_a_tool_that_is_gone_is_left_out_of_the_specs() -> None:
    tools = Registry([everything])
    assert [spec.name for spec in tools.specs(["gone", "everything"])] == ["everything"]
    assert tools.names == {"everything"}


async def test_the_text_of_an_exception_reaches_neither_the_model_nor_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(text: str) -> str:
        """Breaks."""
        raise RuntimeError(SECRET) from ValueError(text)

    caplog.set_level(logging.DEBUG)
    output = await call(broken, {"text": SECRET})
    assert error_of(output) == "The tool failed."
    assert SECRET not in output.text
    assert SECRET not in caplog.text
    assert "broken failed: RuntimeError" in caplog.text


async def test_a_tool_that_takes_too_long_is_stopped() -> None:
    stopped = asyncio.Event()

    @tool(timeout=0.01)
    async def slow() -> str:
        """Waits."""
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return ""

    assert error_of(await call(slow, {})) == "The tool took too long."
    assert stopped.is_set()


async def test_a_tool_that_swallows_its_timeout_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "GRACE", 0.01)
    let_go, ended = asyncio.Event(), asyncio.Event()

    @tool(timeout=0.01)
    async def stubborn() -> str:
        """Does not listen."""
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        ended.set()
        raise RuntimeError(SECRET)

    caplog.set_level(logging.DEBUG)
    assert error_of(await call(stubborn, {})) == "The tool took too long."
    let_go.set()
    await ended.wait()
    await asyncio.sleep(0)
    assert SECRET not in caplog.text


async def test_cancellation_passes_and_stops_the_tool() -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def waiting() -> str:
        """Waits."""
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return ""

    running = asyncio.ensure_future(call(waiting, {}))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert stopped.is_set()


async def test_a_tool_that_cancels_itself_has_failed() -> None:
    async def odd() -> str:
        """Raises what only a canceller should."""
        raise asyncio.CancelledError

    assert error_of(await call(odd, {})) == "The tool failed."


async def test_a_tools_own_timeout_error_is_a_failure_like_any_other() -> None:
    async def late() -> str:
        """Times out by itself."""
        raise TimeoutError(SECRET)

    assert error_of(await call(late, {})) == "The tool failed."


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("plain", "plain"),
        ({"day": date(2026, 1, 2), "mood": Mood.GOOD}, '{"day":"2026-01-02","mood":"good"}'),
        (None, "null"),
        (Plan(title="t"), '{"title":"t","steps":[]}'),
        ("a\0b\ud800c", "a\ufffdb\ufffdc"),
        ({"a": "b\ud800"}, '{"a":"b\ufffd"}'),
        ("\N{WAVING HAND SIGN}", "\N{WAVING HAND SIGN}"),
    ],
)
async def test_results_become_text(result: object, text: str) -> None:
    async def answer() -> object:
        """Answers."""
        return result

    assert await call(answer, {}) == ToolOutput(text)


async def test_a_result_that_json_can_not_hold_is_an_error() -> None:
    async def answer() -> object:
        """Answers."""
        return {"a": object()}

    assert error_of(await call(answer, {})) == "The tool's result could not be read."


async def test_outputs_are_bounded() -> None:
    async def chatty() -> str:
        """Says much."""
        return "x" * (MAX_OUTPUT + 1)

    output = await call(chatty, {})
    assert len(output.text) == MAX_OUTPUT
    assert output.text.endswith("\n[truncated]")


def test_options_are_attached_by_the_decorator() -> None:
    @tool
    async def bare() -> str:
        """Bare."""
        return ""

    @tool(name="other", idempotent=True)
    async def named() -> str:
        """Named."""
        return ""

    specs = Registry([bare, named]).specs(["bare", "other"])
    assert [(spec.name, spec.idempotent) for spec in specs] == [("bare", False), ("other", True)]


def _sync(text: str) -> str:
    """Not async."""
    return text


async def _silent(text: str) -> str:
    return text


async def _bare(text) -> str:  # type: ignore[no-untyped-def] # that is the fault
    """No annotation."""
    return str(text)


async def _many(*texts: str, **more: str) -> str:
    """Not named."""
    return str((texts, more))


async def _positional(text: str, /) -> str:
    """A slash."""
    return text


async def _opaque(what: asyncio.Event) -> str:
    """Takes what JSON can't say."""
    return str(what)


async def _optional_context(text: str, context: ToolContext | None = None) -> str:
    """Could be called without one."""
    return str((text, context))


async def _described_context(context: Annotated[ToolContext, "who asks"]) -> str:
    """Says more of it than is good."""
    return str(context)


async def _many_contexts(contexts: dict[str, list[ToolContext]]) -> str:
    """Takes what there never is."""
    return str(contexts)


async def _unresolved(what: "date.nothing_of_it") -> str:  # type: ignore[name-defined] # that is the fault
    """Names a type that its module does not have."""
    return str(what)


async def _unreadable(what: "no type") -> str:  # type: ignore[valid-type] # noqa: F722 - that is the fault
    """Names what can't be a type."""
    return str(what)


async def _pattern(text: Annotated[str, Field(pattern=r"(?=x)")]) -> str:
    """Has a pattern that the validator can't read."""
    return text


@tool(timeout=0)
async def _hasty() -> str:
    """Has no time."""
    return ""


@tool(timeout=math.nan)
async def _timeless() -> str:
    """Has a time that is none."""
    return ""


@tool(name="bad name!")
async def _misnamed() -> str:
    """Has a bad name."""
    return ""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_sync, "is not an async function: define it with `async def`"),
        (_silent, "has no docstring"),
        (_bare, "the parameter 'text' without a type: annotate it"),
        (_many, "name every parameter"),
        (_positional, "remove the slash"),
        (_opaque, "use plain types"),
        (_misnamed, "has the name 'bad name!'"),
        (_optional_context, "annotate it as ToolContext alone"),
        (_described_context, "annotate it as ToolContext alone"),
        (_many_contexts, "annotate it as ToolContext alone"),
        (_unresolved, "has annotations that can't be resolved"),
        (_unreadable, "has annotations that can't be resolved"),
        (_pattern, "mend its type or its pattern"),
        (_hasty, "has a timeout that is not above 0 seconds"),
        (_timeless, "has a timeout that is not above 0 seconds"),
    ],
)
def test_a_function_that_can_not_be_a_tool_is_refused_with_what_to_do(function: Any, words: str) -> None:
    with pytest.raises(ToolDefinitionError) as caught:
        Registry([function])
    assert any(words in fault for fault in caught.value.faults)


def test_all_faults_are_reported_at_once() -> None:
    functions: list[Any] = [_sync, _silent, _bare, everything, everything]
    with pytest.raises(ToolDefinitionError) as caught:
        Registry(functions)
    assert len(caught.value.faults) == 4
    assert "two tools with the name 'everything'" in caught.value.faults[-1]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module, and no entry points but those that a test gives."""
    module = ModuleType("their_tools")
    monkeypatch.setitem(sys.modules, "their_tools", module)
    monkeypatch.setattr(loading, "entry_points", lambda group: EntryPoints())
    return module


def test_tools_are_found_by_name(package: ModuleType) -> None:
    vars(package).update(one=everything, some=[_silent, everything])
    assert load_tools(None) == []
    assert load_tools("") == []
    assert load_tools(" their_tools:one , their_tools:some,") == [everything, _silent]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("their_tools", "is not of the form package.module:name"),
        ("their_tools:none", "does not exist"),
        ("no_such_package_at_all:x", "can't be imported: ModuleNotFoundError"),
        ("their_tools:number", "must give an async function"),
    ],
)
def test_what_can_not_be_found_is_reported(package: ModuleType, spec: str, words: str) -> None:
    vars(package)["number"] = 7
    with pytest.raises(ToolDefinitionError) as caught:
        load_tools(f"{spec},{spec}x:y:z")
    assert words in caught.value.faults[0]
    assert spec in caught.value.faults[0]
    assert len(caught.value.faults) == 2


def test_tools_are_found_behind_entry_points(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def factory() -> list[Callable[..., Awaitable[Any]]]:
        return [_silent]

    vars(package).update(one=everything, factory=factory)
    points = EntryPoints(
        EntryPoint(name=name, value=f"their_tools:{name}", group=loading.GROUP) for name in ("one", "factory")
    )
    monkeypatch.setattr(loading, "entry_points", lambda group: points)
    assert load_tools("their_tools:one") == [_silent, everything]


def test_a_factory_that_needs_arguments_is_a_fault(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    vars(package)["sync"] = _sync
    points = EntryPoints([EntryPoint(name="sync", value="their_tools:sync", group=loading.GROUP)])
    monkeypatch.setattr(loading, "entry_points", lambda group: points)
    with pytest.raises(ToolDefinitionError, match="no async function, and failed as a factory"):
        load_tools(None)


class CountedIds:
    """Ids that tell their order."""

    def __init__(self) -> None:
        self._count = 0

    def new(self) -> str:
        self._count += 1
        return f"goal-{self._count}"


@pytest.fixture
async def goals() -> Registry:
    """The shipped tools on a store, with the turn that calls them."""
    store = MemoryStore(ManualClock())

    def begin(tx: Transaction) -> None:
        tx.users.ensure("ada", tx.now())
        turn = Turn(
            id=CONTEXT.turn_id,
            thread_id=CONTEXT.thread_id,
            user_id="ada",
            agent_id="health-v1",
            state=TurnState.RUNNING,
            attempt=1,
            epoch=CONTEXT.epoch,
            last_position=1,
            usage=Usage(),
            reason=None,
            model="m",
            provider="p",
            accepted_at=tx.now(),
        )
        key = RequestKey(caller="local", user_id="ada", request_id="", fingerprint="")
        tx.turns.add(turn, key, owner="here")

    await store.write(begin)
    return Registry(goal_tools(store, CountedIds()))


async def test_a_goal_is_set_and_listed(goals: Registry) -> None:
    saved = await goals.call(
        "set_goal", '{"goal": " Sleep ", "commitment": "Lights out at ten", "due": "2026-12-01"}', CONTEXT
    )
    assert not saved.is_error
    listed = json.loads((await goals.call("list_goals", "{}", CONTEXT)).text)
    assert listed == {
        "goals": [
            {"goal": "Sleep", "commitment": "Lights out at ten", "due": "2026-12-01", "set_on": "2026-11-22"},
        ]
    }


async def test_a_repeated_call_sets_one_goal(goals: Registry) -> None:
    first = await goals.call("set_goal", '{"goal": "Sleep"}', CONTEXT)
    again = await goals.call("set_goal", '{"goal": "Sleep"}', CONTEXT)
    assert again == first
    assert len(json.loads((await goals.call("list_goals", "{}", CONTEXT)).text)["goals"]) == 1


async def test_goals_stay_with_their_user_and_domain(goals: Registry) -> None:
    await goals.call("set_goal", '{"goal": "Sleep"}', CONTEXT)
    other = replace(CONTEXT, call_id="c2", domain=Domain.CAREER)
    assert json.loads((await goals.call("list_goals", "{}", other)).text) == {"goals": []}


async def test_of_many_goals_a_few_are_shown(goals: Registry) -> None:
    for number in range(SHOWN + 1):
        await goals.call("set_goal", '{"goal": "Sleep"}', replace(CONTEXT, call_id=f"c{number}"))
    assert len(json.loads((await goals.call("list_goals", "{}", CONTEXT)).text)["goals"]) == SHOWN


async def test_a_goal_for_a_turn_of_somebody_else_is_no_answer(goals: Registry) -> None:
    with pytest.raises(LeaseLost):
        await goals.call("set_goal", '{"goal": "Sleep"}', replace(CONTEXT, epoch=0))
    assert json.loads((await goals.call("list_goals", "{}", CONTEXT)).text) == {"goals": []}


@pytest.mark.parametrize("goal", ["", "x" * (MAX_GOAL + 1), "  ", "a\\u0000b"])
async def test_a_goal_that_is_no_goal_is_refused(goals: Registry, goal: str) -> None:
    assert (await goals.call("set_goal", f'{{"goal": "{goal}"}}', CONTEXT)).is_error


def test_the_shipped_tools_are_idempotent_and_described(goals: Registry) -> None:
    specs = goals.specs(["set_goal", "list_goals"])
    assert all(spec.idempotent for spec in specs)
    assert set(specs[0].parameters["properties"]) == {"goal", "commitment", "due"}
    assert all(described.get("description") for described in specs[0].parameters["properties"].values())

"""Metrics and spans of moments that a service seldom meets, from moments told by hand."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adapters.telemetry import Moments
from adapters.telemetry.pulse import PERIOD
from core.model.errors import Overloaded
from core.model.trail import Trail, begin_trail
from core.model.turn import Turn, TurnReason, TurnState, Usage
from core.ports.telemetry import Vitals
from doubles import DONE, Gate, NotedTools, ScriptedAgent, definition
from simulation.loop import simulate

ACCEPTED = datetime(2026, 11, 23, 6, tzinfo=UTC)


def fail(error: BaseException) -> None:
    raise error


class Lab:
    """Moments, and what they have come to."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self._exporter = InMemorySpanExporter()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.moments = Moments(MeterProvider([self._reader], shutdown_on_exit=False), tracers)

    @property
    def spans(self) -> list[Any]:
        """The spans that have ended."""
        return list(self._exporter.get_finished_spans())

    def points(self, name: str) -> list[tuple[dict[str, Any], float]]:
        """Attributes and sums of a metric."""
        data: Any = self._reader.get_metrics_data()
        return [
            (dict(point.attributes), point.sum if hasattr(point, "sum") else point.value)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture
def lab() -> Lab:
    return Lab()


def turn(epoch: int = 1, **changes: Any) -> Turn:
    """A turn that was claimed two seconds after it was accepted."""
    claimed = Turn(
        id="turn-1",
        thread_id="thread-1",
        user_id="user-1",
        agent_id="career-v1",
        state=TurnState.RUNNING,
        attempt=1,
        epoch=epoch,
        last_position=1,
        usage=Usage(),
        reason=None,
        model="m",
        provider="p",
        accepted_at=ACCEPTED,
        claimed_at=ACCEPTED + timedelta(seconds=2),
    )
    return replace(claimed, **changes)


def test_a_wait_is_that_for_the_first_claim_and_later_claims_are_taken_over(lab: Lab) -> None:
    lab.moments.began(turn())
    assert lab.points("vida.turn.queue_wait") == [({}, 2.0)]
    assert lab.points("vida.turns.taken_over") == [({}, 0)]
    lab.moments.left(turn())
    lab.moments.began(turn(epoch=3))
    assert lab.points("vida.turn.queue_wait") == [({}, 2.0)]
    assert lab.points("vida.turns.taken_over") == [({}, 1)]


def test_a_turn_that_is_claimed_anew_while_it_runs_here_has_a_span_for_each_claim(lab: Lab) -> None:
    lab.moments.began(turn())
    lab.moments.began(turn(epoch=2))
    assert [span.attributes["vida.turn.epoch"] for span in lab.spans] == [1]
    lab.moments.left(turn())  # the older claim's, which comes late
    assert len(lab.spans) == 1
    lab.moments.tool("turn-1", "note", 0.5, "")
    lab.moments.left(turn(epoch=2))
    _, tool, second = lab.spans
    assert second.attributes["vida.turn.epoch"] == 2
    assert tool.parent.span_id == second.context.span_id
    assert tool.end_time - tool.start_time == 500_000_000


def test_an_ending_elsewhere_is_counted_and_makes_no_span(lab: Lab) -> None:
    ended = turn(
        state=TurnState.INCOMPLETE,
        reason=TurnReason.INTERRUPTED,
        finished_at=ACCEPTED + timedelta(seconds=7),
    )
    lab.moments.ended(ended)
    expected = {"vida.turn.state": "incomplete", "error.type": "INTERRUPTED"}
    assert lab.points("vida.turn.duration") == [(expected, 7.0)]
    assert lab.spans == []
    lab.moments.round("turn-1", provider="p", model="m", seconds=1.0, first=None, usage=None, fault="LEFT")
    assert [span.parent for span in lab.spans] == [None]


def test_a_clock_that_was_set_back_makes_no_negative_times(lab: Lab) -> None:
    before = ACCEPTED - timedelta(seconds=3)
    lab.moments.began(turn(claimed_at=before))
    lab.moments.ended(turn(state=TurnState.COMPLETED, finished_at=before))
    assert lab.points("vida.turn.queue_wait") == [({}, 0)]
    assert [value for _, value in lab.points("vida.turn.duration")] == [0]


def test_refusals_and_hand_overs_are_counted(lab: Lab) -> None:
    lab.moments.refused(Overloaded)
    lab.moments.handed_over(turn())
    lab.moments.retried("p", TurnReason.PROVIDER_STALLED)
    assert lab.points("vida.accept.refusals") == [({"error.type": "OVERLOADED"}, 1)]
    assert lab.points("vida.turns.handed_over") == [({}, 1)]
    assert lab.points("vida.provider.retries") == [
        ({"gen_ai.provider.name": "p", "error.type": "PROVIDER_STALLED"}, 1)
    ]


async def test_a_trace_that_can_not_be_one_is_left_alone(lab: Lab) -> None:
    for traceparent in ("", f"00-{'0' * 32}-{'0' * 16}-01", f"ff-{'1' * 32}-{'1' * 16}-01"):
        begin_trail(Trail(traceparent=traceparent))
        lab.moments.began(turn())
        lab.moments.left(turn())
        assert lab.spans[-1].parent is None


async def test_what_is_left_in_the_middle_is_told_as_left(lab: Lab) -> None:
    round_: Any = SimpleNamespace(turn_id="turn-1", definition=definition())
    async with aclosing(lab.moments.agent(ScriptedAgent(["a", DONE])).reply(round_)) as events:
        await anext(events)
    gate = Gate()
    context: Any = SimpleNamespace(turn_id="turn-1")
    call = asyncio.create_task(lab.moments.tools(NotedTools(gate=gate)).call("note", "{}", context))
    await gate.reached.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    for name in ("gen_ai.client.operation.duration", "vida.tool.duration"):
        ((attributes, _),) = lab.points(name)
        assert attributes["error.type"] == "LEFT", name


async def test_an_outage_is_counted_once_however_often_it_is_seen(lab: Lab) -> None:
    vitals = Vitals(running=0, followers=0, lag=0, refusing=True)
    async with lab.moments.watching(lambda: vitals):  # looks when it begins, and when it ends
        assert lab.points("vida.provider.outages") == [({}, 1)]
    assert lab.points("vida.provider.outages") == [({}, 1)]
    assert lab.points("vida.provider.refusing") == [({}, 1)]


def test_an_outage_that_comes_again_is_another_one_and_sizes_are_those_of_now(lab: Lab) -> None:
    now = Vitals(running=1, followers=2, lag=3, refusing=True)

    def seen() -> list[float]:
        names = ("turns.running", "followers", "follower.lag", "provider.refusing", "provider.outages")
        return [value for name in names for _, value in lab.points(f"vida.{name}")]

    async def live() -> None:
        nonlocal now
        async with lab.moments.watching(lambda: now):
            assert seen() == [1, 2, 3, 1, 1]
            now = replace(now, running=4, refusing=False)
            await asyncio.sleep(1.5 * PERIOD)
            assert seen() == [4, 2, 3, 0, 1]
            now = replace(now, refusing=True)
            await asyncio.sleep(PERIOD)
            assert seen() == [4, 2, 3, 1, 2]
            now = replace(now, running=0)
        assert seen() == [0, 2, 3, 1, 2]

    simulate(live(), surprised=fail)


def test_each_moment_is_measured_as_what_it_is(lab: Lab) -> None:
    lab.moments.accepted(turn(), 0.25, attached=True)
    lab.moments.spoke(turn(), 0.5)
    lab.moments.committed(3, 0.75)
    lab.moments.called("/a.B/C", "NOT_FOUND", 1.5)
    lab.moments.copies_left("openai", 7, reached=False)
    assert lab.points("vida.accept.duration") == [({"vida.attached": True}, 0.25)]
    assert lab.points("vida.turn.first_text") == [({}, 0.5)]
    assert lab.points("vida.commit.duration") == [({}, 0.75)]
    assert lab.points("vida.commit.changes") == [({}, 3)]
    assert lab.points("rpc.server.call.duration") == [
        ({"rpc.system.name": "grpc", "rpc.method": "a.B/C", "rpc.response.status_code": "NOT_FOUND"}, 1.5)
    ]
    assert lab.points("vida.copies.left") == [
        ({"gen_ai.provider.name": "openai", "vida.provider.reached": False}, 7)
    ]


async def test_a_rounds_times_count_from_its_begin(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 12.0])  # it begins, its first text comes, it is over
    monkeypatch.setattr(lab.moments, "time", lambda: next(times))
    round_: Any = SimpleNamespace(turn_id="turn-1", definition=definition())
    assert [one async for one in lab.moments.agent(ScriptedAgent(["a", "b", DONE])).reply(round_)]
    said = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "scripted",
        "gen_ai.request.model": "script-1",
    }
    assert lab.points("gen_ai.client.operation.duration") == [(said, 2.0)]
    assert lab.points("gen_ai.client.operation.time_to_first_chunk") == [(said, 0.5)]
    assert lab.points("gen_ai.client.token.usage") == [
        ({**said, "gen_ai.token.type": kind}, count) for kind, count in (("input", 3), ("output", 5))
    ]

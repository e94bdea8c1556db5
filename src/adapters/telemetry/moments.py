"""From moments to metrics and spans.

What OpenTelemetry's conventions have a name for is called so. Dashboards hang on these names: they are spelt out
here and do not change with a library.
"""

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from adapters.telemetry.agent import MeasuredAgent
from adapters.telemetry.instruments import Instruments
from adapters.telemetry.pulse import Pulse
from adapters.telemetry.tools import MeasuredTools
from core.model.errors import CoreError
from core.model.trail import trail
from core.model.turn import Turn, TurnReason, TurnState, Usage
from core.ports.agent import Agent
from core.ports.telemetry import Telemetry, Vitals
from core.ports.tools import Tools

_SCOPE = "vida-coach"
_W3C = TraceContextTextMapPropagator()

Attributes = dict[str, AttributeValue]


class Moments(Telemetry):
    """Measures, and keeps a span for each turn that runs here: a child of the caller's where it named one.

    A turn's span outlives the call that brought its message; its rounds and tools are made its children when they
    are over. Spans know turns, threads and agents by their ids. They know no users, and nothing that was said.
    """

    def __init__(self, meters: MeterProvider, tracers: TracerProvider) -> None:
        self._instruments = Instruments(meters.get_meter(_SCOPE))
        self._tracer = tracers.get_tracer(_SCOPE)
        self._spans: dict[str, tuple[int, Span]] = {}

    def time(self) -> float:
        return time.monotonic()

    def accepted(self, turn: Turn, seconds: float, *, attached: bool) -> None:
        self._instruments.accept.record(seconds, {"vida.attached": attached})

    def refused(self, error: type[CoreError]) -> None:
        self._instruments.refusals.add(1, {"error.type": error.reason})

    def began(self, turn: Turn) -> None:
        if turn.epoch > 1:
            self._instruments.taken_over.add(1)
        elif turn.claimed_at is not None:
            waited = (turn.claimed_at - turn.accepted_at).total_seconds()
            self._instruments.queue_wait.record(max(0.0, waited))
        here = trail()
        attributes: Attributes = {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.provider.name": turn.provider,
            "gen_ai.request.model": turn.model,
            "gen_ai.agent.id": turn.agent_id,
            "gen_ai.conversation.id": turn.thread_id,
            "vida.turn.id": turn.id,
            "vida.turn.attempt": turn.attempt,
            "vida.turn.epoch": turn.epoch,
        }
        if here.request_id:
            attributes["vida.request.id"] = here.request_id
        parent = _W3C.extract({"traceparent": here.traceparent}, Context()) if here.traceparent else Context()
        if earlier := self._spans.get(turn.id):
            earlier[1].end()  # claimed anew, it is left under a claim that does not count any more
        span = self._tracer.start_span(f"invoke_agent {turn.agent_id}", parent, attributes=attributes)
        self._spans[turn.id] = (turn.epoch, span)

    def spoke(self, turn: Turn, seconds: float) -> None:
        self._instruments.first_text.record(seconds)
        if held := self._spans.get(turn.id):
            held[1].add_event("first text")

    def ended(self, turn: Turn) -> None:
        fault = turn.reason.value if turn.reason else ""
        attributes: Attributes = {"vida.turn.state": turn.state.value, **_error(fault)}
        if turn.finished_at is not None:
            seconds = (turn.finished_at - turn.accepted_at).total_seconds()
            self._instruments.turns.record(max(0.0, seconds), attributes)
        if held := self._spans.get(turn.id):
            span = held[1]
            span.set_attributes({**attributes, **_spent(turn.usage)})
            if turn.state in (TurnState.FAILED, TurnState.INCOMPLETE):
                span.set_status(Status(StatusCode.ERROR, fault))

    def left(self, turn: Turn) -> None:
        held = self._spans.get(turn.id)
        if held is not None and held[0] == turn.epoch:
            del self._spans[turn.id]
            held[1].end()

    def handed_over(self, turn: Turn) -> None:
        self._instruments.handed_over.add(1)

    def retried(self, provider: str, reason: TurnReason) -> None:
        self._instruments.retries.add(1, {"gen_ai.provider.name": provider, "error.type": reason.value})

    def committed(self, changes: int, seconds: float) -> None:
        self._instruments.commits.record(seconds)
        self._instruments.changes.record(changes)

    def copies_left(self, provider: str, count: int, *, reached: bool) -> None:
        attributes: Attributes = {"gen_ai.provider.name": provider, "vida.provider.reached": reached}
        self._instruments.copies_left.set(count, attributes)

    def called(self, method: str, status: str, seconds: float) -> None:
        self._instruments.calls.record(
            seconds,
            {
                "rpc.system.name": "grpc",
                "rpc.method": method.removeprefix("/"),
                "rpc.response.status_code": status,
            },
        )

    def agent(self, agent: Agent) -> Agent:
        return MeasuredAgent(agent, self)

    def tools(self, tools: Tools) -> Tools:
        return MeasuredTools(tools, self)

    def watching(self, vitals: Callable[[], Vitals]) -> AbstractAsyncContextManager[None]:
        return Pulse(self._instruments, vitals).beating()

    def round(
        self,
        turn_id: str,
        *,
        provider: str,
        model: str,
        seconds: float,
        first: float | None,
        usage: Usage | None,
        fault: str,
    ) -> None:
        """A round of the provider is over: `first`, the seconds to its first event; `fault`, why it broke off."""
        measured: Attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": model,
        }
        self._instruments.operations.record(seconds, {**measured, **_error(fault)})
        attributes: Attributes = {"vida.turn.id": turn_id, "gen_ai.request.stream": True}
        if first is not None:
            self._instruments.first_chunk.record(first, measured)
            attributes["gen_ai.response.time_to_first_chunk"] = first
        if usage is not None:
            for kind, count in (("input", usage.input_tokens), ("output", usage.output_tokens)):
                self._instruments.tokens.record(count, {**measured, "gen_ai.token.type": kind})
            attributes |= _spent(usage)
        self._over(turn_id, f"chat {model}", SpanKind.CLIENT, seconds, fault, {**measured, **attributes})

    def tool(self, turn_id: str, name: str, seconds: float, fault: str) -> None:
        """A call of a tool is over."""
        measured: Attributes = {"gen_ai.tool.name": name}
        self._instruments.tools.record(seconds, {**measured, **_error(fault)})
        attributes: Attributes = {"gen_ai.operation.name": "execute_tool", "vida.turn.id": turn_id}
        self._over(turn_id, f"execute_tool {name}", SpanKind.INTERNAL, seconds, fault, {**measured, **attributes})

    def _over(
        self, turn_id: str, name: str, kind: SpanKind, seconds: float, fault: str, attributes: Attributes
    ) -> None:
        """Makes the span of what is over."""
        held = self._spans.get(turn_id)
        parent = set_span_in_context(held[1], Context()) if held else Context()
        end = time.time_ns()
        span = self._tracer.start_span(
            name, parent, kind, {**attributes, **_error(fault)}, start_time=end - round(seconds * 1e9)
        )
        if fault:
            span.set_status(Status(StatusCode.ERROR, fault))
        span.end(end)


def _error(fault: str) -> Attributes:
    return {"error.type": fault} if fault else {}


def _spent(usage: Usage) -> Attributes:
    return {
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
    }

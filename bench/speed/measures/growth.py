"""What a turn costs as its thread grows, and as the record does."""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import grpc

from adapters.sql.schema import migrate
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from speed.bench import Bench, say
from speed.filling import fill
from speed.load import Run
from speed.processes import BenchError
from speed.servers import PRODUCT, Server
from speed.verdict import Verdict

_THREADS = 5
_FLAT = 1.2
_PACE = 1000.0
Threads = Sequence[tuple[str, str]]


def growth(bench: Bench) -> list[Verdict]:
    """CPU of a turn as its thread grows from 10 messages to 1,000, and the record from 1,000 threads to 10⁶."""
    return [*_longer_thread(bench), *_larger_record(bench)]


def _longer_thread(bench: Bench) -> list[Verdict]:
    short, long = (10, 100) if bench.quick else (10, 1000)
    runs: dict[int, list[Run]] = {short: [], long: []}
    with bench.field(PRODUCT) as found:
        server = found.servers[PRODUCT]
        bench.upstream.answer(2, _PACE)
        threads = {size: _talk(server, size) for size in (short, long)}
        for number in range(bench.rounds):
            for size in (short, long) if number % 2 else (long, short):
                runs[size].append(_turns(bench, server, threads[size]))
                say(f"  {size} messages: {_told(runs[size][-1])}")
    return [_verdict(f"a turn at {long:,} messages in the thread, in one at {short}'s", runs[long], runs[short])]


def _larger_record(bench: Bench) -> list[Verdict]:
    few, many = (1000, 20_000) if bench.quick else (1000, 1_000_000)
    runs: dict[int, list[Run]] = {few: [], many: []}
    with bench.room() as folder:
        records = {size: _filled(folder, size) for size in (few, many)}
        for number in range(bench.rounds):
            for size in (few, many) if number % 2 else (many, few):
                with bench.field(PRODUCT, database=records[size]) as found:
                    runs[size].append(_turns(bench, found.servers[PRODUCT], ()))
                say(f"  {size:,} threads: {_told(runs[size][-1])}")
    return [_verdict(f"a turn with {many:,} threads in the record, in one with {few:,}'s", runs[many], runs[few])]


def _verdict(what: str, grown: Sequence[Run], small: Sequence[Run]) -> Verdict:
    return Verdict(
        measure="growth",
        what=f"CPU of {what}",
        figures=[_cpu(one) / _cpu(other) for one, other in zip(grown, small, strict=True)],
        target=_FLAT,
        detail=f"{_median(grown)}; {_median(small)}",
        raw=[[asdict(run) for run in runs] for runs in (grown, small)],
    )


def _turns(bench: Bench, server: Server, threads: Threads) -> Run:
    """Turns one after another: in these threads by turns, or each in a new one."""
    turns = 100 if bench.quick else 300
    repeated = [threads[number % len(threads)] for number in range(turns)] if threads else ()
    run = bench.run(server, streams=turns, deltas=2, pace=_PACE, in_flight=1, threads=repeated)
    if run.outcome.failed:
        raise BenchError(f"{server.name}: {run.outcome.failed}")
    return run


def _talk(server: Server, messages: int) -> Threads:
    """Makes threads with so many messages each, by talking."""
    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor(_THREADS) as workers:
        stub = AgentServiceStub(channel)
        return list(workers.map(lambda _: _conversation(stub, messages), range(_THREADS)))


def _conversation(stub: AgentServiceStub, messages: int) -> tuple[str, str]:
    user, thread = uuid.uuid4().hex, ""
    for _ in range(messages // 2):
        request = api.ChatRequest(user_id=user, thread_id=thread, content=[pb.ContentPart(text="I feel stuck.")])
        last = None
        for response in stub.Chat(request, timeout=60):
            thread = response.event.started.thread_id or thread
            last = response.event
        if last is None or last.finished.turn.state != pb.TURN_STATE_COMPLETED:
            raise BenchError("a turn did not complete")
    return user, thread


def _filled(folder: Path, threads: int) -> str:
    """The URL of a record of so many threads."""
    url = f"sqlite:///{folder / f'{threads}.db'}"
    migrate(url)
    say(f"  filling a record with {threads:,} threads …")
    fill(url, threads)
    return url


def _cpu(run: Run) -> float:
    """Milliseconds a turn."""
    return run.cpu / run.outcome.completed * 1000


def _median(runs: Sequence[Run]) -> str:
    times = [run.outcome.turns.p50 for run in runs if run.outcome.turns]
    cpu = statistics.median(_cpu(run) for run in runs)
    return f"{cpu:.1f} ms of CPU, {statistics.median(times):.1f} ms in all"


def _told(run: Run) -> str:
    return _median([run])

"""What must hold whatever happened, judged by what clients were told, what servers say, and the tables."""

import asyncio
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import psycopg
from sqlalchemy import make_url

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from faults.client import TERMINAL, Told, chat_request, follow, insist, stubs
from faults.cluster import DEADLINE
from faults.figures import BROKEN, FIGURES
from faults.scripted import Plan, expected

_BATCH = 400
_STATES = {
    pb.TURN_STATE_COMPLETED: "completed",
    pb.TURN_STATE_INCOMPLETE: "incomplete",
    pb.TURN_STATE_CANCELLED: "cancelled",
    pb.TURN_STATE_FAILED: "failed",
}
MAX_ATTEMPTS = 3
_REPEATED = 0.25
"""The share of requests that are sent once more after their turns have ended."""


@dataclass
class Stored:
    """A turn as the tables have it."""

    turn: Mapping[str, Any]
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    log: list[Mapping[str, Any]] = field(default_factory=list)

    def lines(self, role: str) -> list[Mapping[str, Any]]:
        """Its messages of a role."""
        return [message for message in self.messages if message["role"] == role]


class Tables:
    """The database, read without the product's code, on a connection of one's own."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Rows as dictionaries. Placeholders are question marks."""
        if self._url.get_backend_name() == "sqlite":
            lite = sqlite3.connect(f"file:{self._url.database}?mode=ro", uri=True, timeout=10)
            try:
                cursor = lite.execute(query, values)
                names = [column[0] for column in cursor.description]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
            finally:
                lite.close()
        with psycopg.connect(self._url.set(drivername="postgresql").render_as_string(False)) as connection:
            answer = connection.execute(query.replace("?", "%s").encode(), values)
            assert answer.description is not None
            names = [column.name for column in answer.description]
            return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]

    def turns(self, turn_ids: Collection[str]) -> dict[str, Stored]:
        """Turns with their messages and logs."""
        found: dict[str, Stored] = {}
        ids = list(turn_ids)
        for batch in [ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH)]:
            marks = ", ".join("?" * len(batch))
            for row in self.rows(f"SELECT * FROM turns WHERE id IN ({marks})", *batch):
                found[row["id"]] = Stored(row)
            for row in self.rows(f"SELECT * FROM messages WHERE turn_id IN ({marks}) ORDER BY number", *batch):
                found[row["turn_id"]].messages.append({**row, "content": _loaded(row["content"])})
            for row in self.rows(f"SELECT * FROM turn_log WHERE turn_id IN ({marks}) ORDER BY position", *batch):
                found[row["turn_id"]].log.append(row)
        return found

    def of_requests(self, request_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The turns of request ids."""
        found = []
        for batch in [request_ids[start : start + _BATCH] for start in range(0, len(request_ids), _BATCH)]:
            marks = ", ".join("?" * len(batch))
            found += self.rows(f"SELECT * FROM turns WHERE request_id IN ({marks})", *batch)
        return found

    def unended(self, turn_ids: Collection[str]) -> list[str]:
        """Those of these turns that have not ended."""
        stored = self.turns(turn_ids)
        return [turn_id for turn_id in turn_ids if stored[turn_id].turn["state"] not in _STATES.values()]

    def unbooked(self) -> list[dict[str, Any]]:
        """Users of whose ended turns the ledger tells otherwise, in a database in which no thread was deleted."""
        states = ", ".join(f"'{state}'" for state in _STATES.values())
        return self.rows(
            "SELECT user_id, agent_id, model, count(*) AS n, sum(input_tokens) AS i, sum(output_tokens) AS o"
            f" FROM turns WHERE state IN ({states}) GROUP BY user_id, agent_id, model"
            " EXCEPT SELECT user_id, agent_id, model, sum(turns), sum(input_tokens), sum(output_tokens)"
            " FROM usage GROUP BY user_id, agent_id, model"
        )

    def picture(self, turn_ids: Collection[str]) -> str:
        """Everything that the tables hold of turns and their threads, to be compared."""
        stored = self.turns(turn_ids)
        thread_ids = sorted({each.turn["thread_id"] for each in stored.values()})
        marks = ", ".join("?" * len(thread_ids))
        threads = self.rows(f"SELECT * FROM assistant_threads WHERE id IN ({marks}) ORDER BY id", *thread_ids)
        held = [[each.turn, each.messages, each.log] for _, each in sorted(stored.items())]
        return json.dumps([threads, held], default=str, sort_keys=True, indent=1)


def _loaded(content: Any) -> Any:
    return json.loads(content) if isinstance(content, str) else content


@dataclass
class Verdict:
    """What was found, by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def hold(self, true: bool, kind: str, told: Told | None, what: object) -> None:
        """Notes a fault unless a promise was kept."""
        if not true:
            self.counts[kind] += 1
            of = f"turn {told.turn_id} of {told.user} ({told.message!r}, cuts {told.cuts})" if told else ""
            self.faults.append(f"{kind}: {what} {of}")


async def judge(
    suite: str,
    database_url: str,
    addresses: Sequence[str],
    tolds: Sequence[Told],
    chance: random.Random,
    *,
    reasons: Collection[str] = ("INTERRUPTED", "TOOL_OUTCOME_UNKNOWN"),
    restarts: bool = False,
) -> None:
    """Judges turns that have been followed to their ends, and counts what happened. Raises on any fault.

    `reasons` are those for which a turn may have ended otherwise than COMPLETED. `restarts` says that replies
    whose text was cut off are begun again; else no text is ever taken back.
    """
    verdict = Verdict()
    tables = Tables(database_url)
    stored = await asyncio.to_thread(tables.turns, [told.turn_id for told in tolds])
    for told in tolds:
        _judge_told(verdict, told, reasons)
        verdict.hold(restarts or not told.dropped, "wrong endings", told, f"took back {told.dropped!r}")
        if told.turn_id in stored:
            _judge_stored(verdict, told, stored[told.turn_id])
        else:
            verdict.hold(False, "turns lost", told, "is not in the database")
    mine = await asyncio.to_thread(tables.of_requests, [told.request_id for told in tolds])
    by_request = Counter(row["request_id"] for row in mine)
    for told in tolds:
        verdict.hold(by_request[told.request_id] == 1, "duplicates", told, f"{by_request[told.request_id]} turns")
    verdict.hold(
        not (off := await asyncio.to_thread(tables.unbooked)), "wrong endings", None, f"the ledger: {off}"
    )
    await asyncio.gather(
        *(
            _judge_suffixes(verdict, addresses[number % len(addresses)], told, chance)
            for number, told in enumerate(tolds)
        )
    )
    counts = Counter(
        {
            "acknowledged turns": len(tolds),
            "streams cut": sum(len(told.cuts) for told in tolds),
            "cut after acknowledgement": sum(sum(cut > 0 for cut in told.cuts) for told in tolds),
            "completed": sum(told.turn.state == pb.TURN_STATE_COMPLETED for told in tolds),
            "begun again": sum(told.turn.attempt > 1 for told in tolds),
            **dict.fromkeys(BROKEN, 0),
        }
    )
    counts.update(verdict.counts)
    FIGURES.add(suite, counts)
    assert not verdict.faults, "\n".join(verdict.faults[:20])


def _judge_told(verdict: Verdict, told: Told, reasons: Collection[str]) -> None:
    """What a client was told is in itself right."""
    turn, plan = told.turn, Plan.of(told.message)
    reply = "".join(part.text for part in told.finished.reply.content) if told.finished else ""
    verdict.hold(reply == told.text, "wrong suffixes", told, f"reply {reply!r}, told {told.text!r}")
    verdict.hold(turn.last_position == told.position, "wrong suffixes", told, "the last position is another")
    whole = expected(told.message)
    if turn.state == pb.TURN_STATE_COMPLETED:
        verdict.hold(told.text == whole, "wrong suffixes", told, f"COMPLETED with {told.text!r}")
        return
    verdict.hold(whole.startswith(told.text), "wrong suffixes", told, f"told {told.text!r}")
    if turn.state == pb.TURN_STATE_CANCELLED:
        verdict.hold(turn.error.reason == told.asked_to_end, "wrong endings", told, turn.error.reason)
        return
    verdict.hold(turn.error.reason in reasons, "wrong endings", told, turn.error.reason)
    by_text = pb.TURN_STATE_INCOMPLETE if told.text else pb.TURN_STATE_FAILED
    verdict.hold(turn.state == by_text, "wrong endings", told, f"{_STATES[turn.state]} with {told.text!r}")
    if turn.error.reason == "INTERRUPTED" and turn.state == pb.TURN_STATE_FAILED:
        begun_again = turn.attempt >= MAX_ATTEMPTS or plan.tool == "plain"
        verdict.hold(begun_again, "wrong endings", told, "without text, and was not begun again")
    if turn.error.reason == "TOOL_OUTCOME_UNKNOWN":
        verdict.hold(plan.tool == "plain", "wrong endings", told, "called no tool that can't be repeated")


def _judge_stored(verdict: Verdict, told: Told, stored: Stored) -> None:
    """The tables agree with what the client was told."""
    row = stored.turn
    verdict.hold(row["state"] in _STATES.values(), "turns that never ended", told, row["state"])
    verdict.hold(row["state"] == _STATES.get(told.turn.state), "wrong endings", told, f"is {row['state']}")
    users, replies = stored.lines("user"), stored.lines("assistant")
    never_claimed = row["state"] == "cancelled" and bool(told.on_busy) and not told.text
    verdict.hold(len(users) == 1 or (never_claimed and not users), "duplicates", told, f"{len(users)} questions")
    numbers = [line["number"] for line in stored.messages]
    together = numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    verdict.hold(together, "wrong endings", told, f"its messages have the numbers {numbers}")
    verdict.hold(len(replies) == (1 if told.text else 0), "duplicates", told, f"{len(replies)} replies")
    for line in replies:
        text = "".join(part[1] for part in line["content"])
        verdict.hold(text == told.text, "wrong suffixes", told, f"stored {text!r}, told {told.text!r}")
        verdict.hold(
            bool(line["partial"]) == (row["state"] != "completed"), "wrong endings", told, "marked partial wrongly"
        )
    verdict.hold(len(stored.log) == 1, "wrong endings", told, f"{len(stored.log)} rows of log")
    for entry in stored.log[-1:]:
        same = entry["start"] == 0 and entry["position"] == row["last_position"] == told.position
        verdict.hold(same, "wrong suffixes", told, "the log's last position is another")


async def _judge_repeat(verdict: Verdict, address: str, told: Told) -> None:
    """The same request once more attaches to the same turn."""
    async with stubs(address) as (agents, _):
        call = agents.Chat(chat_request(told), timeout=DEADLINE)
        response = await call.read()
        same = response.attached and response.event.started.turn_id == told.turn_id
        verdict.hold(same, "duplicates", told, f"a repeat began {response.event.started.turn_id}")
        call.cancel()


async def _judge_suffixes(verdict: Verdict, address: str, told: Told, chance: random.Random) -> None:
    """From the beginning, from every break and from anywhere, one hears exactly the rest."""
    if chance.random() < _REPEATED:
        await _judge_repeat(verdict, address, told)
    whole = await follow(address, told, 0)
    for after in {*told.cuts, chance.randrange(told.position), told.position}:
        rest = whole if not after else await follow(address, told, after)
        wanted = pieces(whole, after)
        verdict.hold(pieces(rest, after) == wanted, "wrong suffixes", told, f"after {after} came {rest}")
    again = Told(told.user, told.message, told.thread_id, turn_id=told.turn_id)
    for event in whole:
        again.take(event)
    verdict.hold(
        (again.text, again.position) == (told.text, told.position),
        "wrong suffixes",
        told,
        f"replayed {again.text!r}",
    )


def pieces(events: Sequence[pb.TurnEvent], after: int) -> list[tuple[int, str]]:
    """Events behind a position, text in single code points: the same log however it is cut."""
    result: list[tuple[int, str]] = []
    for event in events:
        if event.WhichOneof("event") == "text_delta":
            text = event.text_delta.text
            first = event.position - len(text) + 1
            result += [(first + number, point) for number, point in enumerate(text)]
        else:
            result.append((event.position, event.SerializeToString(deterministic=True).hex()))
    return [piece for piece in result if piece[0] > after]


async def go_on(address: str, tolds: Sequence[Told]) -> None:
    """No thread stays blocked: each one answers another message, as soon as the service takes one."""
    threads = {told.thread_id: told.user for told in tolds}

    async def ask(agents: Any, thread_id: str, user: str) -> None:
        request = api.SendMessageRequest(
            user_id=user,
            thread_id=thread_id,
            content=[pb.ContentPart(text="words:1 again")],
        )
        try:
            answer = await insist(agents, request)
        except grpc.aio.AioRpcError as error:
            raise AssertionError(f"thread {thread_id} of {user} is blocked") from error
        assert answer.turn.state == pb.TURN_STATE_COMPLETED

    async with stubs(address) as (agents, _):
        await asyncio.gather(*(ask(agents, thread_id, user) for thread_id, user in threads.items()))


assert set(_STATES) == TERMINAL

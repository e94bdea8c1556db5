"""What an export promises, on every store."""

from collections.abc import Callable
from contextlib import aclosing
from datetime import date
from typing import Any

import pytest

from core.model.agent import Domain
from core.model.attachment import FilePart, ImagePart
from core.model.goal import Goal
from core.model.ledger import LedgerKey, LedgerLine, Tally
from core.model.message import Message, TextPart
from core.model.thread import Thread
from core.model.turn import BusyPolicy, TurnState
from core.model.user import User
from core.ports.store import Store, Transaction
from core.use_cases import export_user
from core.use_cases.accept_message import IncomingMessage
from core.use_cases.export_user import AttachmentPiece, Exported, ExportedTurn, ExportUser
from doubles import CATALOG, Gate, ScriptedAgent, service
from records import IDS, NOW, a_line, a_thread, a_turn, request
from samples import PDF, PNG

MANY = 5


def belongings(user: str) -> Callable[[Transaction], list[str]]:
    """Gives a user many of everything; returns what names each of them, in the order of an export."""

    def change(tx: Transaction) -> list[str]:
        for agent in CATALOG.agents():
            tx.agents.publish(agent)
        tx.users.ensure(user, NOW)
        names = [user]
        for _ in range(MANY):
            goal = Goal(
                id=IDS.new(), user_id=user, domain=Domain.CAREER, text="t", commitment="", due=None, created_at=NOW
            )
            tx.goals.add(goal, goal.id)
            names.append(goal.id)
        for _ in range(2):
            thread = a_thread(user)
            tx.threads.add(thread)
            turns = [a_turn(thread, state=TurnState.COMPLETED) for _ in range(MANY)]
            lines = [a_line(turn) for turn in turns]
            for turn in turns:
                tx.turns.add(turn, request(user))
            tx.messages.append(thread.id, lines)
            names += [thread.id, *(turn.id for turn in turns), *(line.id for line in lines)]
        days = [date(2026, 1, number) for number in range(1, MANY + 1)]
        for day in days:
            tx.ledger.enter(LedgerLine(LedgerKey(user, day, "career-v1", "m"), Tally(turns=1)))
        return [*names, *(str(day) for day in reversed(days))]

    return change


def name_of(piece: Exported) -> str:
    """What names a piece."""
    match piece:
        case User() | Goal() | Thread() | Message():
            return piece.id
        case ExportedTurn(turn):
            return turn.id
        case LedgerLine(key):
            return str(key.day)
        case _:
            raise AssertionError("nothing is attached")


@pytest.mark.parametrize("page", [1, 2, MANY, 20])
async def test_everything_is_in_it_once_and_nothing_of_others(
    store: Store, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(export_user, "_PAGE", page)  # things that are read in one go
    names = {user: await store.write(belongings(user)) for user in ("ada", "eve")}
    for user, expected in names.items():
        async with aclosing(ExportUser(store).pieces(user)) as pieces:
            assert [name_of(piece) async for piece in pieces] == expected
    async with aclosing(ExportUser(store).pieces("nobody")) as pieces:
        assert [piece async for piece in pieces] == []


async def test_what_is_attached_follows_what_it_is_attached_to_in_pieces(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_user, "PIECE", 7)
    link = ImagePart("https://pictures.example.org/a.png")
    async with service(store, ScriptedAgent([Gate()])) as it:
        look = IncomingMessage(user_id="ada", content=(ImagePart(PNG), TextPart("Look"), link))
        first = (await it.accept(look)).turn
        file = (FilePart(PDF, "cv.pdf"),)
        more = IncomingMessage(user_id="ada", content=file, thread_id=first.thread_id, on_busy=BusyPolicy.QUEUE)
        second = (await it.accept(more)).turn
        async with aclosing(ExportUser(store).pieces("ada")) as pieces:
            found = [piece async for piece in pieces]
    running, queued = [piece for piece in found if isinstance(piece, ExportedTurn)]
    assert (running.turn.id, running.waiting, queued.turn.id) == (first.id, None, second.id)
    assert queued.waiting is not None
    assert queued.waiting.content == (FilePart(b"", "cv.pdf", "application/pdf"),)
    (line,) = [piece for piece in found if isinstance(piece, Message)]
    assert line.content == (ImagePart(b"", "image/png"), TextPart("Look"), link)
    attached: dict[tuple[str, int], tuple[Exported, bytes]] = {
        (first.id, 0): (line, PNG),
        (second.id, 0): (queued, PDF),
    }
    joined: dict[tuple[str, int], bytes] = {}
    for piece in found:
        if isinstance(piece, AttachmentPiece):
            key = (piece.turn_id, piece.number)
            owner, whole = attached[key]
            assert found.index(owner) < found.index(piece)
            assert (piece.offset, piece.size) == (len(joined.get(key, b"")), len(whole))
            assert 0 < len(piece.data) <= 7
            joined[key] = joined.get(key, b"") + piece.data
    assert joined == {key: whole for key, (_, whole) in attached.items()}


async def test_of_what_waits_no_more_is_read_than_the_next_message(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns_type: Any = type(await store.read(lambda tx: tx.turns))
    waiting_message, reads = turns_type.waiting_message, 0

    def counting(turns: Any, turn_id: str) -> Any:
        nonlocal reads
        reads += 1
        return waiting_message(turns, turn_id)

    async with service(store, ScriptedAgent([Gate()])) as it:
        turn = (await it.threads.turn("ada", await it.say()))[0]
        for _ in range(3):
            await it.say(thread_id=turn.thread_id, on_busy=BusyPolicy.QUEUE)
        monkeypatch.setattr(turns_type, "waiting_message", counting)
        told = 0
        async with aclosing(ExportUser(store).pieces("ada")) as pieces:
            async for piece in pieces:
                told += isinstance(piece, ExportedTurn) and piece.waiting is not None
                assert reads == told
        assert told == 3
        monkeypatch.undo()

"""`vida-coach threads`, `turns`, `agents`, `provider`: beside a running service and alone, on both databases."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from adapters.catalog.loader import SHIPPED
from core.model.events import TextDelta, TurnStarted
from core.model.message import Role
from core.model.thread import ThreadState
from core.ports.store import Transaction
from core.ports.turns import LogAppend
from doubles import DONE, Gate, ScriptedAgent
from entrypoints.cli.main import main
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from fake_provider import Answer, FakeProvider, HttpError, Text
from harness import DEADLINE, Client, message, served, text_of
from openai_thread import words
from records import IDS, a_line, a_thread, a_turn, request

PRIVATE_WORD = "a-word-of-somebodys"


@pytest.fixture(autouse=True)
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds on both databases."""
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    monkeypatch.setenv("VIDA_DRAIN", "0")


Run = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line as a process of its own would; returns its exit code, output and errors."""

    async def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(main, arguments)
        return code, *capsys.readouterr()

    return command


async def as_json(run: Run, *arguments: str, code: int = 0) -> Any:
    """Runs a command; returns what it prints as JSON."""
    found, output, errors = await run(*arguments, "--format", "json")
    assert found == code, errors
    return json.loads(output)


THREAD_KEYS = {
    "thread_id",
    "user_id",
    "domain",
    "state",
    "agent_id",
    "message_count",
    "created_at",
    "last_message_at",
    "copy",
    "unfinished_turns",
}
TURN_KEYS = {
    "turn_id",
    "thread_id",
    "user_id",
    "agent_id",
    "state",
    "attempt",
    "epoch",
    "owner",
    "owner_alive",
    "lease_until",
    "accepted_at",
    "claimed_at",
    "age_seconds",
    "budget_used_seconds",
    "budget_seconds",
    "stuck",
}


async def left_behind(client: Client) -> tuple[str, str]:
    """A thread and its turn whose process is gone: its text is on record, and nobody has claimed it for long."""
    thread = a_thread("eve", agent_id="general-v1", title=PRIVATE_WORD, metadata={"key": PRIVATE_WORD})
    turn = a_turn(thread)

    def fill(tx: Transaction) -> None:
        now = tx.now()
        tx.users.ensure("eve", now)
        tx.threads.add(thread)
        tx.turns.add(turn, request("eve"), owner="gone")
        tx.log.begin(turn.id, [TurnStarted(turn.id, thread.id, turn.agent_id)])
        tx.messages.append(thread.id, [a_line(turn, PRIVATE_WORD, Role.USER, created_at=now - timedelta(hours=1))])
        tx.log.append([LogAppend(turn.id, turn.epoch, 1, (TextDelta(PRIVATE_WORD),))])

    await client.container.store().write(fill)
    return thread.id, turn.id


async def the_whole_story(run: Run, thread_id: str, turn_id: str) -> None:
    """Looks at a turn that was left behind, and ends it."""
    listed = await as_json(run, "threads", "list", "--user", "eve", "--state", "active")
    (thread,) = listed["threads"]
    assert set(thread) == THREAD_KEYS
    assert (thread["thread_id"], thread["message_count"], thread["copy"]) == (thread_id, 1, None)
    assert await as_json(run, "threads", "show", thread_id) | {"unfinished_turns": ()} == thread | {
        "unfinished_turns": ()
    }
    assert (await as_json(run, "threads", "list", "--domain", "health"))["threads"] == []

    (turn,) = (await as_json(run, "turns", "list", "--stuck"))["turns"]
    assert set(turn) == TURN_KEYS
    assert (turn["turn_id"], turn["state"], turn["owner"], turn["owner_alive"], turn["lease_until"]) == (
        turn_id,
        "running",
        "gone",
        False,
        None,
    )
    assert (await as_json(run, "turns", "list", "--user", "ada"))["turns"] == []

    settled = {"turn_id": turn_id, "thread_id": thread_id, "state": "incomplete", "reason": "INTERRUPTED"}
    rest = {"already": False, "has_reply": True}
    assert await as_json(run, "turns", "settle", turn_id, "--dry-run") == settled | rest | {"dry_run": True}
    assert await as_json(run, "threads", "unlock", thread_id, "--dry-run") == {
        "turns": [settled | rest],
        "copy_doubted": False,
        "dry_run": True,
    }
    assert len((await as_json(run, "turns", "list"))["turns"]) == 1
    assert await as_json(run, "turns", "settle", turn_id) == settled | rest | {"dry_run": False}
    again = await as_json(run, "turns", "settle", turn_id)
    assert again == settled | {"already": True, "has_reply": True, "dry_run": False}
    assert await as_json(run, "threads", "unlock", thread_id) == {
        "turns": [],
        "copy_doubted": False,
        "dry_run": False,
    }
    assert (await as_json(run, "threads", "show", thread_id))["message_count"] == 2
    assert (await run("turns", "list"))[1] == "no unfinished turns\n"


async def test_alone(run: Run) -> None:
    async with served(ScriptedAgent()) as client:
        thread_id, turn_id = await left_behind(client)
        await client.container.store().write(lambda tx: _age(tx, turn_id))
    await the_whole_story(run, thread_id, turn_id)


async def test_beside_a_running_service(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.use_cases.recover_turns.RecoverTurns._look_for_turns", _never)
    async with served(ScriptedAgent()) as client:
        thread_id, turn_id = await left_behind(client)
        await client.container.store().write(lambda tx: _age(tx, turn_id))
        await the_whole_story(run, thread_id, turn_id)
        after = await client.chat("Hello again", "eve", thread_id=thread_id)
        assert after[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED


async def _never(_: object) -> None:
    """Recovery that does not look: the turn stays as it was left."""
    await asyncio.Event().wait()


def _age(tx: Transaction, turn_id: str) -> None:
    turn = tx.turns.lock(turn_id)
    assert turn is not None
    tx.turns.save_claim(replace(turn, claimed_at=tx.now() - timedelta(hours=1)), "gone")


async def test_people_are_told_in_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.use_cases.recover_turns.RecoverTurns._look_for_turns", _never)
    gates = Gate(), Gate()
    async with served(ScriptedAgent([gates[0], DONE], [gates[1], DONE])) as client:
        thread_id, turn_id = await left_behind(client)
        at_work = [asyncio.create_task(client.chat("Hello", user)) for user in ("ada", "bob")]
        for gate in gates:
            await gate.reached.wait()

        async def told(*arguments: str) -> tuple[str, str]:
            code, output, errors = await run(*arguments)
            assert code == 0, errors
            return output, errors

        async def line(user: str) -> str:
            return (await told("turns", "list", "--user", user))[0].splitlines()[1]

        assert " gone (gone) " in await line("eve")
        assert " (alive) " in await line("ada")
        for what, first in (("threads", "the newest 1: "), ("turns", "the oldest 1: ")):
            output, errors = await told(what, "list", "--limit", "1")
            assert (len(output.splitlines()), errors.startswith(first)) == (2, True)
            assert (await told(what, "list", "--limit", "4"))[1] == ""
        ending = "incomplete (INTERRUPTED)"
        for arguments, said in (
            (("threads", "unlock", thread_id, "--dry-run"), f"would end: {ending}, keeping its partial text"),
            (("turns", "settle", turn_id, "--dry-run"), f"would end: {ending}, keeping its partial text"),
            (("turns", "settle", turn_id), f"ended: {ending}, keeping its partial text"),
            (("turns", "settle", turn_id), f"had ended before: {ending}"),
        ):
            assert await told(*arguments) == (f"turn {turn_id} {said}\n", "")
        assert await told("threads", "unlock", thread_id) == ("no turn was unfinished\n", "")
        for gate in gates:
            gate.open()
        await asyncio.gather(*at_work)


@pytest.mark.parametrize("beside", [True, False], ids=["beside a service", "alone"])
async def test_lists_are_as_long_as_asked_for_and_have_every_state(run: Run, beside: bool) -> None:
    async def story() -> None:
        listed = (await as_json(run, "threads", "list"))["threads"]
        assert [one["state"] for one in listed] == ["inactive", "active", "active"]
        newest = (await as_json(run, "threads", "list", "--limit", "1"))["threads"]
        assert newest == listed[:1]
        assert len((await as_json(run, "threads", "list", "--limit", "1000"))["threads"]) == 3
        assert len((await as_json(run, "threads", "list", "--state", "active"))["threads"]) == 2
        assert len((await as_json(run, "turns", "list"))["turns"]) == 2
        assert len((await as_json(run, "turns", "list", "--limit", "1"))["turns"]) == 1

    def fill(tx: Transaction) -> None:
        tx.users.ensure("eve", tx.now())
        tx.threads.add(
            a_thread("eve", state=ThreadState.INACTIVE, last_message_at=tx.now() + timedelta(minutes=1))
        )

    gate = Gate()
    async with served(ScriptedAgent([gate, DONE], [gate, DONE])) as client:
        streams = [client.agents.Chat(message(), timeout=DEADLINE) for _ in range(2)]
        for stream in streams:
            await stream.read()
        await client.container.store().write(fill)
        if beside:
            await story()
    if not beside:
        await story()


async def test_a_living_turn_is_left_alone_unless_forced(run: Run) -> None:
    gate = Gate()
    async with served(ScriptedAgent(["so far", gate, "too late", DONE])) as client:
        at_work = asyncio.create_task(client.chat(PRIVATE_WORD))
        await gate.reached.wait()
        (turn,) = (await as_json(run, "turns", "list"))["turns"]
        assert (turn["state"], turn["owner_alive"], turn["stuck"]) == ("running", True, "")
        assert (await as_json(run, "turns", "list", "--stuck"))["turns"] == []
        for refused in (("turns", "settle", turn["turn_id"]), ("threads", "unlock", turn["thread_id"])):
            code, output, errors = await run(*refused)
            assert (code, output) == (1, "")
            assert turn["turn_id"] in errors
            assert "--force" in errors
        code, _, errors = await run("provider", "reconcile", turn["thread_id"])
        assert (code, turn["turn_id"] in errors, "--force" in errors) == (1, True, False)
        unlocked = await as_json(run, "threads", "unlock", turn["thread_id"], "--force")
        assert [each["state"] for each in unlocked["turns"]] == ["incomplete"]
        events = [response.event for response in await at_work]
        assert text_of(events) == "so far"
        assert events[-1].finished.turn.error.reason == "INTERRUPTED"
        gate.open()
        after = await client.chat("And now?", thread_id=turn["thread_id"])
        assert after[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED


async def test_nothing_that_anybody_wrote_is_shown(run: Run) -> None:
    gate = Gate()
    async with served(ScriptedAgent([PRIVATE_WORD, gate, DONE])) as client:
        thread_id, turn_id = await left_behind(client)
        metadata = {"team": PRIVATE_WORD}
        at_work = asyncio.create_task(client.chat(PRIVATE_WORD, metadata=metadata))
        await gate.reached.wait()
        own = (await as_json(run, "threads", "list", "--user", "ada"))["threads"][0]["thread_id"]
        titled = pb.Thread(id=own, title=PRIVATE_WORD)
        update = threads_api.UpdateThreadRequest(user_id="ada", thread=titled)
        update.update_mask.paths.append("title")
        await client.threads.UpdateThread(update)
        shown = []
        for arguments in (
            ("threads", "list"),
            ("threads", "show", own),
            ("threads", "show", thread_id),
            ("turns", "list"),
            ("agents", "list"),
            ("turns", "settle", turn_id, "--force", "--dry-run"),
            ("threads", "unlock", own, "--force", "--dry-run"),
        ):
            for form in ("text", "json"):
                code, output, errors = await run(*arguments, "--format", form)
                assert code == 0, errors
                shown.append(output + errors)
        assert own in shown[0]
        assert not [text for text in shown if PRIVATE_WORD in text]
        gate.open()
        await at_work


async def test_agents_are_compared_and_published(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything = {"career-v1", "general-v1", "health-v1", "relationship-v1"}
    assert {one["agent_id"] for one in (await as_json(run, "agents", "list"))["agents"]} == everything
    before = (await as_json(run, "agents", "diff"))["publications"]
    assert {(one["outcome"], one["compared_with"]) for one in before} == {("NEW", "")}
    assert (await run("agents", "diff"))[2] == "4 versions to publish\n"
    assert (await as_json(run, "agents", "publish", "--dry-run"))["published"] is False
    assert (await as_json(run, "agents", "publish"))["published"] is True
    assert (await as_json(run, "agents", "publish"))["published"] is False
    async with served() as client:
        await client.chat("Hello", domain=pb.DOMAIN_CAREER)
        text = (SHIPPED / "career.toml").read_text()
        monkeypatch.setenv("VIDA_AGENTS_DIR", str(tmp_path))
        raised = text.replace("version = 1", "version = 2").replace('name = "', 'name = "New ')
        (tmp_path / "career.toml").write_text(raised)
        (career, *others) = (await as_json(run, "agents", "diff"))["publications"]
        assert career == {
            "agent_id": "career-v2",
            "outcome": "NEW",
            "compared_with": "career-v1",
            "fields": ["version", "name"],
        }
        assert {one["outcome"] for one in others} == {"UNCHANGED"}
        listed = {one["agent_id"]: one for one in (await as_json(run, "agents", "list"))["agents"]}
        facts = [
            (one["threads"], one["in_catalog"], one["on_record"])
            for one in (listed["career-v1"], listed["career-v2"])
        ]
        assert facts == [(1, False, True), (0, True, False)]
        code, output, errors = await run("agents", "publish")
        assert (code, errors) == (0, "1 versions published\n")
        assert "career-v2" in output

        (tmp_path / "career.toml").write_text(raised.replace('name = "New ', 'name = "Newer '))
        for name in ("diff", "publish"):
            answer = await as_json(run, "agents", name, code=1)
            assert answer["publications"][0]["outcome"] == "CHANGED"
            assert answer["publications"][0]["fields"] == ["name"]
            assert answer["published"] is False
        code, _, errors = await run("agents", "diff")
        assert (code, "career-v2" in errors) == (1, True)


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A provider that the settings point to."""
    async with FakeProvider() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        yield fake


@pytest.mark.parametrize("beside", [True, False], ids=["beside a service", "alone"])
async def test_a_copy_is_brought_into_step(run: Run, provider: FakeProvider, beside: bool) -> None:
    provider.then(Answer(output=(Text(text="First."),)), Answer(output=(Text(text="Second."),)))

    async def standing(thread_id: str, *more: str) -> tuple[object, ...]:
        answer = await as_json(run, "provider", "reconcile", thread_id, *more)
        return tuple(answer.values())

    async def story(thread_id: str) -> None:
        (conversation,) = provider.conversations.values()
        whole = words(conversation.items)
        assert whole == ["user: one", "assistant: First.", "user: two", "assistant: Second."]
        in_step = ("IN_STEP", 0, 0, 0, "NOTHING", False)
        assert await standing(thread_id) == in_step
        assert "\ncopy: conversation, in step, openai conv_" in (await run("threads", "show", thread_id))[1]
        # Something was said there that is not on record, and a call was never answered.
        call = {"type": "function_call", "call_id": "call_9", "name": "list_goals", "arguments": "{}"}
        conversation.items.append({**call, "id": "fc_9", "status": "completed"})
        ahead = ("OUT_OF_STEP", 2, 3, 1, "REPAIRED")
        assert await standing(thread_id, "--dry-run") == (*ahead, True)
        told = "found: 2 items behind, 3 ahead; 1 calls of tools without an answer\nit would be repaired\n"
        assert await run("provider", "reconcile", thread_id, "--dry-run") == (0, told, "")
        assert len(conversation.items) == 5
        assert await standing(thread_id) == (*ahead, False)
        assert words(conversation.items) == whole
        # The end of it is missing.
        del conversation.items[2:]
        assert await standing(thread_id) == ("OUT_OF_STEP", 2, 0, 0, "REPAIRED", False)
        assert words(conversation.items) == whole
        assert await standing(thread_id) == in_step
        provider.conversations.clear()
        assert await standing(thread_id, "--dry-run") == ("GONE", 0, 0, 0, "REBUILT", True)
        code, output, _ = await run("provider", "reconcile", thread_id)
        assert (code, output) == (0, "found: the provider does not know it any more\nit was rebuilt\n")
        (rebuilt,) = provider.conversations.values()
        assert words(rebuilt.items) == whole
        # So much that is not on record is not taken out piece by piece.
        rebuilt.items.extend({**rebuilt.items[0], "id": f"msg_{number}"} for number in range(21))
        assert await standing(thread_id) == ("UNKNOWN", 0, 0, 0, "REBUILT", False)
        (_, rebuilt) = provider.conversations.values()
        assert words(rebuilt.items) == whole
        assert await standing(thread_id) == in_step
        copy = (await as_json(run, "threads", "show", thread_id))["copy"]
        assert copy == {
            "provider": "openai",
            "mode": "conversation",
            "ref": rebuilt.id,
            "doubted": False,
            "lines_behind": 0,
        }
        assert (await as_json(run, "threads", "unlock", thread_id))["copy_doubted"] is True
        assert (await as_json(run, "threads", "show", thread_id))["copy"]["doubted"] is True
        assert "\ncopy: conversation, doubted, openai conv_" in (await run("threads", "show", thread_id))[1]
        del rebuilt.items[2:]
        provider.refusals["items"].append(HttpError(status=500))
        code, output, errors = await run("provider", "reconcile", thread_id)
        assert (code, output) == (1, "")
        assert "the provider can't be asked now" in errors
        assert not provider.refusals["items"]
        assert (await as_json(run, "threads", "show", thread_id))["copy"]["doubted"] is True

    async with served() as client:
        events = await client.chat("one")
        thread_id = events[0].event.started.thread_id
        await client.chat("two", thread_id=thread_id)
        if beside:
            await story(thread_id)
    if not beside:
        await story(thread_id)


@pytest.mark.parametrize("mode", ["response_chain", "stateless"])
async def test_a_mode_that_says_what_is_missing_has_nothing_to_reconcile(
    run: Run, provider: FakeProvider, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_STATE", mode)
    async with served() as client:
        thread_id = (await client.chat("Hello"))[0].event.started.thread_id
    found = await as_json(run, "provider", "reconcile", thread_id)
    assert (found["found"], found["action"]) == ("NO_COPY", "NOTHING")
    copy = (await as_json(run, "threads", "show", thread_id))["copy"]
    if mode == "stateless":
        assert copy is None
    else:
        assert (copy["mode"], copy["doubted"], copy["lines_behind"]) == ("response_chain", False, 0)


async def test_there_is_nothing_to_reconcile_with_the_practice_coach(run: Run) -> None:
    async with served() as client:
        thread_id = (await client.chat("Hello"))[0].event.started.thread_id
    found = await as_json(run, "provider", "reconcile", thread_id)
    assert (found["found"], found["action"]) == ("NO_COPY", "NOTHING")


@pytest.mark.parametrize("beside", [True, False], ids=["beside a service", "alone"])
async def test_what_is_not_there_and_what_can_not_be(run: Run, beside: bool) -> None:
    async def all_of_it() -> None:
        for arguments in (
            ("threads", "show", IDS.new()),
            ("threads", "unlock", IDS.new()),
            ("turns", "settle", IDS.new()),
            ("provider", "reconcile", IDS.new()),
        ):
            code, output, errors = await run(*arguments)
            assert (code, output) == (1, "")
            assert "There is no such" in errors
        too_long: tuple[tuple[str, ...], ...] = (
            ("threads", "list", "--user", "x" * 129),
            ("threads", "show", "x" * 65),
            ("turns", "settle", "x" * 65),
        )
        for other in too_long:
            code, output, errors = await run(*other)
            assert (code, output) == (2, "")
            assert "characters" in errors

    if beside:
        async with served(ScriptedAgent()):
            await all_of_it()
    else:
        await all_of_it()


@pytest.mark.parametrize(
    "arguments",
    [
        ("threads",),
        ("threads", "list", "--limit", "0"),
        ("threads", "list", "--limit", "1001"),
        ("threads", "list", "--domain", "love"),
        ("turns", "list", "--limit", "many"),
        ("turns", "settle"),
        ("agents", "list", "--format", "xml"),
        ("provider", "mend"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A thread and a turn of it whose process was killed in the middle of the reply."""
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "5")
    monkeypatch.setenv("VIDA_LEASE", "600")
    serve = [sys.executable, "-m", "entrypoints.cli.main", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().removeprefix("listening on ").strip()
        with grpc.insecure_channel(address) as channel:
            events = AgentServiceStub(channel).Chat(message("I want a new job"), timeout=DEADLINE)
            started = next(events).event.started
            while not next(events).event.HasField("text_delta"):
                """What comes before the text."""
            server.kill()
    return started.thread_id, started.turn_id


async def test_a_turn_whose_process_was_killed_can_be_ended_by_hand(
    run: Run, killed: tuple[str, str], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread_id, turn_id = killed
    (turn,) = (await as_json(run, "turns", "list"))["turns"]
    assert (turn["turn_id"], turn["state"], turn["claimed_at"] is None) == (turn_id, "running", False)
    if database_url.startswith("sqlite"):
        # Whoever has the file's lock knows that nobody else is alive.
        assert turn["owner_alive"] is False
        settled = await as_json(run, "turns", "settle", turn_id)
    else:
        assert turn["owner_alive"] is True  # its lease is not over
        assert (await run("turns", "settle", turn_id))[0] == 1
        settled = await as_json(run, "turns", "settle", turn_id, "--force")
    assert (settled["state"], settled["reason"], settled["has_reply"]) == ("incomplete", "INTERRUPTED", True)
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0")
    async with served() as client:
        events = await client.follow(turn_id)
        assert text_of(events)
        assert events[-1].finished.turn.error.reason == "INTERRUPTED"
        after = await client.chat("And now?", thread_id=thread_id)
        assert after[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED

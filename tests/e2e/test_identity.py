"""Nobody gets what is not theirs: every method, whatever is asked about, with every kind of credentials."""

import asyncio
import importlib
import logging
import pkgutil
import sqlite3
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from adapters.identity import MAX_TOKEN
from adapters.system import Ids
from certificates import Issuer, Pair
from doubles import DONE, Gate, ScriptedAgent
from entrypoints import policy
from entrypoints.grpc_api import gen
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as admin_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as users_api
from entrypoints.grpc_api.methods import TABLE, Need, need_of
from entrypoints.hosting import reflected
from entrypoints.settings import load_settings
from harness import DEADLINE, Client, message, reason, rest_of, served
from identity_lab import APP, BATCH, OPERATOR, POLICY, READER, Lab, bearer, stubs

TEXT = [pb.ContentPart(text="Hello")]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """What a service with an identity needs."""
    monkeypatch.setenv("VIDA_DRAIN", "0")
    return Lab(tmp_path, monkeypatch)


def methods() -> Iterator[Any]:
    """The descriptors of all our methods, found in the generated code."""
    for module in pkgutil.walk_packages(gen.__path__, f"{gen.__name__}."):
        if module.name.endswith("_pb2"):
            for service in importlib.import_module(module.name).DESCRIPTOR.services_by_name.values():
                yield from service.methods


def path_of(method: Any) -> str:
    """`/package.Service/Method`."""
    return f"/{method.containing_service.full_name}/{method.name}"


def short(method: Any) -> str:
    """`Service/Method`."""
    return f"{method.containing_service.name}/{method.name}"


@dataclass(frozen=True)
class Belongings:
    """What a user has."""

    thread_id: str
    turn_id: str


Build = Callable[[str, Belongings], Any]
ABOUT_SOMETHING: dict[str, Build] = {
    "AgentService/Chat": lambda user, of: api.ChatRequest(user_id=user, thread_id=of.thread_id, content=TEXT),
    "AgentService/SendMessage": lambda user, of: api.SendMessageRequest(
        user_id=user, thread_id=of.thread_id, content=TEXT
    ),
    "AgentService/FollowTurn": lambda user, of: api.FollowTurnRequest(user_id=user, turn_id=of.turn_id),
    "AgentService/GetTurn": lambda user, of: api.GetTurnRequest(user_id=user, turn_id=of.turn_id),
    "AgentService/CancelTurn": lambda user, of: api.CancelTurnRequest(user_id=user, turn_id=of.turn_id),
    "ThreadService/GetThread": lambda user, of: threads_api.GetThreadRequest(user_id=user, thread_id=of.thread_id),
    "ThreadService/ListMessages": lambda user, of: threads_api.ListMessagesRequest(
        user_id=user, thread_id=of.thread_id
    ),
    "ThreadService/UpdateThread": lambda user, of: threads_api.UpdateThreadRequest(
        user_id=user,
        thread=pb.Thread(id=of.thread_id, title="mine"),
        update_mask=field_mask_pb2.FieldMask(paths=["title"]),
    ),
    "ThreadService/DeleteThread": lambda user, of: threads_api.DeleteThreadRequest(
        user_id=user, thread_id=of.thread_id
    ),
}
ABOUT_A_USER: dict[str, Build] = {
    "ThreadService/ListThreads": lambda user, _: threads_api.ListThreadsRequest(user_id=user),
    "UserService/GetUsage": lambda user, _: users_api.GetUsageRequest(user_id=user),
    "UserService/ExportUserData": lambda user, _: users_api.ExportUserDataRequest(user_id=user),
    "UserService/EraseUser": lambda user, _: users_api.EraseUserRequest(user_id=user),
}
ABOUT_NOBODY: dict[str, Build] = {
    "AgentService/ListAgents": lambda *_: api.ListAgentsRequest(),
}
FOR_OPERATORS: dict[str, Build] = {
    "AdminService/Cleanup": lambda *_: admin_api.CleanupRequest(dry_run=True),
    "AdminService/HoldUser": lambda *_: admin_api.HoldUserRequest(user_id="somebody", hold=True),
    "AdminService/ListErasures": lambda *_: admin_api.ListErasuresRequest(),
    "AdminService/ReportUsage": lambda *_: admin_api.ReportUsageRequest(by=["user"]),
    "AdminService/ListThreads": lambda *_: admin_api.ListThreadsRequest(),
    "AdminService/GetThread": lambda _, of: admin_api.GetThreadRequest(thread_id=of.thread_id),
    "AdminService/UnlockThread": lambda _, of: admin_api.UnlockThreadRequest(thread_id=of.thread_id, force=True),
    "AdminService/ListTurns": lambda *_: admin_api.ListTurnsRequest(),
    "AdminService/SettleTurn": lambda _, of: admin_api.SettleTurnRequest(turn_id=of.turn_id, force=True),
    "AdminService/ListAgentVersions": lambda *_: admin_api.ListAgentVersionsRequest(),
    "AdminService/PublishAgents": lambda *_: admin_api.PublishAgentsRequest(),
    "AdminService/ReconcileThread": lambda _, of: admin_api.ReconcileThreadRequest(thread_id=of.thread_id),
}
ALL = {**ABOUT_SOMETHING, **ABOUT_A_USER, **ABOUT_NOBODY, **FOR_OPERATORS}


def test_every_method_is_tried() -> None:
    assert {short(method) for method in methods()} == set(ALL)


def test_every_method_has_a_decision() -> None:
    needs = {short(method): need_of(path_of(method)) for method in methods()}
    assert None not in needs.values()
    kinds = {
        Need.USER: {**ABOUT_SOMETHING, **ABOUT_A_USER},
        Need.CALLER: ABOUT_NOBODY,
        Need.ADMIN: FOR_OPERATORS,
    }
    for need, those in kinds.items():
        assert {name for name, found in needs.items() if found and found[0] is need} == set(those)
    assert need_of("/vidacoach.agents.v1.AgentService/Unheard") is None
    assert need_of("/vidacoach.agents.v2.AgentService/Chat") is None


class Caller:
    """Calls any method on one channel with one token."""

    def __init__(self, channel: grpc.aio.Channel, token: str | None) -> None:
        self._stubs = stubs(channel)
        self._metadata = bearer(token) if token is not None else None

    async def call(self, name: str, user: str, of: Belongings) -> list[Any]:
        """All that is answered."""
        service, _, method = name.partition("/")
        call = getattr(self._stubs[service], method)(
            ALL[name](user, of), metadata=self._metadata, timeout=DEADLINE
        )
        if hasattr(call, "__aiter__"):
            return [response async for response in call]
        return [await call]

    async def refusal(self, name: str, user: str, of: Belongings) -> tuple[Any, ...]:
        """All that is seen of a refusal: status, reason, text and every byte of metadata."""
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await self.call(name, user, of)
        sent = [*(error.value.initial_metadata() or ()), *(error.value.trailing_metadata() or ())]
        return error.value.code(), reason(error.value), error.value.details(), sorted((*pair,) for pair in sent)


async def begin(caller: Caller, user: str) -> Belongings:
    """A thread with a turn that has ended."""
    started = (await caller.call("AgentService/Chat", user, Belongings("", "")))[0].event.started
    return Belongings(started.thread_id, started.turn_id)


async def test_isolation(lab: Lab, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    lab.set()
    ids = Ids()
    issuer = lab.issuer
    async with lab.served(ScriptedAgent()) as client:
        ada, eve = (Caller(client.channel, issuer.token(user)) for user in ("ada", "eve"))
        unbelieved = {
            "expired": issuer.token("ada", seconds=-60),
            "of another audience": issuer.token("ada", aud="another"),
            "of another issuer": issuer.token("ada", iss="https://another.example"),
            "forged": Issuer(issuer.kid).token("ada"),
            "of an unknown key": Issuer("k9").token("ada"),
            "none": None,
            "no token": "x.y.z",
        }
        evil = [Caller(client.channel, token) for token in unbelieved.values()]
        anothers = await begin(eve, "eve")
        deleted = await begin(ada, "ada")
        await ada.call("ThreadService/DeleteThread", "ada", deleted)
        before = [
            await eve.call(name, "eve", anothers) for name in ("AgentService/GetTurn", "ThreadService/GetThread")
        ]
        unauthenticated = set()
        forbidden = set()
        for name in ALL:
            own = await begin(ada, "ada")
            things = [own, anothers, Belongings(ids.new(), ids.new()), deleted]
            for of in things:
                unauthenticated |= {str(await one.refusal(name, "ada", of)) for one in evil}
                if name not in ABOUT_NOBODY:
                    forbidden.add(str(await eve.refusal(name, "ada", of)))
            if name in FOR_OPERATORS:
                forbidden.add(str(await ada.refusal(name, "ada", own)))
                continue
            if name in ABOUT_SOMETHING:
                seen = [await ada.refusal(name, "ada", of) for of in things[1:]]
                assert seen[0] == seen[1] == seen[2], name
                assert seen[0][:2] in {
                    (grpc.StatusCode.NOT_FOUND, "THREAD_NOT_FOUND"),
                    (grpc.StatusCode.NOT_FOUND, "TURN_NOT_FOUND"),
                }
            answered = await ada.call(name, "ada", own)
            assert answered
            assert anothers.thread_id not in str(answered)
        (one,) = unauthenticated
        assert one.startswith(str((grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"))[:-1])
        (one,) = forbidden
        assert one.startswith(str((grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED"))[:-1])
        after = [
            await eve.call(name, "eve", anothers) for name in ("AgentService/GetTurn", "ThreadService/GetThread")
        ]
        assert after == before


async def test_a_policy_says_who_may_do_what(lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set()
    token = lab.issuer.token("ada")
    async with lab.served(ScriptedAgent(), BATCH) as client:
        batch = Caller(client.channel, None)  # for anyone, without a token
        own = await begin(batch, "ada")
        assert await batch.call("ThreadService/ListThreads", "eve", own)
        bound = Caller(client.channel, token)  # but a token that is given counts
        assert await bound.call("AgentService/GetTurn", "ada", own)
        assert (await bound.refusal("AgentService/GetTurn", "eve", own))[1] == "CALLER_NOT_ALLOWED"
        stale = Caller(client.channel, lab.issuer.token(seconds=-60))
        assert (await stale.refusal("AgentService/GetTurn", "ada", own))[1] == "UNAUTHENTICATED"
        assert (await batch.refusal("AdminService/Cleanup", "", own))[1] == "CALLER_NOT_ALLOWED"

        async with lab.channel(client.address, READER) as channel:
            reader = Caller(channel, token)
            allowed = {name for name in ALL if name.startswith("ThreadService/")} | {"AgentService/GetTurn"}
            for name in sorted(ALL, key=lambda name: name == "ThreadService/DeleteThread"):
                if name in allowed:
                    assert await reader.call(name, "ada", own)
                else:
                    assert (await reader.refusal(name, "ada", own))[1] == "CALLER_NOT_ALLOWED"

        async with lab.channel(client.address, OPERATOR) as channel:
            operator = Caller(channel, None)
            assert (await operator.call("AdminService/Cleanup", "", own))[-1].HasField("report")
            for name in ALL.keys() - FOR_OPERATORS.keys():
                assert (await operator.refusal(name, "ada", own))[1] == "CALLER_NOT_ALLOWED"

        async with lab.channel(client.address, "spiffe://example.org/stranger") as channel:
            for name in ALL:  # whom the policy does not name
                assert (await Caller(channel, token).refusal(name, "ada", own))[1] == "CALLER_NOT_ALLOWED"


async def test_a_method_that_nobody_has_decided_on_is_refused(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.delitem(TABLE, "/vidacoach.agents.v1.AgentService/ListAgents")
    async with served(ScriptedAgent()) as client:
        refused = await Caller(client.channel, None).refusal("AgentService/ListAgents", "", Belongings("", ""))
        assert refused[:2] == (grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
        assert await begin(Caller(client.channel, None), "ada")


async def test_a_certificate_without_a_name_is_nobody(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set(tokens=False, policy=False)
    async with lab.served(ScriptedAgent()) as client:
        for pair in (lab.clients.issue(), lab.clients.issue(uris=(APP, BATCH)), lab.clients.issue(name="a\tb")):
            async with lab.channel_with(client.address, pair) as channel:
                refused = await Caller(channel, None).refusal("AgentService/ListAgents", "", Belongings("", ""))
                assert refused[:2] == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


async def connects(channel: grpc.aio.Channel) -> bool:
    """Whether a health check is answered."""
    async with channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
        code = await check.code()
    assert code in {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    return bool(code is grpc.StatusCode.OK)


async def test_health_is_open_to_whoever_completes_the_handshake(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set()
    async with lab.served(ScriptedAgent()) as client:
        assert await connects(lab.channel(client.address, "spiffe://example.org/stranger"))
        assert not await connects(lab.channel(client.address, None))
        assert not await connects(lab.channel_with(client.address, lab.authority.issue(uris=(APP,))))
        assert not await connects(grpc.aio.insecure_channel(client.address))
        untrusting = grpc.ssl_channel_credentials(lab.clients.pem)
        assert not await connects(grpc.aio.secure_channel(client.address, untrusting))


async def describe(channel: grpc.aio.Channel, token: str | None) -> list[Any]:
    """What reflection says."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([request]), metadata=bearer(token) if token else None, timeout=DEADLINE
    )
    return [response async for response in call]


async def test_the_apis_description_is_for_callers(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set()
    token = lab.issuer.token()
    async with lab.served(ScriptedAgent()) as client, lab.channel(client.address, READER) as reader:
        (described,) = await describe(client.channel, token)
        assert "vidacoach.agents.v1.AgentService" in str(described)
        for channel, given, expected in (
            (client.channel, None, "UNAUTHENTICATED"),
            (reader, token, "CALLER_NOT_ALLOWED"),  # as ListAgents
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await describe(channel, given)
            assert reason(error.value) == expected


@pytest.mark.parametrize(
    ("setting", "host", "shown"),
    [
        ("", "127.0.0.1", True),
        ("", "[::1]", True),
        ("", "localhost", True),
        ("", "0.0.0.0", False),
        ("true", "0.0.0.0", True),
        ("false", "127.0.0.1", False),
    ],
)
def test_the_apis_description_is_for_this_machine_unless_set(
    setting: str, host: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_REFLECTION", setting)
    assert reflected(load_settings(), host) is shown


async def test_the_apis_description_is_behind_a_switch(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    async with served(ScriptedAgent()) as client:
        assert "vidacoach.agents.v1.UserService" in str(await describe(client.channel, None))
    monkeypatch.setenv("VIDA_REFLECTION", "false")
    async with served(ScriptedAgent()) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await describe(client.channel, None)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def callers(url: str) -> list[str]:
    """The callers of the turns on record, in the order of acceptance."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return [caller for (caller,) in connection.execute("SELECT caller FROM turns ORDER BY id")]


async def test_request_ids_are_the_callers_own(lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set(policy=False)
    authorization = bearer(lab.issuer.token("ada"))

    async def turn(pair: Pair) -> str:
        async with lab.channel_with(client.address, pair) as channel:
            chat = stubs(channel)["AgentService"].Chat(message(request_id="r1"), metadata=authorization)
            responses = [response async for response in chat]
            return str(responses[0].event.started.turn_id)

    pairs = [
        lab.pair(APP),
        lab.pair(BATCH),
        lab.clients.issue(name="Worker", hosts=("worker.example",)),
        lab.clients.issue(name="local"),
    ]
    async with lab.served(ScriptedAgent()) as client:
        turns = [await turn(pair) for pair in pairs]
        assert len(set(turns)) == 4
        assert await turn(lab.pair(APP)) == turns[0]  # another certificate of the same caller
    assert callers(sqlite_url) == [APP, BATCH, "dns:worker.example", "cn:local"]


async def test_without_certificates_a_caller_is_its_tokens_client(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.policy.write_text(
        '[[caller]]\nname = "token:backend"\nusers = "any"\n[[caller]]\nname = "*"\nusers = "token"\n'
    )
    lab.set(client_ca=False)
    async with lab.served(ScriptedAgent(), None) as client:
        backend = Caller(client.channel, lab.issuer.token("backend", azp="backend"))
        await begin(backend, "ada")
        app = Caller(client.channel, lab.issuer.token("ada", client_id="app"))
        of = await begin(app, "ada")
        assert (await app.refusal("AgentService/GetTurn", "eve", of))[1] == "CALLER_NOT_ALLOWED"
        await begin(Caller(client.channel, lab.issuer.token("ada")), "ada")
        for client_name in ("a\nb", "//x", "x" * 250, "\0"):
            odd = Caller(client.channel, lab.issuer.token("ada", azp=client_name))
            assert (await odd.refusal("AgentService/GetTurn", "ada", of))[1] == "UNAUTHENTICATED"
        refused = await Caller(client.channel, None).refusal("AgentService/GetTurn", "ada", of)
        assert refused[1] == "UNAUTHENTICATED"
    assert callers(sqlite_url) == ["token:backend", "token:app", "token"]


async def test_without_a_policy_a_token_is_for_its_user_alone(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    for certified in (True, False):
        lab.set(client_ca=certified, policy=False)
        if not certified:
            monkeypatch.delenv("VIDA_TLS_CLIENT_CA")
        async with lab.served(ScriptedAgent(), APP if certified else None) as client:
            ada = Caller(client.channel, lab.issuer.token("ada"))
            of = await begin(ada, "ada")
            for name in ABOUT_SOMETHING.keys() | ABOUT_A_USER.keys():
                assert (await ada.refusal(name, "eve", of))[1] == "CALLER_NOT_ALLOWED"
            nobody = Caller(client.channel, None)
            assert (await nobody.refusal("AgentService/GetTurn", "ada", of))[1] == "UNAUTHENTICATED"
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await ada.call("AdminService/ListTurns", "ada", of)
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_authorization_is_one_bearer_token(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set(client_ca=False, policy=False)
    good = lab.issuer.token()
    async with lab.served(ScriptedAgent(), None) as client:

        async def listed(*values: str) -> str:
            metadata = tuple(("authorization", value) for value in values)
            try:
                await client.agents.ListAgents(api.ListAgentsRequest(), metadata=metadata, timeout=DEADLINE)
            except grpc.aio.AioRpcError as error:
                return reason(error)
            return ""

        assert await listed(f"Bearer {good}") == await listed(f"bearer {good}") == ""
        for values in (
            [good],
            [f"Basic {good}"],
            ["Bearer"],
            ["Bearer "],
            [""],
            [f"Bearer {good}", f"Bearer {good}"],
        ):
            assert await listed(*values) == "UNAUTHENTICATED"
        assert await listed(f"Bearer {'x' * (MAX_TOKEN + 1)}") == "UNAUTHENTICATED"
        assert await listed(f"Bearer {lab.issuer.token(padding='x' * 4_096)}") == ""


async def test_keys_that_can_not_be_had_are_nobodys_fault(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set(client_ca=False, policy=False)
    monkeypatch.setenv("VIDA_AUTH_JWKS", "http://127.0.0.1:1/jwks.json")
    async with lab.served(ScriptedAgent(), None) as client:
        refused = await Caller(client.channel, lab.issuer.token()).refusal(
            "AgentService/ListAgents", "", Belongings("", "")
        )
        assert refused[:2] == (grpc.StatusCode.UNAVAILABLE, "IDENTITY_UNAVAILABLE")


async def shown(client: Client, lab: Lab) -> bytes:
    """The certificate that a new connection sees."""
    host, _, port = client.address.rpartition(":")
    context = ssl.create_default_context(cadata=lab.authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
    return ssl.DER_cert_to_PEM_cert(certificate).encode()


async def test_certificates_are_replaced_while_streams_go_on(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set(client_ca=False)
    lab.policy.write_text('[[caller]]\nname = "*"\nusers = "token"\n')
    gate = Gate()
    second = lab.authority.issue(name="second", hosts=("127.0.0.1",))
    async with lab.served(ScriptedAgent(["half", gate, " whole", DONE]), None) as client:
        chat = client.agents.Chat(message(), metadata=bearer(lab.issuer.token()), timeout=DEADLINE)
        await chat.read()
        await gate.reached.wait()
        assert await shown(client, lab) == lab.server.certificate

        lab.certificate.write_bytes(second.certificate)  # its key is not there yet
        assert await shown(client, lab) == lab.server.certificate
        lab.key.write_bytes(second.key[:100])
        assert await shown(client, lab) == lab.server.certificate
        lab.certificate.unlink()
        assert await shown(client, lab) == lab.server.certificate
        warned = [record.getMessage() for record in caplog.records if "not taken" in record.getMessage()]
        assert len(warned) == 3

        second.write(lab.certificate, lab.key)
        assert await shown(client, lab) == second.certificate
        gate.open()
        assert (await rest_of(chat))[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED


async def test_the_policy_is_replaced_while_it_serves(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setattr(policy, "LOOKED_AT_EVERY", 0.0)
    lab.set()
    operators = f"{POLICY}\n[[caller]]\nname = 'spiffe://example.org/new'\nusers = 'any'\nadmin = true"

    def replace(text: str) -> None:
        new = lab.policy.with_suffix(".new")
        new.write_text(text)
        new.rename(lab.policy)

    async with (
        lab.served(ScriptedAgent()) as client,
        lab.channel(client.address, "spiffe://example.org/new") as channel,
    ):
        app, new = (Caller(one, lab.issuer.token("ada")) for one in (client.channel, channel))
        of = await begin(app, "ada")
        assert await app.call("AgentService/GetTurn", "ada", of)
        assert (await new.refusal("AdminService/ListTurns", "", of))[1] == "CALLER_NOT_ALLOWED"

        replace(operators)
        assert await new.call("AdminService/ListTurns", "", of)
        replace(operators.replace(APP, "spiffe://example.org/other"))
        assert (await app.refusal("AgentService/GetTurn", "ada", of))[1] == "CALLER_NOT_ALLOWED"
        assert await new.call("AdminService/ListTurns", "", of)
        replace(POLICY)
        assert await app.call("AgentService/GetTurn", "ada", of)
        assert (await new.refusal("AdminService/ListTurns", "", of))[1] == "CALLER_NOT_ALLOWED"

        for broken in ("[[caller", '[[caller]]\nname = "*"\nusers = "all"\n', None):
            if broken is None:
                lab.policy.unlink()
            else:
                replace(broken)
            for _ in range(2):
                assert await app.call("AgentService/GetTurn", "ada", of)
                assert (await new.refusal("AdminService/ListTurns", "", of))[1] == "CALLER_NOT_ALLOWED"
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert [error.partition(": ")[2] for error in errors] == [
            "is no TOML",
            'caller 1: users must be "any" or "token"',
            "can't be read (FileNotFoundError)",
        ]
        replace(operators)
        assert await new.call("AdminService/ListTurns", "", of)


async def test_clients_authorities_are_replaced_too(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set()
    async with lab.served(ScriptedAgent()) as client:
        old = lab.pair(APP)
        assert await connects(lab.channel_with(client.address, old))
        lab.client_ca.write_bytes(lab.authority.pem)
        assert not await connects(lab.channel_with(client.address, old))
        assert await connects(lab.channel_with(client.address, lab.authority.issue(uris=(APP,))))


async def test_a_flood_of_refused_calls_is_no_flood_of_lines(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set()
    caplog.set_level(logging.INFO)
    async with lab.served(ScriptedAgent()) as client:
        caller = Caller(client.channel, None)
        of = Belongings(Ids().new(), Ids().new())
        for name in [*ABOUT_SOMETHING] * 20:
            assert (await caller.refusal(name, "ada", of))[1] == "UNAUTHENTICATED"
    lines = [line for line in caplog.messages if "refused" in line]
    assert len(lines) == 2
    assert lines[0].endswith("refused: no token")
    assert lines[1].startswith(f"refused {20 * len(ABOUT_SOMETHING) - 1} times more within 60 s: no token")


async def test_no_log_and_no_refusal_holds_a_token_or_a_key(
    lab: Lab, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab.set()
    caplog.set_level(logging.DEBUG)
    good = lab.issuer.token("ada")
    tokens = [
        good,
        lab.issuer.token("ada", seconds=-60),
        lab.issuer.token("ada", aud="canary-audience"),
        Issuer("canary-kid").token("canary-subject"),
        f"{good}canary",
        "canary-token",
    ]
    refusals = []
    async with lab.served(ScriptedAgent()) as client:
        of = await begin(Caller(client.channel, good), "ada")
        for token in tokens:
            caller = Caller(client.channel, token)
            refusals += [await caller.refusal(name, "eve", of) for name in ALL.keys() - ABOUT_NOBODY.keys()]
        lab.key.write_bytes(b"canary-key")
        assert await connects(lab.channel(client.address))
    said = caplog.text + str(refusals)
    assert "ExpiredSignature" in said
    assert "not taken" in said
    parts = {part for token in tokens for part in token.split(".") if len(part) > 8}
    assert [part for part in {*parts, "canary", lab.server.key.decode()[30:60]} if part in said] == []

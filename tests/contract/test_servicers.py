"""Every unary RPC of the API has a handler that decodes, asks and encodes: with grpcio-testing, no socket.

grpcio-testing knows no asyncio, so a thin synchronous face runs our handlers on a loop in a thread. What streams,
and what depends on interceptors, deadlines or bytes on the wire, is tested with real servers.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import grpc_testing
import pytest
from google.protobuf import field_mask_pb2

from adapters.memory.store import MemoryStore
from adapters.system import Clock, Ids
from core.model.ledger import UNLIMITED
from core.use_cases.erase_user import EraseUser
from core.use_cases.export_user import ExportUser
from core.use_cases.places import Places
from core.use_cases.read_usage import ReadUsage
from doubles import CATALOG, Service, service
from entrypoints.grpc_api.call import Call
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as users_api
from entrypoints.grpc_api.services.agents import AgentService, Streams
from entrypoints.grpc_api.services.threads import ThreadService
from entrypoints.grpc_api.services.users import UserService

AGENTS = agents_api.DESCRIPTOR.services_by_name["AgentService"]
THREADS = threads_api.DESCRIPTOR.services_by_name["ThreadService"]
USERS = users_api.DESCRIPTOR.services_by_name["UserService"]
TEXT = [pb.ContentPart(text="Hello")]


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        """Runs a coroutine to its end."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(timeout=20)

    def close(self) -> None:
        """Ends the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Face:
    """A synchronous face of an asynchronous servicer."""

    def __init__(self, loop: Loop, servicer: object) -> None:
        self._loop = loop
        self._servicer = servicer

    def __getattr__(self, name: str) -> Callable[[Any, Any], Any]:
        handler = getattr(self._servicer, name)
        assert inspect.iscoroutinefunction(handler)
        return lambda request, context: self._loop.run(handler(request, Call(context, "local")))


class Api:
    """The services on a store in memory, and a thread to ask about."""

    def __init__(self, loop: Loop, core: Service) -> None:
        agents = AgentService(
            accept=core.accept,
            follow=core.follow,
            cancel=core.cancel,
            threads=core.threads,
            catalog=CATALOG,
            agent=core.agent,
            streams=Streams(Places(10, 10), seconds=20),
        )
        erase = EraseUser(store=core.store, ids=Ids(), gone=core.engine.gone, erased=lambda: None)
        faces = {
            AGENTS: Face(loop, agents),
            THREADS: Face(loop, ThreadService(core.threads, core.delete)),
            USERS: Face(loop, UserService(ExportUser(core.store), erase, ReadUsage(core.store, UNLIMITED))),
        }
        self._server = grpc_testing.server_from_dictionary(faces, grpc_testing.strict_real_time())

    def ask(self, service_descriptor: Any, name: str, request: Any) -> Any:
        """Calls a unary RPC; it must end OK."""
        method = service_descriptor.methods_by_name[name]
        call = self._server.invoke_unary_unary(method, (), request, None)
        response, _, code, _ = call.termination()
        assert code is grpc.StatusCode.OK
        assert response.DESCRIPTOR is method.output_type
        return response


@pytest.fixture
def api() -> Iterator[Api]:
    """The API, ready to be asked."""
    loop = Loop()
    context = service(MemoryStore(Clock()))
    core = loop.run(context.__aenter__())
    try:
        yield Api(loop, core)
    finally:
        loop.run(context.__aexit__(None, None, None))
        loop.close()


def test_every_unary_rpc_answers_with_its_message(api: Api) -> None:
    sent = api.ask(AGENTS, "SendMessage", agents_api.SendMessageRequest(user_id="ada", content=TEXT))
    user = {"user_id": "ada"}
    turn = {**user, "turn_id": sent.turn.id}
    thread = {**user, "thread_id": sent.turn.thread_id}
    requests = {
        (AGENTS, "ListAgents"): agents_api.ListAgentsRequest(),
        (AGENTS, "SendMessage"): agents_api.SendMessageRequest(**thread, content=TEXT),
        (AGENTS, "GetTurn"): agents_api.GetTurnRequest(**turn),
        (AGENTS, "CancelTurn"): agents_api.CancelTurnRequest(**turn),
        (THREADS, "GetThread"): threads_api.GetThreadRequest(**thread),
        (THREADS, "ListThreads"): threads_api.ListThreadsRequest(user_id="ada"),
        (THREADS, "ListMessages"): threads_api.ListMessagesRequest(**thread),
        (THREADS, "UpdateThread"): threads_api.UpdateThreadRequest(
            **user,
            thread=pb.Thread(id=sent.turn.thread_id, title="Mine"),
            update_mask=field_mask_pb2.FieldMask(paths=["title"]),
        ),
        (THREADS, "DeleteThread"): threads_api.DeleteThreadRequest(**thread),
        (USERS, "GetUsage"): users_api.GetUsageRequest(user_id="ada"),
        (USERS, "EraseUser"): users_api.EraseUserRequest(user_id="ada", dry_run=True),
    }
    unary = {
        (descriptor, method.name)
        for descriptor in (AGENTS, THREADS, USERS)
        for method in descriptor.methods
        if not method.server_streaming
    }
    assert set(requests) == unary, "a new RPC needs a request here"
    answers = {name: api.ask(descriptor, name, request) for (descriptor, name), request in requests.items()}
    assert answers["GetTurn"].turn == sent.turn
    assert answers["CancelTurn"].turn == sent.turn  # it has ended: returned as it is
    assert answers["UpdateThread"].thread.title == "Mine"
    assert [each.id for each in answers["ListThreads"].threads] == [sent.turn.thread_id]
    assert [day.turns for day in answers["GetUsage"].days] == [2]

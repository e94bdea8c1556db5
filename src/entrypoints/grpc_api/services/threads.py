"""ThreadService."""

from typing import Any, TypeAlias

import grpc

from core.model.errors import InvalidField
from core.model.user import check_user_id
from core.use_cases.delete_thread import DeleteThread
from core.use_cases.read_threads import MessageQuery, ReadThreads, ThreadQuery
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceServicer

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_UPDATABLE = frozenset({"title", "metadata"})


class ThreadService(ThreadServiceServicer):
    """Read, describe and delete conversations."""

    def __init__(self, threads: ReadThreads, delete: DeleteThread) -> None:
        self._threads = threads
        self._delete = delete

    async def GetThread(self, request: api.GetThreadRequest, context: _Context) -> api.GetThreadResponse:
        """Reads a thread."""
        check_user_id(request.user_id)
        thread_id = mapping.id_of(request.thread_id, "thread_id")
        return api.GetThreadResponse(
            thread=mapping.to_thread(await self._threads.thread(request.user_id, thread_id))
        )

    async def ListThreads(self, request: api.ListThreadsRequest, context: _Context) -> api.ListThreadsResponse:
        """Lists a user's threads."""
        query = ThreadQuery(
            user_id=request.user_id,
            domain=mapping.domain_of(request.domain),
            states=mapping.states_of(request.states),
        )
        page, token = await self._threads.threads(query, request.page_size, request.page_token)
        return api.ListThreadsResponse(threads=map(mapping.to_thread, page), next_page_token=token)

    async def ListMessages(self, request: api.ListMessagesRequest, context: _Context) -> api.ListMessagesResponse:
        """Lists a thread's messages."""
        check_user_id(request.user_id)
        query = MessageQuery(
            user_id=request.user_id,
            thread_id=mapping.id_of(request.thread_id, "thread_id"),
            newest_first=request.newest_first,
        )
        page, token = await self._threads.messages(query, request.page_size, request.page_token)
        return api.ListMessagesResponse(messages=map(mapping.to_message, page), next_page_token=token)

    async def UpdateThread(self, request: api.UpdateThreadRequest, context: _Context) -> api.UpdateThreadResponse:
        """Changes what describes a thread."""
        check_user_id(request.user_id)
        thread_id = mapping.id_of(request.thread.id, "thread.id")
        paths = set(request.update_mask.paths)
        if not paths:
            raise InvalidField("update_mask", "must name title or metadata")
        if not paths <= _UPDATABLE:
            raise InvalidField("update_mask", "may name title and metadata only")
        thread = await self._threads.describe(
            request.user_id,
            thread_id,
            title=request.thread.title if "title" in paths else None,
            metadata=dict(request.thread.metadata) if "metadata" in paths else None,
        )
        return api.UpdateThreadResponse(thread=mapping.to_thread(thread))

    async def DeleteThread(self, request: api.DeleteThreadRequest, context: _Context) -> api.DeleteThreadResponse:
        """Deletes a thread."""
        check_user_id(request.user_id)
        await self._delete(request.user_id, mapping.id_of(request.thread_id, "thread_id"))
        return api.DeleteThreadResponse()

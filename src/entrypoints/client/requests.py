"""The requests of one user, made in one place for both clients."""

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api


@dataclass(frozen=True)
class Requests:
    """What a user may ask, and what shows that they may."""

    user_id: str
    token: Callable[[], str] | None = None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every request: the token as it is now, if there is one."""
        return (("authorization", f"Bearer {self.token()}"),) if self.token is not None else ()

    def chat(
        self,
        text: str,
        thread_id: str,
        domain: pb.Domain.ValueType,
        request_id: str,
        on_busy: pb.BusyPolicy.ValueType,
        attachments: Iterable[pb.ContentPart],
    ) -> agents_api.ChatRequest:
        """A message. Without a request id it gets one of its own: it is never sent without."""
        words = [pb.ContentPart(text=text)] if text else []
        return agents_api.ChatRequest(
            user_id=self.user_id,
            thread_id=thread_id,
            domain=domain,
            content=[*words, *attachments],
            request_id=request_id or str(uuid.uuid4()),
            on_busy=on_busy,
        )

    def follow(self, turn_id: str, after_position: int) -> agents_api.FollowTurnRequest:
        """A turn's events after a position."""
        return agents_api.FollowTurnRequest(user_id=self.user_id, turn_id=turn_id, after_position=after_position)

    def cancel(self, turn_id: str) -> agents_api.CancelTurnRequest:
        """The end of a turn."""
        return agents_api.CancelTurnRequest(user_id=self.user_id, turn_id=turn_id)

    def thread(self, thread_id: str) -> threads_api.GetThreadRequest:
        """One thread."""
        return threads_api.GetThreadRequest(user_id=self.user_id, thread_id=thread_id)

    def threads(self, page_size: int) -> threads_api.ListThreadsRequest:
        """The newest threads, expired ones included."""
        return threads_api.ListThreadsRequest(
            user_id=self.user_id,
            states=[pb.THREAD_STATE_ACTIVE, pb.THREAD_STATE_INACTIVE],
            page_size=page_size,
        )

    def messages(self, thread_id: str, page_size: int, newest_first: bool) -> threads_api.ListMessagesRequest:
        """A thread's messages, first page."""
        return threads_api.ListMessagesRequest(
            user_id=self.user_id, thread_id=thread_id, newest_first=newest_first, page_size=page_size
        )

    def delete(self, thread_id: str) -> threads_api.DeleteThreadRequest:
        """The deletion of a thread."""
        return threads_api.DeleteThreadRequest(user_id=self.user_id, thread_id=thread_id)

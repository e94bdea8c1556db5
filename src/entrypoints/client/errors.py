"""What a client is told when the service does not do what it was asked."""

from collections.abc import Iterator
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class ServiceError(Exception):
    """The service did not do what it was asked. Its text is for people.

    `reason` is the API's machine-readable reason, empty where the status carries none; `facts` are the ids that
    come with it; `violations` are pairs of a request's field and what is wrong with it; `retry_after` is 0 where
    the service names no time.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        facts: dict[str, str] | None = None,
        violations: tuple[tuple[str, str], ...] = (),
        retry_after: float = 0.0,
        request_id: str = "",
    ) -> None:
        sentences = [message or "The call failed.", *(f"{name}: {problem}." for name, problem in violations)]
        if request_id:
            sentences.append(f"The service's log knows it as request {request_id}.")
        super().__init__(f"{' '.join(sentences)} [{reason or code.name}]")
        self.code = code
        self.message = message
        self.reason = reason
        self.facts = facts or {}
        self.violations = violations
        self.retry_after = retry_after
        self.request_id = request_id

    @classmethod
    def of(cls, error: grpc.RpcError) -> "ServiceError":
        """Reads a status and its details, of a synchronous call or an asynchronous one."""
        found: dict[str, Any] = {}
        for packed in _details(error):
            info = error_details_pb2.ErrorInfo()
            bad = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            request = error_details_pb2.RequestInfo()
            if packed.Unpack(info):
                found.update(reason=info.reason, facts=dict(info.metadata))
            elif packed.Unpack(bad):
                found["violations"] = tuple((one.field, one.description) for one in bad.field_violations)
            elif packed.Unpack(retry):
                found["retry_after"] = retry.retry_delay.ToMilliseconds() / 1_000
            elif packed.Unpack(request):
                found["request_id"] = request.request_id
        made = cls(error.code(), error.details() or "", **found)
        made.__cause__ = error
        return made


class ConnectionLost(ServiceError):
    """The service did not come back in time.

    With a `turn_id` the message is safe and its turn goes on: `follow` reads the rest. Without one it is unknown
    whether the message arrived; sent again with the same `request_id` it can't be doubled.
    """

    def __init__(self, cause: ServiceError, turn_id: str, request_id: str) -> None:
        super().__init__(
            cause.code, cause.message, reason=cause.reason, facts=cause.facts, retry_after=cause.retry_after
        )
        self.turn_id = turn_id
        self.request_id = request_id


def _details(error: grpc.RpcError) -> Iterator[Any]:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status are no help
        return
    if status is not None:
        yield from status.details

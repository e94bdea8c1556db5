"""The one table from errors to statuses, and what travels with them."""

from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from core.model import errors

DOMAIN = "agents.vidacoach"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class MalformedRequest(errors.CoreError):
    """The bytes are not the message that the method takes."""

    reason = "MALFORMED_REQUEST"
    message = "The request could not be decoded."


STATUS: dict[type[errors.CoreError], grpc.StatusCode] = {
    MalformedRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.CallerNotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotSupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.ThreadNotFound: grpc.StatusCode.NOT_FOUND,
    errors.TurnNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AgentNotFound: grpc.StatusCode.NOT_FOUND,
    errors.RequestIdReused: grpc.StatusCode.ALREADY_EXISTS,
    errors.TurnInProgress: grpc.StatusCode.ABORTED,
    errors.CleanupRunning: grpc.StatusCode.ABORTED,
    errors.LegalHold: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PositionAhead: grpc.StatusCode.OUT_OF_RANGE,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: grpc.StatusCode.UNAVAILABLE,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.ProviderUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.IdentityUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.LeaseLost: grpc.StatusCode.UNAVAILABLE,
}


async def refuse(context: Context, error: errors.CoreError) -> NoReturn:
    """Ends the call with an error's status, reason and details."""
    details: list[any_pb2.Any] = [
        _packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.details))
    ]
    if isinstance(error, errors.InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.problem)
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if isinstance(error, errors.QuotaExceeded):
        spent = error_details_pb2.QuotaFailure.Violation(subject=error.quota, description=error.message)
        details.append(_packed(error_details_pb2.QuotaFailure(violations=[spent])))
    if isinstance(error, errors.RetryableError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after * 1_000))
        details.append(_packed(retry))
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    await _abort(context, status, error.message, details)


async def refuse_unforeseen(context: Context, request_id: str) -> NoReturn:
    """Ends the call INTERNAL with nothing but an id that the log knows too."""
    details = [
        _packed(error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN)),
        _packed(error_details_pb2.RequestInfo(request_id=request_id)),
    ]
    await _abort(context, grpc.StatusCode.INTERNAL, "Something went wrong in the service.", details)


async def _abort(
    context: Context,
    code: grpc.StatusCode,
    message: str,
    details: list[any_pb2.Any],
) -> NoReturn:
    status = status_pb2.Status(code=code.value[0], message=message, details=details)
    await context.abort_with_status(rpc_status.to_status(status))  # type: ignore[attr-defined] # stubs lack it
    raise AssertionError("abort does not return")


def _packed(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type] # google.rpc ships without types
    return packed

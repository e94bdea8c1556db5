"""Channels that notice a dead service and find a restarted one soon."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Option = tuple[str, int | str]

CHANNEL_OPTIONS: tuple[Option, ...] = (
    # A peer that is gone without a word is noticed within 25 s. The service allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # The library's own backoff grows to two minutes, in which every call fails without an attempt.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", 32 * 2**20),
)

BALANCED: Option = (
    "grpc.service_config",
    '{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}',
)
"""For targets of several addresses (`dns:///NAME:PORT`, `ipv4:HOST:PORT,HOST:PORT`): each call goes to the next
address that says SERVING, so none to a process that drains or is gone."""


def connect(target: str, *options: Option, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """A channel to `HOST:PORT` or `unix:PATH` that finds a restarted service soon. Use as a context manager.

    Without credentials (see `tls`) it speaks in the clear.
    """
    chosen = [*CHANNEL_OPTIONS, *options]
    if credentials is None:
        return grpc.insecure_channel(target, options=chosen)
    return grpc.secure_channel(target, credentials, options=chosen)


def connect_async(
    target: str, *options: Option, credentials: grpc.ChannelCredentials | None = None
) -> grpc.aio.Channel:
    """The same for asyncio: use it with `async with`, in the loop that made it."""
    chosen = [*CHANNEL_OPTIONS, *options]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=chosen)
    return grpc.aio.secure_channel(target, credentials, options=chosen)


def is_serving(channel: grpc.Channel, seconds: float) -> bool:
    """Whether the service answers a health check with SERVING in this time."""
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

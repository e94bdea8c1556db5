"""Clients of the service, synchronous and for asyncio: each sends a message and reads its reply to the end.

    with connect("127.0.0.1:50051") as channel:
        client = CoachClient(channel, user_id="ada")
        with client.say("I feel stuck in my job", domain=pb.DOMAIN_CAREER) as reply:
            for event in reply:
                match event:
                    case pb.TextDelta():
                        print(event.text, end="", flush=True)
                    case pb.AttemptRestarted():
                        print("\\n(starting over)")  # what was shown of this reply is void
                    case pb.TurnFinished():
                        print("\\n", pb.TurnState.Name(event.turn.state))

What they do that a bare stub leaves to you: a deadline on every call; `cancel()` of the stream on the way out, so
that no call outlives its reader; one request id per message, so that a repeated send never makes a second turn;
and after UNAVAILABLE, or a deadline of their own, with backoff and jitter, `FollowTurn` from the last position, so
that no text is lost or shown twice. `pb` is `entrypoints.grpc_api.gen.vidacoach.agents.v1.resources_pb2`.
"""

from entrypoints.client.aio import AsyncCoachClient, AsyncReply
from entrypoints.client.channels import BALANCED, connect, connect_async, is_serving
from entrypoints.client.credentials import TokenFile, tls
from entrypoints.client.errors import ConnectionLost, ServiceError
from entrypoints.client.rules import Event, Patience, Resuming
from entrypoints.client.sync import CoachClient, Reply

__all__ = [
    "BALANCED",
    "AsyncCoachClient",
    "AsyncReply",
    "CoachClient",
    "ConnectionLost",
    "Event",
    "Patience",
    "Reply",
    "Resuming",
    "ServiceError",
    "TokenFile",
    "connect",
    "connect_async",
    "is_serving",
    "tls",
]

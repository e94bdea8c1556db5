"""What each method needs of its caller. What is not here is refused."""

from enum import Enum, auto
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2, thread_service_pb2, user_service_pb2


class Need(Enum):
    """What must be known of a caller."""

    NOTHING = auto()
    CALLER = auto()
    """Who it is."""
    USER = auto()
    """Who it is, and that it may act for the `user_id` of its request."""
    ADMIN = auto()
    """Who it is, and that it may administer."""


_API: tuple[Any, ...] = (agent_service_pb2, thread_service_pb2, user_service_pb2)
_WITHOUT_USER = frozenset({"AgentService/ListAgents"})
_ALIKE = "AgentService/ListAgents"
"""Whoever may see the agents may see the API's description, and channelz where that is on."""
_CHANNELZ = "/grpc.channelz.v1.Channelz/"
"""Its descriptors are in a package that is there only where it is wanted."""


def _full(service: Any, method: Any) -> str:
    return f"/{service.full_name}/{method.name}"


def _table() -> dict[str, tuple[Need, str]]:
    """By method: what it needs, and its name in a policy."""
    table = {}
    for file in _API:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                short = f"{service.name}/{method.name}"
                if "user_id" in method.input_type.fields_by_name:
                    table[_full(service, method)] = Need.USER, short
                elif short in _WITHOUT_USER:
                    table[_full(service, method)] = Need.CALLER, short
    others = {health_pb2: Need.NOTHING, reflection_pb2: Need.CALLER, admin_service_pb2: Need.ADMIN}
    for module, need in others.items():
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                table[_full(service, method)] = need, _ALIKE
    return table


TABLE = _table()


def need_of(method: str) -> tuple[Need, str] | None:
    """What `/package.Service/Method` needs, and `Service/Method` as a policy names it; None: refuse it."""
    return (Need.CALLER, _ALIKE) if method.startswith(_CHANNELZ) else TABLE.get(method)


def named_methods() -> frozenset[str]:
    """What a policy may name."""
    return frozenset(short for _, short in TABLE.values())

"""A service with TLS, clients' certificates, users' tokens and a policy, for tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from certificates import AUDIENCE, ISSUER, Authority, Issuer, Pair
from core.ports.agent import Agent
from entrypoints.grpc_api.gen.vidacoach.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import UserServiceStub
from harness import Client, served

APP = "spiffe://example.org/app"
BATCH = "spiffe://example.org/batch"
OPERATOR = "spiffe://example.org/operator"
READER = "spiffe://example.org/reader/1"
POLICY = f"""
[[caller]]
name = "{APP}"
users = "token"

[[caller]]
name = "{BATCH}"
users = "any"

[[caller]]
name = "{OPERATOR}"
users = "any"
methods = []
admin = true

[[caller]]
name = "spiffe://example.org/reader/*"
users = "token"
methods = ["ThreadService/*", "AgentService/GetTurn"]
"""


class Lab:
    """Files and settings of a service, and what its callers hold."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.authority = Authority()
        self.clients = Authority("Clients' CA")
        self.issuer = Issuer()
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        self.client_ca, self.jwks, self.policy = (
            folder / "clients.pem",
            folder / "jwks.json",
            folder / "policy.toml",
        )
        self.server = self.authority.issue(name="first", hosts=("127.0.0.1", "localhost"))
        self.server.write(self.certificate, self.key)
        self.client_ca.write_bytes(self.clients.pem)
        self.jwks.write_text(self.issuer.jwks)
        self.policy.write_text(POLICY)
        self._monkeypatch = monkeypatch

    def set(self, *, client_ca: bool = True, tokens: bool = True, policy: bool = True) -> None:
        """Puts the settings into the environment."""
        values: dict[str, object] = {"VIDA_TLS_CERT": self.certificate, "VIDA_TLS_KEY": self.key}
        if client_ca:
            values["VIDA_TLS_CLIENT_CA"] = self.client_ca
        if tokens:
            values["VIDA_AUTH_ISSUER"] = ISSUER
            values["VIDA_AUTH_AUDIENCE"] = AUDIENCE
            values["VIDA_AUTH_JWKS"] = self.jwks
        if policy:
            values["VIDA_AUTH_POLICY"] = self.policy
        for name, value in values.items():
            self._monkeypatch.setenv(name, str(value))

    def pair(self, uri: str) -> Pair:
        """A client's certificate."""
        return self.clients.issue(uris=(uri,))

    def channel(self, address: str, uri: str | None = APP) -> grpc.aio.Channel:
        """A channel of a caller; None: without a certificate."""
        return self.channel_with(address, self.pair(uri) if uri is not None else None)

    def channel_with(self, address: str, pair: Pair | None) -> grpc.aio.Channel:
        """A channel with a certificate, or without. No two share a connection."""
        credentials = grpc.ssl_channel_credentials(
            self.authority.pem, pair.key if pair else None, pair.certificate if pair else None
        )
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(address, credentials, options=options)

    @asynccontextmanager
    async def served(self, agent: Agent, uri: str | None = APP) -> AsyncIterator[Client]:
        """The service, and a caller's channel to it."""
        async with served(agent, channel_to=lambda address: self.channel(address, uri)) as client:
            yield client


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


def stubs(channel: grpc.aio.Channel) -> dict[str, Any]:
    """Every service of the API by its name."""
    return {
        "AgentService": AgentServiceStub(channel),
        "ThreadService": ThreadServiceStub(channel),
        "UserService": UserServiceStub(channel),
        "AdminService": AdminServiceStub(channel),
    }

"""What the gRPC references have in common."""

from __future__ import annotations

import asyncio
import resource

import grpc
import httpx2
from openai import AsyncOpenAI, DefaultAsyncHttpx2Client

from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import (
    AgentServiceServicer,
    add_AgentServiceServicer_to_server,
)


async def serve(service: AgentServiceServicer) -> None:
    """Serves on a free port of loopback until it is stopped; says which."""
    raise_file_limit()
    server = grpc.aio.server()
    add_AgentServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


def raise_file_limit() -> None:
    """As many descriptors as there may be."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def client() -> AsyncOpenAI:
    """The SDK's own client, without its bound of 1,000 connections, behind which further streams would wait."""
    limits = httpx2.Limits(max_connections=20_000, max_keepalive_connections=20_000)
    return AsyncOpenAI(api_key="none", max_retries=0, http_client=DefaultAsyncHttpx2Client(limits=limits))

"""The servers under test: the service as it is run, and what it is compared with. Each has one core."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speed import extras
from speed.processes import START_SECONDS, BenchError, Process, Usage, started
from speed.upstream import MODEL, ROOT, Upstream

ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), str(ROOT / "tests")])}
PRODUCT = "vida-coach"
SERVE = (str(Path(sys.executable).with_name("vida-coach")), "serve", "--listen", "127.0.0.1:0")
MAX_TURNS = 9_000
_LITELLM = f"""\
model_list:
  - model_name: {MODEL}
    litellm_params: {{model: openai/{MODEL}, api_base: "%s", api_key: none}}
litellm_settings: {{telemetry: false, num_retries: 0}}
"""
_NGINX = """\
daemon off; master_process off; worker_processes 1; pid %(folder)s/pid; error_log stderr error;
events { worker_connections 20000; }
http {
  access_log off; client_body_temp_path %(folder)s/body; proxy_temp_path %(folder)s/proxy;
  fastcgi_temp_path %(folder)s/f; uwsgi_temp_path %(folder)s/u; scgi_temp_path %(folder)s/s;
  upstream model { server %(upstream)s; keepalive 512; }
  server {
    listen 127.0.0.1:%(port)d backlog=4096;
    proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    location / { proxy_pass http://model; }
  }
}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs."""

    name: str
    protocol: str
    address: str
    process: Process

    def usage(self) -> Usage:
        """What it has used."""
        return self.process.usage()


class Missing(Exception):
    """A reference that is not on this machine. Says why."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every server is started with: its core, the model, a folder of its own on a disk.

    The service keeps its record in that folder, unless `database` is the URL of another.
    """

    cores: frozenset[int]
    upstream: Upstream
    folder: Path
    database: str | None = None


Start = Callable[[Surroundings], contextlib.AbstractContextManager[Server]]


@contextlib.contextmanager
def product(
    surroundings: Surroundings, command: Sequence[str] = SERVE, more: Mapping[str, str] = {}
) -> Iterator[Server]:
    """`vida-coach serve` with OpenAI's conversations, its record on the disk."""
    environment = {
        **more,
        "OPENAI_BASE_URL": surroundings.upstream.base_url,
        "VIDA_DATABASE_URL": surroundings.database or f"sqlite:///{surroundings.folder / 'record.db'}",
        "VIDA_LOG_LEVEL": "error",
        "VIDA_DRAIN": "0",
        "VIDA_MAX_TURNS": str(MAX_TURNS),
        "VIDA_TURN_BUDGET": "3600",
    }
    with started(PRODUCT, command, surroundings.cores, environment) as process:
        yield Server(PRODUCT, "grpc", _listening(process), process)


@contextlib.contextmanager
def null(surroundings: Surroundings) -> Iterator[Server]:
    """grpc.aio and nothing behind it."""
    with _reference("null", surroundings) as process:
        yield Server("null", "grpc", _listening(process), process)


@contextlib.contextmanager
def naive(surroundings: Surroundings) -> Iterator[Server]:
    """grpc.aio and the SDK's typed stream."""
    with _reference("naive", surroundings) as process:
        yield Server("naive", "grpc", _listening(process), process)


@contextlib.contextmanager
def fastapi(surroundings: Surroundings) -> Iterator[Server]:
    """FastAPI and the SDK's typed stream."""
    _need_extras()
    with _reference("web", surroundings) as process:
        yield Server("fastapi", "sse", _listening(process), process)


@contextlib.contextmanager
def litellm(surroundings: Surroundings) -> Iterator[Server]:
    """LiteLLM's proxy, one worker, without a database."""
    _need_extras()
    settings = surroundings.folder / "litellm.yaml"
    settings.write_text(_LITELLM % surroundings.upstream.base_url)
    port = _free_port()
    program = str(extras.python().with_name("litellm"))
    command = [
        program,
        "--config",
        str(settings),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]
    environment = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches one
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # on loopback, for a minute
        "NO_PROXY": "127.0.0.1",
    }
    with started("litellm", command, surroundings.cores, environment) as process:
        _await(process, f"http://127.0.0.1:{port}/health/liveliness")
        yield Server("litellm", "sse", f"127.0.0.1:{port}", process)


@contextlib.contextmanager
def nginx(surroundings: Surroundings) -> Iterator[Server]:
    """nginx as a proxy that does not buffer: what relaying bytes costs."""
    program = shutil.which("nginx")
    if program is None:
        raise Missing("there is no nginx on this machine")
    port = _free_port()
    settings = surroundings.folder / "nginx.conf"
    settings.write_text(
        _NGINX % {"folder": surroundings.folder, "upstream": surroundings.upstream.address, "port": port}
    )
    command = [program, "-p", str(surroundings.folder), "-c", str(settings)]
    with started("nginx", command, surroundings.cores) as process:
        _await(process, f"http://127.0.0.1:{port}/v1/models")
        yield Server("nginx", "sse", f"127.0.0.1:{port}", process)


SERVERS: dict[str, Start] = {
    PRODUCT: product,
    "null": null,
    "naive": naive,
    "fastapi": fastapi,
    "litellm": litellm,
    "nginx": nginx,
}


@contextlib.contextmanager
def _reference(module: str, surroundings: Surroundings) -> Iterator[Process]:
    command = [sys.executable, "-m", f"speed.references.{module}"]
    environment = {**ENVIRONMENT, "OPENAI_BASE_URL": surroundings.upstream.base_url}
    with started(module, command, surroundings.cores, environment) as process:
        yield process


def _need_extras() -> None:
    if why := extras.missing():
        raise Missing(why)


def _listening(process: Process) -> str:
    line = process.line()
    if not line.startswith("listening on "):
        raise BenchError(f"said {line!r} instead of where it listens")
    return line.removeprefix("listening on ")


def _free_port() -> int:
    """A port for servers that can't pick one and say so. Somebody else may be quicker: then the start fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(process: Process, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline or not process.is_running():
                raise BenchError(f"{url} does not answer ({error}): {process.last_words}") from None
        time.sleep(0.1)

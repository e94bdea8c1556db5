"""`vida-coach serve`."""

import argparse
import asyncio
import contextlib
import gc
import logging
import resource
import signal
import sys
from typing import TYPE_CHECKING

from entrypoints.cli.failure import USAGE, Failure, explained

if TYPE_CHECKING:
    from entrypoints.settings import Settings

_log = logging.getLogger(__name__)

_ALLOCATIONS = 20_000
"""Objects that are made, and not freed, before the newest are looked through for cycles. What a turn leaves is
freed as it ends, but for few cycles: Python's own 700 took a seventh of the time, and a twentieth of the start."""
_FILES_BESIDE_TURNS = 200
"""Descriptors for the database, listening sockets, clients' connections and the libraries."""


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "serve",
        help="run the gRPC service",
        description="Runs the gRPC service until SIGTERM, SIGINT or the end of its terminal, then lets running "
        "turns finish within VIDA_DRAIN (a second SIGTERM or SIGINT cuts that short). Several may serve one "
        "PostgreSQL database: turns whose process is gone go on in another. Prints `listening on HOST:PORT` on "
        "stdout once it is SERVING. With nothing configured it keeps its record in SQLite and answers as the "
        "practice coach.",
    )
    parser.add_argument(
        "--listen", metavar="HOST:PORT", help="address (default: VIDA_LISTEN, 127.0.0.1:50051); port 0 picks one"
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow an address that is not loopback without TLS, or without anything that says who calls",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    gc.set_threshold(_ALLOCATIONS, 10, 10)
    with explained():
        import uvloop

        from entrypoints.identity import faults
        from entrypoints.observability import set_up_logging
        from entrypoints.settings import SettingsError, is_loopback, load_settings, require_address

        settings = load_settings(faults)
        listen = options.listen or settings.listen
        try:
            host = require_address(listen).rpartition(":")[0]
        except ValueError as error:
            raise SettingsError([f"--listen: {error}, not {listen!r}"]) from error
        if not is_loopback(host) and (danger := _danger(settings)):
            if not options.insecure:
                raise Failure(
                    f"{host} is not a loopback address and {danger}. See docs/security.md; or use 127.0.0.1, or "
                    "--insecure behind a proxy that checks callers.",
                    USAGE,
                )
            print(f"vida-coach: warning: {host} is not a loopback address and {danger}", file=sys.stderr)
        if settings.channelz and not is_loopback(host):
            raise SettingsError(["VIDA_CHANNELZ: is for loopback addresses: it names everyone who is connected"])
        if settings.metrics_address and not is_loopback(settings.metrics_address[0]) and not options.insecure:
            raise Failure(
                "VIDA_METRICS_LISTEN is not a loopback address: anyone who reaches it could read the metrics. Use "
                "127.0.0.1, or --insecure behind a firewall.",
                USAGE,
            )
        set_up_logging(settings)
        _raise_file_limit(settings)
        uvloop.run(_serve(settings, listen))
    return 0


def _danger(settings: "Settings") -> str:
    """What could happen to those who use an address of the network; empty: nothing that we can prevent."""
    if settings.tls_cert is None:
        return "without VIDA_TLS_CERT whoever is on the way could read every conversation and every token"
    if settings.tls_client_ca is None and settings.auth_issuer is None:
        return "without VIDA_TLS_CLIENT_CA or VIDA_AUTH_ISSUER whoever reaches it could read every conversation"
    return ""


async def _serve(settings: "Settings", listen: str) -> None:
    from entrypoints.hosting import hosted

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays as it is
        loop.add_signal_handler(signal.SIGHUP, stop.set)
    async with hosted(settings, "serve", listen=listen) as (container, address):
        gc.collect()
        gc.freeze()  # what was imported stays
        print(f"listening on {address}", flush=True)
        _log.info("serving %s on %s", settings.provider.value, address)
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, container.engine().hurry)
        _log.info("stopping: running turns have %.0f s, or until the next signal", settings.drain)
    _log.info("stopped")


def _raise_file_limit(settings: "Settings") -> None:
    """A turn may need a connection from its client and one to its provider."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * settings.max_turns + _FILES_BESIDE_TURNS
    if hard != resource.RLIM_INFINITY and need > hard:
        raise Failure(
            f"VIDA_MAX_TURNS={settings.max_turns} needs {need} open files and the hard limit is {hard}: "
            f"set VIDA_MAX_TURNS to at most {(hard - _FILES_BESIDE_TURNS) // 2}, or raise the limit (ulimit -Hn)",
            USAGE,
        )
    with contextlib.suppress(ValueError):  # the kernel's own ceiling may be lower than "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

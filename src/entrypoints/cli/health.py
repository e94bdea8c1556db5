"""`vida-coach health`."""

import argparse
from typing import TYPE_CHECKING

from entrypoints.cli.failure import USAGE, Failure, explained

if TYPE_CHECKING:
    import grpc

    from entrypoints.settings import Settings

_SECONDS = 4.0


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "health",
        help="ask the service on this machine whether it is well",
        description="Asks for the health of the service that these settings belong to, on this machine: at "
        "VIDA_HEALTH_LISTEN if that is set, else at VIDA_LISTEN, where it believes the certificate in "
        "VIDA_TLS_CERT and no other. For probes that can run a command.",
        epilog="exit codes: 0 it is SERVING, 1 it is not or does not answer, 2 usage",
    )
    parser.add_argument("--server", metavar="HOST:PORT", help="ask here, as where `serve --listen` was used")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    with explained():
        from entrypoints.cli.connection import is_near, on_this_machine
        from entrypoints.client import connect, is_serving
        from entrypoints.settings import load_settings

        settings = load_settings()
        target = on_this_machine(options.server or settings.health_listen or settings.listen)
        if not is_near(target):
            raise Failure(f"{target} is not on this machine: name its loopback address with --server", USAGE)
        in_the_clear = settings.tls_cert is None or (settings.health_listen is not None and not options.server)
        credentials, name = (None, "") if in_the_clear else _believing(settings)
        named = [("grpc.ssl_target_name_override", name)] if name else []
        with connect(target, ("grpc.enable_http_proxy", 0), *named, credentials=credentials) as channel:
            if not is_serving(channel, _SECONDS):
                raise Failure(f"no service at {target} says that it is SERVING")
    print(f"{target} is SERVING")
    return 0


def _believing(settings: "Settings") -> "tuple[grpc.ChannelCredentials, str]":
    """TLS to whoever has the key of our own certificate, and the name that it is for."""
    from adapters.identity.certificates import CertificateFault, name_in
    from entrypoints.client import tls

    if settings.tls_client_ca is not None:
        raise Failure(
            "with VIDA_TLS_CLIENT_CA only clients with a certificate get a connection: set VIDA_HEALTH_LISTEN, an "
            "address for health checks alone",
            USAGE,
        )
    assert settings.tls_cert is not None  # whoever calls this has looked
    try:
        return tls(settings.tls_cert), name_in(settings.tls_cert)
    except CertificateFault as fault:
        raise Failure(f"VIDA_TLS_CERT: {fault}", USAGE) from fault

"""`vida-coach chat`."""

import argparse
import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.cli.failure import BROKEN_PIPE, FAILED, USAGE, Failure, explained

if TYPE_CHECKING:
    from grpc import ChannelCredentials

    from entrypoints.cli.connection import Service
    from entrypoints.client import TokenFile
    from entrypoints.settings import Settings


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a coach",
        description="A conversation in the terminal: replies appear word by word, and go on by themselves when "
        "the connection drops. /help lists the commands. Ctrl-C in mid-reply cancels the turn, again leaves. With "
        "nothing configured the practice coach answers: no key, no network; the record is a local file.",
        epilog="From a pipe, one line is one message, sent after the previous reply has ended; blank lines are "
        "skipped and commands work too. stdout holds the replies and nothing else, each ended by a newline. "
        "Exit codes: 0 every turn completed, 1 not so, 130 interrupted.",
    )
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="this service and no other (default: the embedded database's, or VIDA_LISTEN with PostgreSQL)",
    )
    parser.add_argument(
        "--domain",
        choices=["career", "health", "relationship", "general"],
        help="what a new thread is about (default: general)",
    )
    parser.add_argument("--thread", metavar="ID", default="", help="go on with a thread (see /threads)")
    parser.add_argument("--user", metavar="ID", help="whose conversation it is (default: your user name)")
    group = parser.add_argument_group("for services on the network")
    group.add_argument(
        "--ca",
        metavar="FILE",
        type=Path,
        help="use TLS, and believe the authorities in this file (your system's may be in "
        "/etc/ssl/certs/ca-certificates.crt)",
    )
    group.add_argument("--cert", metavar="FILE", type=Path, help="the certificate to show, PEM")
    group.add_argument("--key", metavar="FILE", type=Path, help="its private key, PEM")
    group.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="the user's token, read anew when the file changes; --user must be whom it is for",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    with explained():
        from entrypoints.cli.connection import ServiceAt, open_channel, service
        from entrypoints.cli.session import Session
        from entrypoints.cli.terminal import Lines, Screen
        from entrypoints.client import CoachClient
        from entrypoints.settings import load_settings

        screen = Screen(sys.stdout, sys.stderr)
        place: Service
        credentials = _credentials(options)
        try:
            if options.server is not None:
                advice = "check the address, or start it there with `vida-coach serve`"
                place = ServiceAt(options.server, advice, credentials)
            else:
                settings = load_settings()
                _set_up_logging(settings)
                place = service(settings, credentials)
            if options.server is None and place.credentials is None and (credentials or options.token_file):
                raise Failure(
                    "--ca and --token-file are for a service on the network: name it with --server", USAGE
                )
            token = _token(options, place)
            with place, open_channel(place.target, place.credentials) as channel:
                session = Session(
                    CoachClient(
                        channel,
                        options.user if options.user is not None else _user_name(),
                        token=token,
                    ),
                    place,
                    screen,
                    Lines(sys.stdin, screen),
                    domain=options.domain or "",
                    thread_id=options.thread,
                )
                return 0 if session.run() else FAILED
        except BrokenPipeError:
            screen.abandon()
            return BROKEN_PIPE


def _credentials(options: argparse.Namespace) -> "ChannelCredentials | None":
    """What the channel shows; None: it speaks in the clear."""
    if (options.cert is None) is not (options.key is None):
        raise Failure("--cert and --key need each other", USAGE)
    if options.ca is None:
        if options.cert is not None:
            raise Failure("--cert needs --ca: a certificate is shown over TLS only", USAGE)
        return None
    from entrypoints.client import tls

    return tls(options.ca, options.cert, options.key)


def _token(options: argparse.Namespace, place: "Service") -> "TokenFile | None":
    """The user's token. It must not be seen on the way."""
    if options.token_file is None:
        return None
    from entrypoints.cli.connection import is_near
    from entrypoints.client import TokenFile

    if place.credentials is None and not is_near(place.target):
        raise Failure("--token-file needs --ca: a token is sent over TLS only, or to this machine", USAGE)
    token = TokenFile(options.token_file)
    token()  # a file that is not there is told of before the first message
    return token


def _user_name() -> str:
    try:
        return getpass.getuser() or "me"
    except (KeyError, OSError, ImportError):  # a user without a name
        return "me"


def _set_up_logging(settings: "Settings") -> None:
    """A conversation is no place for the lines of a service that runs well, unless they are asked for."""
    from entrypoints.observability import set_up_logging
    from entrypoints.settings import LogLevel

    if "log_level" not in settings.model_fields_set:
        settings = settings.model_copy(update={"log_level": LogLevel.ERROR})
    set_up_logging(settings)

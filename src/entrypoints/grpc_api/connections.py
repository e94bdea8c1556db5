"""Connections of a server that stops. The library has no way to close them first, and needs one.

A call that arrives while the library's server stops is reset as CANCELLED, which tells a client that it asked for
it itself. Where the connection is closed before, the same call ends UNAVAILABLE: try again, elsewhere.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def close_connections(address: int | Path) -> None:
    """Lets nobody connect to a TCP port or a Unix socket of this process, and closes what was accepted there.

    The library complains about that on stderr, unless GRPC_VERBOSITY says that it is not to.
    """
    for listening in (True, False):
        for found in _sockets(address):
            with suppress(OSError):  # the peer was faster
                if bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) is listening:
                    found.shutdown(socket.SHUT_RDWR)


def _sockets(address: int | Path) -> Iterator[socket.socket]:
    """A duplicate of each of this process's sockets with that address, one at a time: there may be as many as
    files that it may open. Each is closed when the next is asked for."""
    for descriptor in Path("/dev/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or no socket
            number = os.dup(int(descriptor.name))
            try:
                one = socket.socket(fileno=number)
            except OSError:
                os.close(number)
                raise
            with one:
                if _is_at(one, address):
                    yield one


def _is_at(one: socket.socket, address: int | Path) -> bool:
    name = one.getsockname()
    match address:
        case Path():
            return bool(name == str(address))
        case int():
            return one.family in (socket.AF_INET, socket.AF_INET6) and bool(name[1] == address)

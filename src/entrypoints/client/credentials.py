"""What a caller shows: certificates, and a token that may be renewed while it is in use."""

import errno
from pathlib import Path

import grpc


def tls(
    authority: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> grpc.ChannelCredentials:
    """TLS to a service whose certificate comes from `authority` (PEM; None: the authorities that gRPC comes with).

    `certificate` and `key` (PEM) are what this caller shows, for services that ask for it. Raises OSError.
    """
    files = [file.read_bytes() if file is not None else None for file in (authority, key, certificate)]
    return grpc.ssl_channel_credentials(*files)


class TokenFile:
    """The token in a file, read anew when the file has changed.

    Calling it raises OSError if there is no file, or if no header can hold what is in it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp: tuple[int, int, int] | None = None
        self._token = ""

    def __call__(self) -> str:
        """The token as it is now."""
        found = self._file.stat()
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            content = self._file.read_bytes().strip()
            if not content.isascii() or not content.decode().isprintable():
                # The library would refuse it in a way that looks like a lost connection.
                raise OSError(errno.EINVAL, "must hold a token, one line of ASCII", str(self._file))
            self._token = content.decode()
            self._stamp = stamp
        return self._token

"""HTTP/2 frames (RFC 9113) and plain header literals (RFC 7541), for clients such as no library would be."""

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
HEAD = struct.Struct(">HBBBL")
"""Length (its high two bytes, its low one), type, flags, stream."""
CANCEL = struct.pack(">L", 8)
"""What RST_STREAM says of a stream that is not wanted any more."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame."""
    return HEAD.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """A SETTINGS frame."""
    numbers = {"header_table_size": 1, "enable_push": 2, "initial_window_size": 4}
    pairs = [struct.pack(">HL", numbers[name], value) for name, value in values.items()]
    return frame(SETTINGS, 0, 0, b"".join(pairs))


def request_headers(authority: str, method: str) -> bytes:
    """The headers of a gRPC call."""
    return b"".join(
        [
            b"\x83\x86",  # :method POST, :scheme http
            _named(4, method),
            _named(1, authority),
            _named(31, "application/grpc"),
            header("te", "trailers"),
        ]
    )


def header(name: str, value: str) -> bytes:
    """A literal that enters no table: RFC 7541, 6.2.2."""
    return b"\0" + _string(name) + _string(value)


def message(request: bytes) -> bytes:
    """A gRPC message: not compressed, its length, itself."""
    return b"\0" + len(request).to_bytes(4, "big") + request


def _named(number: int, value: str) -> bytes:
    """A literal whose name is in the static table."""
    return _integer(number, 4) + _string(value)


def _string(value: str) -> bytes:
    data = value.encode("ascii")
    return _integer(len(data), 7) + data


def _integer(value: int, bits: int) -> bytes:
    """RFC 7541, 5.1, with the bits before it 0."""
    most = (1 << bits) - 1
    if value < most:
        return bytes([value])
    encoded, value = [most], value - most
    while value >= 128:
        encoded.append(value % 128 | 128)
        value //= 128
    return bytes([*encoded, value])

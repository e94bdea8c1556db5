"""Bytes that have been tampered with."""

import random
from collections.abc import Sequence

_BYTES = (0, 1, 8, 10, 0x7F, 0x80, 0xC0, 0xED, 0xFF)
_PIECES = (b"\x00", "\0👋".encode(), b"\xed\xa0\x80", b"\xff" * 10)


def mutated(chance: random.Random, payload: bytes, others: Sequence[bytes]) -> bytes:
    """The bytes with one to four things done to them; pieces of `others` may get into them."""
    data = bytearray(payload)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0 if data:
                data[min(place, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[min(place, len(data) - 1)] = chance.choice(_BYTES)
            case 2:
                del data[place : place + chance.randint(1, 8)]
            case 3:
                data[place:place] = chance.randbytes(chance.randint(1, 8))
            case 4:
                data[place:place] = data[place : place + chance.randint(1, 40)]
            case 5:
                other = chance.choice(others)
                start = chance.randrange(len(other) + 1)
                data[place:place] = other[start : start + chance.randint(1, 60)]
            case _:
                data[place:place] = chance.choice(_PIECES)
    return bytes(data)

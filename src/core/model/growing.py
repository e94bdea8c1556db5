"""Text that comes in small pieces."""

_PIECES = 64


class GrowingText:
    """What was said so far, held as a whole: a piece by itself takes fifty bytes more than its few letters."""

    __slots__ = ("_pieces",)

    def __init__(self, text: str = "") -> None:
        self._pieces = [text]

    def add(self, piece: str) -> None:
        """Goes on with a piece."""
        self._pieces.append(piece)
        if len(self._pieces) == _PIECES:
            self._pieces = ["".join(self._pieces)]

    def __str__(self) -> str:
        return "".join(self._pieces)

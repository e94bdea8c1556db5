"""What a handler is given beside its request."""

from typing import Any, TypeAlias

import grpc

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Call:
    """The context of a call that was let in: all of the library's, and `caller`, the name of who makes it."""

    def __init__(self, context: _Context, caller: str) -> None:
        self._context = context
        self.caller = caller

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

"""Control over HTTP, for tests and benchmarks in other processes: everything under `/__fake__/`."""

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fake_provider.exchange import Exchange
from fake_provider.faults import rule_from
from fake_provider.reading import read_default, read_steps
from fake_provider.validation import bad
from fake_provider.wire import Json, Request

if TYPE_CHECKING:
    from fake_provider.server import FakeProvider

HELP = """\
  GET    /__fake__/               counts: requests, running, streams, strikes, rejected, lateness, CPU …
  GET    /__fake__/requests       all requests, with headers and bodies; ?since=N leaves out the first N
  GET    /__fake__/rejected       those with parameters that the API does not take, and what they were told
  GET    /__fake__/conversations  with their items
  GET    /__fake__/items          all items, those of deleted conversations too
  GET    /__fake__/responses      those that are kept
  GET    /__fake__/streams        those that are open, and how far they are
  GET    /__fake__/faults         the rules, and how often each applied
  POST   /__fake__/faults         adds rules: {"faults": ["stall@middle,nth=2", …]}
  DELETE /__fake__/faults         drops them
  POST   /__fake__/script         adds steps: {"steps": [{"answer": …}, …]}
  POST   /__fake__/default        the answer behind the script: {"default": {"load": {"pace": 25}}}
  POST   /__fake__/settings       {"models": {"gpt-6-luna": null}, "context_limit": 1000}
  POST   /__fake__/release        lets everything that stalls go on
  POST   /__fake__/refuse         {"seconds": 2}: connections are refused for so long
  POST   /__fake__/reset          begins anew
"""


class Control:
    """Serves them. They are not counted among the requests."""

    def __init__(self, provider: "FakeProvider") -> None:
        self._provider = provider

    async def serve(self, exchange: Exchange) -> None:
        """Answers a request of the test itself."""
        request = exchange.request
        what = request.path.removeprefix("/__fake__").strip("/")
        try:
            answer = (
                self._read(what, request) if request.method == "GET" else self._do(request.method, what, request)
            )
        except (TypeError, ValueError, KeyError) as error:
            return await exchange.refuse(bad(f"{type(error).__name__}: {error}"))
        return await (exchange.unknown_route() if answer is None else exchange.answer(answer))

    def _read(self, what: str, request: Request) -> Json | None:
        provider = self._provider
        match what:
            case "":
                return self._counts()
            case "requests":
                since = int(request.query.get("since", 0))
                return {"requests": [_as_json(one) for one in provider.requests[since:]]}
            case "rejected":
                told = [{**_as_json(one), "message": error.message} for one, error in provider.rejected]
                return {"rejected": told}
            case "conversations":
                found = [{**one.as_json(), "items": one.items} for one in provider.conversations.values()]
                return {"conversations": found}
            case "items":
                return {"items": list(provider.items.values())}
            case "responses":
                return {"responses": list(provider.responses.values())}
            case "streams":
                names = ("response_id", "conversation", "events", "deltas")
                return {"streams": [{n: getattr(one, n) for n in names} for one in provider.streams]}
            case "faults":
                return {"faults": [rule.as_json() for rule in provider.rules]}
        return None

    def _counts(self) -> Json:
        provider = self._provider
        return {
            "requests": len(provider.requests),
            "posts": len(provider.posts),
            "rejected": len(provider.rejected),
            "running": provider.running,
            "streams": len(provider.streams),
            "stalled": len(provider.gates),
            "connections": provider.connections,
            "accepted": provider.accepted,
            "conversations": len(provider.conversations),
            "items": len(provider.items),
            "responses": len(provider.responses),
            "cancelled": len(provider.cancelled),
            "script": len(provider.script),
            "strikes": dict(provider.strikes),
            "lateness": provider.lateness.as_json(),
            "cpu_seconds": time.process_time(),
        }

    def _do(self, method: str, what: str, request: Request) -> Json | None:
        provider, body = self._provider, request.body or {}
        match (method, what):
            case ("POST", "faults"):
                provider.rules += [rule_from(given) for given in _only(body, "faults")]
            case ("DELETE", "faults"):
                provider.rules.clear()
            case ("POST", "script"):
                provider.then(*read_steps(_only(body, "steps")))
            case ("POST", "default"):
                provider.default = read_default(_only(body, "default"))
            case ("POST", "settings"):
                apply_settings(provider, body)
            case ("POST", "release"):
                for gate in provider.gates:
                    gate.released.set()
            case ("POST", "refuse"):
                provider.start(self._refuse(float(_only(body, "seconds"))))
            case ("POST", "reset"):
                provider.forget_all()
            case _:
                return None
        return self._counts()

    async def _refuse(self, seconds: float) -> None:
        self._provider.stop_listening()
        await asyncio.sleep(seconds)
        await self._provider.listen()


def apply_settings(provider: "FakeProvider", given: Mapping[str, Any]) -> None:
    """Sets what scripts and control may set. Raises ValueError for anything else."""
    for name, value in given.items():
        match name:
            case "models":
                provider.models = {str(model): day for model, day in dict(value).items()}
            case "context_limit":
                provider.context_limit = int(value)
            case _:
                raise ValueError(f"no such setting: {name}")


def _only(body: Json, name: str) -> Any:
    if set(body) != {name}:
        raise ValueError(f"the body has the key {name!r} and no other")
    return body[name]


def _as_json(request: Request) -> Json:
    return {
        "method": request.method,
        "path": request.path,
        "query": dict(request.query),
        "headers": dict(request.headers),
        "body": request.body,
    }

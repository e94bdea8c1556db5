"""What a server can do, found out with requests that it has to refuse: they cost nothing and leave nothing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

import httpx2
from openai import APIStatusError, AsyncOpenAI

from adapters.openai.errors import Exchange, translated

_NOBODY = "0" * 50
"""Of no response and of no conversation the id."""
_SECONDS = 10.0
_NOTHING_SAID = {"input": None, "previous_response_id": f"resp_{_NOBODY}"}
"""No model and no input: nobody can reply to that. llama.cpp looks at the second field before it says so."""

_UNTELLING = frozenset({401, 403, 407, 408, 429})
"""Answers that tell nothing of a route, nor do those from 500 on."""
_WORD = re.compile(r"(?<![\w-])[a-z_]{5,}(?![\w-])")
_UNSUPPORTED = re.compile(
    r"(unsupported|unknown (parameter|field)|n[o']t support)[^.{}]{0,40}previous_response_id"
    r"|previous_response_id[^.{}]{0,20}(un|not )support",
    re.IGNORECASE,
)


class Found(Enum):
    """Whether a server has something."""

    YES = auto()
    NO = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a server has. `chains` is whether it keeps responses for `previous_response_id`.

    `chat_completions` is asked only of a server without the Responses API.
    """

    responses: Found = Found.UNKNOWN
    conversations: Found = Found.UNKNOWN
    chains: Found = Found.UNKNOWN
    chat_completions: Found = Found.UNKNOWN

    def supports(self, mode: str) -> Found:
        """Whether a state mode works with this server, UNKNOWN for a mode that is not known here."""
        if self.responses is Found.NO:
            return Found.NO
        match mode:
            case "conversation":
                return self.conversations
            case "response_chain":
                return self.chains
            case "stateless":
                return self.responses
        return Found.UNKNOWN


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server answered to a request for a path."""

    status: int
    text: str
    path: str

    @property
    def words(self) -> frozenset[str]:
        """What it says, apart from ids, times and the path."""
        return frozenset(_WORD.findall(self.text.lower())) - frozenset(_WORD.findall(self.path))


async def abilities(client: AsyncOpenAI) -> Abilities:
    """Finds out what the client's server can do. Raises ProviderFault if it can't be reached.

    A route that is there answers otherwise than one that nobody has. So no server's wording is needed, and it
    also holds for those that answer 200 for everything (LM Studio). Whether responses are kept is UNKNOWN where
    nothing but a second reply would show it: vLLM looks responses up even with its store off, and Ollama ignores
    `previous_response_id` without a word.
    """
    responses, refusal = await _route(client, "POST", "/responses", _NOTHING_SAID)
    if responses is Found.NO:
        chat, _ = await _route(client, "POST", "/chat/completions", {})
        return Abilities(responses, Found.NO, Found.NO, chat)
    conversations, _ = await _route(client, "GET", f"/conversations/conv_{_NOBODY}")
    if _UNSUPPORTED.search(refusal.text):
        return Abilities(responses, conversations, Found.NO)
    # Who lists what went into a response has kept it. Who does not may keep it all the same (LM Studio).
    listed, _ = await _route(client, "GET", f"/responses/resp_{_NOBODY}/input_items")
    return Abilities(responses, conversations, Found.YES if listed is Found.YES else Found.UNKNOWN)


async def _route(
    client: AsyncOpenAI, method: str, path: str, body: Mapping[str, object] | None = None
) -> tuple[Found, _Answer]:
    """Whether a path leads anywhere, by comparison with one that doesn't, and what was answered."""
    answer = await _ask(client, method, path, body)
    if answer.status in _UNTELLING or answer.status >= 500:
        return Found.UNKNOWN, answer
    if answer.status == 405:
        return Found.NO, answer
    rest = path[1:].partition("/")[2]
    nowhere = await _ask(client, method, f"/nowhere/{rest}" if rest else "/nowhere", body)
    if (answer.status, answer.words) == (nowhere.status, nowhere.words):
        return Found.NO if answer.status == 404 or answer.status < 300 else Found.UNKNOWN, answer
    refused = 400 <= answer.status != 404
    missed = answer.status == 404 and nowhere.status == 404  # not the same way: it is the id that is not there
    return Found.YES if refused or missed else Found.UNKNOWN, answer


async def _ask(client: AsyncOpenAI, method: str, path: str, body: Mapping[str, object] | None) -> _Answer:
    asked = client.with_options(max_retries=1, timeout=_SECONDS)
    with translated(Exchange()):
        try:
            if method == "POST":
                response = await asked.post(path, body=body, cast_to=httpx2.Response)
            else:
                response = await asked.get(path, cast_to=httpx2.Response)
        except APIStatusError as error:
            response = error.response
    return _Answer(response.status_code, response.text, path)

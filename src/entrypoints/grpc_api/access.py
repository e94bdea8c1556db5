"""Who may call what for whom: the one place that decides."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from adapters.identity import BadToken, KeysUnavailable, Token
from core.model.errors import CallerNotAllowed, IdentityUnavailable, Unauthenticated
from entrypoints.grpc_api.methods import Need, need_of
from entrypoints.grpc_api.refusals import Refusals
from entrypoints.policy import Policy, PolicyFile, Rule

if TYPE_CHECKING:
    from adapters.identity.tokens import Tokens

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Refused: TypeAlias = Callable[[str, Unauthenticated | CallerNotAllowed], Exception]
"""Notes why a call is refused, and returns what to raise."""

LOCAL = "local"
"""The caller where the transport identifies nobody."""
MAX_NAME = 255
"""Characters of a caller's name: it is a column."""
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Access:
    """Lets calls in, or not.

    `certified` says that callers have certificates, `tokens` checks the end users' tokens. Without either, whoever
    reaches the address is one caller, LOCAL.
    """

    def __init__(
        self, policy: Policy | PolicyFile, *, certified: bool = False, tokens: "Tokens | None" = None
    ) -> None:
        self._policy = policy
        self._certified = certified
        self._tokens = tokens
        self._refusals = Refusals()

    async def admit(self, method: str, context: _Context) -> "Admission":
        """Lets a caller in, before its request is looked at. Raises Unauthenticated, CallerNotAllowed and
        IdentityUnavailable."""
        refused = partial(self._refused, method)
        needed = need_of(method)
        if needed is None:
            raise refused(f"nobody may call {method}", CallerNotAllowed())
        need, short = needed
        if need is Need.NOTHING:
            return Admission(refused, "", None)
        caller, user, rule = await self._identified(refused, context)
        if rule is None:
            raise refused(f"no rule for {caller}", CallerNotAllowed())
        if not (rule.admin if need is Need.ADMIN else rule.allows(short)):
            raise refused(f"{caller} may not call {short}", CallerNotAllowed())
        return Admission(refused, caller, user if need is Need.USER else None)

    @property
    def administered(self) -> bool:
        """Whether anybody may call AdminService."""
        return self._policy.administered

    async def aclose(self) -> None:
        """Gives up what is under way."""
        self._refusals.close()
        if self._tokens is not None:
            await self._tokens.aclose()

    def _refused(self, method: str, why: str, error: Unauthenticated | CallerNotAllowed) -> Exception:
        self._refusals.note(method, why)
        return error

    async def _identified(self, refused: _Refused, context: _Context) -> tuple[str, str | None, Rule | None]:
        """The caller, the only user that it may act for (None: any), and its rule."""
        certified = _name_of(refused, context) if self._certified else None
        if self._tokens is None:
            caller = certified or LOCAL
            return caller, None, self._policy.rule(caller)
        rule = self._policy.rule(certified) if certified is not None else None
        text = _bearer(refused, context)
        if text is None:
            if certified is not None and rule is not None and rule.any_user:
                return certified, None, rule
            raise refused("no token", Unauthenticated())
        token = await self._read(refused, text, self._tokens)
        if certified is not None:
            return certified, token.subject, rule
        caller = _token_name(refused, token)
        rule = self._policy.rule(caller)
        return caller, None if rule is not None and rule.any_user else token.subject, rule

    async def _read(self, refused: _Refused, text: str, tokens: "Tokens") -> Token:
        try:
            return await tokens.read(text)
        except BadToken as bad:
            raise refused(f"token: {bad.why}", Unauthenticated()) from None
        except KeysUnavailable:
            raise IdentityUnavailable from None


class Admission:
    """A caller that was let in: `caller` names it. It may act for `user` alone, where there is one."""

    __slots__ = ("_refused", "caller", "user")

    def __init__(self, refused: _Refused, caller: str, user: str | None) -> None:
        self._refused = refused
        self.caller = caller
        self.user = user

    def check(self, request: Any) -> None:
        """Raises CallerNotAllowed for a request that is for another user."""
        if self.user is not None and request.user_id != self.user:
            raise self._refused(f"{self.caller} is not there for this user", CallerNotAllowed())


def certificate_name(identity: Mapping[str, Iterable[bytes]]) -> str | None:
    """The name in a client's verified certificate: its URI (SPIFFE), else `dns:…`, else `cn:…`.

    None if there is none that can be used, or several URIs: an identity is one. No two kinds of names are equal,
    nor equal LOCAL or a token's: what is no URI has no `//` behind its prefix.
    """
    uris, hosts, common = ([*identity.get(kind, ())] for kind in ("peer_uri", "peer_dns", "x509_common_name"))
    if uris:
        name = _usable("", uris[0]) if len(uris) == 1 else None
        return name if name is not None and _URI.match(name) else None
    if hosts:
        return _usable("dns:", hosts[0])
    return _usable("cn:", common[0]) if common else None


def _usable(prefix: str, name: bytes | str) -> str | None:
    try:
        text = name.decode() if isinstance(name, bytes) else name
    except UnicodeDecodeError:
        return None
    known = text and text.isprintable() and len(prefix + text) <= MAX_NAME
    return prefix + text if known and not (prefix and text.startswith("//")) else None


def _name_of(refused: _Refused, context: _Context) -> str:
    name = certificate_name(context.auth_context())
    if name is None:
        raise refused("the client's certificate has no name that can be used", Unauthenticated())
    return name


def _token_name(refused: _Refused, token: Token) -> str:
    name = _usable("token:", token.client) if token.client else "token"
    if name is None:
        raise refused("the token's client has no name that can be used", Unauthenticated())
    return name


def _bearer(refused: _Refused, context: _Context) -> str | None:
    """The token of the call. None if there is none; two of them, or another scheme, are Unauthenticated."""
    found = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not found:
        return None
    scheme, _, token = str(found[0]).partition(" ")
    if len(found) > 1 or scheme.lower() != "bearer" or not token:
        raise refused("the authorization is not one bearer token", Unauthenticated())
    return token

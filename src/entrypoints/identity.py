"""Who may call: certificates, tokens and the policy, made of the settings. What is not set is not imported."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from entrypoints.grpc_api.access import Access
from entrypoints.grpc_api.methods import named_methods
from entrypoints.policy import Policy, PolicyFault, PolicyFile, Rule, read_policy
from entrypoints.settings import Settings, SettingsError

if TYPE_CHECKING:
    from adapters.identity.certificates import CertificateFault, CertificateFiles
    from adapters.identity.keys import Load
    from adapters.identity.tokens import Tokens

OWNER = Access(Policy((Rule("*", any_user=True, admin=True),)))
"""For an address that only the owner of the service can reach: everything."""
_SETTING = {"certificate": "VIDA_TLS_CERT", "key": "VIDA_TLS_KEY", "client CA": "VIDA_TLS_CLIENT_CA"}


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What the address speaks; None: in the clear. Raises SettingsError."""
    files = certificate_files(settings)
    if files is None:
        return None
    from adapters.identity.certificates import CertificateFault
    from entrypoints.grpc_api.tls import server_credentials

    try:
        return server_credentials(files)
    except CertificateFault as fault:
        raise SettingsError([_told(fault)]) from fault


def access(settings: Settings) -> Access:
    """Who may call what at the address. Raises SettingsError."""
    try:
        policy = _policy(settings)
    except PolicyFault as error:
        raise SettingsError(list(_policy_faults(settings))) from error
    return Access(policy, certified=settings.tls_client_ca is not None, tokens=_tokens(settings))


def faults(settings: Settings) -> list[str]:
    """All that is wrong with the files that the settings name. Keys behind a URL are not asked for."""
    return [*_certificate_faults(settings), *_key_faults(settings), *_policy_faults(settings)]


def certificate_files(settings: Settings) -> "CertificateFiles | None":
    """Where the certificates are; None without TLS."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    from adapters.identity.certificates import CertificateFiles

    return CertificateFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


def key_source(place: str) -> "Load":
    """How the keys of VIDA_AUTH_JWKS are had."""
    from adapters.identity.keys import from_file, from_url

    return from_url(place) if _is_url(place) else from_file(Path(place))


def _is_url(place: str) -> bool:
    return "://" in place


def _tokens(settings: Settings) -> "Tokens | None":
    """What checks tokens; None where callers need none."""
    if settings.auth_issuer is None or settings.auth_audience is None or settings.auth_jwks is None:
        return None
    from adapters.identity.keys import Keys
    from adapters.identity.tokens import Tokens

    keys = Keys(key_source(settings.auth_jwks), settings.auth_algorithms)
    return Tokens(keys, settings.auth_issuer, settings.auth_audience, settings.auth_algorithms)


def _policy(settings: Settings) -> Policy | PolicyFile:
    """Who may do what. Without a file all may do all but administer, where there are tokens for their users."""
    tokens_are_used = settings.auth_issuer is not None
    if settings.auth_policy is None:
        return Policy((Rule("*", any_user=not tokens_are_used),))
    return PolicyFile(settings.auth_policy, partial(read_policy, methods=named_methods(), tokens=tokens_are_used))


def _certificate_faults(settings: Settings) -> Iterator[str]:
    files = certificate_files(settings)
    if files is None:
        return
    from adapters.identity.certificates import CertificateFault, read

    try:
        read(files)
    except CertificateFault as fault:
        yield _told(fault)


def _told(fault: "CertificateFault") -> str:
    return f"{_SETTING[fault.part]}: {fault}"


def _key_faults(settings: Settings) -> Iterator[str]:
    place = settings.auth_jwks
    if place is None or _is_url(place):
        return
    from adapters.identity.keys import KeysFault, parse, read_file

    try:
        parse(read_file(Path(place)), settings.auth_algorithms)
    except KeysFault as fault:
        yield f"VIDA_AUTH_JWKS: {fault}"


def _policy_faults(settings: Settings) -> Iterator[str]:
    try:
        _policy(settings)
    except PolicyFault as error:
        yield from (f"VIDA_AUTH_POLICY: {fault}" for fault in error.faults)

"""`vida-coach doctor`."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.cli.failure import FAILED
from entrypoints.cli.users import REACH

if TYPE_CHECKING:
    from datetime import date

    from sqlalchemy import URL

    from adapters.sql.errors import UnusableFileError
    from core.model.agent import Catalog
    from core.model.errors import StoreUnavailable
    from core.use_cases.read_erasures import Erasures
    from entrypoints.settings import Settings


class Status(StrEnum):
    """What a check found. Only FAIL keeps the service from working."""

    OK = "ok"
    INFO = "info"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what to do about it. Holds no secret."""

    name: str
    status: Status
    detail: str
    advice: str = ""


_HEADER = b"SQLite format 3\0"

_CERTIFICATE_DAYS = 14
"""Days before its end from which a certificate is warned of."""
_NEEDS = {"conversation": "conversations", "response_chain": "responses that it keeps"}
"""What the state modes need beyond the Responses API."""

_Examine = Callable[["Settings"], Iterator[Check]]


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the set-up and say what to do",
        description="Checks the settings, certificates and the keys of tokens, the agents and their tools, the "
        "prices, the database and its schema, and the provider: whether it takes the key, has the models and "
        "until when, and can do what OPENAI_STATE needs. Changes nothing, costs nothing and shows no secret.",
        epilog="exit codes: 0 nothing fails, 1 something does, 2 usage",
    )
    parser.add_argument(
        "--format", choices=["text", "json"], default="text", help="what stdout gets (default: text)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    checks = list(examined())
    ok = not any(check.status is Status.FAIL for check in checks)
    if options.format == "json":
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, ensure_ascii=False))
    else:
        for check in checks:
            print(f"{check.status:4}  {check.name:9} {check.detail}")
            if check.advice:
                print(f"{'':16}{check.advice}")
    return 0 if ok else FAILED


def examined() -> Iterator[Check]:
    """Looks at everything, one thing after the other. Never raises."""
    yield _versions()
    from entrypoints.identity import faults
    from entrypoints.settings import SettingsError, load_settings

    try:
        settings = load_settings(faults)
    except SettingsError as error:
        for fault in error.faults:
            yield Check("settings", Status.FAIL, fault, "Correct it in the environment or in the .env file.")
        return
    yield Check("settings", Status.OK, f"provider {settings.provider.value}, listening on {settings.listen}")
    parts: list[tuple[str, _Examine]] = [
        ("identity", _identity),
        ("agents", _agents),
        ("prices", _prices),
        ("database", _database),
        ("provider", _provider),
    ]
    for name, examine in parts:
        try:
            yield from examine(settings)
        except Exception as error:  # noqa: BLE001 - its text may hold a secret, its type does not
            yield Check(name, Status.FAIL, f"could not be checked: {type(error).__name__}")


def _versions() -> Check:
    import platform
    import sqlite3
    from importlib.metadata import PackageNotFoundError, version

    import grpc

    try:
        ours = version("vida-coach")
    except PackageNotFoundError:  # run from a source tree
        ours = "from source"
    detail = (
        f"vida-coach {ours}, Python {platform.python_version()}, grpcio {grpc.__version__}, "
        f"SQLite {sqlite3.sqlite_version}"
    )
    return Check("versions", Status.INFO, detail)


def _identity(settings: "Settings") -> Iterator[Check]:
    """Who may call. The files themselves are in order: that is a part of the settings."""
    if settings.tls_cert is not None:
        yield _certificate(settings)
    elif settings.auth_issuer is not None:
        advice = "Set VIDA_TLS_CERT and VIDA_TLS_KEY to serve more than this machine."
        yield Check("tls", Status.INFO, "tokens arrive in the clear", advice)
    if settings.auth_jwks is not None:
        yield _keys(settings)


def _certificate(settings: "Settings") -> Check:
    from datetime import UTC, datetime

    from adapters.identity.certificates import read
    from entrypoints.identity import certificate_files

    files = certificate_files(settings)
    if files is None:
        raise AssertionError("the settings have both files, or none")
    until = read(files).valid_until
    days = (until - datetime.now(UTC)).days
    detail = f"the certificate is valid until {until:%Y-%m-%d %H:%M} UTC"
    if files.client_ca is not None:
        detail += "; clients need one too"
    advice = "Replace the files of VIDA_TLS_CERT and VIDA_TLS_KEY: a running service takes the new ones."
    if days < 0:
        return Check("tls", Status.FAIL, detail, advice)
    if days < _CERTIFICATE_DAYS:
        return Check("tls", Status.WARN, f"{detail}: {days} days", advice)
    return Check("tls", Status.OK, detail)


def _keys(settings: "Settings") -> Check:
    import asyncio

    from adapters.identity.keys import KeysFault, parse
    from entrypoints.identity import key_source

    async def asked() -> int:
        return len(parse(await key_source(settings.auth_jwks or "")(), settings.auth_algorithms))

    try:
        number = asyncio.run(asked())
    except KeysFault as fault:
        advice = (
            "Check VIDA_AUTH_JWKS, VIDA_AUTH_ALGORITHMS and the network: without keys no token can be checked."
        )
        return Check("tokens", Status.FAIL, f"the key set {fault}", advice)
    return Check(
        "tokens", Status.OK, f"the key set has {number} keys for {', '.join(sorted(settings.auth_algorithms))}"
    )


def _agents(settings: "Settings") -> Iterator[Check]:
    from dependency_injector import providers

    from adapters.memory.store import MemoryStore
    from entrypoints.container import Container
    from entrypoints.settings import SettingsError

    container = Container(settings=settings)
    container.store.override(providers.Singleton(MemoryStore, container.clock))  # tools are not called here
    try:
        catalog: Catalog = container.catalog()
    except SettingsError as error:
        for fault in error.faults:
            yield Check("agents", Status.FAIL, fault, "Correct the definition, or VIDA_AGENTS_DIR.")
        return
    agents = catalog.agents()
    yield Check("agents", Status.OK, ", ".join(f"{agent.name} ({agent.id})" for agent in agents))
    try:
        names = container.tools().names
    except SettingsError as error:
        for fault in error.faults:
            yield Check("tools", Status.FAIL, fault, "Correct VIDA_TOOLS.")
        return
    missing = [(agent.id, name) for agent in agents for name in agent.tools if name not in names]
    for agent_id, name in missing:
        advice = "Name its function in VIDA_TOOLS, or take it out of the definition."
        yield Check("tools", Status.FAIL, f"agent {agent_id}: there is no tool {name!r}", advice)
    if not missing:
        yield Check("tools", Status.OK, ", ".join(sorted(names)) or "none")


def _prices(settings: "Settings") -> Iterator[Check]:
    from adapters.prices.loader import PricesError, load_prices

    try:
        prices = load_prices(settings.prices)
    except PricesError as error:
        for fault in error.faults:
            yield Check("prices", Status.FAIL, fault, "Correct the file of VIDA_PRICES.")
        return
    models = ", ".join(sorted({price.model for price in prices.prices}))
    yield Check("prices", Status.OK, f"{prices.currency}, of {models or 'nothing'}")


def _database(settings: "Settings") -> Iterator[Check]:
    from sqlalchemy import exc, make_url

    from adapters.sql.engines import is_embedded

    try:
        url = make_url(settings.database)
    except (exc.ArgumentError, ValueError):
        yield Check(
            "database",
            Status.FAIL,
            "VIDA_DATABASE_URL can't be read",
            "Write it as postgresql://USER@HOST:PORT/NAME.",
        )
        return
    if is_embedded(url):
        yield from _embedded(settings)
    else:
        yield from _server(settings, url)


def _server(settings: "Settings", url: "URL") -> Iterator[Check]:
    from adapters.sql.errors import UnreadableDatabaseError
    from adapters.sql.schema import SchemaState, schema_state
    from core.model.errors import StoreUnavailable

    where = url.set(query={}).render_as_string(hide_password=True)
    try:
        state = schema_state(settings.database)
    except StoreUnavailable as error:
        advice = "Start it, or correct VIDA_DATABASE_URL."
        yield Check("database", Status.FAIL, f"{where} does not answer: {_cause(error, url)}", advice)
        return
    except UnreadableDatabaseError:
        advice = "Name another database in VIDA_DATABASE_URL, or give its user the right to read this one."
        yield Check("database", Status.FAIL, f"{where} answers, but can't be read", advice)
        return
    yield Check("database", Status.OK, f"{where} answers")
    match state:
        case SchemaState.CURRENT:
            yield Check("schema", Status.OK, "up to date")
            yield _erasures(settings)
        case SchemaState.NEWER:
            yield _newer()
        case SchemaState.EMPTY | SchemaState.OUTDATED:
            yield Check("schema", Status.FAIL, f"the schema is {state.value}", "Run `vida-coach migrate`.")


def _embedded(settings: "Settings") -> Iterator[Check]:
    from adapters.sql.engines import database_file
    from adapters.sql.errors import UnusableFileError
    from entrypoints.ownership import DatabaseOwnedError, Ownership

    file = database_file(settings.database)
    yield _sqlite()
    if not file.exists():
        yield _not_there_yet(file)
        return
    try:
        # Before anything is locked or opened: a file that is none of ours must stay as it is.
        with file.open("rb") as content:
            header = content.read(len(_HEADER))
        if header != _HEADER:
            yield _none_of_ours(file, header)
            return
        with Ownership(file, "doctor"):
            yield from _owned_file(settings, file)
    except DatabaseOwnedError as owned:
        # Its owner alone may open it for writing, and has migrated it.
        yield _owner(file, owned)
    except UnusableFileError as error:
        yield _unusable(file, error)
    except OSError as error:
        yield _unusable(file, UnusableFileError(file, error))


def _unusable(file: Path, error: "UnusableFileError") -> Check:
    advice = "Give this user the right to read and write it and its folder, and the disk room."
    return Check("database", Status.FAIL, f"{file}: {error.why}", advice)


def _owned_file(settings: "Settings", file: Path) -> Iterator[Check]:
    from sqlalchemy import make_url

    from adapters.sql.errors import UnreadableDatabaseError
    from adapters.sql.schema import SchemaState, schema_state
    from core.model.errors import StoreUnavailable

    try:
        state = schema_state(settings.database)
    except StoreUnavailable as error:
        cause = _cause(error, make_url(settings.database))
        yield Check(
            "database",
            Status.FAIL,
            f"{file}: {cause}",
            "Give this user the right to read and write the file, and the disk room.",
        )
        return
    except UnreadableDatabaseError:
        yield Check("database", Status.FAIL, f"{file} is damaged", "Put a backup in its place.")
        return
    yield Check("database", Status.OK, f"{file}, in use by nobody")
    match state:
        case SchemaState.CURRENT:
            yield Check("schema", Status.OK, "up to date")
            yield _erasures(settings)
        case SchemaState.NEWER:
            yield _newer()
        case SchemaState.EMPTY | SchemaState.OUTDATED:
            advice = "Nothing to do: whatever opens it next migrates it. `vida-coach migrate` does so now."
            yield Check("schema", Status.INFO, f"the schema is {state.value}", advice)


def _erasures(settings: "Settings") -> Check:
    """Whether what was erased here is gone at the provider too."""
    import asyncio

    from entrypoints.container import opened

    async def read() -> "Erasures":
        async with opened(settings) as container:
            return await container.erasures()()

    found = asyncio.run(read())
    failed = sum(copy.reason != "" for copy in found.copies)
    detail = f"{found.copies_left} objects of erased threads are left at providers"
    if found.waiting:
        waiting = ", ".join(f"{count} at {provider}" for provider, count in sorted(found.waiting.items()))
        return Check("erasures", Status.WARN, f"{detail}: {waiting}, which is not configured here", REACH)
    if failed:
        advice = "`vida-coach users erasures` says which and why. A running service tries them again."
        return Check("erasures", Status.WARN, f"{detail}; deleting {failed} of them has failed", advice)
    return Check("erasures", Status.INFO if found.copies_left else Status.OK, detail)


def _newer() -> Check:
    detail = "the database was written by a newer version of vida-coach"
    return Check("schema", Status.FAIL, detail, "Run that version, or name another database in VIDA_DATABASE_URL.")


def _not_there_yet(file: Path) -> Check:
    import os

    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if os.access(folder, os.W_OK | os.X_OK) and folder.is_dir():
        return Check("database", Status.INFO, f"{file} does not exist yet: the first command makes it")
    advice = "Give this user the right to write there, or name another file in VIDA_DATABASE_URL."
    return Check("database", Status.FAIL, f"{file} can't be made: {folder} can't be written", advice)


def _none_of_ours(file: Path, header: bytes) -> Check:
    if not header:
        return Check("database", Status.INFO, f"{file} is empty: the first command makes the database")
    advice = "Move it away, or name another file in VIDA_DATABASE_URL."
    return Check("database", Status.FAIL, f"{file} is not a SQLite database", advice)


def _owner(file: Path, owned: Exception) -> Check:
    from entrypoints.cli.connection import CHECK_SECONDS, open_channel
    from entrypoints.client import is_serving
    from entrypoints.ownership import socket_path

    socket = socket_path(file)
    with open_channel(f"unix:{socket}") as channel:
        answers = is_serving(channel, CHECK_SECONDS)
    if answers:
        return Check("database", Status.OK, f"{file}: {owned}, which answers")
    advice = "If that lasts, it is neither starting nor leaving: stop it."
    return Check("database", Status.WARN, f"{file}: {owned}, which does not answer on {socket}", advice)


def _sqlite() -> Check:
    import sqlite3

    version = sqlite3.sqlite_version_info
    if version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45):
        return Check("sqlite", Status.OK, f"SQLite {sqlite3.sqlite_version}")
    return Check(
        "sqlite",
        Status.INFO,
        f"SQLite {sqlite3.sqlite_version} can lose commits where several connections write and checkpoint "
        "(sqlite.org/wal.html#walresetbug). The service is safe: one connection does all of both.",
        "Let no other program write to the file while the service runs.",
    )


def _cause(error: "StoreUnavailable", url: "URL") -> str:
    """The driver's own words, their first line, without the password."""
    cause = getattr(error.__cause__, "orig", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0].replace(str(url.password), "***") if url.password else lines[0]


def _provider(settings: "Settings") -> Iterator[Check]:
    import asyncio

    from entrypoints.settings import Provider

    if settings.provider is Provider.PRACTICE:
        advice = "Set OPENAI_API_KEY to talk to a model."
        yield Check("provider", Status.OK, "the practice coach is built in and needs nothing", advice)
    else:
        yield from asyncio.run(_openai(settings))


async def _openai(settings: "Settings") -> list[Check]:
    from adapters.openai import make_client
    from entrypoints.container import Container, models_in_use
    from entrypoints.settings import SettingsError

    try:
        models = models_in_use(settings, Container(settings=settings).catalog())
    except SettingsError:
        models = [settings.openai_model]  # the agents' own check tells of it
    key = settings.openai_api_key.get_secret_value() if settings.openai_api_key else ""
    async with make_client(key, settings.openai_base_url, max_connections=1) as client:
        checks = [await _model(settings, client, model) for model in models]
        if not any(check.name == "provider" and check.status is Status.FAIL for check in checks):
            checks += await _state(settings, client)
    return checks


async def _model(settings: "Settings", client: object, model: str) -> Check:
    from datetime import UTC, datetime

    from adapters.openai.errors import ProviderFault
    from adapters.openai.models import KeyRefused, ModelMissing, model_sunset
    from core.model.turn import TurnReason

    own = settings.openai_base_url is not None
    where = _where(settings)
    try:
        day = await model_sunset(client, model)  # type: ignore[arg-type] # its type costs an import
    except KeyRefused as fault:
        advice = "Set OPENAI_API_KEY to a key that is valid there" + (
            "." if own else ": https://platform.openai.com/api-keys"
        )
        return Check("provider", Status.FAIL, f"{where} refuses the key (HTTP {fault.status})", advice)
    except ModelMissing as fault:
        detail = f"{where} does not have the model {model}, or not for this key (HTTP {fault.status})"
        if own:  # many compatible servers do not say what they have
            return Check("provider", Status.WARN, detail, "Check OPENAI_MODEL if replies fail.")
        return Check("provider", Status.FAIL, detail, "Set OPENAI_MODEL to a model that it has.")
    except ProviderFault as fault:
        away = fault.reason in (TurnReason.PROVIDER_UNAVAILABLE, TurnReason.PROVIDER_TIMEOUT)
        status = Status.FAIL if away else Status.WARN
        http = f" (HTTP {fault.status})" if fault.status else ""
        return Check(
            "provider",
            status,
            f"{where} could not be asked about the model {model}: {fault.reason.message}{http}",
            "Check the network and OPENAI_BASE_URL." if away else "Try again later.",
        )
    return _until(model, day, datetime.now(UTC).date())


def _where(settings: "Settings") -> str:
    from urllib.parse import urlsplit

    return str(urlsplit(settings.openai_base_url).hostname) if settings.openai_base_url else "OpenAI"


async def _state(settings: "Settings", client: object) -> list[Check]:
    """Whether the provider has what the state mode needs. No check where it can't be reached."""
    from adapters.openai import probe
    from adapters.openai.errors import ProviderFault
    from adapters.openai.probe import Found
    from entrypoints.settings import StateMode

    where, mode = _where(settings), settings.openai_state.value
    try:
        found = await probe.abilities(client)  # type: ignore[arg-type] # its type costs an import
    except ProviderFault as fault:
        return [Check("state", Status.WARN, f"{where} could not be asked what it can do: {fault.reason.message}")]
    if found.responses is Found.NO:
        return [_no_responses(where, found.chat_completions is Found.YES)]
    working = [f"OPENAI_STATE={other.value}" for other in StateMode if found.supports(other.value) is Found.YES]
    others = " or ".join(working)
    match found.supports(mode):
        case Found.YES:
            return [Check("state", Status.OK, f"{where} has what OPENAI_STATE={mode} needs")]
        case Found.NO:
            advice = f"Set {others}." if others else "Name a server in OPENAI_BASE_URL that has it."
            detail = f"{where} does not have what OPENAI_STATE={mode} needs: {_NEEDS.get(mode, 'another server')}"
            return [Check("state", Status.FAIL, detail, advice)]
        case Found.UNKNOWN:
            advice = "Talk to it with `vida-coach chat`: does its second reply know what you said before?"
            advice += f" If not, set {others}." if others else ""
            return [
                Check(
                    "state", Status.WARN, f"{where} does not tell whether OPENAI_STATE={mode} works there", advice
                )
            ]


def _no_responses(where: str, chat_completions: bool) -> Check:
    if chat_completions:
        advice = "Update it, or name a server in OPENAI_BASE_URL that speaks the Responses API."
        detail = f"{where} speaks Chat Completions only: the service needs the Responses API"
        return Check("state", Status.FAIL, detail, advice)
    advice = "Check OPENAI_BASE_URL: most servers want it to end in /v1."
    return Check("state", Status.FAIL, f"{where} has no Responses API at that address", advice)


def _until(model: str, day: "date | None", today: "date") -> Check:
    from adapters.openai.models import sunset_warning

    if (warning := sunset_warning(model, day, today)) is not None:
        gone = day is not None and day < today
        sentence, _, advice = warning.partition(". ")
        return Check("model", Status.FAIL if gone else Status.WARN, f"{sentence}.", advice)
    known = f"until {day.isoformat()}" if day else "with no end announced"
    return Check("provider", Status.OK, f"the key is taken and the model {model} is there, {known}")

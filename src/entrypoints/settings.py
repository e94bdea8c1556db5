"""Settings: the only reader of the environment."""

import ipaddress
import os
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, quote, urlsplit

from dotenv.parser import parse_stream
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, DotEnvSettingsSource, NoDecode, SettingsConfigDict

from adapters.identity import ALGORITHMS

_ENV_FILE = Path(".env")


class SettingsError(Exception):
    """The settings have faults, all of them listed. Names settings, never values."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(["the settings have faults:", *(f"  {fault}" for fault in faults)]))
        self.faults = faults


class Provider(StrEnum):
    """Who writes the replies."""

    OPENAI = "openai"
    PRACTICE = "practice"


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """What is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class OtelExporter(StrEnum):
    """Where OpenTelemetry's data goes."""

    OTLP = "otlp"
    NONE = "none"


class OtlpProtocol(StrEnum):
    """How a collector is spoken to."""

    GRPC = "grpc"


class StateMode(StrEnum):
    """Where the provider finds the conversation."""

    CONVERSATION = "conversation"
    RESPONSE_CHAIN = "response_chain"
    STATELESS = "stateless"


def default_database_url() -> str:
    """SQLite under the user's data directory."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return f"sqlite:///{quote(str(Path(data) / 'vida-coach' / 'vida-coach.db'))}"


def _setting(name: str, description: str, default: Any = ..., **rules: Any) -> Any:
    return Field(default, validation_alias=name, description=description, **rules)


def require_address(address: str) -> str:
    """HOST:PORT as it is. Raises ValueError for anything else, such as an IPv6 address without its brackets."""
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65_535 or (":" in bare and bare == host):
        raise ValueError("must be HOST:PORT, with an IPv6 address in brackets")
    return address


def _parts(url: str) -> SplitResult:
    """A URL in its parts. Raises ValueError for what is none, in words of ours: the library's quote it."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("must be a URL: brackets are for IPv6 addresses, and a port is a number") from None
    return parts


class Settings(BaseSettings):
    """All settings. `load_settings` reads them from the environment, `NAME_FILE` files and an `.env` file."""

    model_config = SettingsConfigDict(
        env_file=_ENV_FILE, env_ignore_empty=True, extra="ignore", frozen=True, allow_inf_nan=False
    )

    openai_api_key: SecretStr | None = _setting("OPENAI_API_KEY", "the provider's key", None)
    openai_base_url: str | None = _setting("OPENAI_BASE_URL", "a server that speaks the Responses API", None)
    openai_model: str = _setting(
        "OPENAI_MODEL", "the model of agents that name none", "gpt-6-luna", min_length=1, max_length=255
    )
    openai_assistant_id: str | None = _setting("OPENAI_ASSISTANT_ID", "the agent that serves every domain", None)
    openai_thread_ttl: int = _setting(
        "OPENAI_THREAD_TTL", "days until an idle thread expires", 30, ge=0, le=36_500
    )
    openai_state: StateMode = _setting(
        "OPENAI_STATE", "where the provider finds the conversation", StateMode.CONVERSATION
    )
    openai_context_tokens: int = _setting(
        "OPENAI_CONTEXT_TOKENS", "what a model reads that we know nothing of", 128_000, ge=2_048, le=100_000_000
    )
    openai_background: bool = _setting(
        "OPENAI_BACKGROUND", "the provider writes a reply to its end, read or not", False
    )
    user_hash_key: SecretStr | None = _setting(
        "VIDA_USER_HASH_KEY", "key of the hash that stands for a user at the provider; unset: OPENAI_API_KEY", None
    )
    database_url: SecretStr = _setting(
        "VIDA_DATABASE_URL", "sqlite:///FILE or postgresql://…", SecretStr(""), validate_default=True
    )
    listen: str = _setting("VIDA_LISTEN", "address of the service", "127.0.0.1:50051")
    health_listen: str | None = _setting(
        "VIDA_HEALTH_LISTEN", "address that answers health checks alone, in the clear", None
    )
    provider_choice: Provider | None = _setting("VIDA_PROVIDER", "who writes the replies", None)
    agents_dir: Path | None = _setting("VIDA_AGENTS_DIR", "a folder of agent definitions", None)
    tools: Annotated[str | None, NoDecode] = _setting("VIDA_TOOLS", "custom tools: package.module:name, …", None)
    turn_budget: float = _setting("VIDA_TURN_BUDGET", "seconds that a turn may take", 180.0, gt=0, le=3_600)
    lease: float = _setting(
        "VIDA_LEASE", "seconds after which a silent process has lost its turns", 15.0, ge=0.5, le=600
    )
    restart_interrupted: bool = _setting(
        "VIDA_RESTART_INTERRUPTED", "begin a reply again whose text was cut off", False
    )
    drain_seconds: float | None = _setting(
        "VIDA_DRAIN", "seconds that a stop waits for turns", None, ge=0, le=7_200
    )
    practice_words_per_second: float = _setting(
        "VIDA_PRACTICE_WORDS_PER_SECOND",
        "pace of the practice coach; 0: no delay",
        25.0,
        ge=0,
        allow_inf_nan=False,
    )
    max_request_bytes: int = _setting(
        "VIDA_MAX_REQUEST_BYTES", "size of a request", 32 * 2**20, ge=2**18, le=2**28
    )
    max_turns: int = _setting("VIDA_MAX_TURNS", "turns in flight in a process", 5_000, ge=1, le=100_000)
    max_turns_per_user: int = _setting("VIDA_MAX_TURNS_PER_USER", "turns in flight of a user", 8, ge=1)
    max_connection_age: float = _setting(
        "VIDA_MAX_CONNECTION_AGE",
        "seconds after which a client is asked to connect anew",
        1_800.0,
        ge=1,
        le=86_400,
    )
    quota_turns: int | None = _setting("VIDA_QUOTA_TURNS_PER_DAY", "turns of a user in a UTC day", None, ge=1)
    quota_tokens: int | None = _setting(
        "VIDA_QUOTA_TOKENS_PER_DAY", "tokens of a user in a UTC day, read and written", None, ge=1
    )
    prices: Path | None = _setting("VIDA_PRICES", "a file with prices of models, instead of ours", None)
    reflection: bool | None = _setting("VIDA_REFLECTION", "server reflection; unset: on loopback only", None)
    tls_cert: Path | None = _setting("VIDA_TLS_CERT", "file: the service's certificate and its chain, PEM", None)
    tls_key: Path | None = _setting("VIDA_TLS_KEY", "file: the certificate's private key, PEM", None)
    tls_client_ca: Path | None = _setting(
        "VIDA_TLS_CLIENT_CA", "file: authorities of clients' certificates, PEM; set: clients need one", None
    )
    auth_issuer: str | None = _setting("VIDA_AUTH_ISSUER", "who signs users' tokens; set: calls need one", None)
    auth_audience: str | None = _setting("VIDA_AUTH_AUDIENCE", "whom users' tokens must be for", None)
    auth_jwks: str | None = _setting(
        "VIDA_AUTH_JWKS", "file or URL of the keys that tokens are checked with", None
    )
    auth_algorithms: Annotated[frozenset[str], NoDecode] = _setting(
        "VIDA_AUTH_ALGORITHMS", "signatures that tokens may have", frozenset({"RS256", "ES256", "EdDSA"})
    )
    auth_policy: Path | None = _setting("VIDA_AUTH_POLICY", "file: what each caller may do, TOML", None)
    channelz: bool = _setting("VIDA_CHANNELZ", "gRPC's own view of its connections; on loopback only", False)
    metrics_listen: str | None = _setting("VIDA_METRICS_LISTEN", "address of the Prometheus page", None)
    otel_endpoint: str | None = _setting("OTEL_EXPORTER_OTLP_ENDPOINT", "collector of traces and metrics", None)
    otel_protocol: OtlpProtocol = _setting(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "how the collector is spoken to", OtlpProtocol.GRPC
    )
    otel_service_name: str = _setting(
        "OTEL_SERVICE_NAME", "what the service is called there", "vida-coach", min_length=1
    )
    otel_traces: OtelExporter = _setting("OTEL_TRACES_EXPORTER", "whether traces go there", OtelExporter.OTLP)
    otel_metrics: OtelExporter = _setting("OTEL_METRICS_EXPORTER", "whether metrics go there", OtelExporter.OTLP)
    otel_disabled: bool = _setting("OTEL_SDK_DISABLED", "nothing is measured, whatever else is set", False)
    log_format: LogFormat = _setting("VIDA_LOG_FORMAT", "how log lines look", LogFormat.TEXT)
    log_level: LogLevel = _setting("VIDA_LOG_LEVEL", "what is logged", LogLevel.INFO)

    @field_validator("database_url")
    @classmethod
    def _check_database(cls, url: SecretStr) -> SecretStr:
        value = url.get_secret_value() or default_database_url()
        if not value.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
            raise ValueError("must begin with sqlite:/// or postgresql://")
        _parts(value)
        if value.startswith("sqlite:///") and value in {"sqlite:///", "sqlite:///:memory:"}:
            raise ValueError("must name a file")
        return SecretStr(value)

    @field_validator("openai_base_url", "otel_endpoint")
    @classmethod
    def _check_http_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = _parts(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must begin with http:// or https:// and name a host")
        return url

    @field_validator("openai_base_url")
    @classmethod
    def _check_base_url(cls, url: str | None) -> str | None:
        parts = _parts(url or "")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("must have no credentials, query or fragment: the key goes into OPENAI_API_KEY")
        return url

    @field_validator("openai_api_key")
    @classmethod
    def _check_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not all("!" <= character <= "~" for character in key.get_secret_value()):
            raise ValueError("must be printable ASCII without spaces")
        return key

    @field_validator("listen", "health_listen", "metrics_listen")
    @classmethod
    def _check_listen(cls, listen: str | None) -> str | None:
        if listen is None:
            return None
        return require_address(listen)

    @field_validator("agents_dir")
    @classmethod
    def _check_agents_dir(cls, folder: Path | None) -> Path | None:
        if folder is not None and not folder.is_dir():
            raise ValueError("must be a folder")
        return folder

    @field_validator("auth_jwks")
    @classmethod
    def _check_jwks(cls, place: str | None) -> str | None:
        if place is not None and "://" in place:
            parts = _parts(place)
            loopback = parts.scheme == "http" and is_loopback(parts.hostname or "")
            if not parts.hostname or not (parts.scheme == "https" or loopback):
                raise ValueError("must be a file, or begin with https:// (http:// on loopback only)")
        return place

    @field_validator("auth_algorithms", mode="before")
    @classmethod
    def _check_algorithms(cls, names: object) -> object:
        if not isinstance(names, str):
            return names
        given = frozenset(name.strip() for name in names.split(","))
        if not given <= ALGORITHMS:
            raise ValueError(f"must be some of {', '.join(sorted(ALGORITHMS))}")
        return given

    @field_validator("prices")
    @classmethod
    def _check_prices(cls, file: Path | None) -> Path | None:
        if file is not None and not file.is_file():
            raise ValueError("must be a file")
        return file

    @property
    def provider(self) -> Provider:
        """The chosen provider; by default OpenAI where a key or a server is given, else the practice coach."""
        return self.provider_choice or self.erased_at

    @property
    def erased_at(self) -> Provider:
        """The provider whose copies of erased threads are deleted: OpenAI where a key or a server is given,
        whoever writes the replies."""
        return Provider.OPENAI if self.openai_api_key or self.openai_base_url else Provider.PRACTICE

    @property
    def database(self) -> str:
        """The database's URL. It may hold a password."""
        return self.database_url.get_secret_value()

    @property
    def measured(self) -> bool:
        """Whether metrics or traces go anywhere."""
        return not self.otel_disabled and bool(self.otel_endpoint or self.metrics_listen)

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Host and port of the Prometheus page."""
        if self.metrics_listen is None:
            return None
        host, _, port = self.metrics_listen.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def drain(self) -> float:
        """Seconds that a stop waits for running turns."""
        return self.turn_budget + 5 if self.drain_seconds is None else self.drain_seconds


def load_settings(examine: Callable[[Settings], list[str]] | None = None) -> Settings:
    """Reads the settings. Raises SettingsError with every fault; `examine` finds those beyond the values."""
    if unread := list(_unread_lines()):
        raise SettingsError(unread)  # what they were to set is not known
    environ = {**DotEnvSettingsSource(Settings, case_sensitive=True).env_vars, **os.environ}
    faults = _unknown_names(environ)
    from_files = _read_files(environ, faults)
    settings = None
    try:
        settings = Settings(**from_files)
    except ValidationError as error:
        # The library's own text would quote values, and they may be secret.
        faults += [
            f"{fault['loc'][0]}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_input=False)
        ]
    if settings is not None:
        faults += _contradictions(settings)
        faults += examine(settings) if examine is not None else []
    if faults or settings is None:
        raise SettingsError(faults)
    return settings


def _unread_lines() -> Iterator[str]:
    """What can't be read of the `.env` file, and would be ignored."""
    if not _ENV_FILE.is_file():
        return
    try:
        with _ENV_FILE.open(encoding="utf-8") as lines:
            bindings = list(parse_stream(lines))
    except (OSError, UnicodeError) as error:
        yield f"{_ENV_FILE}: can't be read ({type(error).__name__})"
        return
    for binding in bindings:
        if binding.error:
            text = binding.original.string
            line = binding.original.line + text[: -len(text.lstrip())].count("\n")
            yield f"{_ENV_FILE}: line {line} can't be read: write NAME=value, and close quotes"


def _contradictions(settings: Settings) -> Iterator[str]:
    """Settings that need others."""
    if settings.provider is Provider.OPENAI and not (settings.openai_api_key or settings.openai_base_url):
        yield "VIDA_PROVIDER: openai needs OPENAI_API_KEY or OPENAI_BASE_URL"
    if settings.openai_background and settings.openai_state is StateMode.STATELESS:
        yield "OPENAI_BACKGROUND: needs what OPENAI_STATE=stateless does not keep at the provider"
    needs = {
        "VIDA_TLS_CERT": ["VIDA_TLS_KEY"],
        "VIDA_TLS_KEY": ["VIDA_TLS_CERT"],
        "VIDA_TLS_CLIENT_CA": ["VIDA_TLS_CERT"],
        "VIDA_AUTH_ISSUER": ["VIDA_AUTH_AUDIENCE", "VIDA_AUTH_JWKS"],
        "VIDA_AUTH_AUDIENCE": ["VIDA_AUTH_ISSUER"],
        "VIDA_AUTH_JWKS": ["VIDA_AUTH_ISSUER"],
        "VIDA_AUTH_ALGORITHMS": ["VIDA_AUTH_ISSUER"],
    }
    given = {
        str(field.validation_alias)
        for name, field in Settings.model_fields.items()
        if name in settings.model_fields_set and getattr(settings, name) is not None
    }
    for name in sorted(needs.keys() & given):
        yield from (f"{name}: needs {other}" for other in needs[name] if other not in given)
    if "VIDA_AUTH_POLICY" in given and not {"VIDA_TLS_CLIENT_CA", "VIDA_AUTH_ISSUER"} & given:
        yield "VIDA_AUTH_POLICY: needs VIDA_TLS_CLIENT_CA or VIDA_AUTH_ISSUER, without which callers have no names"


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _names() -> frozenset[str]:
    return frozenset(str(field.validation_alias) for field in Settings.model_fields.values())


def _read_files(environ: Mapping[str, str | None], faults: list[str]) -> dict[str, Any]:
    """Settings from the files that `NAME_FILE` names, unless the environment itself has `NAME`."""
    values = {}
    for name in sorted(_names()):
        path = environ.get(f"{name}_FILE")
        if path and not os.environ.get(name):
            try:
                content = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeError) as error:
                faults.append(f"{name}_FILE: can't be read ({type(error).__name__})")
                continue
            if content.strip():
                values[name] = content
            else:  # a default in its place would be a surprise: another coach, another database
                faults.append(f"{name}_FILE: the file is empty")
    return values


def _unknown_names(environ: Mapping[str, str | None]) -> list[str]:
    """Names that look like ours and would be ignored."""
    known = _names()
    faults = []
    for name in sorted(environ):
        if not environ[name] or name in known or name.removesuffix("_FILE") in known:
            continue
        if name.startswith("VIDA_"):
            faults.append(f"{name}: there is no such setting")
    return faults

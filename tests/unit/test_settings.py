"""Settings: read in one place, all faults at once, no value ever shown."""

from pathlib import Path

import pytest

import adapters.openai
from adapters.sql.engines import database_file
from entrypoints.settings import (
    LogFormat,
    LogLevel,
    OtelExporter,
    OtlpProtocol,
    Provider,
    Settings,
    SettingsError,
    StateMode,
    load_settings,
)

SECRET = "canary-4711"


def faults() -> list[str]:
    """What is wrong with the settings."""
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert SECRET not in str(error.value) + repr(error.value) + "".join(error.value.faults)
    assert str(error.value).splitlines()[1:] == [f"  {fault}" for fault in error.value.faults]
    return error.value.faults


def test_defaults(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.database == f"sqlite:///{tmp_path}/data/vida-coach/vida-coach.db"
    assert settings.provider is Provider.PRACTICE
    assert settings.openai_api_key is None
    values = {
        "openai_model": "gpt-6-luna",
        "openai_assistant_id": None,
        "openai_thread_ttl": 30,
        "openai_state": StateMode.CONVERSATION,
        "openai_background": False,
        "listen": "127.0.0.1:50051",
        "turn_budget": 180,
        "drain": 185,
        "lease": 15,
        "restart_interrupted": False,
        "practice_words_per_second": 25,
        "max_request_bytes": 32 * 2**20,
        "max_turns": 5_000,
        "max_turns_per_user": 8,
        "quota_turns": None,
        "quota_tokens": None,
        "prices": None,
        "reflection": None,
        "channelz": False,
        "health_listen": None,
        "erased_at": Provider.PRACTICE,
        "metrics_listen": None,
        "metrics_address": None,
        "otel_endpoint": None,
        "otel_protocol": OtlpProtocol.GRPC,
        "otel_service_name": "vida-coach",
        "otel_traces": OtelExporter.OTLP,
        "otel_metrics": OtelExporter.OTLP,
        "otel_disabled": False,
        "measured": False,
        "log_format": LogFormat.TEXT,
        "log_level": LogLevel.INFO,
    }
    assert {name: getattr(settings, name) for name in values} == values


def test_the_database_is_a_file_whatever_its_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a b%20c?d#e é"
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    assert database_file(load_settings().database) == folder / "vida-coach" / "vida-coach.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(folder))
    expected = folder / ".local" / "share" / "vida-coach" / "vida-coach.db"
    assert database_file(load_settings().database) == expected


@pytest.mark.parametrize(
    ("environment", "provider"),
    [
        ({}, Provider.PRACTICE),
        ({"OPENAI_API_KEY": SECRET}, Provider.OPENAI),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}, Provider.OPENAI),
        ({"OPENAI_API_KEY": ""}, Provider.PRACTICE),
        ({"OPENAI_MODEL": "gpt-4o"}, Provider.PRACTICE),
        ({"OPENAI_API_KEY": SECRET, "VIDA_PROVIDER": "practice"}, Provider.PRACTICE),
        ({"OPENAI_API_KEY": SECRET, "VIDA_PROVIDER": "openai"}, Provider.OPENAI),
    ],
    ids=str,
)
def test_the_provider_is_chosen_by_what_is_set(
    environment: dict[str, str], provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load_settings().provider is provider


def test_openai_needs_a_key_or_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_PROVIDER", "openai")
    (fault,) = faults()
    assert "OPENAI_API_KEY" in fault
    assert "OPENAI_BASE_URL" in fault


def test_a_reply_that_is_to_be_resumed_must_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BACKGROUND", "true")
    assert load_settings().openai_background
    monkeypatch.setenv("OPENAI_STATE", "response_chain")
    assert load_settings().openai_background
    monkeypatch.setenv("OPENAI_STATE", "stateless")
    (fault,) = faults()
    assert fault.startswith("OPENAI_BACKGROUND: ")
    assert "OPENAI_STATE" in fault


BAD = {
    "OPENAI_API_KEY": [f"{SECRET} and more", f"{SECRET}\x7f", f"{SECRET}é"],
    "OPENAI_THREAD_TTL": ["-1", "36501", "1.5", f"{SECRET}"],
    "OPENAI_STATE": ["chain", SECRET],
    "OPENAI_CONTEXT_TOKENS": ["0", "2047", "100000001", SECRET],
    "OPENAI_MODEL": ["x" * 256],
    "OPENAI_BACKGROUND": ["maybe", SECRET],
    "OPENAI_BASE_URL": [
        f"ftp://{SECRET}",
        "localhost:8000",
        "http://",
        "http://host:port/v1",
        "http://host:65536/v1",
        f"https://user:{SECRET}@host/v1",
        f"https://host/v1?key={SECRET}",
        f"https://user:{SECRET}@ho\u2100st/v1",
        f"http://[{SECRET}]/v1",
    ],
    "VIDA_DATABASE_URL": [
        f"mysql://u:{SECRET}@h/d",
        SECRET,
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        f"postgresql://u:{SECRET}@h:port/d",
    ],
    "VIDA_LISTEN": ["50051", ":50051", "host:", "host:x", "host:65536", f"{SECRET}", "host:-1", "::1:50051"],
    "VIDA_PROVIDER": ["anthropic", SECRET],
    "VIDA_AGENTS_DIR": [f"/nowhere/{SECRET}", "/dev/null"],
    "VIDA_TURN_BUDGET": ["0", "-1", "3601", "nan", SECRET],
    "VIDA_DRAIN": ["-1", "7201", "nan", SECRET],
    "VIDA_PRACTICE_WORDS_PER_SECOND": ["-1", "nan", SECRET],
    "VIDA_MAX_REQUEST_BYTES": ["1", "1000000000", "4MiB"],
    "VIDA_MAX_TURNS": ["0", "-5", "100001"],
    "VIDA_MAX_TURNS_PER_USER": ["0"],
    "VIDA_MAX_CONNECTION_AGE": ["0", "nan", "90000"],
    "VIDA_QUOTA_TURNS_PER_DAY": ["0", "-1", "many"],
    "VIDA_QUOTA_TOKENS_PER_DAY": ["0", "1.5"],
    "VIDA_PRICES": ["/nowhere/prices.toml", "/"],
    "VIDA_REFLECTION": ["maybe", SECRET],
    "VIDA_AUTH_ALGORITHMS": ["HS256", "none", "RS256,HS256", "RS256,", SECRET],
    "VIDA_AUTH_JWKS": [
        f"http://issuer.example/{SECRET}",
        f"ftp://127.0.0.1/{SECRET}",
        "https://",
        f"https://[{SECRET}]/keys",
    ],
    "VIDA_CHANNELZ": ["maybe", SECRET],
    "VIDA_HEALTH_LISTEN": ["50052", ":50052", "host:65536", SECRET],
    "VIDA_METRICS_LISTEN": ["9464", ":9464", "host:65536", SECRET],
    "OTEL_EXPORTER_OTLP_ENDPOINT": ["localhost:4317", "http://", f"ftp://{SECRET}@host", f"http://[{SECRET}]:1"],
    "OTEL_EXPORTER_OTLP_PROTOCOL": ["http/protobuf", SECRET],
    "OTEL_TRACES_EXPORTER": ["console", SECRET],
    "OTEL_METRICS_EXPORTER": ["prometheus", SECRET],
    "OTEL_SDK_DISABLED": ["maybe", SECRET],
    "VIDA_LOG_FORMAT": ["xml", SECRET],
    "VIDA_LOG_LEVEL": ["trace", SECRET],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=lambda part: str(part).replace(SECRET, "SECRET"),
)
def test_a_bad_value_is_named_and_not_shown(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (fault,) = faults()
    assert fault.startswith(f"{name}: ")


BOUNDS = {
    "OPENAI_THREAD_TTL": ("0", "36500", "-1", "36501"),
    "OPENAI_CONTEXT_TOKENS": ("2048", "100000000", "2047", "100000001"),
    "VIDA_TURN_BUDGET": ("0.001", "3600", "0", "3600.1"),
    "VIDA_LEASE": ("0.5", "600", "0.4", "600.1"),
    "VIDA_DRAIN": ("0", "7200", "-0.1", "7200.1"),
    "VIDA_PRACTICE_WORDS_PER_SECOND": ("0", "1e9", "-0.1", "inf"),
    "VIDA_MAX_REQUEST_BYTES": (str(2**18), str(2**28), str(2**18 - 1), str(2**28 + 1)),
    "VIDA_MAX_TURNS": ("1", "100000", "0", "100001"),
    "VIDA_MAX_TURNS_PER_USER": ("1", "100000", "0", "-1"),
    "VIDA_MAX_CONNECTION_AGE": ("1", "86400", "0.9", "86400.1"),
    "VIDA_QUOTA_TURNS_PER_DAY": ("1", "1000000000", "0", "-1"),
    "VIDA_QUOTA_TOKENS_PER_DAY": ("1", "1000000000", "0", "-1"),
}
"""The least and the most that a setting may be, and what is beyond."""


def test_every_number_has_bounds() -> None:
    numbers = {
        str(field.validation_alias)
        for field in Settings.model_fields.values()
        if field.annotation in (int, float, int | None, float | None)
    }
    assert set(BOUNDS) == numbers


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_may_be_what_its_bounds_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *within, below, above = BOUNDS[name]
    (field,) = (field for field, info in Settings.model_fields.items() if info.validation_alias == name)
    for value in within:
        monkeypatch.setenv(name, value)
        assert getattr(load_settings(), field) == float(value)
    for value in (below, above):
        monkeypatch.setenv(name, value)
        (fault,) = faults()
        assert fault.startswith(f"{name}: ")


def test_all_faults_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in BAD.items():
        monkeypatch.setenv(name, values[0])
    for name in ["VIDA_AUTH_TOKENS", "VIDA_LISTN", "VIDA_DATABASE"]:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("OPENAI_ORG", "not ours, and of no interest")
    found = faults()
    assert sorted(fault.partition(":")[0] for fault in found) == sorted(
        [*BAD, "VIDA_AUTH_TOKENS", "VIDA_LISTN", "VIDA_DATABASE"]
    )


def test_an_unreadable_file_is_told_with_all_other_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY_FILE", f"/nowhere/{SECRET}")
    monkeypatch.setenv("VIDA_DATABASE_URL_FILE", f"/nowhere/else/{SECRET}")
    monkeypatch.setenv("VIDA_LOG_LEVEL", "loud")
    monkeypatch.setenv("VIDA_LISTN", "x")
    assert sorted(fault.partition(":")[0] for fault in faults()) == [
        "OPENAI_API_KEY_FILE",
        "VIDA_DATABASE_URL_FILE",
        "VIDA_LISTN",
        "VIDA_LOG_LEVEL",
    ]


NEEDS = {
    "VIDA_TLS_CERT": ["VIDA_TLS_KEY"],
    "VIDA_TLS_KEY": ["VIDA_TLS_CERT"],
    "VIDA_TLS_CLIENT_CA": ["VIDA_TLS_CERT"],
    "VIDA_AUTH_ISSUER": ["VIDA_AUTH_AUDIENCE", "VIDA_AUTH_JWKS"],
    "VIDA_AUTH_AUDIENCE": ["VIDA_AUTH_ISSUER"],
    "VIDA_AUTH_JWKS": ["VIDA_AUTH_ISSUER"],
    "VIDA_AUTH_POLICY": ["VIDA_TLS_CLIENT_CA or VIDA_AUTH_ISSUER, without which callers have no names"],
}


@pytest.mark.parametrize("name", NEEDS)
def test_half_an_identity_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    load_settings()  # empty is unset
    monkeypatch.setenv(name, SECRET)
    assert faults() == [f"{name}: needs {other}" for other in NEEDS[name]]


def test_algorithms_are_a_list_and_of_no_use_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().auth_algorithms == {"RS256", "ES256", "EdDSA"}
    monkeypatch.setenv("VIDA_AUTH_ALGORITHMS", "PS256, ES384")
    assert faults() == ["VIDA_AUTH_ALGORITHMS: needs VIDA_AUTH_ISSUER"]
    for name in ("ISSUER", "AUDIENCE", "JWKS"):
        monkeypatch.setenv(f"VIDA_AUTH_{name}", "x")
    assert load_settings().auth_algorithms == {"PS256", "ES384"}


def test_faults_of_files_are_told_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_LISTN", "x")
    monkeypatch.setenv("VIDA_TLS_CLIENT_CA", "x")
    with pytest.raises(SettingsError) as error:
        load_settings(lambda settings: [f"{settings.tls_client_ca}: is no file"])
    assert error.value.faults == [
        "VIDA_LISTN: there is no such setting",
        "VIDA_TLS_CLIENT_CA: needs VIDA_TLS_CERT",
        "x: is no file",
    ]


@pytest.mark.parametrize("name", ["VIDA_LISTN", "VIDA_", "VIDA_PROVIDERS", "VIDA_LISTN_FILE"])
def test_a_name_that_is_not_known_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    load_settings()  # empty is unset
    monkeypatch.setenv(name, SECRET)
    assert faults() == [f"{name}: there is no such setting"]


def test_secrets_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, url = tmp_path / "key", tmp_path / "url"
    key.write_text(f"{SECRET}\r\n")
    url.write_text(f"postgresql://u:{SECRET}@h/d")
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(key))
    monkeypatch.setenv("VIDA_DATABASE_URL_FILE", str(url))
    settings = load_settings()
    assert settings.openai_api_key is not None
    assert settings.openai_api_key.get_secret_value() == SECRET
    assert settings.database.startswith("postgresql://u:")
    assert SECRET not in repr(settings) + str(settings)
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    settings = load_settings()
    assert settings.openai_api_key is not None
    assert settings.openai_api_key.get_secret_value() == "from-the-environment"


@pytest.mark.parametrize("content", ["", "\n", " \r\n"])
def test_an_empty_file_is_no_setting_that_is_left_out(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "empty"
    file.write_text(content)
    for name in ("OPENAI_API_KEY", "VIDA_DATABASE_URL"):
        monkeypatch.setenv(f"{name}_FILE", str(file))
    assert faults() == [f"{name}_FILE: the file is empty" for name in ("OPENAI_API_KEY", "VIDA_DATABASE_URL")]


def test_an_env_file_counts_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dotenv = Path(".env")
    dotenv.write_text("OPENAI_MODEL=from-file\nVIDA_LISTEN=127.0.0.1:1\nVIDA_MAX_TURNS=\n# VIDA_X=1\n")
    settings = load_settings()
    assert (settings.openai_model, settings.listen, settings.max_turns) == ("from-file", "127.0.0.1:1", 5_000)
    monkeypatch.setenv("OPENAI_MODEL", "from-environment")
    assert load_settings().openai_model == "from-environment"
    dotenv.write_text(
        f"VIDA_LISTN={SECRET}\nVIDA_AUTH_ALGORITHMS={SECRET}\nVIDA_LOG_LEVEL={SECRET}\nOTHER={SECRET}\n"
    )
    assert sorted(fault.partition(":")[0] for fault in faults()) == [
        "VIDA_AUTH_ALGORITHMS",
        "VIDA_LISTN",
        "VIDA_LOG_LEVEL",
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"VIDA_MAX_TURNS=7\n\n{SECRET} is a word too many\n".encode(), [".env: line 3 "]),
        (f"OPENAI_API_KEY='{SECRET}\n".encode(), [".env: line 1 "]),
        (b"OPENAI_API_KEY=\xff\n", [".env: can't be read (UnicodeDecodeError)"]),
    ],
)
def test_a_line_of_an_env_file_that_can_not_be_read_is_not_ignored(content: bytes, told: list[str]) -> None:
    Path(".env").write_bytes(content)
    found = faults()
    assert [fault[: len(start)] for fault, start in zip(found, told, strict=True)] == told


def test_an_env_file_may_name_files(tmp_path: Path) -> None:
    """What is accepted is not ignored."""
    key = tmp_path / "key"
    key.write_text(SECRET)
    Path(".env").write_text(f"OPENAI_API_KEY_FILE={key}\n")
    settings = load_settings()
    assert settings.openai_api_key is not None
    assert settings.openai_api_key.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("listen", "drain", "budget", "expected"),
    [("[::1]:0", None, "60", 65), ("localhost:65535", "0", "60", 0)],
    ids=["by budget", "as set"],
)
def test_what_follows_from_settings(
    listen: str, drain: str | None, budget: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_LISTEN", listen)
    monkeypatch.setenv("VIDA_TURN_BUDGET", budget)
    if drain is not None:
        monkeypatch.setenv("VIDA_DRAIN", drain)
    settings = load_settings()
    assert (settings.listen, settings.drain) == (listen, expected)


@pytest.mark.parametrize(
    ("environment", "measured"),
    [
        ({"VIDA_METRICS_LISTEN": "[::1]:0"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_SERVICE_NAME": "coach"}, False),
        ({"VIDA_METRICS_LISTEN": "[::1]:0", "OTEL_SDK_DISABLED": "true"}, False),
    ],
    ids=str,
)
def test_it_is_measured_where_that_goes_anywhere(
    environment: dict[str, str], measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.measured is measured
    assert settings.metrics_address == (("::1", 0) if "VIDA_METRICS_LISTEN" in environment else None)


def test_settings_never_change() -> None:
    with pytest.raises(ValueError):
        load_settings().listen = "x"
    assert {str(field.validation_alias)[:5] for field in Settings.model_fields.values()} == {
        "OPENA",
        "VIDA_",
        "OTEL_",
    }


def test_the_adapter_knows_every_state_mode() -> None:
    assert {mode.value for mode in StateMode} == {mode.value for mode in adapters.openai.StateMode}

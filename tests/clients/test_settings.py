"""`postern config`: the settings are checked and shown without a start, and a wrong value of any of them is told."""

import re
import subprocess

import pytest

from support import pb
from support.engine import new_master_key
from support.environment import own_environment

ADDRESS = "localhost"
URL = "not a url"
FILE = "/no/such/file"
NUMBER, WORD, DURATION = "many", "perhaps", "soon"
# A value that each setting refuses.
BAD = {
    "GRPC_ADDR": ADDRESS, "HTTP_ADDR": ADDRESS, "OPS_ADDR": ADDRESS,
    "PUBLIC_URL": URL, "CORS_ORIGINS": "https://app.example/path", "ALLOW_PLAINTEXT": WORD, "REFLECTION": WORD,
    "LAME_DUCK": DURATION, "HTTP_IDLE_TIMEOUT": "2h", "MAX_CONNECTION_AGE": DURATION,
    "DATA_DIR": "", "DATABASE_URL": "mysql://db/postern", "DATABASE_URL_FILE": FILE,
    "DATABASE_MAX_CONNECTIONS": "0", "DATABASE_NOTIFICATIONS": WORD,
    "MASTER_KEY": "changeme", "MASTER_KEY_FILE": FILE, "PREVIOUS_MASTER_KEY": "changeme", "PREVIOUS_MASTER_KEY_FILE": FILE,
    "SIGNING_ALGORITHM": "HS256", "SIGNING_KEY_ROTATION": DURATION, "SIGNING_KEY_PUBLISH_AHEAD": "1s",
    "ISSUER": URL, "AUDIENCE": "", "ACCESS_TOKEN_TTL": "0s", "SERVICE_TOKEN_TTL": DURATION,
    "REFRESH_TOKEN_TTL": DURATION, "SESSION_MAX_LIFETIME": DURATION, "REFRESH_RETRY_WINDOW": DURATION,
    "REFRESH_LOST_ANSWER_WINDOW": DURATION, "MAX_SESSIONS_PER_USER": "0",
    "REQUIRE_VERIFIED_EMAIL": WORD, "RESERVED_USERNAMES": "no name",
    "ARGON2_MEMORY_KIB": "1", "ARGON2_ITERATIONS": "0", "HASH_THREADS": "0", "HASH_QUEUE": NUMBER,
    "PASSWORD_MIN_LENGTH": "0", "PASSWORD_MIN_SCORE": "9",
    "MAIL_URL": "ftp://mail", "MAIL_URL_FILE": FILE, "MAIL_PASSWORD_FILE": FILE, "MAIL_FROM": "nobody",
    "SERVICE_NAME": "", "VERIFY_EMAIL_URL": URL, "RESET_PASSWORD_URL": URL, "CONFIRM_EMAIL_CHANGE_URL": URL,
    "MAIL_LIMIT_PER_ADDRESS": NUMBER, "MAIL_LIMIT_PER_CLIENT": NUMBER, "CONCEAL_EXISTING_ACCOUNTS": WORD,
    "LOGIN_MAX_FAILURES": "0", "LOGIN_LIMIT_PER_CLIENT": NUMBER, "SIGN_UP_LIMIT_PER_CLIENT": NUMBER,
    "TRUSTED_PROXIES": "proxy", "AUDIT_RETENTION": DURATION, "LOG": "h2=loud", "LOG_FORMAT": "xml", "ACCESS_LOG": WORD,
    "TLS_CERT": FILE, "TLS_KEY": FILE, "TLS_CLIENT_CA": FILE, "SERVICE_IDENTITIES": "no name",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
    "OTEL_EXPORTER_OTLP_HEADERS": "no header", "OTEL_EXPORTER_OTLP_HEADERS_FILE": FILE,
    "OTEL_TRACES_SAMPLER": "some", "OTEL_TRACES_SAMPLER_ARG": "2",
}  # fmt: skip


@pytest.fixture
def check(binary, tmp_path):
    def check(**settings) -> subprocess.CompletedProcess:
        given = own_environment(**{"data_dir": tmp_path / "data", **settings})
        return subprocess.run([binary, "config", "check"], env=given, capture_output=True, text=True, timeout=60)

    return check


def documented() -> set[str]:
    page = (pb.REPOSITORY / "docs/configuration.md").read_text()
    return {name.removeprefix("POSTERN_") for name in re.findall(r"^\| `([A-Z]+_\w+)`", page, re.MULTILINE)}


def variable(name: str) -> str:
    return name if name.startswith("OTEL_") else f"POSTERN_{name}"


def test_every_setting_has_a_bad_value_here():
    # Any text is a name.
    assert set(BAD) == documented() - {"OTEL_SERVICE_NAME"}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_told_by_the_name_of_its_variable(check, name):
    ended = check(**{variable(name): BAD[name]})
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert variable(name) in ended.stderr
    assert "panicked" not in ended.stderr


def test_all_bad_values_are_told_at_once(check):
    """Apart from those that hide others: the links in mails come from the issuer, the place of the key from the database,
    of a setting and its file only one can be set, and of the files of TLS the first is told."""
    hiding = {"ISSUER", "PUBLIC_URL", "DATABASE_URL", "TLS_CERT", "TLS_KEY"}
    together = {name: value for name, value in BAD.items() if name not in hiding and not name.endswith("_FILE")}
    told = check(**{variable(name): value for name, value in together.items()}).stderr
    assert {name for name in together if variable(name) not in told} == set()


def test_settings_can_be_checked_without_a_start(check, tmp_path):
    assert (check().returncode, check().stdout) == (0, "the settings are valid\n")
    wrong = check(hash_threads="0", issuer="not a url", acces_token_ttl="5m")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    for name in ("POSTERN_HASH_THREADS", "POSTERN_ISSUER", "POSTERN_ACCES_TOKEN_TTL"):
        assert name in wrong.stderr
    assert not (tmp_path / "data").exists(), "nothing is created"


def test_the_settings_are_shown_with_where_they_come_from_and_without_secrets(binary, tmp_path):
    def show(*arguments: str, **settings) -> dict[str, tuple[str, str]]:
        given = own_environment(**settings)
        command = [binary, "config", "show", *arguments]
        ended = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        rows = [line.split("\t") for line in ended.stdout.splitlines()]
        return {name: (value, source) for name, value, source in rows}

    key = tmp_path / "key"
    key.write_text(new_master_key())
    shown = show(
        "--hash-queue", "7", "--log-format=json",
        database_url="postgres://ada:hunter2@db/postern", mail_url="smtp://mail:25", master_key_file=key, issuer="https://id.example",
    )  # fmt: skip
    expected = {
        "POSTERN_DATABASE_URL": ("(hidden)", "variable"),
        "POSTERN_MAIL_URL": ("smtp://mail:25", "variable"),
        "POSTERN_MASTER_KEY": ("-", "default"),
        "POSTERN_MASTER_KEY_FILE": (str(key), "variable"),
        "POSTERN_ISSUER": ("https://id.example", "variable"),
        "POSTERN_HASH_QUEUE": ("7", "flag"),
        "POSTERN_LOG_FORMAT": ("json", "flag"),
        "POSTERN_ACCESS_TOKEN_TTL": ("15m", "default"),
        "POSTERN_ALLOW_PLAINTEXT": ("false", "default"),
    }
    assert {name: shown[name] for name in expected} == expected
    without_password = show(database_url="postgres://ada@db/postern", master_key=new_master_key())
    assert without_password["POSTERN_DATABASE_URL"] == ("postgres://ada@db/postern", "variable")
    assert without_password["POSTERN_MASTER_KEY"] == ("(hidden)", "variable")
    assert {name.removeprefix("POSTERN_") for name in shown} >= documented()

"""TLS to PostgreSQL: a real server with certificates that hold, and with others. The connections to a mail server are
tested in `test_mail_delivery`.
"""

import subprocess

from support.engine import Postgres
from support.environment import own_environment
from support.tls import DAY, Authority, replace

LOOPBACK = "127.0.0.1"


def test_the_certificate_of_postgresql_is_verified_with_the_name_of_its_host(cluster, binary, tmp_path):
    engine, authority = Postgres(cluster), Authority("databases")
    known, unknown = replace(tmp_path / "known.pem", authority.pem), replace(tmp_path / "other.pem", Authority().pem)

    def run(ca=known) -> tuple[int, str]:
        settings = engine.settings()
        settings["database_url"] += f"?sslmode=verify-full&sslrootcert={ca}"
        command = [binary, "user", "list"]
        ended = subprocess.run(command, env=own_environment(**settings), capture_output=True, text=True, timeout=60)
        return ended.returncode, ended.stderr

    try:
        ours, expired = authority.issue(LOOPBACK), authority.issue(LOOPBACK, end=-DAY / 24)
        with cluster.serve_tls(ours.pem, ours.key):
            assert run() == (0, "")
            code, said = run(unknown)
            assert (code, "cannot be used now: TLS: " in said, "UnknownIssuer" in said) == (1, True, True), said
        for certificate, why in ((authority.issue("db.example.org"), "name"), (expired, "expired")):
            with cluster.serve_tls(certificate.pem, certificate.key):
                code, said = run()
                assert (code, "cannot be used now: TLS: " in said, why in said) == (1, True, True), said
    finally:
        engine.close()

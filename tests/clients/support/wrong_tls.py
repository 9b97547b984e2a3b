"""Starts that end because of the files of TLS: the cases of `test_command_errors`, by a part of their messages."""

from collections.abc import Callable

from cryptography.hazmat.primitives import serialization

from support.tls import Authority

CASES: dict[str, Callable] = {}


def _case(fragment: str):
    def add(produce):
        CASES[fragment] = produce
        return produce

    return add


def _tls(place, cert: bytes, key: bytes, **files: bytes) -> tuple[int, str]:
    """A start with these files."""
    settings = {}
    for name, content in {"tls_cert": cert, "tls_key": key, **files}.items():
        settings[name] = place.directory / name
        settings[name].write_bytes(content)
        settings[name].chmod(0o600)
    return place.run("serve", **settings)


@_case("has no certificate in PEM")
def swapped_files(place):
    own = Authority().issue("localhost")
    code, said = _tls(place, own.key, own.pem)
    assert said.startswith("POSTERN_TLS_CERT: ")
    assert _tls(place, own.pem, own.key, tls_client_ca=own.key)[1].startswith("POSTERN_TLS_CLIENT_CA: ")
    return code, said


@_case("has a certificate that cannot be used")
def a_damaged_certificate(place):
    own = Authority().issue("localhost")
    return _tls(place, own.pem.replace(b"MII", b"AAA", 1), own.key)


@_case("has no private key that can be used")
def no_private_key(place):
    own = Authority().issue("localhost")
    code, said = _tls(place, own.pem, own.pem)
    encrypted = serialization.BestAvailableEncryption(b"a passphrase")
    key = serialization.load_pem_private_key(own.key, None)
    locked = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted)
    assert _tls(place, own.pem, locked) == (code, said)
    return code, said


@_case("is not the key of the first certificate")
def a_key_of_another_certificate(place):
    authority = Authority()
    return _tls(place, authority.issue("localhost").pem, authority.issue("localhost").key)

"""Certificates for the tests: private authorities and what they issue, and clients that use them."""

import datetime
import http.client
import ipaddress
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from support.client import TIMEOUT, Client
from support.http import address_of

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Certificate:
    """A certificate with its key, both in PEM. Between it and the root of its authority there is nothing."""

    pem: bytes
    key: bytes

    @property
    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.pem.decode())

    @property
    def sha256(self) -> str:
        return x509.load_pem_x509_certificate(self.pem).fingerprint(hashes.SHA256()).hex().upper()

    def write(self, directory: Path, name: str = "server") -> dict[str, Path]:
        """Replaces the two files, each at once, and returns their paths as settings."""
        return {
            "tls_cert": replace(directory / f"{name}.pem", self.pem),
            "tls_key": replace(directory / f"{name}.key", self.key, 0o600),
        }

    def load_into(self, context: ssl.SSLContext, directory: Path) -> None:
        """Makes it the certificate of a client or a server."""
        files = self.write(directory, f"own-{self.sha256[:16]}")
        context.load_cert_chain(files["tls_cert"], files["tls_key"])


def replace(path: Path, content: bytes, mode: int = 0o644) -> Path:
    draft = path.with_name(f"{path.name}.new")
    draft.write_bytes(content)
    draft.chmod(mode)
    os.replace(draft, path)
    return path


class Authority:
    """A private authority."""

    def __init__(self, name: str = "An authority of the tests"):
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        own = self._key.public_key()
        builder = self._begin(self._name, own, -DAY, 10 * DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(own), critical=False)
        builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        self.pem = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(self, *names: str, begin=-DAY, end=DAY, purpose=None) -> Certificate:
        """A certificate with these names: URIs, IP addresses or DNS names. `end` is how long it is still valid."""
        key = ec.generate_private_key(ec.SECP256R1())
        purposes = [purpose] if purpose else [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = self._begin(x509.Name([]), key.public_key(), begin, end)
        builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        builder = builder.add_extension(_usage(digital_signature=True), critical=True)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        signed = builder.sign(self._key, hashes.SHA256())
        encoding, no_passphrase = serialization.Encoding.PEM, serialization.NoEncryption()
        return Certificate(
            signed.public_bytes(encoding), key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_passphrase)
        )

    def _begin(self, subject, key, begin: datetime.timedelta, end: datetime.timedelta) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(self._name, subject, key, x509.random_serial_number())
        return builder.not_valid_before(now + begin).not_valid_after(now + end)

    def context(self, directory: Path, certificate: Certificate | None = None) -> ssl.SSLContext:
        """What a client needs that trusts this authority."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        if certificate is not None:
            certificate.load_into(context, directory)
        return context

    def client(self, server, certificate: Certificate | None = None) -> Client:
        """A gRPC client that trusts this authority; the caller closes it."""
        own = (certificate.key, certificate.pem) if certificate else (None, None)
        return Client(server.address, server.secrets, credentials=grpc.ssl_channel_credentials(self.pem, *own))


def shake_hands(address: str, context: ssl.SSLContext, source=None) -> ssl.SSLSocket:
    """A TLS connection; the caller closes it."""
    host, _, port = address.rpartition(":")
    wire = socket.create_connection((host, int(port)), timeout=TIMEOUT, source_address=source)
    try:
        return context.wrap_socket(wire, server_hostname=host)
    except BaseException:
        wire.close()
        raise


def get(
    server, name: str, path: str, context: ssl.SSLContext, method="GET", body=None, headers=()
) -> tuple[int, bytes]:
    """The status and the body of an answer from one of the addresses: `http_addr` or `ops_addr`."""
    host, _, port = address_of(server, name).rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=TIMEOUT, context=context)
    try:
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _usage(**usages: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: usages.get(name, False) for name in names})


def _general(name: str) -> x509.GeneralName:
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)

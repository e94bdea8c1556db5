"""Certificates and keys in PEM files."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from adapters.identity.files import stamp

_MAX_BYTES = 2**20


Part: TypeAlias = Literal["certificate", "key", "client CA"]


class CertificateFault(Exception):
    """A file can't be used. The text says why, never what is in it; `part` says which file."""

    def __init__(self, part: Part, problem: str) -> None:
        super().__init__(problem)
        self.part: Part = part


@dataclass(frozen=True)
class CertificateFiles:
    """Places of a server's certificate (with its chain), of its key, and of its clients' authorities."""

    certificate: Path
    key: Path
    client_ca: Path | None

    def stamp(self) -> tuple[object, ...]:
        """Changes when one of the files does. Costs three system calls and never raises."""
        return tuple(stamp(file) for file in (self.certificate, self.key, self.client_ca))


@dataclass(frozen=True, repr=False)
class Certificates:
    """What the files held when they fitted together."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    valid_until: datetime
    """Of the server's own certificate, UTC."""


def read(files: CertificateFiles) -> Certificates:
    """Reads the files. Raises CertificateFault for the first one that can't be used."""
    certificate = _content("certificate", files.certificate)
    key = _content("key", files.key)
    chain = _parsed("certificate", certificate)
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise CertificateFault("key", "is no private key in PEM without a password") from error
    ours, theirs = (
        one.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for one in (private.public_key(), chain[0].public_key())
    )
    if ours != theirs:
        raise CertificateFault("key", "does not belong to the certificate")
    client_ca = None
    if files.client_ca is not None:
        client_ca = _content("client CA", files.client_ca)
        _parsed("client CA", client_ca)
    return Certificates(certificate, key, client_ca, chain[0].not_valid_after_utc)


def name_in(certificate: Path) -> str:
    """A name that the first certificate of a file is for: a host, else an address, else what it is called. Raises
    CertificateFault."""
    found = _parsed("certificate", _content("certificate", certificate))[0]
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        called = found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return str(called[0].value) if called else ""
    hosts = names.get_values_for_type(x509.DNSName)
    addresses = names.get_values_for_type(x509.IPAddress)
    return next(iter([*(host.replace("*", "any") for host in hosts), *map(str, addresses)]), "")


def _content(part: Part, file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CertificateFault(part, f"can't be read ({type(error).__name__})") from error
    if len(content) > _MAX_BYTES:
        raise CertificateFault(part, "is larger than a certificate")
    return content


def _parsed(part: Part, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise CertificateFault(part, "holds no certificate in PEM") from error

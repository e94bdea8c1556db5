"""Certificate authorities, certificates and tokens for tests: made in memory, valid for a day."""

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER = "https://issuer.example"
AUDIENCE = "vida-coach"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes

    def write(self, certificate: Path, key: Path) -> None:
        """Puts them into files, each replaced at once."""
        for file, content in ((certificate, self.certificate), (key, self.key)):
            fresh = file.with_name(file.name + ".new")
            fresh.write_bytes(content)
            fresh.replace(file)


class Authority:
    """A certificate authority."""

    def __init__(self, name: str = "Test CA") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = (
            _builder(self._name, self._name, self._key.public_key(), timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        *,
        name: str = "",
        uris: tuple[str, ...] = (),
        hosts: tuple[str, ...] = (),
        valid: timedelta = timedelta(days=1),
    ) -> Pair:
        """A certificate for a server or a client, with this common name and these alternative ones."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
        others: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        others += [x509.IPAddress(ip_address(h)) if h[0].isdigit() else x509.DNSName(h) for h in hosts]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = _builder(subject, self._name, key.public_key(), valid).add_extension(
            x509.ExtendedKeyUsage(usages), critical=False
        )
        if others:
            builder = builder.add_extension(x509.SubjectAlternativeName(others), critical=not name)
        certificate = builder.sign(self._key, hashes.SHA256())
        return Pair(certificate.public_bytes(serialization.Encoding.PEM), pem_of(key))


def _builder(subject: x509.Name, issuer: x509.Name, key: Any, valid: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + valid) - timedelta(hours=1))
        .not_valid_after(now + valid)
    )


def pem_of(key: PrivateKeyTypes) -> bytes:
    """A private key, PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Issuer:
    """Signs tokens with one ES256 key at a time."""

    def __init__(self, kid: str = "k1") -> None:
        self.rotate(kid)

    def rotate(self, kid: str) -> None:
        """Takes another key."""
        self.kid = kid
        self.key = ec.generate_private_key(ec.SECP256R1())

    @property
    def jwk(self) -> dict[str, Any]:
        """The public key."""
        numbers = self.key.public_key().public_numbers()
        x, y = (base64.urlsafe_b64encode(n.to_bytes(32)).rstrip(b"=").decode() for n in (numbers.x, numbers.y))
        return {"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.kid, "x": x, "y": y}

    @property
    def jwks(self) -> str:
        """The key set."""
        return json.dumps({"keys": [self.jwk]})

    def token(self, subject: str = "ada", *, seconds: float = 300, without: str = "", **claims: Any) -> str:
        """A token for a user; `claims` add to it or replace what it says, `without` leaves one out."""
        now = int(datetime.now(UTC).timestamp())
        said = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + int(seconds), **claims}
        said.pop(without, None)
        return jwt.encode(said, self.key, algorithm="ES256", headers={"kid": self.kid})

"""A certificate authority of a test's own, and certificates as a service mesh or a company's CA would issue them."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, both as PEM."""

    cert: bytes
    key: bytes

    def write(self, folder: Path, name: str) -> tuple[str, str]:
        """Writes NAME.pem and NAME.key; their paths."""
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(self.cert)
        key.write_bytes(self.key)
        return str(cert), str(key)


# Of the nine usages that there are, the sixth: to sign certificates.
_SIGNS_CERTIFICATES = x509.KeyUsage(*(index == 5 for index in range(9)))


class Authority:
    """Issues certificates, as strict as Python's own contexts want them from 3.13 on."""

    def __init__(self, name: str = "Test CA", curve: ec.EllipticCurve | None = None) -> None:
        self._key = ec.generate_private_key(curve or ec.SECP256R1())
        self._name = _name(name)
        key = self._key.public_key()
        builder = _builder(self._name, self._name, key, days=30)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(_SIGNS_CERTIFICATES, critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        self._cert = builder.sign(self._key, hashes.SHA256())
        self._key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(key)

    @property
    def cert(self) -> bytes:
        """The authority's own certificate, as PEM."""
        return self._cert.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        common_name: str = "",
        *,
        uri: str = "",
        dns: tuple[str, ...] = (),
        ip: str = "",
        days: float = 30,
        since_days: float = -30,
        curve: ec.EllipticCurve | None = None,
    ) -> Certificate:
        """A certificate for servers and clients, valid from `since_days` to `days` after now."""
        key = ec.generate_private_key(curve or ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns]
        names += [x509.UniformResourceIdentifier(uri)] if uri else []
        names += [x509.IPAddress(ipaddress.ip_address(ip))] if ip else []
        builder = _builder(_name(common_name), self._name, key.public_key(), days, since_days)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not common_name)
        builder = builder.add_extension(self._key_id, critical=False)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        cert = builder.add_extension(usage, critical=False).sign(self._key, hashes.SHA256())
        return Certificate(cert.public_bytes(serialization.Encoding.PEM), _pem(key))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float, since_days: float = -30
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now + since_days * _DAY).not_valid_after(now + days * _DAY)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

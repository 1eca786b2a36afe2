"""A federation's own certificates and keys: one authority, the server's certificate, a key pair for each node.

    ca.crt      the authority's certificate: on every machine
    ca.key      its private key: signs the server's certificate, is needed nowhere else
    server.crt  the server's certificate, with the names under which nodes reach it
    server.key  its private key: on the server only
    NAME.pub    a node's public key: on the server, which lets in nodes with these keys and no others
    NAME.key    its private key: on that node only

X.509 and OpenSSH files on the curve P-384, made by `cryptography` (which comes with Flower); Flower wants an elliptic
curve of NIST for node keys. Private keys can be read by their owner only. Nothing is ever overwritten.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedkeel.errors import ConfigError, MissingExtra, StorageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, CertificateBuilder

ALWAYS = ("localhost", "127.0.0.1")
"""Names of the server under which its own machine reaches it."""
AUTHORITY_DAYS = 3650


@dataclass(frozen=True)
class Made:
    """What was made, and what was there already."""

    new: tuple[Path, ...]
    kept: tuple[Path, ...]


def make_keys(folder: Path, hosts: Sequence[str] = (), nodes: Sequence[str] = (), days: int = 730) -> Made:
    """Makes what is missing in `folder`; more nodes can be added at any time, under the same authority.

    hosts: names or addresses of the server as nodes will write them. days: for which the server's certificate is valid;
    the authority's is for ten years. Raises ConfigError when the server's certificate is there for other hosts.
    """
    for node in nodes:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", node) or node in ("ca", "server"):
            raise ConfigError("--node", node, "letters, digits, _ . - make a node's name; ca and server are taken")
    _need()
    made: list[Path] = []
    names = list(dict.fromkeys([*ALWAYS, *(_host(host) for host in hosts)]))
    _folder(folder)
    new = [folder / f"{node}.key" for node in dict.fromkeys(nodes) if not (folder / f"{node}.key").exists()]
    for path in new:
        if path.with_suffix(".pub").exists():
            raise ConfigError("--node", path.stem, f"{path.with_suffix('.pub')} is there without its private key")
    whole = _pairs(folder)
    if not whole["ca"]:
        _authority(folder, max(days, AUTHORITY_DAYS))
        made += [folder / "ca.key", folder / "ca.crt"]
    if whole["server"]:
        missing = set(names) - set(hosts_of(folder))
        if missing:
            text = f"server.crt is there and names {', '.join(hosts_of(folder))} only; move server.crt and server.key"
            raise ConfigError("--host", ", ".join(sorted(missing)), f"{text} away to have them made anew")
    else:
        _server(folder, names, days)
        made += [folder / "server.key", folder / "server.crt"]
    for path in new:
        _node(path)
        made += [path, path.with_suffix(".pub")]
    return Made(tuple(made), tuple(path for path in sorted(folder.iterdir()) if path not in made))


def hosts_of(folder: Path) -> list[str]:
    """Names and addresses in the server's certificate. Raises ConfigError when it cannot be read."""
    _need()
    from cryptography import x509

    names = _read(folder / "server.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def expires(folder: Path) -> datetime:
    """When the server's certificate ends. Raises ConfigError when it cannot be read."""
    return _read(folder / "server.crt").not_valid_after_utc


def files(folder: Path, *names: str) -> list[Path]:
    """These files of the folder. Raises ConfigError naming the first that is missing or cannot be read."""
    found = [folder / name for name in names]
    for path in found:
        if not path.is_file():
            what = "there is no such file; `fedkeel deploy keys` makes keys and says which file goes where"
            raise ConfigError("--keys", str(path), what)
        if not os.access(path, os.R_OK):
            raise ConfigError("--keys", str(path), "cannot be read by this user")
    return found


def exposed(folder: Path, *names: str) -> list[str]:
    """A warning for each of these private keys that others than its owner may use."""
    return [
        f"warning: {path} can be used by others on this machine (mode {mode:04o}); chmod 600 {path}"
        for path in (folder / name for name in names)
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077
    ]


def public(folder: Path) -> dict[str, Path]:
    """Public keys of nodes in the folder, by the node's name."""
    return {path.stem: path for path in sorted(folder.glob("*.pub"))}


def public_key(path: Path) -> str:
    """A node's public key as Flower keeps it (PEM). Raises ConfigError naming the file."""
    _need()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = form.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError("--keys", str(path), f"cannot be read as a public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError("--keys", str(path), "must be on an elliptic curve, as `fedkeel deploy keys` makes them")
    return key.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo).decode()


def advice(folder: Path, nodes: Sequence[str]) -> list[str]:
    """Which file goes to which machine, a line each."""
    lines = [
        f"server: ca.crt server.crt server.key {' '.join(f'{node}.pub' for node in nodes)}".rstrip(),
        *(f"node {node}: ca.crt {node}.key" for node in nodes),
        "submitting, status, stop: ca.crt",
        f"keep {folder / 'ca.key'} off all of them; it is needed to make another server certificate",
    ]
    return lines


def _need() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise MissingExtra("fedkeel deploy", "flower") from None


def _host(text: str) -> str:
    """A host as certificates write it."""
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        pass
    if not re.fullmatch(r"(?!-)[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", text):
        raise ConfigError("--host", text, "must be a host name or an IP address, without port")
    return text.lower()


def _pairs(folder: Path) -> dict[str, bool]:
    """Whether a certificate and its key are there. Raises ConfigError for a half."""
    found = {}
    for name in ("ca", "server"):
        there = [(folder / f"{name}.{end}").exists() for end in ("key", "crt")]
        if any(there) and not all(there):
            have, lack = ("key", "crt") if there[0] else ("crt", "key")
            if (name, lack) == ("ca", "key") and (folder / "server.key").exists() and (folder / "server.crt").exists():
                found[name] = True  # the authority's key is kept elsewhere; nodes can be added without it
                continue
            raise ConfigError("FOLDER", str(folder), f"holds {name}.{have} but not {name}.{lack}")
        found[name] = all(there)
    return found


def _folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # one that is there may hold other things: it stays open
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error


def _save(path: Path, content: bytes, mode: int) -> None:
    """Creates a file; whoever may not read it never could."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def _read(path: Path) -> Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError("--keys", str(path), f"cannot be read as a certificate: {error}") from None


def _key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def _certificate(
    name: str, key: EllipticCurvePrivateKey, issuer: Certificate | None, days: int, ca: bool
) -> CertificateBuilder:
    """What both certificates have: RFC 5280 asks for it, and Python 3.13 checks that it is there."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    signer: object = key.public_key() if issuer is None else issuer.public_key()
    assert isinstance(signer, ec.EllipticCurvePublicKey)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks of machines differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=ca,
                crl_sign=ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )


def _authority(folder: Path, days: int) -> None:
    from cryptography.hazmat.primitives import hashes, serialization

    key = _key()
    certificate = _certificate("fedkeel federation", key, None, days, ca=True).sign(key, hashes.SHA384())
    _save(folder / "ca.key", _pem(key), 0o600)
    _save(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _server(folder: Path, hosts: Sequence[str], days: int) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if not (folder / "ca.key").exists():
        raise ConfigError("FOLDER", str(folder), "holds no ca.key, which signs the server's certificate")
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = _key()
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    certificate = (
        _certificate("fedkeel server", key, _read(folder / "ca.crt"), days, ca=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _save(folder / "server.key", _pem(key), 0o600)
    _save(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _node(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form

    key = _key()
    _save(path, key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()), 0o600)
    public_key = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    _save(path.with_suffix(".pub"), public_key + b"\n", 0o644)

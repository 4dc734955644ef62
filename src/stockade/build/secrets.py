"""Secrets of a jail: generated once, kept in a directory of their own. Copies none from the host."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import ipaddress
import os
import re
import secrets
import shutil
import string
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from stockade.errors import HostError, SpecError, StateError
from stockade.kernel.crypt import crypt, new_setting
from stockade.records.spec import Secret, Spec

__all__ = ["CLIENT_DIRECTORY", "Material", "ensure", "password_hashes", "substitute", "substitutions"]

#: Where exercises find the files of `${secret-file:NAME}`.
CLIENT_DIRECTORY = "/run/stockade/secrets"

_DAY_S = 86400
# 825 days is the most that TLS clients of today accept for a certificate (CA/Browser Forum, ballot 193).
_CERTIFICATE_DAYS = 825
_RENEW_DAYS = 30
_PASSWORD_LENGTH = 20
_TOOL_TIMEOUT_S = 60
_ALPHABET = string.ascii_letters + string.digits
_REFERENCE = re.compile(r"\$\{(secret|secret-file|public):([^}]*)\}")
_DNS_NAME = re.compile(r"(?:\*\.)?[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")

_FILES: dict[str, tuple[str, ...]] = {
    "password": ("value", "hash"),
    "random": ("value",),
    "ssh-key": ("value", "public"),
    "certificate": ("value", "key", "names"),
}

_CERTIFICATE_CONFIGURATION = """\
[req]
distinguished_name = subject
x509_extensions = extensions
prompt = no
[subject]
CN = {common_name}
[extensions]
subjectAltName = {names}
basicConstraints = critical, CA:TRUE
subjectKeyIdentifier = hash
"""


class Material(msgspec.Struct, frozen=True, kw_only=True):
    """A generated secret.

    `value` is the password, the hexadecimal text, the private ssh key or the certificate; `public` an
    ssh key's public line; `key` a certificate's private key; `hash` a password's crypt(3) hash.
    """

    name: str
    secret: Secret
    value: bytes
    public: bytes = b""
    key: bytes = b""
    hash: str = ""


def ensure(spec: Spec, directory: Path) -> dict[str, Material]:
    """The secrets of `spec` by name, from `directory`; what is not there yet is generated.

    Idempotent, and safe against a second process and against being killed: a secret is there whole or not
    at all. A certificate is made anew when its names change or its last month begins. HostError when a
    program that generates is missing, StateError when `directory` holds another kind of secret.
    """
    if not spec.secrets:
        return {}
    os.makedirs(directory, mode=0o700, exist_ok=True)
    os.chmod(directory, 0o700)
    with _locked(directory):
        for entry in os.scandir(directory):
            # The lock is ours, so whoever made this is dead.
            if entry.name.startswith("."):
                shutil.rmtree(entry.path)
        return {name: _ensure_one(name, secret, directory / name) for name, secret in sorted(spec.secrets.items())}


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _ensure_one(name: str, secret: Secret, home: Path) -> Material:
    if home.exists() and _outdated(secret, home):
        os.rename(home, home.with_name(f".old-{name}"))
        shutil.rmtree(home.with_name(f".old-{name}"))
    if not home.exists():
        _generate(name, secret, home)
    try:
        parts = {part: (home / part).read_bytes() for part in _FILES[secret.kind]}
    except FileNotFoundError as error:
        raise StateError(
            f"`{home}` does not hold a secret of kind `{secret.kind}`: `{Path(error.filename).name}` is missing",
            hint=f"remove `{home}` to have secret `{name}` generated anew",
        ) from error
    return Material(
        name=name,
        secret=secret,
        value=parts["value"] if secret.kind in ("ssh-key", "certificate") else parts["value"].rstrip(b"\n"),
        public=parts.get("public", b"").rstrip(b"\n"),
        key=parts.get("key", b""),
        hash=parts.get("hash", b"").decode("ascii").rstrip("\n"),
    )


def _outdated(secret: Secret, home: Path) -> bool:
    if secret.kind != "certificate":
        return False
    try:
        names = (home / "names").read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return False
    age_s = time.time() - (home / "value").stat().st_mtime
    return names != list(secret.names) or age_s > (_CERTIFICATE_DAYS - _RENEW_DAYS) * _DAY_S


def _generate(name: str, secret: Secret, home: Path) -> None:
    """Make the secret in a directory beside `home`, which then gets its name by one rename."""
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=home.parent))
    try:
        match secret.kind:
            case "password":
                password = "".join(secrets.choice(_ALPHABET) for _ in range(_PASSWORD_LENGTH))
                (scratch / "value").write_text(f"{password}\n", encoding="ascii")
                (scratch / "hash").write_text(f"{crypt(password, new_setting())}\n", encoding="ascii")
            case "random":
                (scratch / "value").write_text(f"{secrets.token_hex(32)}\n", encoding="ascii")
            case "ssh-key":
                _ssh_key(name, scratch)
            case "certificate":
                _certificate(name, secret, scratch)
        for entry in os.scandir(scratch):
            os.chmod(entry.path, 0o600)
            _sync(entry.path)
        _sync(scratch)
        os.rename(scratch, home)
        _sync(home.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ssh_key(name: str, scratch: Path) -> None:
    _tool(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{name}@stockade", "-f", str(scratch / "value")],
        package="openssh-client",
        purpose=f"generate the ssh key `{name}`",
    )
    os.rename(scratch / "value.pub", scratch / "public")


def _certificate(name: str, secret: Secret, scratch: Path) -> None:
    if not secret.names:
        raise SpecError(f"certificate `{name}` has no names", hint=f"give `secrets.{name}.names` at least one")
    alternatives = ",".join(_alternative(name, text) for text in secret.names)
    configuration = scratch / "configuration"
    # An own file: what the host's openssl.cnf says must not change what the jail gets. X.520 ends a CN at 64.
    configuration.write_text(
        _CERTIFICATE_CONFIGURATION.format(common_name=secret.names[0][:64], names=alternatives), encoding="ascii"
    )
    _tool(
        [
            "openssl", "req", "-x509", "-config", str(configuration), "-newkey", "ec",
            "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-sha256", "-days", str(_CERTIFICATE_DAYS),
            "-keyout", str(scratch / "key"), "-out", str(scratch / "value"),
        ],
        package="openssl",
        purpose=f"generate the certificate `{name}`",
    )  # fmt: skip
    configuration.unlink()
    (scratch / "names").write_text("\n".join(secret.names), encoding="utf-8")


def _alternative(name: str, text: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(text)}"
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(text):
        raise SpecError(
            f"`{text}` in `secrets.{name}.names` is neither a host name nor an IP address",
            hint='write names as in `names = ["www.example.org", "127.0.0.1"]`',
        )
    return f"DNS:{text}"


def _tool(command: list[str], *, package: str, purpose: str) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TOOL_TIMEOUT_S, umask=0o077, check=False
        )
    except FileNotFoundError as error:
        raise HostError(
            f"cannot {purpose}: `{command[0]}` is not installed", hint=f"install it: `apt-get install {package}`"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"cannot {purpose}: `{command[0]}` did not end within {_TOOL_TIMEOUT_S} s") from error
    if done.returncode != 0:
        output = os.fsdecode(done.stderr).strip() or "no message"
        raise HostError(f"cannot {purpose}: `{command[0]}` ended with status {done.returncode}: {output}")


def password_hashes(spec: Spec, secrets: Mapping[str, Material]) -> dict[str, str]:
    """Hash for each account of `spec` that has a password, by account name; SpecError for a wrong name."""
    hashes = {}
    for account in spec.accounts:
        if account.password is None:
            continue
        material = secrets.get(account.password)
        if material is None or not material.hash:
            passwords = sorted(name for name, known in secrets.items() if known.hash)
            raise SpecError(
                f"account `{account.name}` names `{account.password}`, which is no secret of kind `password`",
                hint=_suggestion(account.password, passwords)
                or f'add `{account.password} = {{ kind = "password" }}` to `[secrets]`',
            )
        hashes[account.name] = material.hash
    return hashes


def _suggestion(name: str, known: list[str]) -> str | None:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else None


def substitutions(spec: Spec, secrets: Mapping[str, Material]) -> dict[str, str]:
    """What stands for each `${…}`, by the text between the braces.

    `secret:NAME` is the value, `secret-file:NAME` its path in the client's view, `public:NAME` the public line
    of an ssh key or the certificate.
    """
    texts = {}
    for name in spec.secrets:
        material = secrets[name]
        texts[f"secret:{name}"] = material.value.decode()
        texts[f"secret-file:{name}"] = f"{CLIENT_DIRECTORY}/{name}"
        if material.secret.kind == "ssh-key":
            texts[f"public:{name}"] = material.public.decode()
        elif material.secret.kind == "certificate":
            texts[f"public:{name}"] = material.value.decode()
    return texts


def substitute(text: str, texts: Mapping[str, str], *, place: str) -> str:
    """`text` with each reference to a secret filled in; any other `${…}` is left as it is.

    `place` names the text in the SpecError for an unknown secret.
    """

    def fill(match: re.Match[str]) -> str:
        reference = f"{match[1]}:{match[2]}"
        if reference in texts:
            return texts[reference]
        known = sorted(texts)
        raise SpecError(
            f"{place} refers to `${{{reference}}}`, which `[secrets]` does not give",
            hint=_suggestion(reference, known)
            or (f"there are {', '.join(f'`{name}`' for name in known)}" if known else "add it to `[secrets]`"),
        )

    return _REFERENCE.sub(fill, text)

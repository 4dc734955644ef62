"""Generate secrets: passwords, random text, ssh keys, certificates. Copies none from the host."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shutil
import string
import subprocess
import tempfile
from pathlib import Path

from stockade.errors import HostError, SpecError
from stockade.kernel.crypt import crypt, new_setting
from stockade.records.spec import Secret

from .secrets import CERTIFICATE_DAYS

__all__ = ["generate"]

_PASSWORD_LENGTH = 20
_TOOL_TIMEOUT_S = 60
_ALPHABET = string.ascii_letters + string.digits
_DNS_NAME = re.compile(r"(?:\*\.)?[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")

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


def generate(name: str, secret: Secret, home: Path) -> None:
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
            "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-sha256", "-days", str(CERTIFICATE_DAYS),
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

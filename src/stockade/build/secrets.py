"""Secrets of a jail: generated once, kept in a directory of their own. Copies none from the host."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from stockade.errors import SpecError, StateError
from stockade.records.spec import Secret, Spec

from .generations import remove_tree

__all__ = ["CLIENT_DIRECTORY", "Material", "ensure", "password_hashes", "substitute", "substitutions"]

#: Where exercises find the files of `${secret-file:NAME}`.
CLIENT_DIRECTORY = "/run/stockade/secrets"

_DAY_S = 86400
# 825 days is the most that TLS clients of today accept for a certificate (CA/Browser Forum, ballot 193).
CERTIFICATE_DAYS = 825
_RENEW_DAYS = 30
_REFERENCE = re.compile(r"\$\{(secret|secret-file|public):([^}]*)\}")

_FILES: dict[str, tuple[str, ...]] = {
    "password": ("value", "hash"),
    "random": ("value",),
    "ssh-key": ("value", "public"),
    "certificate": ("value", "key", "names"),
}


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
                remove_tree(Path(entry.path))
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
        remove_tree(home.with_name(f".old-{name}"))
    if not home.exists():
        from .generate import generate  # what makes secrets takes long to import, and is needed once

        generate(name, secret, home)
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
    return names != list(secret.names) or age_s > (CERTIFICATE_DAYS - _RENEW_DAYS) * _DAY_S


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
    import difflib  # only for a name that is wrong

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

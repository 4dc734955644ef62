"""What Stockade writes by itself: generated files, links, homes, secrets. Pure: writes nothing here."""

from __future__ import annotations

from collections.abc import Mapping

from stockade.errors import SpecError
from stockade.records.addresses import RESOLVER
from stockade.records.seed import Seed
from stockade.records.spec import Secret, Spec

from .accounts import NO_HOME, AccountFiles, owner
from .secrets import CLIENT_DIRECTORY, Material, substitute, substitutions

__all__ = ["account_seeds", "client_seeds", "seeds"]

_SHADOW_GROUP = "shadow"


def seeds(spec: Spec, secrets: Mapping[str, Material], accounts: AccountFiles) -> tuple[Seed, ...]:
    """Everything that the spec has generated, sorted by path, a directory before what it holds.

    Parents are not listed. Later stages of the list below win: directories and homes, links, contents,
    secrets. A content that a secret went into is secret itself.
    """
    made: dict[str, Seed] = {}
    for source in (_homes, _directories, _links):
        made.update((seed.path, seed) for seed in source(spec, accounts))
    made.update((seed.path, seed) for seed in _contents(spec, secrets, accounts))
    made.update((seed.path, seed) for seed in _secret_files(spec, secrets, accounts))
    return tuple(made[path] for path in sorted(made))


def _path(text: str) -> str:
    """`text` without empty and `.` components; `..` is left, as only symlinks say what it means."""
    if "\0" in text:
        raise SpecError(f"the path `{text!a}` holds a NUL, which no file name can")
    return "/" + "/".join(part for part in text.split("/") if part not in ("", "."))


def _mode(spec: Spec, path: str, default: int) -> int:
    text = spec.files.modes.get(path)
    return default if text is None else int(text, 8)


def _owner(spec: Spec, accounts: AccountFiles, path: str, default: tuple[int, int]) -> tuple[int, int]:
    text = spec.files.owners.get(path)
    return default if text is None else owner(accounts, text)


def _homes(spec: Spec, accounts: AccountFiles) -> list[Seed]:
    result = []
    for account in spec.accounts:
        user = accounts.user(account.name)
        if user is None or account.home is None or account.home in ("/", NO_HOME):
            continue
        uid, gid = _owner(spec, accounts, account.home, (user.uid, user.gid))
        result.append(
            Seed(
                path=_path(account.home), type="directory", mode=_mode(spec, account.home, 0o700), uid=uid, gid=gid,
                reason=f"home of account {account.name}",
            )
        )  # fmt: skip
    return result


def _directories(spec: Spec, accounts: AccountFiles) -> list[Seed]:
    result = []
    for path, directory in spec.directories.items():
        uid, gid = owner(accounts, directory.owner)
        result.append(
            Seed(
                path=_path(path), type="directory", mode=int(directory.mode, 8), uid=uid, gid=gid,
                reason="spec `directories`",
            )
        )  # fmt: skip
    return result


def _links(spec: Spec, _accounts: AccountFiles) -> list[Seed]:
    return [
        Seed(path=_path(path), type="symlink", target=target, reason="spec `files.links`")
        for path, target in spec.files.links.items()
    ]


def _contents(spec: Spec, secrets: Mapping[str, Material], accounts: AccountFiles) -> list[Seed]:
    texts = substitutions(spec, secrets)
    result = []
    for path, text in spec.files.content.items():
        filled = substitute(text, texts, place=f"`files.content.\"{path}\"`")
        private = any(f"${{secret:{name}}}" in text for name in secrets)
        default = 0o400 if private else 0o555 if filled.startswith("#!") else 0o444
        uid, gid = _owner(spec, accounts, path, (0, 0))
        result.append(
            Seed(
                path=_path(path), content=filled.encode(errors="surrogateescape"), mode=_mode(spec, path, default),
                uid=uid, gid=gid, secret=filled != text, reason="spec `files.content`",
            )
        )  # fmt: skip
    if spec.network.egress and "/etc/resolv.conf" not in spec.files.content:
        resolver = f"nameserver {RESOLVER}\n".encode("ascii")
        result.append(Seed(path="/etc/resolv.conf", content=resolver, mode=0o444, reason="egress: who resolves names"))
    return result


def _secret_files(spec: Spec, secrets: Mapping[str, Material], accounts: AccountFiles) -> list[Seed]:
    result = []
    for name, secret in spec.secrets.items():
        if secret.client:
            continue
        uid, gid = owner(accounts, secret.owner)
        for path, content, mode in _parts(secret, secrets[name]):
            result.append(
                Seed(
                    path=_path(path), content=content, mode=mode, uid=uid, gid=gid, secret=True,
                    reason=f"secret {name}",
                )
            )  # fmt: skip
    return result


def _parts(secret: Secret, material: Material) -> list[tuple[str, bytes, int]]:
    """Path, content and mode of each file of a secret that the jail sees."""
    private = int(secret.mode, 8)
    parts: list[tuple[str, bytes, int]] = []
    if secret.kind == "certificate":
        if secret.path is not None:
            parts.append((secret.path, material.value, 0o444))
        if secret.key_path is not None:
            parts.append((secret.key_path, material.key, private))
    elif secret.path is not None:
        parts.append((secret.path, material.value, private))
        if secret.kind == "ssh-key":
            parts.append((f"{secret.path}.pub", material.public + b"\n", 0o444))
    return parts


def account_seeds(accounts: AccountFiles, *, shadow: bool = True) -> tuple[Seed, ...]:
    """The account files: passwd and group for all to read, shadow for root (and the group shadow where there is one).

    They are secret in the sense of a lock only if a password hash is in them.
    """
    made = [
        Seed(path="/etc/group", content=accounts.group_file, mode=0o444, reason="accounts in use"),
        Seed(path="/etc/passwd", content=accounts.passwd, mode=0o444, reason="accounts in use"),
    ]
    if shadow:
        group = accounts.group(_SHADOW_GROUP)
        hashed = any(line.split(b":")[1:2] not in ([b"*"], []) for line in accounts.shadow.split(b"\n"))
        made.append(
            Seed(
                path="/etc/shadow", content=accounts.shadow, mode=0o400 if group is None else 0o440,
                gid=0 if group is None else group.gid, secret=hashed, reason="accounts in use",
            )
        )  # fmt: skip
    return tuple(made)


def client_seeds(spec: Spec, secrets: Mapping[str, Material]) -> tuple[Seed, ...]:
    """Files of `${secret-file:NAME}` in the client's view, for root alone.

    A certificate's private key is there only for a `client` secret, which no server holds.
    """
    made = [Seed(path=CLIENT_DIRECTORY, type="directory", mode=0o700, reason="secrets for exercises")]
    for name, secret in sorted(spec.secrets.items()):
        material = secrets[name]
        newline = b"\n" if secret.kind in ("password", "random") else b""
        parts = {"": material.value + newline}
        if secret.kind == "ssh-key":
            parts[".pub"] = material.public + b"\n"
        if secret.kind == "certificate" and secret.client:
            parts[".key"] = material.key
        made += [
            Seed(
                path=f"{CLIENT_DIRECTORY}/{name}{suffix}", content=content, mode=0o600, secret=True,
                reason=f"secret {name}",
            )
            for suffix, content in parts.items()
        ]  # fmt: skip
    return tuple(made)

"""Write down what was shown about a jail, and tell later whether it is still that jail."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stockade.build.generations import Store, ids_of, on_files
from stockade.errors import NotFoundError, StateError
from stockade.records.finding import Finding
from stockade.records.generation import EXERCISES, Generation
from stockade.records.proof import PROOF_VERSION, Certificate, Changed, Machine, Proof, What
from stockade.records.spec import Spec
from stockade.records.text import escape

__all__ = ["certify", "compare", "read", "write"]

_CHUNK = 1 << 20


def certify(proof: Proof, *, audit: tuple[Finding, ...]) -> Certificate:
    """The certificate of the generation that `proof` is about. NotFoundError when it is gone, OSError as it comes."""
    generation = Store(proof.name).generation(proof.generation)
    spec = msgspec.json.decode((generation.path / "spec.json").read_bytes(), type=Spec)
    return Certificate(
        stockade=importlib.metadata.version("stockade"), lock=_file(generation.path / "lock.json"),
        rootfs=_rootfs(proof.name, generation), plan=_file(generation.path / "plan"),
        spec=_file(generation.path / "spec.json"), capabilities=generation.lock.capabilities,
        syscalls=spec.policy.syscalls.preset, exercises=_exercises(generation.path), audit=audit, proof=proof,
    )  # fmt: skip


def write(certificate: Certificate, path: Path) -> None:
    """Write it to `path`, whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(certificate), indent=2) + b"\n")
    fresh.replace(path)


def read(path: Path) -> Certificate:
    """The certificate in `path`. NotFoundError for no file, StateError for one that is none."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no certificate `{path}`", hint="`stockade prove NAME --certificate FILE` writes one"
        ) from None
    try:
        certificate = msgspec.json.decode(text, type=Certificate)
    except msgspec.DecodeError as error:
        raise StateError(f"`{path}` is no certificate: {error}", hint="it may have been cut off or edited") from None
    if certificate.certificate != PROOF_VERSION:
        raise StateError(
            f"`{path}` is a certificate of version {certificate.certificate}, and this Stockade reads {PROOF_VERSION}",
            hint="prove the jail again with this Stockade",
        )
    return certificate


def compare(certificate: Certificate) -> tuple[Changed, ...]:
    """What is no longer as certified, sorted. Empty when the certificate still describes the jail as it is now.

    The rootfs is read from disk, not believed. NotFoundError when the jail was removed.
    """
    name = certificate.proof.name
    generation = Store(name).current()
    if generation is None:
        raise NotFoundError(f"there is no jail `{name}` any more", hint=f"`stockade build {name}` makes it")
    release, machine = os.uname().release, os.uname().machine
    pairs: dict[What, tuple[str, str]] = {
        "generation": (str(certificate.proof.generation), str(generation.number)),
        "kernel": (certificate.proof.kernel, f"{release} {machine}"),
        "lock": (certificate.lock, _file(generation.path / "lock.json")),
        "plan": (certificate.plan, _file(generation.path / "plan")),
        "rootfs": (certificate.rootfs, _rootfs(name, generation)),
        "spec": (certificate.spec, _file(generation.path / "spec.json")),
    }
    around = certificate.proof.machine
    if around is not None:
        pairs["machine"] = (f"{around.sha256} {around.lock}".strip(), _around(around))
    return tuple(Changed(what=what, then=then, now=now) for what, (then, now) in pairs.items() if then != now)


def _around(machine: Machine) -> str:
    """Digests of the machine's kernel and of the lock of the jail around it now, "none" for what is gone."""
    try:
        digests = [_file(Path(machine.kernel))]
    except FileNotFoundError:
        return "none"
    if machine.jail:
        generation = Store(machine.jail).current()
        digests.append("none" if generation is None else _file(generation.path / "lock.json"))
    return " ".join(digests)


def _exercises(generation: Path) -> tuple[str, ...]:
    try:
        text = (generation / EXERCISES).read_bytes()
    except FileNotFoundError:
        return ()
    return msgspec.json.decode(text, type=tuple[str, ...])


def _file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rootfs(name: str, generation: Generation) -> str:
    entries = generation.lock.entries
    owner = (entries[0].uid, entries[0].gid) if entries else (0, 0)
    return on_files(ids_of(Store(name), *owner), _tree, generation.rootfs)


def _tree(root: Path) -> str:
    """Digest of every path's type, mode, owner and content, in order. Opens nothing but regular files."""
    digest = hashlib.sha256()
    for line in _lines(root):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _lines(root: Path) -> Iterator[str]:
    for top, directories, files, descriptor in os.fwalk(root):
        directories.sort()
        for name in sorted([".", *directories, *files]):
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            path = os.path.relpath(os.path.join(top, name), root)
            if name != "." and stat.S_ISDIR(status.st_mode):
                continue
            owner = f"{status.st_uid} {status.st_gid}"
            yield f"{escape(path)} {status.st_mode:o} {owner} {_content(name, status, descriptor)}"


def _content(name: str, status: os.stat_result, directory: int) -> str:
    if stat.S_ISLNK(status.st_mode):
        return escape(os.readlink(name, dir_fd=directory))
    if not stat.S_ISREG(status.st_mode):
        return str(status.st_rdev)
    digest = hashlib.sha256()
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=directory), "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()

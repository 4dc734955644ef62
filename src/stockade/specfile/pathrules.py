"""The rules of a spec about paths: how they are written, where they may lie, and what is given twice."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterator

from stockade.records.spec import Spec
from stockade.specfile.problem import Place, Problem, key, table

__all__ = ["RULES"]

# Made by the launch itself; anything put there would be hidden.
_RESERVED = ("/dev", "/proc", "/sys")

_UNIX_PATH_BYTES = 107  # sun_path of unix(7), less the final NUL


def _paths(spec: Spec) -> Iterator[Problem]:
    for place, path in _all_paths(spec):
        if ".." in path.split("/"):
            yield Problem(place, f"path `{path}` goes up with `..`: {key(place)}", "write the path without `..`")
        elif len(path) > 1 and (path.endswith("/") or "//" in path or "/./" in path):
            yield Problem(
                place, f"path `{path}` is written with more than it needs: {key(place)}", f"write `{_plain(path)}`"
            )


def _plain(path: str) -> str:
    return "/" + posixpath.normpath(path).lstrip("/")


def _all_paths(spec: Spec) -> Iterator[tuple[Place, str]]:
    files = spec.files
    for name, listed in (("include", files.include), ("exclude", files.exclude), ("setuid", files.setuid)):
        yield from ((("files", name), path) for path in listed)
    for name, keys in (
        ("content", files.content), ("modes", files.modes), ("owners", files.owners), ("links", files.links),
        ("reasons", files.reasons),
    ):  # fmt: skip
        yield from ((("files", name, path), path) for path in keys)
    yield from ((("directories", path), path) for path in spec.directories)
    for index, mount in enumerate(spec.mounts):
        yield from (
            ((*("mounts", index), name), path) for name, path in (("source", mount.source), ("target", mount.target))
        )
    for index, account in enumerate(spec.accounts):
        yield from (
            ((*("accounts", index), name), path)
            for name, path in (("home", account.home), ("shell", account.shell))
            if path
        )
    for secret_name, secret in spec.secrets.items():
        for name, path in (("path", secret.path), ("key_path", secret.key_path)):
            if path:
                yield ("secrets", secret_name, name), path
    service = spec.service
    yield ("service", "directory"), service.directory
    for name, path in (("unix", service.ready.unix), ("file", service.ready.file)):
        if path:
            yield ("service", "ready", name), path


def _directories(spec: Spec) -> Iterator[Problem]:
    volumes = Counter[str]()
    for path, directory in spec.directories.items():
        place = ("directories", path)
        if directory.kind != "volume" and directory.volume is not None:
            yield Problem(
                place, f"{table(place)} names a volume and is of kind `{directory.kind}`", 'set `kind = "volume"`'
            )
        if directory.volume is not None:
            volumes[directory.volume] += 1
        if path == "/":
            yield Problem(place, '`[directories."/"]` cannot be given: the root is read-only')
    for name, count in volumes.items():
        if count > 1:
            yield Problem(("directories",), f"volume `{name}` is mounted {count} times in `[directories]`")


def _reserved(spec: Spec) -> Iterator[Problem]:
    for place, path in _targets(spec):
        if path in _RESERVED or path.startswith(tuple(f"{name}/" for name in _RESERVED)):
            yield Problem(
                place, f"`{path}` of {table(place[:1])} lies where the launch makes /dev, /proc and /sys",
                "name devices in `[policy] devices`, and choose /proc by `[policy] proc`",
            )  # fmt: skip


def _targets(spec: Spec) -> Iterator[tuple[Place, str]]:
    yield from ((("directories", path), path) for path in spec.directories)
    yield from ((("mounts", index, "target"), mount.target) for index, mount in enumerate(spec.mounts))
    yield from ((("files", "content", path), path) for path in spec.files.content)
    yield from ((("files", "links", path), path) for path in spec.files.links)


def _placed_twice(spec: Spec) -> Iterator[Problem]:
    for path, count in Counter(path for _, path in _targets(spec)).items():
        if count > 1:
            where = " and ".join(dict.fromkeys(table(place[:1]) for place, named in _targets(spec) if named == path))
            yield Problem((), f"`{path}` is given {count} times, in {where}", "keep one of them")


def _special_bits(spec: Spec) -> Iterator[Problem]:
    for path, mode in spec.files.modes.items():
        if int(mode, 8) & 0o6000 and path not in spec.files.setuid:
            yield Problem(
                ("files", "modes", path), f"mode {mode} of `{path}` is setuid or setgid",
                f'a file keeps these bits only when named: `setuid = ["{path}"]` in `[files]`',
            )  # fmt: skip


def _socket_path(spec: Spec) -> Iterator[Problem]:
    path = spec.service.ready.unix
    if path is not None and len(path.encode()) > _UNIX_PATH_BYTES:
        yield Problem(
            ("service", "ready", "unix"), f"socket path `{path}` is longer than {_UNIX_PATH_BYTES} bytes",
            "the kernel takes no longer one",
        )  # fmt: skip


RULES: tuple[Callable[[Spec], Iterator[Problem]], ...] = (
    _paths, _directories, _reserved, _placed_twice, _special_bits, _socket_path,
)  # fmt: skip

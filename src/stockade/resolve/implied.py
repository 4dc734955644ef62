"""Implied sets: files that one access implies, as `implied.toml` lists them. Named in the evidence."""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from ..records.closure import Evidence
from .collect import Collector
from .pattern import Patterns

__all__ = ["imply"]

_VARIABLE = re.compile(r"\$\{([A-Z_]+)\}")
_BANNERS = (b"ld.so (", b"GNU C Library (")  # of ld.so since 2.33, and of libc.so, which is ten times as large
_VERSION = re.compile(rb"[^\n]{0,80}?version (\d+)\.(\d+)")
_STACK_LINE = re.compile(r"-?(?P<type>\w+)\s+(?P<control>\[[^\]]*\]|\S+)\s+(?P<module>\S+)")


class Set(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One implied set; see the head of `implied.toml`."""

    name: str
    touched: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()
    unobserved: tuple[str, ...] = ()
    option: str = ""
    files: tuple[str, ...] = ()
    reader: str = ""


class _Nss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    built_in: tuple[str, ...]
    since: tuple[int, int]


class _Pam(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    directories: tuple[str, ...]
    always: tuple[str, ...]
    modules: dict[str, tuple[str, ...]]


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    set: tuple[Set, ...]
    nss: _Nss
    pam: _Pam


@functools.cache
def _data() -> _Data:
    text = Path(__file__).with_name("implied.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), _Data)


def imply(collector: Collector, touched: Iterable[tuple[str, bool]]) -> None:
    """Add every set that has a trigger. `touched` are the trace's paths, each with whether an access succeeded."""
    paths = dict(touched)
    pending = list(_data().set)
    while True:
        ready = [(item, cause) for item in pending if (cause := _trigger(collector, item, paths)) is not None]
        if not ready:
            return
        for item, cause in ready:  # what a set adds may be linked with the trigger of another
            pending.remove(item)
            for pattern in item.files:
                text = _filled(pattern, collector.spec.service.environment)
                if text is not None:
                    collector.include(text, "implied", item.name, cause)
            if item.reader:
                _READERS[item.reader](collector, item.name, cause, [path for path, ok in paths.items() if ok])


def _trigger(collector: Collector, item: Set, paths: dict[str, bool]) -> str | None:
    """The entry that makes the set count, "" for one that counts without; None when it doesn't count."""
    spec = collector.spec
    libraries = item.linked if collector.observed else item.linked + item.unobserved
    library = next((name for name in libraries if name in collector.linked), None)
    if library is not None:
        return collector.linked[library]
    patterns = Patterns(item.touched)
    touched = next((path for path in sorted(paths) if patterns.covers(path)), None)
    if touched is not None:
        real = collector.host.walk(touched).path
        return real if collector.has(real) else ""
    options = {"timezone": spec.timezone, "locale": spec.locale}
    options["network"] = not collector.observed and spec.network.mode != "none"
    return "" if options.get(item.option, False) else None


def _filled(pattern: str, environment: dict[str, str]) -> str | None:
    """`pattern` with the service's environment in it; None when a variable is not set, or would lead elsewhere."""
    result = pattern
    for name in _VARIABLE.findall(pattern):
        value = environment.get(name, "").lstrip(":")
        if not value or value.startswith("/") or ".." in value.split("/"):
            return None
        if name in ("LANG", "LC_ALL"):  # directories below /usr/lib/locale are named by the normalised codeset
            language, dot, codeset = value.partition(".")
            value = language + dot + codeset.replace("-", "").lower()
        result = result.replace(f"${{{name}}}", value)
    return result


# readers

def _text(collector: Collector, path: str) -> str | None:
    """The text of a file as the jail has it: what the spec has generated wins over what the host has."""
    generated = collector.spec.files.content.get(path)
    return generated if generated is not None else collector.host.text(path)


def _nsswitch(collector: Collector, name: str, cause: str, touched: list[str]) -> None:
    """libnss_NAME.so.2 of every service that nsswitch.conf(5) names and the host has."""
    del cause, touched
    nss = _data().nss
    text = _text(collector, "/etc/nsswitch.conf") or "passwd: files\nhosts: files dns\n"
    services = set[str]()
    for line in text.splitlines():
        _, _, value = line.partition("#")[0].partition(":")
        services |= set(re.sub(r"\[[^\]]*\]", " ", value).split())
    libc = collector.linked.get("libc.so.6")
    if _glibc_version(collector, libc) >= nss.since:
        services -= set(nss.built_in)
    for service in sorted(services):
        path = collector.loader.lookup(f"libnss_{service}.so.2", libc) if libc and "/" not in service else None
        if path is not None:
            collector.library(path, Evidence(kind="implied", detail=name, because="/etc/nsswitch.conf"))


def _glibc_version(collector: Collector, libc: str | None) -> tuple[int, int]:
    if libc is None:
        return 0, 0
    linkers = (found.interpreter for found in collector.programs.values())
    beside = (path for path in linkers if path is not None and os.path.dirname(path) == os.path.dirname(libc))
    for file, banner in zip((next(beside, libc), libc), _BANNERS, strict=True):
        data = collector.host.data(file, limit=16 << 20) or b""
        place = -1
        while (place := data.find(banner, place + 1)) >= 0:
            match = _VERSION.match(data, place + len(banner))
            if match:
                return int(match[1]), int(match[2])
    return 0, 0


def _pam(collector: Collector, name: str, cause: str, touched: list[str]) -> None:
    """The stacks of every PAM service that was used, with what they include; see pam.conf(5)."""
    pam = _data().pam
    services = {os.path.basename(path) for path in touched if path.startswith(tuple(f"{d}/" for d in pam.directories))}
    if not services:
        services = {os.path.basename(program) for program in collector.programs}
    pending = [(stack, cause) for stack in sorted({*services, *pam.always})]
    seen = {stack for stack, _ in pending}
    while pending:
        stack, because = pending.pop(0)
        text, path = next(
            ((text, path) for d in pam.directories if (text := _text(collector, path := f"{d}/{stack}")) is not None),
            ("", ""),
        )
        if not path:
            continue
        collector.add(path, Evidence(kind="implied", detail=name, because="" if because == path else because))
        for included, module in _stack(text):
            if included and included not in seen and "/" not in included:
                seen.add(included)
                pending.append((included, path))
            if module:
                _pam_module(collector, name, module, path)


def _stack(text: str) -> Iterable[tuple[str, str]]:
    """For each line of a PAM stack what it includes, or the module that it names."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("@include"):
            yield line.removeprefix("@include").strip(), ""
            continue
        match = _STACK_LINE.match(line)
        if match and match["control"] in ("include", "substack"):
            yield match["module"], ""
        elif match:
            yield "", match["module"]


def _pam_module(collector: Collector, name: str, module: str, stack: str) -> None:
    evidence = Evidence(kind="implied", detail=name, because=stack)
    library = collector.linked.get("libpam.so.0") or collector.linked.get("libc.so.6")
    directories = collector.loader.system_directories(library) if library else ()
    candidates = [module] if module.startswith("/") else [f"{d}/security/{module}" for d in directories]
    path = next((path for path in candidates if collector.host.walk(path).is_file), None)
    if path is None:
        return
    collector.library(path, evidence)
    for pattern in _data().pam.modules.get(os.path.basename(module), ()):
        collector.include(pattern, "implied", name, collector.host.walk(path).path)


def _locale(collector: Collector, name: str, cause: str, touched: list[str]) -> None:
    """The whole of each locale of which one file was read."""
    del cause
    for path in sorted({os.path.dirname(path) for path in touched}):
        match = re.match(r"(/usr/lib/locale/[^/]+)", path)
        if match and collector.host.walk(match[1]).is_directory:
            collector.include(match[1], "implied", name)


_READERS: dict[str, Callable[[Collector, str, str, list[str]], None]] = {
    "nsswitch": _nsswitch,
    "pam": _pam,
    "locale": _locale,
}

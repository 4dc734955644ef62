"""What a well-formed spec may still not say: the rules, as a table. Looks at nothing but the spec."""

from __future__ import annotations

import posixpath
import re
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

import msgspec

from stockade.kernel import capabilities, presets
from stockade.records import publish
from stockade.records.policy import size_bytes
from stockade.records.spec import Spec, ready_beside
from stockade.specfile import pathrules
from stockade.specfile.problem import Place, Problem, dotted, key, nearest, table

__all__ = ["RULES", "WALLS", "problems"]

WALLS = (("jail",), ("vm",), ("jail", "vm"), ("jail", "vm", "jail"), ("chroot",))

_PRIVILEGED_BELOW = 1024  # net.ipv4.ip_unprivileged_port_start of the host's network
_ID_COUNT = 65536  # a jail's own user and group ids
_LEAST_VOLUME, _LARGEST_VOLUME = 8 << 20, 8 << 40
_LEAST_PER_FILE = 1024

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_REFERENCE = re.compile(r"\$\{(?:secret|secret-file|public):(?P<name>[^}]*)\}")


def problems(spec: Spec) -> Iterator[Problem]:
    """Yield every rule that `spec` breaks."""
    for rule in RULES:
        yield from rule(spec)


def _nul_bytes(spec: Spec) -> Iterator[Problem]:
    """No path, argument or variable can hold a NUL: execve(2) ends each there."""

    def visit(value: object, place: Place) -> Iterator[Problem]:
        match value:
            case str() if "\0" in value and place[:2] != ("files", "content"):
                yield Problem(place, f"{key(place)} holds a NUL character")
            case dict():
                for name, inner in value.items():
                    yield from visit(name, (*place, name))
                    yield from visit(inner, (*place, name))
            case list() | tuple():
                for index, inner in enumerate(value):
                    yield from visit(inner, (*place, index))

    yield from visit(msgspec.to_builtins(spec), ())


def _walls(spec: Spec) -> Iterator[Problem]:
    if spec.walls not in WALLS:
        written = [f"`{list(walls)}`".replace("'", '"') for walls in WALLS]
        yield Problem(
            ("walls",), f"`walls` must be {', '.join(written[:-1])} or {written[-1]}", "the outermost wall comes first"
        )  # fmt: skip


def _host_name(spec: Spec) -> Iterator[Problem]:
    if spec.hostname is not None and not _HOST_NAME.fullmatch(spec.hostname):
        yield Problem(
            ("hostname",), f"`hostname` must be a host name, not `{spec.hostname}`",
            "letters, digits, `.` and `-`, 64 characters at most",
        )  # fmt: skip


def _signals(spec: Spec) -> Iterator[Problem]:
    known = [member.name for member in signal.Signals]
    if spec.service.stop_signal not in known:
        yield _unknown(("service", "stop_signal"), "signal", spec.service.stop_signal, known)


def _capabilities(spec: Spec) -> Iterator[Problem]:
    if spec.policy.capabilities == "auto":
        return
    place = ("policy", "capabilities")
    for name in spec.policy.capabilities:
        plain = name.lower().removeprefix("cap_")
        if name not in capabilities.NAMES and plain in capabilities.NAMES:
            yield Problem(place, f"capability `{name}` in `[policy]` is written `{plain}`")
        elif name not in capabilities.NAMES:
            yield _unknown(place, "capability", name, capabilities.NAMES)


def _system_calls(spec: Spec) -> Iterator[Problem]:
    calls = spec.policy.syscalls
    for name, listed in (("add", calls.add), ("remove", calls.remove)):
        place = ("policy", "syscalls", name)
        accepted = presets.words(add=name == "add")
        for word in listed:
            if word not in accepted and presets.known(word):
                refused = presets.refusal(word, dotted(place))
                yield Problem(place, refused.message, refused.hint or "")
            elif word not in accepted:
                yield _unknown(place, _kind(word), word, accepted)
    for word in sorted(set(calls.add) & set(calls.remove)):
        yield Problem(
            ("policy", "syscalls", "add"), f"{_kind(word)} `{word}` is both added and removed in `[policy]`"
        )  # fmt: skip
    if calls.preset == "none" and (calls.add or calls.remove):
        yield Problem(
            ("policy", "syscalls"), "`add` and `remove` in `[policy.syscalls]` change nothing: the preset `none` "
            "allows every system call", "name another preset, or leave them out",
        )  # fmt: skip


def _kind(word: str) -> str:
    """What a word of a list of system calls is meant to be."""
    if word.startswith("@"):
        return "group of system calls"
    return {"socket": "socket family", "netlink": "netlink protocol"}.get(word.partition(":")[0], "system call")


def _devices(spec: Spec) -> Iterator[Problem]:
    for name in spec.policy.devices:
        if name.startswith("/") or ".." in name.split("/") or not name:
            yield Problem(
                ("policy", "devices"), f"device `{name}` in `[policy]` must be a name below /dev",
                f"write `{posixpath.relpath(name, '/dev')}`" if name.startswith("/dev/") else "",
            )  # fmt: skip


def _network(spec: Spec) -> Iterator[Problem]:
    mode = spec.network.mode
    for name, given in (("publish", bool(spec.network.publish)), ("egress", spec.network.egress)):
        if given and mode != "private":
            yield Problem(
                ("network", name), f'`{name}` in `[network]` needs `mode = "private"`, not `"{mode}"`',
                'set `mode = "private"`',
            )  # fmt: skip
    ready = ready_beside(spec.service.ready, _given(spec))
    for port in (ready.tcp, ready.udp):
        if mode == "host" and port is not None and port < _PRIVILEGED_BELOW:
            yield Problem(
                ("network", "mode"),
                f'port {port} cannot be opened with `mode = "host"` in `[network]`: '
                "no port of the host below 1024 is a jail's to open",
                f'publish it instead: `mode = "private"`, `publish = ["{port}:{port}"]`',
            )  # fmt: skip


def _given(spec: Spec) -> frozenset[tuple[str, int]]:
    """Protocol and port of each socket that the service is given, of those that can be read."""
    found = set()
    for text in spec.network.listen:
        with suppress(ValueError):
            port = publish.parse_listen(text)
            found.add((port.protocol, port.port))
    return frozenset(found)


def _published(spec: Spec) -> Iterator[Problem]:
    place = ("network", "publish")
    seen = Counter[tuple[str, int, str]]()
    for text in spec.network.publish:
        try:
            port = publish.parse(text)
        except ValueError as error:
            yield Problem(
                place, f"{key(place)}: {error}", 'the outer port comes first, for example `"127.0.0.1:2222:22"`'
            )  # fmt: skip
        else:
            seen[port.address, port.port, port.protocol] += 1
    for (address, number, protocol), count in seen.items():
        if count > 1:
            yield Problem(place, f"{key(place)}: port {number}/{protocol} of {address} is given {count} times")


def _listening(spec: Spec) -> Iterator[Problem]:
    place = ("network", "listen")
    if spec.network.listen and "vm" in spec.walls:
        yield Problem(
            place, f"{key(place)} is not for a jail with a machine among its walls: no socket goes into a guest",
            "`publish` opens a port of this host that leads to one of the guest",
        )  # fmt: skip
    for text in spec.network.listen:
        try:
            publish.parse_listen(text)
        except ValueError as error:
            yield Problem(place, f"{key(place)}: {error}", 'for example `"127.0.0.1:8080"` or `"[::1]:53/udp"`')
    for text, count in Counter(spec.network.listen).items():
        if count > 1:
            yield Problem(place, f"{key(place)}: `{text}` is given {count} times")


def _sizes(spec: Spec) -> Iterator[Problem]:
    limits = spec.limits
    sizes: list[tuple[Place, str | int | None]] = [
        (("limits", "memory"), limits.memory),
        (("limits", "file_size"), limits.file_size),
        (("limits", "tmpfs"), limits.tmpfs),
        *((("directories", path, "size"), directory.size) for path, directory in spec.directories.items()),
        *((("directories", path, "inodes"), directory.inodes) for path, directory in spec.directories.items()),
    ]
    for place, size in sizes:
        if size is not None and int(str(size).rstrip("KMGT")) < 1:
            yield Problem(place, f"{key(place)} must be above 0", "leave the key out for no limit")


def _sizes_that_nothing_keeps(spec: Spec) -> Iterator[Problem]:
    for path, directory in spec.directories.items():
        for name in ("size", "inodes"):
            if directory.kind == "fixed" and getattr(directory, name) is not None:
                place = ("directories", path, name)
                yield Problem(
                    place, f"{key(place)} is for a tmpfs or a volume, and this is a part of the read-only root",
                    "leave it out: nothing is written there",
                )  # fmt: skip


def _sizes_of_volumes(spec: Spec) -> Iterator[Problem]:
    """A volume with a size is a file system of its own, with a journal, a table of its files, and one file at least."""
    for path, directory in spec.directories.items():
        if directory.kind != "volume":
            continue
        size = None if directory.size is None else size_bytes(directory.size)
        place = ("directories", path, "size")
        if size and not _LEAST_VOLUME <= size <= _LARGEST_VOLUME:
            yield Problem(
                place, f"{key(place)} is `{directory.size}`, and a volume has between 8M and 8T",
                "leave it out for a volume without a limit",
            )  # fmt: skip
        place = ("directories", path, "inodes")
        if directory.inodes is not None and size is None:
            yield Problem(
                place, f"{key(place)} limits the files of a volume that has no `size`", 'set both: `size = "256M"`'
            )  # fmt: skip
        elif directory.inodes is not None and size is not None and directory.inodes > size // _LEAST_PER_FILE:
            yield Problem(
                place, f"{key(place)} is {directory.inodes}, more than one for each {_LEAST_PER_FILE} bytes",
                "give the volume a larger `size`, or fewer `inodes`",
            )  # fmt: skip


def _accounts(spec: Spec) -> Iterator[Problem]:
    for what, given in (("name", [account.name for account in spec.accounts]), ("uid", [a.uid for a in spec.accounts])):
        for value, count in Counter(given).items():
            if count > 1 and value is not None:
                yield Problem(("accounts",), f"{count} `[[accounts]]` have the {what} `{value}`")
    for index, account in enumerate(spec.accounts):
        if account.uid is not None and not 0 <= account.uid < _ID_COUNT:
            yield Problem(
                ("accounts", index, "uid"), f"uid {account.uid} of account `{account.name}` is not between 0 and 65535"
            )  # fmt: skip
        secret = spec.secrets.get(account.password or "")
        if account.password is not None and (secret is None or secret.kind != "password"):
            yield Problem(
                ("accounts", index, "password"),
                f"the password of account `{account.name}` is `{account.password}`, no secret of kind `password`",
                'a password never stands in a spec: add `NAME = { kind = "password" }` to `[secrets]`, '
                'and `password = "NAME"` to the account',
            )  # fmt: skip


def _secrets(spec: Spec) -> Iterator[Problem]:
    for name, secret in spec.secrets.items():
        place = ("secrets", name)
        if secret.client and (secret.path or secret.key_path):
            yield Problem(
                place, f"{table(place)} is a client's and has a path in the jail", "a client's secret never enters it"
            )  # fmt: skip
        if secret.key_path and secret.kind != "certificate":
            yield Problem(place, f"{table(place)} has a `key_path` and is no certificate")
        if secret.kind == "certificate" and bool(secret.path) != bool(secret.key_path):
            yield Problem(
                place, f"{table(place)} needs both `path` and `key_path`", "a certificate is of no use without its key"
            )  # fmt: skip


def _references(spec: Spec) -> Iterator[Problem]:
    for place, text in _filled_in(spec):
        for match in _REFERENCE.finditer(text):
            if match["name"] not in spec.secrets:
                yield _unknown(place, "secret", match["name"], spec.secrets)


def _filled_in(spec: Spec) -> Iterator[tuple[Place, str]]:
    """Yield every text in which `${…}` is filled in."""
    yield from ((("files", "content", path), text) for path, text in spec.files.content.items())
    yield from ((("service", "environment", name), text) for name, text in spec.service.environment.items())
    yield from ((("service", "command"), word) for word in spec.service.command)
    for index, exercise in enumerate(spec.exercises):
        yield from ((("exercises", index, "command"), word) for word in exercise.command)
        yield ("exercises", index, "input"), exercise.input or ""


def _expressions(spec: Spec) -> Iterator[Problem]:
    texts: list[tuple[Place, str | None]] = [(("service", "ready", "log"), spec.service.ready.log)]
    texts += [(("exercises", index, "stdout"), exercise.stdout) for index, exercise in enumerate(spec.exercises)]
    for place, text in texts:
        try:
            re.compile(text or "")
        except re.error as error:
            yield Problem(
                place, f"{key(place)} is no regular expression: {error}",
                "a backslash before `. * + ? ( ) [ ] |` takes each as it is",
            )  # fmt: skip


def _exercises(spec: Spec) -> Iterator[Problem]:
    for name, count in Counter(exercise.name for exercise in spec.exercises if exercise.name).items():
        if count > 1:
            yield Problem(("exercises",), f"{count} `[[exercises]]` have the name `{name}`")
    for index, exercise in enumerate(spec.exercises):
        if exercise.refused and exercise.status:
            place = ("exercises", index)
            yield Problem(
                place, f"{table(place)} has both `refused` and `status`", "`refused` takes any status but 0"
            )  # fmt: skip


def _environment(spec: Spec) -> Iterator[Problem]:
    for name in spec.service.environment:
        if not name or "=" in name:
            yield Problem(
                ("service", "environment"), f"`{name}` in `[service.environment]` cannot be the name of a variable"
            )  # fmt: skip


def _unknown(place: Place, what: str, name: str, known: Collection[str]) -> Problem:
    return Problem(place, f"unknown {what} `{name}` in {table(place[:1])}{nearest(name, known)}")


RULES: tuple[Callable[[Spec], Iterator[Problem]], ...] = (
    _nul_bytes, _walls, _host_name, _signals, _capabilities, _system_calls, _devices, _network, _published,
    _listening, _sizes, _sizes_that_nothing_keeps, _sizes_of_volumes, *pathrules.RULES, _accounts, _secrets,
    _references, _expressions, _exercises, _environment,
)  # fmt: skip

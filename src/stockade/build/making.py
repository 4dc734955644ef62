"""From a closure to a generation: rootfs and lock. Runs no service."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import msgspec

from stockade.errors import BuildError, HostError, SpecError
from stockade.kernel import userns
from stockade.kernel.beneath import Root
from stockade.records.closure import Closure, WorkDirectory
from stockade.records.generation import Generation, Identity
from stockade.records.lock import Lock, LockEntry
from stockade.records.spec import Spec
from stockade.records.text import unescape

from . import accounts, loader
from .generations import Store, failures_explained, ids_of, on_files
from .lock import closure_of, encode, encode_spec, is_generated
from .newlock import PackageOf, make_lock
from .operations import Applied, Operation, apply
from .permissions import ID_COUNT, reduced_directory, reduced_file
from .plan import HostFacts, Plan, plan
from .secrets import Material, password_hashes
from .seeds import account_seeds, seeds

__all__ = ["build", "from_lock", "plan_of", "require_ids"]

Finish = Callable[[Path, Lock], None]
Progress = Callable[[str], None]
_SHOWN = 20


def build(
    closure: Closure,
    spec: Spec,
    *,
    store: Store,
    secrets: Mapping[str, Material],
    package_of: PackageOf,
    capabilities: Collection[str] = (),
    progress: Progress | None = None,
    trace_json: bytes | None = None,
    finish: Finish | None = None,
) -> Generation:
    """Make a new generation of the jail `store` from `closure`, and make it the current one.

    `secrets` come from `secrets.ensure`; `package_of` gives package and version of a host path; `capabilities` are
    those found to be needed, for a spec that leaves them to the build. `progress` is told what is done now.
    `finish` is called with the directory of the generation, complete but not yet current, and with its lock: it adds
    what a launch needs; what it raises discards the generation.
    BuildError, SpecError or HostError leave the generation before as it was.
    """
    return _build(
        closure, spec, store=store, secrets=secrets, package_of=package_of, capabilities=capabilities,
        progress=progress, trace_json=trace_json, finish=finish, accept=lambda lock: None,
    )  # fmt: skip


def from_lock(
    lock: Lock,
    spec: Spec,
    *,
    store: Store,
    secrets: Mapping[str, Material],
    package_of: PackageOf,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> Generation:
    """Make the generation that `lock` describes, from this host's files.

    BuildError, with package and versions, when a file is missing here or has another content than the lock says.
    """
    closure = closure_of(lock)
    expected = {unescape(entry.path): entry for entry in lock.entries}
    missing = [
        expected[entry.path]
        for entry in closure.entries
        if entry.type == "file" and entry.source is not None and not os.path.lexists(entry.source)
    ]
    _refuse(missing, package_of, "are missing on this host")

    def accept(made: Lock) -> None:
        digests = {entry.path: entry.sha256 for entry in made.entries}
        changed = [
            entry
            for entry in lock.entries
            if entry.type == "file" and not is_generated(entry) and digests.get(entry.path) != entry.sha256
        ]
        _refuse(changed, package_of, "differ on this host")

    return _build(
        closure, spec, store=store, secrets=secrets, package_of=package_of, capabilities=lock.capabilities,
        progress=progress, trace_json=None, finish=finish, accept=accept,
    )  # fmt: skip


def _refuse(entries: Iterable[LockEntry], package_of: PackageOf, problem: str) -> None:
    """BuildError that lists `entries` with the package version locked and the one that is here."""
    lines = []
    for entry in entries:
        here = package_of(unescape(entry.source or entry.path))
        locked = f"{entry.package} {entry.package_version}" if entry.package else "no package"
        lines.append(f"`{entry.path}` ({locked}; here {' '.join(here) if here else 'no package'})")
    if lines:
        more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise BuildError(
            f"{len(lines)} files of the lock {problem}: {', '.join(lines[:_SHOWN])}{more}",
            hint="install the versions of the lock, or `stockade build` from what this host has",
        )


def _build(
    closure: Closure,
    spec: Spec,
    *,
    store: Store,
    secrets: Mapping[str, Material],
    package_of: PackageOf,
    capabilities: Collection[str],
    progress: Progress | None,
    trace_json: bytes | None,
    finish: Finish | None,
    accept: Callable[[Lock], None],
) -> Generation:
    say = progress or (lambda stage: None)
    say("planning the root")
    made, identity = plan_of(closure, spec, secrets, store=store)
    ids = ids_of(store, identity.uid, identity.gid)
    with failures_explained(store.directory), store.new() as building:
        say(f"making {len(made.operations)} files and directories")
        applied = on_files(ids, _apply, made.operations, building.descriptor)
        building.begin_writing()
        say("writing the lock")
        lock = make_lock(made, applied, closure, spec, package_of=package_of, capabilities=capabilities)
        accept(lock)
        files = {"lock.json": encode(lock), "spec.json": encode_spec(spec)}
        if trace_json is not None:
            files["trace.json"] = trace_json
        for name, content in files.items():
            (building.path / name).write_bytes(content)
        if finish is not None:
            finish(building.path, lock)
        say("writing to disk")
        building.commit()
        return Generation(number=building.number, path=building.final, lock=lock, unresolved=made.unresolved)


def plan_of(
    closure: Closure, spec: Spec, secrets: Mapping[str, Material], *, store: Store
) -> tuple[Plan, Identity]:
    """The plan that `build` would carry out, and the ids of the service. Changes nothing."""
    files = accounts.sanitised(
        spec,
        accounts.read(),
        uids={*closure.uids, *_owners(closure, spec, 1)},
        gids={*closure.gids, *_owners(closure, spec, 2)},
        password_hashes=password_hashes(spec, secrets),
        paths=_directories(closure, spec),
    )
    identity = accounts.identity(spec, files)
    generated = (*account_seeds(files), *seeds(spec, secrets, files))
    facts = _host_facts(closure, spec, identity, store)
    return plan(closure, spec, generated, files, host=facts), identity


def _owners(closure: Closure, spec: Spec, which: int) -> set[int]:
    """Ids, of users (`which` 1) or groups (2), that own something in the jail."""
    volumes = [path for path, directory in spec.directories.items() if directory.kind == "volume"]
    volumes += [found.path for found in closure.state]
    found: set[int] = set()
    for entry in closure.entries:
        if entry.type == "symlink":
            continue
        if any(entry.path.startswith(f"{path}/") for path in volumes):
            found.add((entry.mode, entry.uid, entry.gid)[which])
        else:
            rule = reduced_directory if entry.type == "directory" else reduced_file
            found.add(rule(entry.mode, entry.uid, entry.gid)[which])
    work: tuple[WorkDirectory, ...] = (*closure.tmpfs, *closure.state)
    return found | {(directory.uid, directory.gid)[which - 1] for directory in work}


def _directories(closure: Closure, spec: Spec) -> set[str]:
    known = {entry.path for entry in closure.entries if entry.type == "directory"}
    known |= {directory.path for directory in (*closure.tmpfs, *closure.state)}
    return known | set(spec.directories)


def _no_device(name: str) -> SpecError:
    import difflib  # only for a name that is wrong

    near = difflib.get_close_matches(name, os.listdir("/dev"), n=1)
    hint = f"did you mean `{near[0]}`?" if near else "leave it out, or load the driver that makes it"
    return SpecError(f"device `{name}` in `[policy]` is not in /dev of this host", hint=hint)


def _host_facts(closure: Closure, spec: Spec, identity: Identity, store: Store) -> HostFacts:
    mounts = {}
    for mount in spec.mounts:
        if not os.path.exists(mount.source):
            raise SpecError(
                f"`{mount.source}` in `[[mounts]]` does not exist on this host", hint="make it, or leave it out"
            )
        mounts[mount.source] = "directory" if os.path.isdir(mount.source) else "file"
    for device in spec.policy.devices:
        if not os.path.exists(f"/dev/{device}"):
            raise _no_device(device)
    capabilities = {}
    for path in spec.files.setuid:
        real = os.path.realpath(path)
        if os.path.exists(real) and "security.capability" in os.listxattr(real):
            capabilities[real] = capabilities[path] = os.getxattr(real, "security.capability")
    sources = [entry.source for entry in closure.entries if entry.type == "file" and entry.source is not None]
    facts = HostFacts(
        mounts=mounts,
        capabilities=capabilities,
        library_directories=loader.host_directories(),
        libraries={source: found for source in sources if (found := loader.library(source)) is not None},
        configurations={source: loader.text(source) for source in sources if source.endswith(".conf")},
        id_count=store.ids.count if isinstance(store.ids, userns.Range) else ID_COUNT,
    )
    require_ids(identity, store)
    if not isinstance(store.ids, userns.Single):
        return facts
    return msgspec.structs.replace(facts, single=(identity.uid, identity.gid))


def require_ids(identity: Identity, store: Store) -> None:
    """HostError, with the cure, where a service with `identity` needs more ids than the jail `store` has."""
    if not isinstance(store.ids, userns.Single):
        return
    if identity.uid == 0:
        raise HostError(
            "the service runs as root, and the jail has only one id: that of the caller, who must not be root inside",
            hint=f"{userns.range_cure()}; or name another `service.user`",
        )
    if set(identity.groups) - {identity.gid}:
        raise HostError(
            "the service has further groups in `service.groups`, and the jail has only one group id, the caller's",
            hint=f"{userns.range_cure()}; or leave `service.groups` out",
        )


def _apply(operations: tuple[Operation, ...], descriptor: int) -> tuple[Applied, ...]:
    os.mkdir("rootfs", 0o700, dir_fd=descriptor)
    with Root.open("rootfs", directory=descriptor) as root:
        return apply(operations, root)

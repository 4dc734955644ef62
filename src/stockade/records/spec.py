"""The spec: what the owner of a jail wants, as `NAME.toml` says it."""

# No `from __future__ import annotations`: msgspec would have to evaluate each of them again, at twice the time.

from typing import Annotated, Literal

import msgspec

SPEC_VERSION = 1

Wall = Literal["jail", "vm", "chroot"]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}\Z")]
AbsolutePath = Annotated[str, msgspec.Meta(pattern=r"^/")]
Mode = Annotated[str, msgspec.Meta(pattern=r"^[0-7]{3,4}\Z")]
Size = Annotated[str, msgspec.Meta(pattern=r"^[0-9]+[KMGT]?\Z")]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Ready(_Record, frozen=True, kw_only=True):
    """When the service counts as started: the first given condition that holds.

    With none given the service is ready once it runs (or, for a command that ends, has ended).
    """

    tcp: Port | None = None
    udp: Port | None = None
    unix: AbsolutePath | None = None
    file: AbsolutePath | None = None
    command: tuple[str, ...] = ()
    log: str | None = None            # regular expression, searched in the service's output
    timeout_s: Seconds = 15.0


class Service(_Record, frozen=True, kw_only=True):
    """The command that the jail is for, and how it is run."""

    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    user: str = "root"
    group: str | None = None          # default: the user's own
    groups: tuple[str, ...] = ()      # supplementary
    directory: AbsolutePath = "/"
    environment: dict[str, str] = {}
    umask: Mode = "0022"
    forks: bool = False               # the command daemonises: the jail lives while any process does
    syslog: bool | None = None        # a /dev/log socket; default: when the trace shows its use
    ready: Ready = Ready()
    stop_signal: str = "SIGTERM"      # for one that reloads at SIGTERM, or ignores it: often SIGINT or SIGQUIT
    stop_timeout_s: Seconds = 10.0
    restart: Literal["no", "on-failure", "always"] = "no"


class Files(_Record, frozen=True, kw_only=True):
    """Files beyond what was observed, and exceptions from the rules."""

    include: tuple[AbsolutePath, ...] = ()   # path, directory (whole tree) or glob
    exclude: tuple[AbsolutePath, ...] = ()   # path or glob; wins over evidence
    programs: tuple[str, ...] = ()           # programs (name on PATH, or path) with their closure
    setuid: tuple[AbsolutePath, ...] = ()    # may keep setuid, setgid or file capabilities
    content: dict[AbsolutePath, str] = {}    # generated text files; ${…} is filled in
    modes: dict[AbsolutePath, Mode] = {}     # mode of a path, copied or generated
    owners: dict[AbsolutePath, str] = {}     # "user" or "user:group" of a path
    links: dict[AbsolutePath, str] = {}      # symbolic links to make, and their targets
    reasons: dict[AbsolutePath, str] = {}    # why a shell, a key, … stands here on purpose


class Account(_Record, frozen=True, kw_only=True):
    """A user to create in the jail, or one of the host's to keep."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z_][a-z0-9_-]{0,31}\Z")]
    uid: int | None = None            # default: the host's, else the next free from 1000
    group: str | None = None          # default: the host's, else one of the account's own name
    groups: tuple[str, ...] = ()
    home: AbsolutePath | None = None
    shell: AbsolutePath | None = None
    gecos: str | None = None
    password: str | None = None       # name of a secret of kind "password"; default: locked


class Directory(_Record, frozen=True, kw_only=True):
    """A directory that must be there at run time."""

    mode: Mode = "0755"
    owner: str = "root"               # "user" or "user:group"
    kind: Literal["tmpfs", "volume", "fixed"] = "tmpfs"   # fixed: part of the read-only rootfs
    volume: Name | None = None        # name of the volume, for kind "volume"; default: from the path
    size: Size | None = None          # limit, for tmpfs and volume
    inodes: int | None = None         # limit of files; default: 65536 in a tmpfs, one for each 8 KiB of a volume's size


class Mount(_Record, frozen=True, kw_only=True):
    """A path of the host seen inside."""

    source: AbsolutePath
    target: AbsolutePath
    writable: bool = False


class Network(_Record, frozen=True, kw_only=True):
    """The network that the service has, and its ports outside.

    The sockets of `listen` it is given by a build too, while it is observed and tried.
    """

    mode: Literal["none", "host", "private"] = "none"
    publish: tuple[str, ...] = ()     # [ADDRESS:]PORT:PORT[/tcp|/udp]
    listen: tuple[str, ...] = ()      # [ADDRESS:]PORT[/tcp|/udp], opened outside, given to the service as LISTEN_FDS
    egress: bool = False


class Limits(_Record, frozen=True, kw_only=True):
    memory: Size | None = None
    processes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    cpus: Annotated[float, msgspec.Meta(gt=0)] | None = None     # 1.5: one and a half CPUs
    cpu_weight: Annotated[int, msgspec.Meta(ge=1, le=10000)] | None = None  # share when CPUs are short; others have 100
    io_read: Size | None = None       # bytes per second, from the disk that holds the jail
    io_write: Size | None = None
    open_files: Annotated[int, msgspec.Meta(ge=3)] | None = None
    file_size: Size | None = None
    tmpfs: Size | None = None         # default size of each tmpfs


class Syscalls(_Record, frozen=True, kw_only=True):
    preset: Literal["strict", "default", "shell", "none"] = "default"
    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


class Policy(_Record, frozen=True, kw_only=True):
    """What is allowed. Capability names are lower case, without `cap_`.

    `capabilities = "auto"`: those that the build finds to be needed; the lock holds them.
    """

    capabilities: tuple[str, ...] | Literal["auto"] = "auto"
    syscalls: Syscalls = Syscalls()
    landlock: bool = True
    devices: tuple[str, ...] = ("null", "zero", "full", "random", "urandom")
    proc: Literal["auto", "none", "pid", "full"] = "auto"


class Secret(_Record, frozen=True, kw_only=True):
    """Something generated once per jail, kept in its secret directory, never exported.

    password: random letters and digits. ssh-key: a private key at `path`, its public half at
    `path`.pub. certificate: a self-signed TLS certificate at `path` and its key at `key_path`.
    random: 32 bytes as hexadecimal text. `path` is where the jail sees it; without one only
    exercises and ${…} do. `client` secrets are for exercises and the owner: never in the jail.
    """

    kind: Literal["password", "ssh-key", "certificate", "random"]
    path: AbsolutePath | None = None
    key_path: AbsolutePath | None = None
    owner: str = "root"
    mode: Mode = "0600"
    client: bool = False
    names: tuple[str, ...] = ("localhost", "127.0.0.1")   # of a certificate


class Exercise(_Record, frozen=True, kw_only=True):
    """A command run as a client would, whose success shows that the service works.

    It runs in a throwaway view of the host that shares the service's network; $STOCKADE_ROOT is
    the service's file system there. `where = "inside"` runs it behind the walls instead.
    Succeeds when the status is `status` and the output matches; `refused = true` turns an
    exercise into one that must not succeed (any status other than 0 is then a pass).
    """

    name: str = ""
    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    input: str | None = None
    stdout: str | None = None         # regular expression that must be found
    status: int = 0
    refused: bool = False
    where: Literal["client", "inside"] = "client"
    timeout_s: Seconds = 20.0


class Spec(_Record, frozen=True, kw_only=True):
    """Everything that NAME.toml can say. Unknown keys are errors."""

    stockade: Literal[1] = 1
    name: Name
    description: str = ""
    walls: tuple[Wall, ...] = ("jail",)
    hostname: str | None = None       # default: the name
    service: Service
    files: Files = Files()
    accounts: tuple[Account, ...] = ()
    directories: dict[AbsolutePath, Directory] = {}
    mounts: tuple[Mount, ...] = ()
    network: Network = Network()
    limits: Limits = Limits()
    policy: Policy = Policy()
    secrets: dict[Name, Secret] = {}
    exercises: tuple[Exercise, ...] = ()
    record: bool = False              # behind vm: what is executed and typed in the guest is kept outside of it
    locale: bool = False              # the locale set, beyond what was observed
    timezone: bool = True             # the host's time zone


def ready_beside(ready: Ready, given: frozenset[tuple[str, int]]) -> Ready:
    """`ready` without the conditions on sockets that are open before the service starts and tell nothing of it.

    `given` has the protocol, "tcp" or "udp", and the port of each.
    """
    return msgspec.structs.replace(
        ready,
        tcp=None if ("tcp", ready.tcp) in given else ready.tcp,
        udp=None if ("udp", ready.udp) in given else ready.udp,
    )


def must_stay(spec: Spec) -> bool:
    """Whether the service has to run until it is stopped; otherwise it is a command that may end."""
    ready = spec.service.ready
    waits = any((ready.tcp, ready.udp, ready.unix, ready.file, ready.command, ready.log))
    return spec.service.forks or waits or any(exercise.where == "client" for exercise in spec.exercises)

"""Trees for audits: a small one with nothing wrong in it, and what is done to it."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from stockade import elf
from stockade.assure import audit
from stockade.assure.audit import Subject
from stockade.build.lock import encode_spec
from stockade.records.closure import Evidence
from stockade.records.lock import Lock, LockedSpec, LockEntry
from stockade.records.report import AuditReport
from stockade.records.spec import Limits, Service, Spec
from stockade.records.text import escape
from stockade.records.trace import Trace
from stockade.resolve import ldso

PLAIN = "root:x:0:0::/nonexistent:/usr/sbin/nologin\n"
SPEC = Spec(
    name="sample",
    service=Service(command=("/usr/bin/true",), user="service"),
    limits=Limits(memory="64M", processes=10),
)


@dataclass
class Tree:
    """A tree in `root`, beside a host of its own in `host`; as a jail when it has a spec."""

    root: Path
    host: Path
    user: int | None = None
    spec: Spec | None = None
    trace: Trace | None = None
    evidence: dict[str, tuple[Evidence, ...]] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    changes: dict[str, object] = field(default_factory=dict)
    baseline: str | None = None
    after: Callable[[Tree], None] | None = None

    @classmethod
    def new(cls, directory: Path) -> Tree:
        tree = cls(directory / "tree", directory / "host")
        for part in (tree.root / "etc", tree.root / "usr/bin", tree.host / "etc"):
            part.mkdir(parents=True)
        tree.write("/etc/passwd", PLAIN)
        tree.write("/etc/group", "root:x:0:\n")
        tree.write("/etc/shadow", "root:*:::::::\n", mode=0o400)
        return tree

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def write(
        self, path: str, content: str | bytes = "", *, mode: int = 0o444, owner: tuple[int, int] = (0, 0)
    ) -> Path:
        """Put a file into the tree."""
        place = self.path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            place.unlink()
        place.write_bytes(content.encode() if isinstance(content, str) else content)
        if owner != (0, 0):
            os.chown(place, *owner)
        place.chmod(mode)
        return place

    def directory(self, path: str, *, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> Path:
        place = self.path(path)
        place.mkdir(parents=True, exist_ok=True)
        os.chown(place, *owner)
        place.chmod(mode)
        return place

    def link(self, path: str, target: str) -> None:
        place = self.path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)

    def program(self, name: str) -> str:
        """Copy a program of the real host with all its libraries, below a merged /usr; its canonical path."""
        found = ldso.closure(str(shutil.which(name)))
        assert found.interpreter is not None
        for top in ("lib", "lib64"):
            self.directory(f"/usr/{top}")
            self.link(f"/{top}", f"usr/{top}")
        for place in (found.program, found.interpreter, *(library.real for library in found.libraries)):
            self.write(place, Path(place).read_bytes(), mode=0o555)
        for library in found.libraries:
            if not os.path.lexists(self.path(library.path)):
                self.link(library.path, library.real)
        asked = elf.read(found.program)
        assert asked is not None
        assert asked.interpreter is not None
        if not os.path.lexists(self.path(asked.interpreter)):
            self.link(asked.interpreter, found.interpreter)
        return found.program

    def lock(self) -> Lock:
        """The lock of the tree as it stands."""
        assert self.spec is not None
        entries = []
        for place in sorted([self.root, *self.root.rglob("*")]):
            status = place.lstat()
            path = "/" + str(place.relative_to(self.root)).removeprefix(".")
            kind = "directory" if stat.S_ISDIR(status.st_mode) else "symlink" if place.is_symlink() else "file"
            content = place.read_bytes() if kind == "file" else b""
            entries.append(
                LockEntry(
                    path=escape(path), type=kind, mode=stat.S_IMODE(status.st_mode), uid=status.st_uid,
                    gid=status.st_gid, size=len(content),
                    sha256=hashlib.sha256(content).hexdigest() if kind == "file" else "",
                    target=os.readlink(place) if kind == "symlink" else "",
                    package=self.packages.get(path, ""), package_version="1-1",
                    evidence=self.evidence.get(path, (Evidence(kind="generated"),)),
                )
            )  # fmt: skip
        lock = Lock(
            spec=LockedSpec(name=self.spec.name, sha256=hashlib.sha256(encode_spec(self.spec)).hexdigest()),
            architecture="x86_64", entries=tuple(entries), uids=(990,), capabilities=(),
        )  # fmt: skip
        return msgspec.structs.replace(lock, **self.changes)

    def subject(self) -> Subject:
        subject = Subject(name="sample", root=self.root, user=self.user, host=self.host)
        if self.spec is not None:
            subject = replace(subject, lock=self.lock(), spec=self.spec, trace=self.trace)
        if self.after is not None:
            self.after(self)
        return subject

    def audit(self) -> AuditReport:
        baseline = None
        if self.baseline is not None:
            file = self.root.parent / "baseline.toml"
            file.write_text(self.baseline)
            baseline = audit.read_baseline(file)
        return audit.audit(self.subject(), baseline)

    def as_jail(self, **changes: object) -> None:
        """Make it a jail, whose spec is the sample with `changes`."""
        self.spec = msgspec.structs.replace(SPEC, **changes)
        self.trace = Trace(where="outside")


def found(report: AuditReport, code: str) -> list[str]:
    """Paths at which a rule is broken."""
    return [finding.path for finding in report.findings if finding.code == code]


def secret_texts() -> Mapping[str, str]:
    """Texts that look like secrets of every kind, put together here so that none stands in a file."""
    letters = "Ab3" * 40
    return {
        "a private key in PEM": f"-----BEGIN RSA {'PRIVATE'} KEY-----\n{letters[:64]}\n",
        "a private key of PuTTY": f"PuTTY-User-Key-{'File'}-3: ssh-ed25519\nEncryption: none\n",
        "a secret key of age": f"AGE-SECRET-{'KEY'}-1{'Q' * 58}\n",
        "a private key of WireGuard": f"[Interface]\nPrivate{'Key'} = {letters[:43]}=\n",
        "an access key of AWS": f"aws_secret_access_{'key'} = {letters[:40]}\n",
        "a token of GitHub": f"token: ghp{'_'}{letters[:36]}\n",
        "a token of GitLab": f"glpat{'-'}{letters[:20]}\n",
        "a token of Slack": f"xoxb{'-'}{'1234567890' * 3}\n",
        "a webhook of Slack": f"https://hooks.slack.com/{'services'}/T{'A' * 9}/B{'B' * 9}/{letters[:24]}\n",
        "a secret key of Stripe": f"sk_live{'_'}{letters[:24]}\n",
        "an API key of Google": f"key=AIza{letters[:35]}\n",
        "a service account of Google": f'{{"private_key{"_id"}": "{"0a" * 20}"}}\n',
        "a token of npm": f"npm{'_'}{letters[:36]}\n",
        "a token of PyPI": f"pypi-AgE{letters[:60]}\n",
        "a token of Anthropic or OpenAI": f"sk-ant{'-'}{letters[:50]}\n",
        "a token of DigitalOcean": f"dop_v1{'_'}{'0a' * 32}\n",
        "a token of Hugging Face": f"hf{'_'}{letters[:34]}\n",
        "a token of SendGrid": f"SG{'.'}{letters[:22]}.{letters[:43]}\n",
        "a token of Vault": f"hvs{'.'}{letters[:24]}\n",
        "a key of an Azure storage account": f"Account{'Key'}={letters[:86]}==;\n",
        "a URL with a name and a password in it": f"url = postgres://{'app'}:{letters[:10]}@db/x\n",
    }

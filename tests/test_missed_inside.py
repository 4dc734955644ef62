"""What no trace of files shows: accounts that are only looked up, who a client is, directories in the way."""

from __future__ import annotations

import json
import pwd
from collections.abc import Iterator
from pathlib import Path

import policyjail
import pytest
from policyjail import PYTHON, Home, spec

pytestmark = pytest.mark.skipif(bool(policyjail.UNABLE), reason=policyjail.UNABLE)

LOOKS_UP = """
import pwd
for name in NAMES:
    try: pwd.getpwnam(name)
    except KeyError: sys.exit(f"line 3: user {name} was not found")
"""
PEER = """
os.makedirs("/run/peer", exist_ok=True)
server = socket.socket(socket.AF_UNIX); server.bind("/run/peer/socket"); server.listen()
while True:
    client, _ = server.accept()
    pid, uid, gid = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    client.send(REPLY); client.close()
"""
ASK = (
    "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('/run/peer/socket'); "
    "said = s.recv(99).decode(); sys.exit(0 if said == 'welcome' else said)"
)
ASKING_WHO = "b'welcome' if uid == 0 else b'go away'"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    home.run("rm", "--force", "missed")


def peer(reply: str, where: str = "client") -> str:
    """A server that replies so, and a client that needs a welcome."""
    exercise = f'[[exercises]]\ncommand = {json.dumps([PYTHON, "-c", ASK])}\nwhere = "{where}"'
    return spec("missed", PEER.replace("REPLY", reply), 'ready = { unix = "/run/peer/socket" }', exercise)


def test_accounts_that_are_looked_up_only_are_kept_and_no_others(home: Home) -> None:
    names = [user.pw_name for user in pwd.getpwall() if 0 < user.pw_uid < 1000 and user.pw_name.isalpha()][:3]
    report = home.build("missed", spec("missed", LOOKS_UP.replace("NAMES", repr(names[:2]))))
    assert [made["added"][:1] for made in report["rounds"]] == [["/etc/passwd"], ["/etc/passwd"], []]
    assert {one["path"] for one in report["advice"] if one["code"] == "account"} == set(names[:2])
    passwd = (home.directory / "state/jails/missed/current/rootfs/etc/passwd").read_text()
    assert sorted(line.partition(":")[0] for line in passwd.splitlines()) == sorted(["root", *names[:2]])


def test_a_directory_that_a_service_insists_on_making_is_not_made_for_it(home: Home) -> None:
    report = home.build("missed", spec("missed", "os.mkdir('/run/own'); os.mkdir('/run/own/deep'); print('made')"))
    assert [made["added"] for made in report["rounds"]] == [[]]
    assert [home.output("run", "missed") for _ in range(2)] == ["made\n"] * 2


def test_a_client_reaches_a_unix_socket_of_the_jail_at_its_own_path(home: Home) -> None:
    assert [one["passed"] for one in home.build("missed", peer("b'welcome'"))["exercises"]] == [True]


def test_a_client_that_a_service_does_not_know_is_told_to_go_inside(home: Home) -> None:
    home.write("missed", peer(ASKING_WHO))
    done = home.run("build", "missed")
    assert done.returncode != 0
    assert "it said: go away" in done.stderr and 'see whether it passes with `where = "inside"`' in done.stderr
    assert [one["passed"] for one in home.build("missed", peer(ASKING_WHO, "inside"))["exercises"]] == [True]


def test_lines_that_allow_what_was_refused_and_do_not_help_are_not_called_the_cure(home: Home) -> None:
    read = "try: open('/proc/filesystems').read()\nexcept FileNotFoundError: pass\n"
    code = f"{read}sys.exit(0 if len(os.listdir('/usr/share/common-licenses')) > 5 else 'too few')"
    home.write("missed", spec("missed", f"open('/proc/self/stat').read()\n{code}"))
    done = home.run("build", "missed")
    assert done.returncode != 0 and "it listed `/usr/share/common-licenses`" in done.stderr
    assert "put this into the spec" not in done.stderr
    allowed = '[policy]\nproc = "full"'
    assert f"this in the spec allows what was refused, and it failed all the same:\n{allowed}" in done.stderr


def test_a_directory_that_was_listed_in_vain_is_named_with_what_brings_its_files(home: Home) -> None:
    licenses = Path("/usr/share/common-licenses")
    code = f"sys.exit(0 if len(os.listdir('{licenses}')) > 5 else 'too few')"
    home.write("missed", spec("missed", code))
    done = home.run("build", "missed")
    assert done.returncode != 0 and "too few" in done.stderr
    count = len(list(licenses.iterdir()))
    assert f"it listed `{licenses}`, of whose {count} names the jail has 0" in done.stderr
    assert "comes in by `files.include`" in done.stderr
    home.build("missed", spec("missed", code, f'[files]\ninclude = ["{licenses}"]'))


def test_directories_that_are_mounted_in_the_jail_are_not_called_partly_there(home: Home) -> None:
    licenses, mounted, made = "/usr/share/common-licenses", "/usr/share/doc", "/etc/default"
    below = next(str(path) for path in sorted(Path(mounted).iterdir()) if path.is_dir() and not path.is_symlink())
    code = f"found = [os.listdir(path) for path in {[licenses, mounted, below, made]}]\n"
    home.write("missed", spec(
        "missed", f"{code}sys.exit(0 if len(found[0]) > 5 else 'too few')",
        f'[[mounts]]\nsource = "{mounted}"\ntarget = "{mounted}"', f'[directories]\n"{made}" = {{}}',
    ))  # fmt: skip
    done = home.run("build", "missed")
    assert done.returncode != 0 and f"it listed `{licenses}`, of whose" in done.stderr
    assert mounted not in done.stderr and made not in done.stderr

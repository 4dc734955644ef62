from __future__ import annotations

import json
import os
import pickle

import buildbench
import pytest

from stockade.errors import BuildError, HostError
from stockade.kernel import namespaces, userns

CALL = """
import json, os
from stockade.errors import BuildError, HostError
from stockade.kernel import userns
def show(work, ids=None):
    try:
        print(json.dumps(userns.call(work, ids=ids or userns.require_range())))
    except (HostError, BuildError, OSError) as error:
        print(json.dumps([type(error).__name__, str(error), getattr(error, "hint", None)]))
"""


def shown(user: buildbench.User, code: str, **given: str) -> object:
    done = user.python(CALL + code, **given)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_function_runs_as_root_of_the_range(user: buildbench.User) -> None:
    found = shown(user, "show(lambda: [os.getresuid(), os.getresgid(), open('/proc/self/uid_map').read().split()])")
    own = [str(number) for number in (0, buildbench.FIRST_UID, 65536, 65536, buildbench.UID, 1)]
    assert found == [[0, 0, 0], [0, 0, 0], own]


def test_it_reads_the_callers_files_and_writes_those_of_the_range(user: buildbench.User) -> None:
    code = """
open('mine', 'w').write('x'); os.chmod('mine', 0o600)
def work():
    os.mkdir('theirs'); os.chown('theirs', 33, 44)
    return open('mine').read()
show(work)
status = os.stat('theirs')
userns.call(lambda: os.rmdir('theirs'), ids=userns.require_range())
open('owner', 'w').write(f'{status.st_uid} {status.st_gid}')
"""
    assert shown(user, code) == "x"
    assert (user.home / "owner").read_text() == f"{buildbench.FIRST_UID + 33} {buildbench.FIRST_GID + 44}"


def test_host_root_is_not_in_reach(user: buildbench.User) -> None:
    found = shown(user, "show(lambda: open('/etc/shadow').read())")
    assert isinstance(found, list)
    assert found[0] == "PermissionError"


def test_errors_come_back_whole(user: buildbench.User) -> None:
    code = "def work(): raise BuildError('message', hint='cure')\nshow(work)"
    assert shown(user, code) == ["BuildError", "message", "cure"]


def test_with_a_single_id_the_caller_is_that_id(user_without_range: buildbench.User) -> None:
    code = "show(lambda: [os.getuid(), os.getgid(), os.stat('.').st_uid], ids=userns.Single(uid=33, gid=44))"
    assert shown(user_without_range, code) == [33, 44, 33]


def test_a_user_without_a_range_is_told_how_to_get_one(user_without_range: buildbench.User) -> None:
    code = "\ntry: userns.require_range()\nexcept HostError as error: print(json.dumps([error.message, error.hint]))"
    message, hint = shown(user_without_range, code)  # type: ignore[misc]
    assert message == "user `walluser` has no range of subordinate ids in `/etc/subuid` and `/etc/subgid`"
    assert hint == (
        "as root: `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 walluser` "
        "(any 65536 ids that nobody else has)"
    )


def test_a_missing_newuidmap_names_its_package(user: buildbench.User) -> None:
    kind, message, hint = shown(user, "os.environ['PATH'] = '/nowhere'\nshow(os.getpid)")  # type: ignore[misc]
    assert (kind, hint) == ("HostError", "install it: `apt-get install uidmap`")
    assert message == "`newuidmap` is not installed, and without it a range of ids cannot be used"


def test_ids_that_are_not_the_callers_are_refused_with_the_cure(user: buildbench.User) -> None:
    code = "show(os.getpid, ids=userns.Range(first_uid=5000, first_gid=5000, count=10))"
    kind, message, hint = shown(user, code)  # type: ignore[misc]
    assert kind == "HostError"
    assert message.startswith("`newuidmap` refused the ids from 5000 to 5009: ")
    assert "usermod --add-subuids 5000-5009 --add-subgids 5000-5009 walluser" in hint


def test_a_range_is_found_by_name_or_by_number(tmp_path_factory: pytest.TempPathFactory) -> None:
    etc = tmp_path_factory.mktemp("etc")
    (etc / "subuid").write_text(f"other:1:1\nbroken\n{os.getuid()}:100000:70000\n")
    (etc / "subgid").write_text("root:200000:65536\n" if os.getuid() == 0 else f"{os.getuid()}:200000:65536\n")
    assert userns.subordinate(etc=etc) == userns.Range(first_uid=100000, first_gid=200000, count=65536)
    (etc / "subgid").unlink()
    assert userns.subordinate(etc=etc) is None


def test_a_refused_namespace_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_flags: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(userns, "unshare", refuse)
    with pytest.raises(HostError) as caught:
        userns.call(os.getpid, ids=userns.Single(uid=0, gid=0))
    assert "this host refuses user namespaces to user" in caught.value.message
    assert caught.value.hint == namespaces.refusal(1)


def test_a_child_that_dies_is_an_error_and_no_process_is_left() -> None:
    with pytest.raises(HostError, match="ended without an answer, with status 7"):
        userns.call(os._exit, 7, ids=userns.Single(uid=os.getuid(), gid=os.getgid()))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_no_descriptor_is_left() -> None:
    before = os.listdir("/proc/self/fd")
    assert userns.call(os.getuid, ids=userns.Single(uid=5, gid=5)) == 5
    with pytest.raises(ZeroDivisionError):
        userns.call(lambda: 1 // 0, ids=userns.Single(uid=5, gid=5))
    assert os.listdir("/proc/self/fd") == before


def test_an_error_that_cannot_be_sent_arrives_as_text() -> None:
    class Local(Exception):
        def __reduce__(self) -> str:
            raise pickle.PicklingError("cannot")

    def work() -> None:
        raise Local("what happened")

    with pytest.raises(RuntimeError, match="what happened"):
        userns.call(work, ids=userns.Single(uid=5, gid=5))


def test_the_error_of_a_build_keeps_its_hint() -> None:
    def work() -> None:
        raise BuildError("m", hint="h")

    with pytest.raises(BuildError) as caught:
        userns.call(work, ids=userns.Single(uid=5, gid=5))
    assert caught.value.hint == "h"

from __future__ import annotations

from pathlib import Path

import pytest
from samples import spec

from stockade.build import accounts
from stockade.errors import SpecError
from stockade.records.spec import Account, Directory, Files, Service, Spec
from stockade.records.trace import Access, Trace

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
+nisuser::::::
broken:x:notanumber:1::/:/bin/sh
short:x:5
www-data:x:33:33:www:/var/www:/usr/sbin/nologin
alice:x:1000:1000:Alice:/home/alice:/bin/bash
toor:x:0:0:second root:/root:/bin/sh
"""
GROUP = """\
root:x:0:
daemon:x:1:
adm:x:4:alice,daemon
shadow:x:42:
www-data:x:33:
docker:x:998:alice
alice:x:1000:
"""
SHADOW = "root:$y$j9T$secret$hash:19000:0:99999:7:::\nalice:$6$abc$def:19000:0:99999:7:::\n"


@pytest.fixture
def host(tmp_path: Path) -> accounts.HostAccounts:
    (tmp_path / "etc").mkdir()
    for name, text in (("passwd", PASSWD), ("group", GROUP), ("shadow", SHADOW)):
        (tmp_path / "etc" / name).write_text(text)
    return accounts.read(tmp_path)


def sanitised(spec: Spec, host: accounts.HostAccounts, **given: object) -> accounts.AccountFiles:
    fields: dict[str, object] = {"uids": (), "gids": (), "password_hashes": {}, **given}
    return accounts.sanitised(spec, host, **fields)  # type: ignore[arg-type]


def test_damaged_and_nis_lines_are_no_accounts(host: accounts.HostAccounts) -> None:
    assert [user.name for user in host.users] == ["root", "daemon", "www-data", "alice", "toor"]


def test_a_jail_that_runs_as_root_holds_root_alone(host: accounts.HostAccounts) -> None:
    files = sanitised(spec(), host)
    assert files.passwd == b"root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n"
    assert files.group_file == b"root:x:0:\n"
    assert files.shadow == b"root:*:::::::\n"


def test_no_password_hash_of_the_host_enters(host: accounts.HostAccounts) -> None:
    files = sanitised(spec(accounts=(Account(name="alice"),)), host, uids=(0, 33, 1000), gids=(0, 42))
    assert b"$" not in files.passwd + files.shadow
    assert files.user("alice") is not None


def test_observed_ids_bring_their_accounts_and_no_others(host: accounts.HostAccounts) -> None:
    files = sanitised(spec(), host, uids=(33, 4711), gids=(4,))
    assert [user.name for user in files.users] == ["root", "www-data"]
    assert [group.name for group in files.groups] == ["root", "adm", "www-data"]


def test_membership_is_kept_only_of_accounts_that_are_there(host: accounts.HostAccounts) -> None:
    files = sanitised(spec(accounts=(Account(name="alice"),)), host, gids=(4,))
    group = files.group("adm")
    assert group is not None
    assert group.members == ("alice",)
    assert files.group("docker") is None


def test_a_home_stands_only_if_the_spec_or_the_jail_has_it(host: accounts.HostAccounts) -> None:
    plain = sanitised(spec(), host, uids=(33,)).user("www-data")
    used = sanitised(spec(), host, uids=(33,), paths={"/var/www"}).user("www-data")
    named = sanitised(spec(accounts=(Account(name="www-data", home="/srv"),)), host).user("www-data")
    assert plain is not None
    assert used is not None
    assert named is not None
    assert (plain.home, used.home, named.home) == ("/nonexistent", "/var/www", "/srv")


def test_a_login_shell_stands_only_if_the_spec_names_it(host: accounts.HostAccounts) -> None:
    kept = sanitised(spec(accounts=(Account(name="alice"),)), host).user("alice")
    named = sanitised(spec(accounts=(Account(name="alice", shell="/bin/bash"),)), host).user("alice")
    assert kept is not None
    assert named is not None
    assert (kept.shell, named.shell) == ("/usr/sbin/nologin", "/bin/bash")


def test_a_new_account_gets_ids_that_the_host_does_not_use(host: accounts.HostAccounts) -> None:
    wanted = spec(accounts=(Account(name="bob", groups=("uploads",)), Account(name="carol", uid=1001)))
    files = sanitised(wanted, host)
    bob, uploads = files.user("bob"), files.group("uploads")
    assert bob is not None
    assert uploads is not None
    assert (bob.uid, bob.gid) == (1002, 1002)
    assert uploads.gid == 1003
    assert uploads.members == ("bob",)


def test_the_view_and_the_jail_give_a_new_account_the_same_ids(host: accounts.HostAccounts) -> None:
    wanted = spec(accounts=(Account(name="bob"), Account(name="eve", group="adm")), user="bob")
    inside, outside = sanitised(wanted, host), accounts.merged(wanted, host, {})
    assert inside.user("bob") == outside.user("bob")
    assert inside.user("eve") == outside.user("eve")
    assert accounts.identity(wanted, inside) == accounts.identity(wanted, outside)


def test_the_view_keeps_the_hosts_accounts_and_hashes(host: accounts.HostAccounts) -> None:
    wanted = spec(accounts=(Account(name="alice", password="p"), Account(name="bob")))
    files = accounts.merged(wanted, host, {"alice": "$6$new"})
    assert b"root:$y$j9T$secret$hash:19000" in files.shadow
    assert b"alice:$6$new:" in files.shadow
    assert b"$6$abc$def" not in files.shadow
    assert b"bob:*:" in files.shadow
    assert files.passwd.startswith(b"root:x:0:0:root:/root:/bin/bash\ndaemon:")


def test_identity_has_the_groups_that_the_spec_names_and_no_others(host: accounts.HostAccounts) -> None:
    wanted = Spec(name="s", service=Service(command=("/x",), user="alice", groups=("adm", "shadow")))
    identity = accounts.identity(wanted, sanitised(wanted, host))
    assert (identity.uid, identity.gid, identity.groups) == (1000, 1000, (4, 42))


def test_a_numeric_user_needs_no_account(host: accounts.HostAccounts) -> None:
    wanted = spec(user="4711:33")
    identity = accounts.identity(wanted, sanitised(wanted, host))
    assert (identity.uid, identity.gid) == (4711, 33)


def test_an_unknown_service_user_is_named_with_a_suggestion(host: accounts.HostAccounts) -> None:
    with pytest.raises(SpecError) as caught:
        sanitised(spec(user="wwwdata"), host)
    assert caught.value.message == "user `wwwdata` is neither in `[[accounts]]` nor on this host"
    assert caught.value.hint == "did you mean `www-data`?"


def test_owners_in_the_spec_bring_their_accounts(host: accounts.HostAccounts) -> None:
    wanted = spec(
        files=Files(owners={"/etc/x": "daemon:shadow"}), directories={"/run/w": Directory(owner="www-data")}
    )
    files = sanitised(wanted, host)
    assert {user.name for user in files.users} == {"root", "daemon", "www-data"}
    assert accounts.owner(files, "daemon:shadow") == (1, 42)
    assert accounts.owner(files, "www-data") == (33, 33)


def test_an_account_named_twice_is_refused(host: accounts.HostAccounts) -> None:
    with pytest.raises(SpecError, match="stands twice"):
        sanitised(spec(accounts=(Account(name="bob"), Account(name="bob"))), host)


@pytest.mark.parametrize(
    ("output", "read", "users", "groups"),
    [
        ("line 3: user www-data was not found.", ["passwd"], ["www-data"], []),
        ("getpwnam('daemon'): no such user", ["passwd", "group"], ["daemon"], ["daemon"]),
        ("unknown group `adm`", ["group"], [], ["adm"]),
        ("www-data", [], [], []),
        ("user mydaemon www-data2 daemons root docker-compose", ["passwd", "group"], [], []),
        ("cannot start the daemon\nuser unknown", ["passwd", "group"], [], []),
    ],
)
def test_accounts_that_a_failing_service_names_are_missed(
    tmp_path: Path, host: accounts.HostAccounts, output: str, read: list[str], users: list[str], groups: list[str]
) -> None:
    trace = Trace(
        where="inside", accesses=tuple(Access(path=f"/etc/{name}", operation="read") for name in read)
    )  # fmt: skip
    root = accounts.User(name="root", uid=0, gid=0), accounts.Group(name="root", gid=0)
    inside = accounts.HostAccounts(users=root[:1], groups=root[1:])
    found = accounts.missed(output, trace, host, inside)
    assert ([user.name for user in found[0]], [group.name for group in found[1]]) == (users, groups)

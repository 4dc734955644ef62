from __future__ import annotations

from pathlib import Path

from samples import spec

from stockade.build import accounts, secrets
from stockade.build.seeds import account_seeds, client_seeds, seeds
from stockade.records.seed import Seed
from stockade.records.spec import Account, Directory, Files, Secret, Spec

WANTED = spec(
    accounts=(Account(name="bob", uid=2000, home="/home/bob", password="pass"), Account(name="eve", home="/")),
    files=Files(
        content={
            "/etc/plain": "x",
            "/etc/script": "#!/bin/sh\n",
            "/etc/with-secret": "p=${secret:pass}",
            "/etc/keys": "${public:key}\n",
        },
        modes={"/etc/plain": "0640"},
        owners={"/etc/plain": "root:bob"},
        links={"/etc/link": "plain"},
    ),
    directories={"/srv/x": Directory(kind="volume", owner="bob", mode="0750")},
    secrets={
        "pass": Secret(kind="password", client=True),
        "key": Secret(kind="ssh-key", path="/etc/key", owner="bob", mode="0400"),
        "tls": Secret(kind="certificate", path="/etc/tls.pem", key_path="/etc/tls.key"),
        "own": Secret(kind="ssh-key", path="/not/there", client=True),
    },
)


def made(wanted: Spec, directory: Path) -> tuple[dict[str, Seed], dict[str, secrets.Material]]:
    material = secrets.ensure(wanted, directory)
    hashes = secrets.password_hashes(wanted, material)
    files = accounts.sanitised(wanted, accounts.HostAccounts(), uids=(), gids=(), password_hashes=hashes)
    found = (*account_seeds(files), *seeds(wanted, material, files))
    return {seed.path: seed for seed in found}, material


def test_modes_owners_and_secrecy_follow_the_content(tmp_path: Path) -> None:
    found, _ = made(WANTED, tmp_path / "s")
    shown = {path: (seed.mode, seed.uid, seed.gid, seed.secret) for path, seed in found.items()}
    assert shown["/etc/plain"] == (0o640, 0, 2000, False)
    assert shown["/etc/script"] == (0o555, 0, 0, False)
    assert shown["/etc/with-secret"] == (0o400, 0, 0, True)
    assert shown["/etc/keys"] == (0o444, 0, 0, True)
    assert shown["/etc/key"] == (0o400, 2000, 2000, True)
    assert shown["/etc/key.pub"] == (0o444, 2000, 2000, True)
    assert shown["/etc/tls.pem"] == (0o444, 0, 0, True)
    assert shown["/etc/tls.key"] == (0o600, 0, 0, True)
    assert shown["/home/bob"] == (0o700, 2000, 2000, False)
    assert shown["/srv/x"] == (0o750, 2000, 2000, False)
    assert shown["/etc/shadow"] == (0o400, 0, 0, True)
    assert shown["/etc/passwd"] == (0o444, 0, 0, False)
    assert found["/etc/link"].target == "plain"
    assert "/not/there" not in found
    assert "/" not in found


def test_content_is_filled_in(tmp_path: Path) -> None:
    found, material = made(WANTED, tmp_path / "s")
    assert found["/etc/with-secret"].content == b"p=" + material["pass"].value
    assert found["/etc/keys"].content == material["key"].public + b"\n"
    assert f"bob:{material['pass'].hash}:".encode() in found["/etc/shadow"].content


def test_shadow_is_no_secret_while_every_password_is_locked(tmp_path: Path) -> None:
    found, _ = made(spec(), tmp_path / "s")
    assert not found["/etc/shadow"].secret


def test_the_client_sees_files_that_root_alone_can_read(tmp_path: Path) -> None:
    _, material = made(WANTED, tmp_path / "s")
    found = {seed.path.removeprefix("/run/stockade/secrets"): seed for seed in client_seeds(WANTED, material)}
    assert found.keys() == {"", "/pass", "/key", "/key.pub", "/tls", "/own", "/own.pub"}
    assert (found[""].type, found[""].mode) == ("directory", 0o700)
    assert {seed.mode for path, seed in found.items() if path} == {0o600}
    assert found["/pass"].content == material["pass"].value + b"\n"
    assert found["/tls"].content == material["tls"].value

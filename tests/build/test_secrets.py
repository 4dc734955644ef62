from __future__ import annotations

import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from samples import spec

from stockade.build import secrets
from stockade.errors import HostError, SpecError, StateError
from stockade.kernel.crypt import crypt, new_setting
from stockade.records.spec import Account, Secret

ALL = {
    "pass": Secret(kind="password"),
    "token": Secret(kind="random"),
    "host-key": Secret(kind="ssh-key"),
    "tls": Secret(kind="certificate", names=("www.example.org", "127.0.0.1", "::1")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, secrets.Material], Path]:
    directory = tmp_path_factory.mktemp("state") / "secrets"
    return secrets.ensure(spec(secrets=ALL), directory), directory


def test_secrets_are_generated_once(made: tuple[dict[str, secrets.Material], Path]) -> None:
    first, directory = made
    assert secrets.ensure(spec(secrets=ALL), directory) == first


def test_only_the_owner_can_read_secrets(made: tuple[dict[str, secrets.Material], Path]) -> None:
    _, directory = made
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for path in directory.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_each_secret_is_of_its_kind(made: tuple[dict[str, secrets.Material], Path], tmp_path: Path) -> None:
    material, _ = made
    assert len(material["pass"].value) == 20
    assert material["pass"].value.isalnum()
    assert len(bytes.fromhex(material["token"].value.decode())) == 32
    key = tmp_path / "key"
    key.write_bytes(material["host-key"].value)
    key.chmod(0o600)
    derived = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, check=True, timeout=20).stdout
    assert derived.split()[:2] == material["host-key"].public.split()[:2]


def test_the_certificate_holds_for_its_names_and_fits_its_key(
    made: tuple[dict[str, secrets.Material], Path], tmp_path: Path
) -> None:
    material, _ = made
    (tmp_path / "cert").write_bytes(material["tls"].value)
    (tmp_path / "key").write_bytes(material["tls"].key)

    def openssl(*words: str) -> str:
        done = subprocess.run(["openssl", *words], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout

    text = openssl("x509", "-in", "cert", "-noout", "-text")
    assert "DNS:www.example.org, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1" in text
    assert "prime256v1" in text
    assert openssl("x509", "-in", "cert", "-noout", "-pubkey") == openssl("pkey", "-in", "key", "-pubout")
    assert "is not" not in openssl("verify", "-CAfile", "cert", "-verify_hostname", "www.example.org", "cert")


def test_a_certificate_whose_names_change_is_made_anew(tmp_path: Path) -> None:
    one = spec(secrets={"tls": Secret(kind="certificate", names=("one.example",))})
    two = spec(secrets={"tls": Secret(kind="certificate", names=("two.example",))})
    first = secrets.ensure(one, tmp_path / "s")["tls"].value
    assert secrets.ensure(two, tmp_path / "s")["tls"].value != first


def test_a_certificate_in_its_last_month_is_made_anew(tmp_path: Path) -> None:
    wanted = spec(secrets={"tls": Secret(kind="certificate")})
    first = secrets.ensure(wanted, tmp_path / "s")["tls"].value
    old = (tmp_path / "s/tls/value").stat().st_mtime - 800 * 86400
    os.utime(tmp_path / "s/tls/value", (old, old))
    assert secrets.ensure(wanted, tmp_path / "s")["tls"].value != first


def test_a_password_hash_stays_the_same_and_checks(made: tuple[dict[str, secrets.Material], Path]) -> None:
    material, directory = made
    wanted = spec(secrets=ALL, accounts=(Account(name="bob", password="pass"),))
    again = secrets.password_hashes(wanted, secrets.ensure(wanted, directory))
    assert again == {"bob": material["pass"].hash}
    assert crypt(material["pass"].value.decode(), again["bob"]) == again["bob"]
    assert crypt("another", again["bob"]) != again["bob"]


def test_crypt_agrees_with_openssl() -> None:
    setting = new_setting()
    salt = setting.split("$")[2]
    theirs = subprocess.run(
        ["openssl", "passwd", "-6", "-salt", salt, "pa ss"], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
    assert crypt("pa ss", setting) == theirs


def test_two_processes_get_the_same_secrets(tmp_path: Path) -> None:
    results: list[dict[str, secrets.Material]] = []
    wanted = spec(secrets={"a": Secret(kind="ssh-key"), "b": Secret(kind="password")})
    threads = [
        threading.Thread(target=lambda: results.append(secrets.ensure(wanted, tmp_path / "s"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 4
    assert all(result == results[0] for result in results)


def test_what_a_kill_left_half_made_is_removed(tmp_path: Path) -> None:
    (tmp_path / "s/.new-dead").mkdir(parents=True)
    (tmp_path / "s/.new-dead/value").write_text("half")
    secrets.ensure(spec(secrets={"b": Secret(kind="random")}), tmp_path / "s")
    assert sorted(entry.name for entry in (tmp_path / "s").iterdir()) == ["b"]


def test_a_missing_generator_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind, program, package in (("ssh-key", "ssh-keygen", "openssh-client"), ("certificate", "openssl", "openssl")):
        with pytest.raises(HostError) as caught:
            secrets.ensure(spec(secrets={"x": Secret(kind=kind)}), tmp_path / "s")  # type: ignore[arg-type]
        assert f"`{program}` is not installed" in caught.value.message
        assert caught.value.hint == f"install it: `apt-get install {package}`"
    assert list((tmp_path / "s").iterdir()) == []


def test_a_secret_of_another_kind_is_not_overwritten(tmp_path: Path) -> None:
    secrets.ensure(spec(secrets={"x": Secret(kind="random")}), tmp_path / "s")
    before = (tmp_path / "s/x/value").read_bytes()
    with pytest.raises(StateError, match="does not hold a secret of kind `ssh-key`"):
        secrets.ensure(spec(secrets={"x": Secret(kind="ssh-key")}), tmp_path / "s")
    assert (tmp_path / "s/x/value").read_bytes() == before


@pytest.mark.parametrize("name", ["a b", "x,DNS:evil.example", "x\nbasicConstraints=CA:FALSE", ""])
def test_a_certificate_name_cannot_carry_more_than_a_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="neither a host name nor an IP address"):
        secrets.ensure(spec(secrets={"x": Secret(kind="certificate", names=(name,))}), tmp_path / "s")


def test_references_are_filled_in(made: tuple[dict[str, secrets.Material], Path]) -> None:
    material, _ = made
    texts = secrets.substitutions(spec(secrets=ALL), material)
    filled = secrets.substitute("${secret:pass}|${secret-file:tls}|${public:host-key}|${HOME}", texts, place="x")
    assert filled.split("|") == [
        material["pass"].value.decode(),
        "/run/stockade/secrets/tls",
        material["host-key"].public.decode(),
        "${HOME}",
    ]


def test_an_unknown_reference_is_named_with_a_suggestion(made: tuple[dict[str, secrets.Material], Path]) -> None:
    texts = secrets.substitutions(spec(secrets=ALL), made[0])
    with pytest.raises(SpecError) as caught:
        secrets.substitute("${public:hostkey}", texts, place='`files.content."/x"`')
    assert caught.value.message == '`files.content."/x"` refers to `${public:hostkey}`, which `[secrets]` does not give'
    assert caught.value.hint == "did you mean `public:host-key`?"


def test_an_account_whose_password_is_no_password_is_refused(made: tuple[dict[str, secrets.Material], Path]) -> None:
    with pytest.raises(SpecError) as caught:
        secrets.password_hashes(spec(secrets=ALL, accounts=(Account(name="bob", password="token"),)), made[0])
    assert "account `bob` names `token`, which is no secret of kind `password`" in caught.value.message

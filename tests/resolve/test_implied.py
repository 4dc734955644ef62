from __future__ import annotations

import os
from pathlib import Path

import pytest
from little_world import World, did, entry, paths, spec, trace

from stockade.records.closure import Closure
from stockade.records.spec import Network, Service
from stockade.resolve import resolve

MULTIARCH = "/usr/lib/x86_64-linux-gnu"


def implied(closure: Closure, path: str) -> set[str]:
    return {evidence.detail for evidence in entry(closure, path).evidence if evidence.kind == "implied"}


def command(*words: str, **environment: str) -> Service:
    return Service(command=words, environment=environment)


def test_reading_nsswitch_brings_the_modules_that_it_names_and_glibc_has_not_built_in() -> None:
    """Against the host's own file: files and dns are in libc, what else is named and installed comes in."""
    text = Path("/etc/nsswitch.conf").read_text()
    closure = resolve(trace(did("read", "/etc/nsswitch.conf")), spec(service=command("/bin/true")))
    modules = {os.path.basename(name) for name in paths(closure) if "/libnss_" in name}
    named = {word for line in text.splitlines() for word in line.partition("#")[0].partition(":")[2].split()}
    wanted = {
        f"libnss_{name}.so.2" for name in named - {"files", "dns"} if os.path.exists(f"{MULTIARCH}/libnss_{name}.so.2")
    }
    assert modules == wanted


def test_a_pam_stack_comes_with_what_it_includes_and_its_modules_with_their_libraries() -> None:
    closure = resolve(
        trace(did("read", "/etc/pam.d/sshd"), did("read", "/etc/pam.d/other")), spec(service=command("/bin/true"))
    )
    found = paths(closure)
    assert {"/etc/pam.d/sshd", "/etc/pam.d/common-auth", "/etc/pam.d/other", "/etc/login.defs"} <= found
    assert {f"{MULTIARCH}/security/pam_unix.so", f"{MULTIARCH}/security/pam_deny.so"} <= found
    assert os.path.realpath(f"{MULTIARCH}/libcrypt.so.1") in found
    assert implied(closure, f"{MULTIARCH}/security/pam_unix.so") == {"PAM"}


def test_a_pam_stack_that_was_not_used_stays_out() -> None:
    closure = resolve(trace(did("read", "/etc/pam.d/sshd")), spec(service=command("/bin/true")))
    assert "/etc/pam.d/login" not in paths(closure)


@pytest.mark.parametrize("touched", ["/usr/lib/ssl/certs/0a1b2c3d.0", "/etc/ssl/certs/ca-certificates.crt"])
@pytest.mark.parametrize("error", ["", "ENOENT"])
def test_touching_one_certificate_brings_them_all(world: World, touched: str, error: str) -> None:
    """One page only needs one of them, and no exercise asks for it."""
    world.files("/usr/share/ca-certificates/mozilla/A.crt", "/etc/ssl/certs/ca-certificates.crt")
    world.link("/etc/ssl/certs/A.pem", "/usr/share/ca-certificates/mozilla/A.crt")
    world.link("/etc/ssl/certs/12345678.0", "A.pem")
    world.link("/usr/lib/ssl/certs", "/etc/ssl/certs")
    world.file("/etc/ssl/private/x.key")
    closure = world.resolve(trace(did("read", touched, error)))
    assert {
        "/etc/ssl/certs/A.pem", "/etc/ssl/certs/12345678.0", "/etc/ssl/certs/ca-certificates.crt",
        "/usr/share/ca-certificates/mozilla/A.crt", "/usr/lib/ssl/certs",
    } <= paths(closure)  # fmt: skip
    assert implied(closure, "/usr/share/ca-certificates/mozilla/A.crt") == {"CA certificates"}
    assert "/etc/ssl/private/x.key" not in paths(closure)


def test_no_certificate_comes_in_untouched(world: World) -> None:
    world.files("/etc/ssl/certs/ca-certificates.crt", "/usr/lib/ssl/openssl.cnf")
    closure = world.resolve(trace(did("read", "/usr/lib/ssl/openssl.cnf")))
    assert "/etc/ssl/certs/ca-certificates.crt" not in paths(closure)


def test_the_hosts_time_zone_comes_in_unless_the_spec_says_no(world: World) -> None:
    world.file("/usr/share/zoneinfo/Europe/Paris")
    world.file("/usr/share/zoneinfo/Asia/Tokyo")
    world.link("/etc/localtime", "/usr/share/zoneinfo/Europe/Paris")
    closure = world.resolve(None, spec(timezone=True))
    assert {"/etc/localtime", "/usr/share/zoneinfo/Europe/Paris"} <= paths(closure)
    assert "/usr/share/zoneinfo/Asia/Tokyo" not in paths(closure)
    assert "/etc/localtime" not in paths(world.resolve(None, spec(timezone=False)))
    tokyo = spec(timezone=True, service=command("/usr/bin/service", TZ="Asia/Tokyo"))
    assert "/usr/share/zoneinfo/Asia/Tokyo" in paths(world.resolve(None, tokyo))


def test_a_locale_of_which_one_file_was_read_comes_whole(world: World) -> None:
    world.files("/usr/lib/locale/de_DE.utf8/LC_TIME", "/usr/lib/locale/de_DE.utf8/LC_MESSAGES/SYS_LC_MESSAGES")
    world.file("/usr/lib/locale/fr_FR.utf8/LC_TIME")
    closure = world.resolve(trace(did("read", "/usr/lib/locale/de_DE.utf8/LC_TIME")))
    assert "/usr/lib/locale/de_DE.utf8/LC_MESSAGES/SYS_LC_MESSAGES" in paths(closure)
    assert "/usr/lib/locale/fr_FR.utf8/LC_TIME" not in paths(closure)


def test_the_locale_that_the_spec_asks_for_comes_in(world: World) -> None:
    world.files("/usr/lib/locale/de_DE.utf8/LC_TIME", "/usr/lib/locale/C.utf8/LC_CTYPE")
    given = spec(locale=True, service=command("/usr/bin/service", LANG="de_DE.UTF-8"))
    assert {"/usr/lib/locale/de_DE.utf8/LC_TIME", "/usr/lib/locale/C.utf8/LC_CTYPE"} <= paths(
        world.resolve(trace(), given)
    )
    assert "/usr/lib/locale/C.utf8/LC_CTYPE" not in paths(world.resolve(trace()))


def test_gconv_brings_its_tables(world: World) -> None:
    world.files(f"{MULTIARCH}/gconv/gconv-modules.cache", f"{MULTIARCH}/gconv/gconv-modules.d/extra.conf")
    world.file(f"{MULTIARCH}/gconv/EUC-JP.so")
    closure = world.resolve(trace(did("read", f"{MULTIARCH}/gconv/gconv-modules.cache")))
    assert f"{MULTIARCH}/gconv/gconv-modules.d/extra.conf" in paths(closure)
    assert f"{MULTIARCH}/gconv/EUC-JP.so" not in paths(closure)


def test_a_program_with_a_terminal_library_brings_the_usual_terminals() -> None:
    if not os.path.exists("/lib/terminfo/x/xterm"):
        pytest.skip("needs the basic terminal descriptions (package `ncurses-base`)")
    closure = resolve(trace(), spec(service=command("bash")))
    assert {"/usr/lib/terminfo/x/xterm", "/usr/lib/terminfo/d/dumb"} <= paths(closure)
    assert implied(closure, "/usr/lib/terminfo/x/xterm") == {"terminfo"}


def test_the_resolver_comes_with_a_network_when_nothing_was_observed(world: World) -> None:
    world.files("/etc/resolv.conf", "/etc/hosts", "/etc/services")
    networked = spec(network=Network(mode="private"))
    assert {"/etc/resolv.conf", "/etc/hosts", "/etc/services"} <= paths(world.resolve(None, networked))
    assert "/etc/hosts" not in paths(world.resolve(None))
    assert "/etc/hosts" not in paths(world.resolve(trace(), networked))
    assert "/etc/hosts" in paths(world.resolve(trace(did("read", "/etc/resolv.conf"))))


def test_a_variable_of_the_environment_leads_to_no_other_directory(world: World) -> None:
    world.file("/usr/share/secret")
    given = spec(timezone=True, service=command("/usr/bin/service", TZ="../secret"))
    assert "/usr/share/secret" not in paths(world.resolve(None, given))

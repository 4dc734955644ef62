from __future__ import annotations

import os

import pytest
from little_world import World, did, spec, trace

from stockade.errors import ResolveError
from stockade.records.closure import Closure, Entry, Evidence
from stockade.records.spec import Service
from stockade.resolve import Step, chain, resolve, summary


def test_the_numbers_are_those_of_the_entries(world: World) -> None:
    world.file("/srv/a", "1234", mode=0o644)
    world.file("/usr/bin/su", "12", mode=0o4755)
    world.link("/srv/link", "a")
    closure = world.resolve(
        trace(did("read", "/srv/link"), did("exec", "/usr/bin/su"), did("read", "/none", "ENOENT"), uids=(5,))
    )
    found = summary(closure)
    assert (found.files, found.symlinks, found.size_bytes) == (3, 1, 4 + 2 + len("service"))
    assert found.directories == len([entry for entry in closure.entries if entry.type == "directory"])
    assert found.entries == found.files + found.symlinks + found.directories
    assert found.programs == ("/usr/bin/service", "/usr/bin/su")
    assert found.setuid == ("/usr/bin/su",)
    assert found.uids == (5,)
    assert found.left_out == {"absent on the host too": 1}
    assert found.evidence["access"] == 2


def test_the_chain_leads_from_a_library_to_the_command() -> None:
    closure = resolve(None, spec(service=Service(command=("sshd",))))
    steps = chain(closure, "/lib/x86_64-linux-gnu/libz.so.1")
    assert steps[0].path == "/usr/lib/x86_64-linux-gnu/libz.so.1"
    assert steps[0].evidence.kind == "symlink"
    assert steps[1].evidence == Evidence(kind="needed", detail="libz.so.1 by ld.so.cache", because="/usr/sbin/sshd")
    assert steps[-1] == Step(path="/usr/sbin/sshd", evidence=Evidence(kind="spec", detail="the command"))


def test_every_entry_of_a_real_closure_has_a_chain_that_ends() -> None:
    closure = resolve(None, spec(service=Service(command=("sshd",)), timezone=True))
    known = {entry.path for entry in closure.entries}
    for entry in closure.entries:
        steps = chain(closure, entry.path)
        assert steps
        assert steps[0].path == entry.path
        assert steps[-1].evidence.because not in known, f"{entry.path}: {steps}"


def test_a_circle_of_evidence_ends() -> None:
    entries = tuple(
        Entry(path=path, type="file", evidence=(Evidence(kind="needed", because=because),))
        for path, because in (("/a", "/b"), ("/b", "/c"), ("/c", "/b"))
    )
    steps = chain(Closure(entries=entries), "/a")
    assert [step.path for step in steps] == ["/a", "/b"]


def test_the_shortest_of_several_chains_is_told() -> None:
    long = Evidence(kind="needed", because="/b")
    short = Evidence(kind="access", detail="read")
    entries = (
        Entry(path="/a", type="file", evidence=(long, short)),
        Entry(path="/b", type="file", evidence=(Evidence(kind="spec"),)),
    )
    assert chain(Closure(entries=entries), "/a") == (Step(path="/a", evidence=short),)


def test_an_unknown_path_is_told_with_its_reason_or_a_near_one(world: World) -> None:
    world.file("/usr/share/doc/x/README")
    closure = world.resolve(trace(did("read", "/usr/share/doc/x/README")))
    with pytest.raises(ResolveError) as caught:
        chain(closure, "/usr/share/doc/x/README")
    assert caught.value.message == "`/usr/share/doc/x/README` is not in the jail: left out: documentation"
    with pytest.raises(ResolveError) as caught:
        chain(closure, "/usr/bin/servic")
    assert caught.value.hint == "did you mean `/usr/bin/service`?"


def test_a_path_of_any_bytes_can_be_asked_for(world: World) -> None:
    path = world.file(f"/srv/{os.fsdecode(bytes([255, 10]))}")
    assert chain(world.resolve(trace(did("read", path))), path)[0].path == path

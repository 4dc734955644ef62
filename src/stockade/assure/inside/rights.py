"""V1 to V10: ways to more rights than the service was given."""

from __future__ import annotations

import ctypes
import os
import subprocess

from .calls import CAPABILITY_VERSION, attempt, capability_sets, error_name, opening
from .results import Result, held, reached, skipped, worst
from .world import World

__all__ = ["PROBES"]

# include/uapi/linux/prctl.h, sched.h, keyctl.h, personality.h
_PR_GET_NO_NEW_PRIVS = 39
_CLONE_NEWUSER, _SIGCHLD = 0x10000000, 17
_GET_KEYRING_ID, _SESSION_KEYRING, _PROCESS_KEYRING = 0, -3, -2
_NO_RANDOMIZE = 0x0040000

_REPORT = "import sys; sys.path.insert(0, sys.argv[1]); from inside.helper import main; main(*sys.argv[2:])"


def _helper(world: World, name: str) -> tuple[int, int] | str:
    """Effective uid and permitted capabilities behind the helper, a loader with rights of its own; or why not."""
    helper = world.request["helpers"].get(name)
    if helper is None:
        return "the helper cannot be made here: the caller has one id only"
    program = [f"{world.tree}/{helper}", *world.request["python"][1:], "-I", "-S", "-B", "-c", _REPORT]
    command = [*program, world.tree, *(str(world.call.numbers[name]) for name in ("capget", "prctl"))]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        return f"exec: {error_name(error.errno or 0)}"
    if done.returncode != 0:
        return f"exec: {done.stderr.decode(errors='replace').strip()[-120:]}"
    uid, permitted = done.stdout.split()
    return int(uid), int(permitted)


def setuid_helper(world: World) -> Result:
    if os.geteuid() == 0:
        return skipped("already uid 0")
    answer = _helper(world, "setuid")
    if isinstance(answer, str):
        return held(answer) if answer.startswith("exec") else skipped(answer)
    if answer[0] != os.geteuid():
        return reached(f"a setuid helper runs as uid {answer[0]}")
    return held("the effective uid stays the same")


def capability_helper(world: World) -> Result:
    own = capability_sets(world.call)["permitted"]
    answer = _helper(world, "capable")
    if isinstance(answer, str):
        return held(answer) if answer.startswith("exec") else skipped(answer)
    more = answer[1] & ~own
    if more:
        return reached(f"a helper with file capabilities has {more:#x} more than the service")
    return held("no capability is added")


def no_new_privileges(world: World) -> Result:
    value, _ = world.call("prctl", _PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
    bounding = capability_sets(world.call)["bounding"] & ~world.request["granted"]
    more = reached(f"the bounding set holds {bounding:#x} beyond the policy")
    return worst([
        held("no_new_privs is set") if value == 1 else reached("no_new_privs is not set"),
        more if bounding else held("the bounding set is the policy's"),
    ])  # fmt: skip


def passed_on_sets(world: World) -> Result:
    sets = capability_sets(world.call)
    allowed = world.request["granted"] if os.geteuid() != 0 else 0
    more = {name: sets[name] & ~allowed for name in ("inheritable", "ambient") if sets[name] & ~allowed}
    if more:
        return reached("; ".join(f"the {name} set holds {mask:#x}" for name, mask in more.items()))
    return held("inheritable and ambient hold nothing beyond the policy")


def user_namespace(world: World) -> Result:
    # A success changes only this process, which ends with the probe.
    pid, error = world.call("clone", _CLONE_NEWUSER | _SIGCHLD, 0, 0, 0, 0)
    if pid == 0 and not error:
        os._exit(0)
    if pid > 0:
        os.waitpid(pid, 0)
    return worst([
        attempt("clone of a user namespace", (pid, error)),
        attempt("unshare of a user namespace", world.call("unshare", _CLONE_NEWUSER)),
    ])  # fmt: skip


def clone3(world: World) -> Result:
    return attempt("clone3", world.call("clone3", None, 0), reach=("EINVAL", "EFAULT", "E2BIG"))


def leftover_groups(world: World) -> Result:
    allowed = set(world.request["groups"])
    extra = ({*os.getresgid(), *os.getgroups()}) - allowed
    if extra:
        return reached(f"groups beyond the service's: {' '.join(map(str, sorted(extra)))}")
    return held("none is left over")


def keys(world: World) -> Result:
    name, content = ctypes.create_string_buffer(b"stockade-probe"), ctypes.create_string_buffer(b"x")
    return worst([
        attempt("keyctl", world.call("keyctl", _GET_KEYRING_ID, _SESSION_KEYRING, 0), reach=("ENOKEY",)),
        attempt("add_key", world.call("add_key", b"user", name, content, 1, _PROCESS_KEYRING)),
    ])  # fmt: skip


def personality(world: World) -> Result:
    return attempt("personality", world.call("personality", _NO_RANDOMIZE))


def root_without_capabilities(world: World) -> Result:
    if os.geteuid() != 0:
        return skipped("not uid 0")
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    world.call("capset", header, (ctypes.c_uint32 * 6)())
    error, _ = opening("/proc/sys/kernel/core_pattern", os.O_WRONLY)
    if error:
        return held(f"open of core_pattern for writing: {error}")
    return reached("core_pattern can be opened for writing by the uid alone")


PROBES = {
    "V1": setuid_helper,
    "V2": capability_helper,
    "V3": no_new_privileges,
    "V4": passed_on_sets,
    "V5": user_namespace,
    "V6": clone3,
    "V7": leftover_groups,
    "V8": keys,
    "V9": personality,
    "V10": root_without_capabilities,
}

"""From a trace and a spec to the closure: every file that a jail needs, with the evidence. Never runs a target."""

from . import elf, ldso, packages, shebang
from .closure import require_command, resolve
from .gap import gaps
from .packages import PackageIndex
from .summary import Step, Summary, chain, summary

__all__ = [
    "PackageIndex",
    "Step",
    "Summary",
    "chain",
    "elf",
    "gaps",
    "ldso",
    "packages",
    "require_command",
    "resolve",
    "shebang",
    "summary",
]

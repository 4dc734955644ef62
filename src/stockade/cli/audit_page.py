"""The page of audit rules, made from the rules: `python -m stockade.cli.audit_page > docs/audit.md`."""

from __future__ import annotations

from collections.abc import Iterator

from stockade.assure.audit import rules
from stockade.assure.audit.catalogue import Rule, lists, scoring

__all__ = ["page"]

_HEAD = """\
# Audit

Made from the rules themselves: `python -m stockade.cli.audit_page > docs/audit.md`.

`stockade audit NAME` looks at a jail: at every file of its root, its accounts and secrets, at how it differs from its
lock and from the host's present packages, and at what its policy allows beyond what the service was seen to need.
`stockade audit --root DIR` looks at a directory that another tool made (jailkit, debootstrap, by hand), without a
lock; for it a program "never used" is one that is there and executable. `--user NAME` says as whom the service runs.

Nothing is executed and nothing is changed. Devices, FIFOs and sockets are never opened; no path, link or mount leads
out of the tree; what cannot be read, vanishes or is too deep is a finding. Volumes are not looked at: they hold what
the service writes, and are mounted nosuid, nodev and without a way to the host's ids.

The exit status is 0 when nothing is found that is not accepted, 1 when something is, 2 for a malformed command line or
baseline. `--json` writes the report of `stockade/schema/audit.json`. `stockade explain CODE` tells a rule.

## Accepting

The spec says in `[files.reasons]` why a path is there on purpose: that accepts the rules marked *reason* below for
that path, and no others (a shell that is meant to be there may still not be writable). For everything else, and for
directories, there is a baseline, `--baseline FILE`:

```toml
[[accept]]
code = "SETUID"
path = "/usr/bin/su"        # as the report writes it; or a glob, in which * also crosses /
reason = "administrators log in to this one"
expires = 2030-12-31        # optional; from the next day on it is a finding again
```

An entry that has expired, matches nothing or names no rule is a finding of its own.

## Mending

`--fix`, with `--root` only, lists the changes that it would make, asks (or takes `--force`), makes them, and audits
again. It takes mode bits and file capabilities away (rules marked *fix*). Accounts go only with `--user`, as an
account that owns nothing may be the service's. A file with another name outside of the tree is left alone: it would
change there too. A jail of Stockade's is mended by its spec: change it and build again.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([_HEAD, *_score(), *_rules()]).rstrip("\n") + "\n"


def _score() -> Iterator[str]:
    marks = scoring()
    weights = ", ".join(f"{severity} {weight:g}" for severity, weight in marks.weights.items())
    yield "## Score\n"
    yield f"Weights: {weights}. A rule that is broken n times gives (1 + log2 n) times its weight, and the score is"
    yield f"100 / (1 + points / {marks.half:g}): 100 for nothing found, 50 at {marks.half:g} points. The report has it"
    yield "twice, without and with what is accepted, so that two jails can be compared whatever was accepted.\n"


def _rules() -> Iterator[str]:
    yield "## Rules\n"
    yield "| code | severity | what is wrong | what to do | source | |"
    yield "|---|---|---|---|---|---|"
    for code, rule in rules().items():
        cells = (f"`{code}`", rule.severity, rule.title, rule.remedy, rule.source, _marks(rule))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    limit = lists()["secrets"]["limit"]
    yield ""
    yield f"Secrets are looked for in the first {limit // 1024} KiB of every file but ELF files; no report shows one."
    yield "The lists that the rules go by (programs, devices, patterns of secrets, file systems, paths of the host) are"
    yield "`lists.toml` beside the rules in `rules.toml`, in the package's `assure` directory."


def _marks(rule: Rule) -> str:
    marks = [name for name, on in (("reason", rule.reason), ("fix", rule.fix), ("jails only", bool(rule.needs))) if on]
    return ", ".join(f"*{name}*" for name in marks)


if __name__ == "__main__":
    print(page(), end="")

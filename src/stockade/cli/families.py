"""Verbs that have verbs of their own: `image`, `guest`, `snapshot`."""

from __future__ import annotations

from stockade.cli.parser import Parser, Subparsers

__all__ = ["add_family"]


def add_family(subparsers: Subparsers, name: str, *, help: str) -> Subparsers:
    """Add the family `name` and return what its verbs are added to."""
    parser: Parser = subparsers.add_parser(
        name, help=help, description=f"{help[:1].upper()}{help[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(parser=parser)
    return parser.add_subparsers(title="verbs", metavar="VERB", required=True)

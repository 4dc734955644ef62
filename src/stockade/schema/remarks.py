"""What the comment behind each field of a record says, for schemas and the reference. Reads source, runs nothing."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from functools import cache

import msgspec

__all__ = ["remarks"]


@cache
def remarks(record: type[msgspec.Struct]) -> dict[str, str]:
    """Return the comment on the line of each field of `record` that has one."""
    source = textwrap.dedent(inspect.getsource(record))
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        node.target.id: comments[node.end_lineno]
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in comments
    }

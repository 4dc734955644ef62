"""Sockets that the service is given, as `listen` in `[network]` names them, opened where its exercises run."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import HostError
from ..records.publish import parse_listen
from ..records.spec import Spec
from .view import View

__all__ = ["given_ports", "given_sockets"]

_HINTS = {
    errno.EADDRINUSE: "see `listen` in `[network]`: two entries may clash",
    errno.EAFNOSUPPORT: "see `listen` in `[network]`: this kernel lacks IPv6",
}


def given_ports(spec: Spec) -> frozenset[tuple[str, int]]:
    """Protocol and port of each, which is open before the service starts."""
    return frozenset((wanted.protocol, wanted.port) for wanted in map(parse_listen, spec.network.listen))


@contextmanager
def given_sockets(spec: Spec, view: View) -> Iterator[tuple[int, ...]]:
    """Descriptors of them in the network of `view`, in the spec's order, open for the length of a block.

    HostError for one that cannot be had.
    """
    opened: list[int] = []
    try:
        for text in spec.network.listen:
            wanted = parse_listen(text)
            try:
                opened.append(view.listen(wanted.address, wanted.port, datagrams=wanted.protocol == "udp"))
            except OSError as error:
                raise HostError(
                    f"cannot listen on `{text}` where the exercises run: {error.strerror}",
                    hint=_HINTS.get(error.errno or 0),
                ) from error
        yield tuple(opened)
    finally:
        for descriptor in opened:
            os.close(descriptor)

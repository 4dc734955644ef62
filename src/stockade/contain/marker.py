"""The file `network` beside a plan: what a launch of the jail does outside. Opens nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from stockade.errors import UsageError

if TYPE_CHECKING:
    from stockade.records.launch import IdRange
    from stockade.records.spec import Network

__all__ = ["Outside", "read", "refuse_too_many", "write"]

_NAME = "network"
_NOBODY = 65534
#: What the warden takes: sockets for the service, and those together with the descriptors of its helpers.
_MOST_GIVEN, _MOST_OPEN = 32, 53


class Outside(msgspec.Struct, frozen=True, kw_only=True):
    """Published ports, egress, and sockets that the service is given. `ids` are uid and gid of the helpers."""

    publish: tuple[str, ...] = ()
    egress: bool = False
    listen: tuple[str, ...] = ()
    ids: tuple[str, str]


def write(network: Network, ids: IdRange, generation: Path) -> None:
    """Keep what launches of the jail in `generation` do outside. No file without any of it."""
    marker = generation / _NAME
    served = network.mode == "private" and (network.publish or network.egress)
    if not (served or network.listen):
        marker.unlink(missing_ok=True)
        return
    fresh = generation / f".{_NAME}.new"
    # A helper that root starts becomes nobody, of the ids that the jail owns.
    nobody = min(_NOBODY, ids.count - 1)
    wanted = Outside(
        publish=network.publish, egress=network.egress, listen=network.listen,
        ids=(str(ids.first + nobody), str(ids.first_gid + nobody)),
    )  # fmt: skip
    fresh.write_bytes(msgspec.json.encode(wanted))
    fresh.replace(marker)


def read(generation: Path) -> Outside | None:
    """What launches of the jail in `generation` do outside, None for nothing; msgspec.DecodeError when damaged."""
    try:
        return msgspec.json.decode((generation / _NAME).read_bytes(), type=Outside)
    except FileNotFoundError:
        return None


def refuse_too_many(*, given: int, published: int) -> None:
    """UsageError for more sockets than a launch carries: `given` to the service, and `published` by the forwarder."""
    most = _MOST_OPEN - 1 - given  # egress takes one
    for what, count, limit in (("given to the service", given, _MOST_GIVEN), ("published", published, most)):
        if count > limit:
            raise UsageError(
                f"{count} sockets are to be {what}, and a jail has {limit} at most",
                hint="divide them among several jails; a service with many ports on the host's own addresses can have "
                '`mode = "host"`',
            )

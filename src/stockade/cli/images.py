"""The verbs about images: image create, import, list, inspect, export, rm; boot."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from stockade import machines
from stockade.cli import console
from stockade.cli.families import add_family
from stockade.cli.joining import LEAVE, join
from stockade.cli.parser import Parser, Subparsers, add_verb
from stockade.errors import StateError, UsageError
from stockade.records.image import Image, ImageStart
from stockade.records.machine import ImageReport, ImagesReport
from stockade.records.policy import size_bytes
from stockade.vm import control, debian, images, manage, sparse, staging, store

__all__ = ["byte_count", "register"]


def register(subparsers: Subparsers) -> None:
    """Add the verbs to the parser."""
    family = add_family(subparsers, "image", help="make, import and keep images: a root file system in one file")
    _register_making(family)

    add_verb(family, "list", list_images, json=True, help="list the images")
    parser = add_verb(family, "inspect", inspect, json=True, help="show what is known of an image")
    _name(parser)
    parser.add_argument(
        "--verify", action="store_true", help="read it all, and compare its SHA-256 with the recorded one"
    )
    parser = add_verb(
        family, "export", export, help="write an image to a file",
        description="Write an image to FILE, compressed where its name ends in .xz, .zst or .gz; print its SHA-256.",
    )  # fmt: skip
    _name(parser)
    parser.add_argument("file", metavar="FILE", help="the file to make")
    parser.add_argument(
        "--with-secrets", action="store_true", help="even though it holds keys that were generated for it"
    )
    parser = add_verb(family, "rm", remove, help="remove images")
    parser.add_argument("name", metavar="NAME", nargs="+", help="name of the image")
    parser.add_argument("--force", action="store_true", help="even those that guests are made of: they keep their base")

    parser = add_verb(
        subparsers, "boot", boot,
        help="boot an image once, on a disk that vanishes",
        description="Boot an image as a guest without a network, with its console on this terminal, and forget what it "
        "wrote once it has ended or Ctrl-] was typed. That is how an imported image is looked at first.",
    )  # fmt: skip
    _name(parser)
    parser.add_argument(
        "--memory", metavar="SIZE", type=byte_count, default=128 << 20, help="its memory (default: 128M)"
    )
    parser.add_argument("--walls", metavar="WALLS", default="jail,vm", help="walls around it (default: jail,vm)")


def _register_making(family: Subparsers) -> None:
    parser = add_verb(
        family, "create", create,
        help="make an image of a jail, of a Debian suite, or of a directory",
        description="Make the image NAME: of a built jail, of a Debian suite with packages, or of a directory. The "
        "same jail gives the same image to the bit.",
    )  # fmt: skip
    _name(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--jail", metavar="JAIL", help="of the current generation of this jail")
    source.add_argument("--debian", metavar="SUITE", help="of this Debian suite, for example bookworm")
    source.add_argument("--directory", metavar="DIRECTORY", help="of this root file system")
    parser.add_argument(
        "--package",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="a Debian package more; may be given more than once",
    )
    parser.add_argument("--mirror", metavar="URL", default="", help="the archive to get Debian from")
    parser.add_argument("--size", metavar="SIZE", type=byte_count, help="size of the disk (default: contents and room)")
    parser.add_argument("--program", metavar="PATH", default="", help="what a guest of a directory runs once it is up")
    parser.add_argument(
        "--init", metavar="INIT", default="",
        help="PID 1 instead of Stockade's own: `systemd` for a Debian suite, a program's path for a directory",
    )  # fmt: skip
    parser.add_argument(
        "--module", metavar="MODULE", action="append", default=[],
        help="a kernel module that its guests load, as in overlay; may be given more than once",
    )  # fmt: skip

    parser = add_verb(
        family, "import", import_image,
        help="take in an image from a file",
        description="Check FILE against its SHA-256 and take it in, unpacked where it is .xz, .zst or .gz. Its first "
        "boot is one on a throw-away disk without a network.",
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", help="an ext4 file system, as it is or compressed")
    parser.add_argument("--name", metavar="NAME", help="name of the image (default: the file's)")
    parser.add_argument("--sha256", metavar="SHA256", help="the SHA-256 that its maker has published")
    parser.add_argument("--unchecked", action="store_true", help="take it without a SHA-256")
    parser.add_argument("--init", metavar="PATH", default="/sbin/init", help="its PID 1 (default: /sbin/init)")
    parser.add_argument("--trusted", action="store_true", help="its first boot may be any")


def _name(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the image")


def byte_count(text: str) -> int:
    """A size as specs write it. ValueError for argparse where it is none."""
    if not text or not text.rstrip("KMGT").isdecimal() or len(text) - len(text.rstrip("KMGT")) > 1:
        raise argparse.ArgumentTypeError(f"`{text}` is no size: write 64M or 1G")
    return size_bytes(text)


def create(arguments: argparse.Namespace) -> None:
    """Make an image."""
    if (arguments.package or arguments.mirror) and not arguments.debian:
        raise UsageError("`--package` and `--mirror` are for `--debian`", hint="a jail has what its spec names")
    if arguments.jail and (arguments.init or arguments.module):
        raise UsageError("`--init` and `--module` are for `--debian` and `--directory`", hint="leave them out")
    if arguments.directory and arguments.init and arguments.module:
        raise UsageError(
            "no module is loaded in a guest whose PID 1 is the directory's own", hint="leave out `--init` or `--module`"
        )
    with console.Progress() as progress:
        if arguments.jail:
            image = machines.image_of_jail(arguments.jail, arguments.name, size=arguments.size, progress=progress.doing)
        elif arguments.debian:
            image = debian.image_of_debian(
                arguments.debian, arguments.name, packages=arguments.package, size=arguments.size,
                mirror=arguments.mirror, init=arguments.init, modules=arguments.module, say=progress.doing,
            )  # fmt: skip
        else:
            image = _of_directory(arguments, progress)
    _made(image)


def _of_directory(arguments: argparse.Namespace, progress: console.Progress) -> Image:
    progress.doing(f"making an image of `{arguments.directory}`")
    start = ImageStart(init=arguments.init) if arguments.init else ImageStart(program=arguments.program)
    record = Image(
        name=arguments.name, sha256="", size=0, mtime=0, origin="directory", source=arguments.directory, start=start
    )
    return staging.image_of(
        arguments.name, Path(arguments.directory), record, size=arguments.size, with_init=not arguments.init,
        modules=arguments.module,
    )  # fmt: skip


def _made(image: Image) -> None:
    console.text(
        f"{image.name}: {console.size(image.size)}, {console.size(sparse.allocated(images.file(image.name)))} on disk"
    )
    console.text(f"sha256 {image.sha256}")
    console.next_command(
        f"`stockade guest create NAME --image {image.name}`; `stockade boot {image.name}` looks at it once"
    )


def import_image(arguments: argparse.Namespace) -> None:
    """Take in an image."""
    source = Path(arguments.file)
    name = arguments.name or source.name.split(".")[0].lower()
    image = images.add_file(
        name, source, sha256=arguments.sha256, unchecked=arguments.unchecked, start=ImageStart(init=arguments.init),
        trusted=arguments.trusted,
    )  # fmt: skip
    _made(image)


def _report(name: str, *, intact: bool | None = None) -> ImageReport:
    users = tuple(guest for guest in store.names() if store.load(guest).image == name)
    return ImageReport(
        image=images.load(name), disk_bytes=sparse.allocated(images.file(name)), guests=users, intact=intact
    )


def list_images(arguments: argparse.Namespace) -> None:
    """List the images."""
    found = tuple(_report(name) for name in images.names())
    if arguments.json:
        console.json_report(ImagesReport(images=found))
        return
    console.rows(
        (
            (
                one.image.name, one.image.origin, console.size(one.image.size), console.size(one.disk_bytes),
                str(len(one.guests)), one.image.sha256[:16],
            )
            for one in found
        ),
        heading=("NAME", "ORIGIN", "SIZE", "ON DISK", "GUESTS", "SHA256"),
    )  # fmt: skip


def inspect(arguments: argparse.Namespace) -> int:
    """Show one image."""
    intact = images.verify(arguments.name) if arguments.verify else None
    report = _report(arguments.name, intact=intact)
    if arguments.json:
        console.json_report(report)
    else:
        image = report.image
        lines = {
            "name": image.name, "origin": f"{image.origin} {image.source}".strip(), "sha256": image.sha256,
            "size": console.size(image.size), "on disk": console.size(report.disk_bytes),
            "PID 1": image.start.system or image.start.init,
            "starts": image.start.program or ", ".join(sorted(image.start.plan.values())) or "-",
            "publishes": ", ".join(image.publish) or "-", "secrets": "yes" if image.secrets else "no",
            "first boot": "throw-away, no network" if image.quarantine else "any",
            "guests": ", ".join(report.guests) or "-",
        }  # fmt: skip
        if intact is not None:
            lines["contents"] = "as recorded" if intact else "NOT as recorded"
        for key, value in lines.items():
            console.text(f"{key + ':':12} {value}")
    return 1 if intact is False else 0


def export(arguments: argparse.Namespace) -> None:
    """Write an image to a file."""
    if images.load(arguments.name).secrets and not arguments.with_secrets:
        raise StateError(
            f"image `{arguments.name}` holds keys or passwords that were generated for its jail",
            hint="`--with-secrets` exports them too; whoever has the file has them",
        )
    console.text(f"{images.export(arguments.name, Path(arguments.file))}  {arguments.file}")


def remove(arguments: argparse.Namespace) -> None:
    """Remove images. A guest that a `run` or `boot` that was killed left is no user of one."""
    machines.sweep()
    for name in arguments.name:
        users = [] if arguments.force else [guest for guest in store.names() if store.load(guest).image == name]
        images.remove(name, users)
        console.note(f"{name}: removed")


def boot(arguments: argparse.Namespace) -> int:
    """Boot an image once and pass its service's status on."""
    walls = tuple(arguments.walls.split(","))
    manage.check_walls(walls)
    image = images.load(arguments.name)
    name = f"{arguments.name[:40]}-boot-{os.getpid()}"
    machines.sweep()
    machines.prepare(walls)
    # Its default action would leave the guest.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    guest = store.create(name, image, memory=arguments.memory, walls=walls, maker=machines.this_process())
    try:
        started = machines.start_guest(guest.name, leash=True)
        images.tried(arguments.name)
        with control.connect(name) as connection:
            control.ask(connection, "console")
            keys = sys.stdin.isatty()
            if keys:
                console.note(f"{LEAVE} ends it")
            ended = join(connection, keys=keys)
        return started.wait() or 0 if ended else 0
    finally:
        machines.discard(name)

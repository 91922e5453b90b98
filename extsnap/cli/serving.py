"""The commands that serve a volume as files and mount it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from extsnap.cli import output
from extsnap.cli.failure import RUN_FAILED, about
from extsnap.cli.options import Command, Image, Json, Partition, Version, complete_snapshot
from extsnap.errors import ServerError

Directory = Annotated[str, typer.Argument(metavar="DIR", help="An existing directory.", show_default=False)]

Scratch = Annotated[
    bool, typer.Option("--scratch", help="With --snapshot: writable, over a layer that is thrown away at the end.")
]

AllowOther = Annotated[
    bool, typer.Option("--allow-other", help="For other users, too, as far as the image, or a file in it, is theirs.")
]
Snapshot = Annotated[
    str | None,
    typer.Option(
        "--snapshot",
        metavar="NAME",
        help="This snapshot, read-only.",
        autocompletion=complete_snapshot,
        show_default=False,
    ),
]

_SEPARATOR = "extsnap.separator"


class RunCommand(Command):
    """``run`` remembers whether ``--`` was there: without it, options of CMD would be taken for our own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_SEPARATOR] = "--" in args
        return super().parse_args(ctx, args)


def require_snapshot(scratch: bool, snapshot: str | None) -> None:
    """A throw-away layer is over a snapshot.

    Raises:
        typer.BadParameter: None was named.
    """
    if scratch and snapshot is None:
        raise typer.BadParameter("name the snapshot that it is for: --snapshot NAME", param_hint="--scratch")


def attach(
    image: Image,
    directory: Directory,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until the volume is detached.")] = False,
    allow_other: AllowOther = False,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Serve the volume and its snapshots as plain files.

    They are DIR/volume and DIR/snapshots/NAME, and for a partition DIR/disk: the whole disk around it.
    """
    with about(image):
        from extsnap.serve import attaching

        attaching.attach(image, directory, foreground=foreground, allow_other=allow_other, partition=partition)
    if as_json:
        output.emit_json({"version": 1, "image": image, "directory": directory})


def detach(
    target: Annotated[
        str, typer.Argument(metavar="IMAGE|DIR", help="The image, or where it is attached.", show_default=False)
    ],
    force: Annotated[bool, typer.Option("--force", help="Also in use: unmount and detach what stands on it.")] = False,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Stop serving a volume, once everything is durable. Refused while it is mounted."""
    with about(target):
        from extsnap.serve import attaching

        if not attaching.detach(target, force=force, partition=partition):
            raise ServerError(
                f"{target} was not left clean", hint="the next extsnap command that writes recovers the volume"
            )
    if as_json:
        output.emit_json({"version": 1, "detached": target})


def mount(
    image: Image,
    directory: Directory,
    snapshot: Snapshot = None,
    scratch: Scratch = False,
    allow_other: AllowOther = False,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Mount the base volume read-write, or a snapshot read-only.

    With --scratch a snapshot can be written: what is written is thrown away at the unmount, and the snapshot stays.
    """
    require_snapshot(scratch, snapshot)
    with about(image):
        from extsnap.serve import mountpoints

        mountpoints.mount(
            image, directory, snapshot=snapshot, scratch=scratch, allow_other=allow_other, partition=partition
        )
    if as_json:
        answer = {"version": 1, "image": image, "directory": directory, "snapshot": snapshot, "scratch": scratch}
        output.emit_json(answer)


class Program(StrEnum):
    """What speaks NBD."""

    nbdkit = "nbdkit"
    qemu_nbd = "qemu-nbd"


def parse_tcp(text: str) -> tuple[str, int]:
    """Return host and port of ``[HOST:]PORT``; without one the host is this machine alone.

    Raises:
        typer.BadParameter: It is no such thing.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 <= int(port) <= 65535):
        raise typer.BadParameter(f"{text!r} is not [HOST:]PORT", param_hint="--tcp")
    return host.removeprefix("[").removesuffix("]") or "localhost", int(port)


def serve(
    image: Image,
    snapshot: Snapshot = None,
    scratch: Scratch = False,
    socket: Annotated[
        str | None,
        typer.Option("--socket", metavar="PATH", help="Path of the Unix socket.", show_default=False),
    ] = None,
    tcp: Annotated[
        str | None,
        typer.Option("--tcp", metavar="[HOST:]PORT", help="Listen there instead; port 0: any.", show_default=False),
    ] = None,
    tls: Annotated[
        str | None,
        typer.Option(
            "--tls",
            metavar="DIR",
            help="TLS with DIR/ca-cert.pem, server-cert.pem and server-key.pem; clients need a certificate of that CA.",
            show_default=False,
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="TCP without TLS: whoever reaches the port reads and writes.")
    ] = False,
    program: Annotated[
        Program | None,
        typer.Option("--with", help="What serves it; without, one that is installed.", show_default=False),
    ] = None,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Serve the base volume, or a snapshot, by NBD until Ctrl-C, and print its address.

    It is a Unix socket of mode 0600. A snapshot is read-only, or with --scratch over a layer that is thrown away.
    """
    require_snapshot(scratch, snapshot)
    if tcp is None and (tls is not None or insecure):
        raise typer.BadParameter("it is for --tcp", param_hint="--insecure" if insecure else "--tls")
    if tcp is not None and (tls is None) == (not insecure):
        raise typer.BadParameter("give either --tls DIR or --insecure with it", param_hint="--tcp")
    if tcp is not None and socket is not None:
        raise typer.BadParameter("give either --socket or --tcp", param_hint="--tcp")
    host, port = parse_tcp(tcp) if tcp is not None else ("", 0)

    def ready(found: dict[str, Any]) -> None:
        if as_json:
            output.emit_json({"version": 1, "image": image, "snapshot": snapshot, "scratch": scratch, **found})
        else:
            output.emit_lines([found["uri"]])
        output.finish()

    with about(image):
        import os

        from extsnap.serve import nbd, offering

        address = nbd.Address(socket or "", host, port, os.path.abspath(tls) if tls is not None else "")
        offering.serve(
            image,
            snapshot=snapshot,
            scratch=scratch,
            address=address,
            program=program.value if program is not None else None,
            ready=ready,
            partition=partition,
        )


def umount(directory: Directory, as_json: Json = False, version: Version = False) -> None:
    """Unmount what mount mounted; returns once everything is durable."""
    with about(directory):
        from extsnap.serve import mountpoints

        mountpoints.umount(directory)
    if as_json:
        output.emit_json({"version": 1, "directory": directory})


def parse_statuses(text: str) -> frozenset[int]:
    """Return the exit statuses of a list like ``0,1``.

    Raises:
        typer.BadParameter: It is no such list.
    """
    statuses = frozenset(int(part) for part in text.split(",") if part.isascii() and part.isdigit())
    if len(statuses) != len(set(text.split(","))) or not all(status <= 255 for status in statuses):
        raise typer.BadParameter(f"{text!r} is no list of exit statuses from 0 to 255, like 0,1", param_hint="--ok")
    return statuses


def run(
    ctx: typer.Context,
    image: Image,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="-- CMD...",
            help="A command; {} becomes the path of the served volume, {disk} that of the disk around a partition.",
            show_default=False,
        ),
    ],
    atomic: Annotated[bool, typer.Option("--atomic", help="Take a snapshot first; if CMD fails, restore it.")] = False,
    ok: Annotated[
        str, typer.Option("--ok", metavar="STATUS,...", help="Exit statuses of CMD that are no failure.")
    ] = "0",
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Serve the volume, run a command on it, stop serving.

    The exit status is the command's: 125 if extsnap failed, 126 if it cannot be executed, 127 if it was not found.
    """
    statuses = parse_statuses(ok)
    if not ctx.meta.get(_SEPARATOR):
        raise typer.BadParameter("put -- before the command: extsnap run IMAGE -- CMD...", param_hint="CMD")
    with about(image, status=RUN_FAILED):
        from extsnap.serve import running

        status = running.run(image, command, atomic=atomic, ok=statuses, partition=partition)
    if as_json:
        output.emit_json({"version": 1, "status": status})
    raise typer.Exit(status)

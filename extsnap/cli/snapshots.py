"""The commands that take, show, remove and bring back snapshots."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from extsnap.cli import output
from extsnap.cli.failure import about
from extsnap.cli.options import Image, Json, Partition, SnapshotName, Version, complete_snapshot
from extsnap.cli.units import safe


class Kind(StrEnum):
    """Why a snapshot was taken."""

    manual = "manual"
    safety = "safety"
    atomic = "atomic"


def call(
    image: str, verb: str, *, writable: bool, partition: int | None, unrecovered: bool = False, **arguments: Any
) -> dict[str, Any]:
    """Carry out one verb on an image, served or not, and pass its notices on.

    ``unrecovered``: also where the filesystem needs recovery and that fails.

    Raises:
        Failed: With the ExtsnapError or OSError as its cause.
    """
    with about(image):
        from extsnap.serve import session

        with session.open_session(image, writable=writable, partition=partition, unrecovered=unrecovered) as opened:
            result: dict[str, Any] = opened.call(verb, **arguments)
    output.notices(result)
    return result


def create(
    image: Image,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Name; without one, the time in UTC.", show_default=False),
    ] = None,
    message: Annotated[str, typer.Option("--message", "-m", metavar="TEXT", help="A note to keep with it.")] = "",
    no_freeze: Annotated[bool, typer.Option("--no-freeze", help="Do not freeze a mounted volume first.")] = False,
    quiesced: Annotated[
        bool, typer.Option("--quiesced", help="Whoever uses the volume has already brought it to rest.")
    ] = False,
    checksums: Annotated[
        bool,
        typer.Option("--checksums", help="Store a checksum of every block, to tell later what was written outside."),
    ] = False,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Take a snapshot and print its name.

    With checksums all that the snapshot has is read once; users of a served volume wait meanwhile.
    """
    with output.progress("taking a snapshot"):
        result = call(
            image,
            "create",
            writable=True,
            partition=partition,
            name=name,
            message=message,
            freeze=not no_freeze,
            quiesced=quiesced,
        )
        if checksums:
            call(image, "checksum", writable=True, partition=partition, name=result["name"])
    if as_json:
        output.emit_json(result)
    else:
        output.emit_lines([safe(result["name"])])


def list_snapshots(image: Image, partition: Partition = None, as_json: Json = False, version: Version = False) -> None:
    """List the snapshots, oldest first."""
    result = call(image, "list", writable=False, partition=partition)
    if as_json:
        output.emit_json(result)
    elif result["snapshots"]:
        from extsnap.cli import render

        output.emit_table(render.snapshot_table(result))
    else:
        output.say(f"{image} has no snapshots; extsnap create takes one")


def show(
    image: Image, name: SnapshotName, partition: Partition = None, as_json: Json = False, version: Version = False
) -> None:
    """Show everything about one snapshot."""
    result = call(image, "show", writable=False, partition=partition, name=name)
    if as_json:
        output.emit_json(result)
    else:
        from extsnap.cli import render

        output.emit_table(render.snapshot_details(result))


def delete(
    image: Image,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME...", help="Names of snapshots.", autocompletion=complete_snapshot, show_default=False
        ),
    ] = None,
    kind: Annotated[Kind | None, typer.Option("--kind", help="All snapshots of this kind.", show_default=False)] = None,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Delete snapshots, in any order.

    Deleting the last one lifts the guard: the volume can be mounted read-write again.
    """
    if not names and kind is None:
        raise typer.BadParameter("give at least one name, or --kind", param_hint="NAME")
    with output.progress("deleting"):
        result = call(
            image,
            "delete",
            writable=True,
            unrecovered=True,
            partition=partition,
            names=list(names or ()),
            kind=kind.value if kind else None,
        )
    if as_json:
        output.emit_json(result)


def restore(
    image: Image,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="Name of the snapshot.", autocompletion=complete_snapshot, show_default=False
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Go back to the newest safety snapshot.")] = False,
    no_safety: Annotated[bool, typer.Option("--no-safety", help="Take no safety snapshot before.")] = False,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Make the base volume what a snapshot is.

    All other snapshots stay. What the volume was before is kept as a safety snapshot, whose name is printed.
    """
    if (name is None) == (not undo):
        raise typer.BadParameter("give either the name of a snapshot or --undo", param_hint="NAME")
    with output.progress("restoring"):
        result = call(
            image,
            "restore",
            writable=True,
            partition=partition,
            unrecovered=no_safety,  # what is not kept need not be whole
            name=name,
            undo=undo,
            safety=not no_safety,
        )
    work_left = result.pop("work_left", False)
    if as_json:
        output.emit_json(result)
    elif result.get("safety") is not None:
        output.emit_lines([safe(result["safety"])])
    if work_left:
        with output.progress("letting go of what was open"), about(image):
            from extsnap.serve import recovering

            recovering.let_go_of_orphans(image, partition, result["restored"])


def strip(image: Image, partition: Partition = None, as_json: Json = False, version: Version = False) -> None:
    """Remove all snapshots and all of extsnap: a plain volume again."""
    with output.progress("removing all snapshots"):
        result = call(image, "strip", writable=True, partition=partition)
    if as_json:
        output.emit_json(result)


def accept(image: Image, partition: Partition = None, as_json: Json = False, version: Version = False) -> None:
    """Go on after the image was written outside extsnap: the snapshots at risk are marked tainted."""
    with output.progress("accepting the volume as it is"):
        result = call(image, "accept", writable=True, partition=partition)
    if as_json:
        output.emit_json(result)
    elif result["tainted"]:
        output.emit_lines([safe(name) for name in result["tainted"]])


def set_properties(
    image: Image,
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROPERTY=VALUE]...",
            help="on-full=refuse: a write without room for copies fails; on-full=drop-oldest: snapshots go instead.",
            show_default=False,
        ),
    ] = None,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Change properties of the volume, which its store keeps; without any, show them."""
    wanted = {}
    for word in values or ():
        name, separator, value = word.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"{safe(word)} is not PROPERTY=VALUE", param_hint="PROPERTY=VALUE")
        wanted[name] = value
    result = call(image, "set", writable=bool(wanted), partition=partition, unrecovered=True, values=wanted)
    if as_json:
        output.emit_json(result)
    elif not wanted:
        output.emit_lines([f"{name}={safe(value)}" for name, value in sorted(result["properties"].items())])


class Switch(StrEnum):
    """Whether."""

    on = "on"
    off = "off"


def guard(
    image: Image,
    switch: Annotated[Switch, typer.Argument(metavar="on|off", help="Whether.", show_default=False)],
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Let plain mounts of the image with snapshots be read-only, or not; remembered.

    Without the guard a plain mount can write what snapshots need: extsnap notices that afterwards.
    """
    result = call(image, "guard", writable=True, partition=partition, wanted=switch is Switch.on)
    if as_json:
        output.emit_json(result)

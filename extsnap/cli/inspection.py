"""The commands that look and change nothing: check, info, dump."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from extsnap.cli import output
from extsnap.cli.failure import DAMAGE, about
from extsnap.cli.options import Image, Json, Partition, Version, complete_snapshot
from extsnap.cli.snapshots import call


class Structure(StrEnum):
    """What ``dump`` can show."""

    header = "header"
    log = "log"
    records = "records"
    snapshots = "snapshots"
    bitmaps = "bitmaps"


def check(
    image: Image,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Snapshots to check; all of them if none is named.",
            autocompletion=complete_snapshot,
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Without e2fsck on the snapshots.")] = False,
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Check the store, the base volume and the snapshots.

    That is: both bitmaps, every structure and its second copy, every copy's checksum, and e2fsck on all of them.
    The exit status is 3 if something is damaged; the files that are affected are named. What has a whole second copy is
    written again, a snapshot that cannot be read whole is listed as damaged from then on; nothing else is changed.
    """
    with about(image):
        from extsnap.serve import checking

        with output.progress("checking"):
            result = checking.check(image, list(names or ()), quick, partition=partition)
    output.notices(result)
    if as_json:
        output.emit_json(result)
    else:
        from extsnap.cli import render

        output.emit_table(render.check_table(result))
    if not result["ok"]:
        output.finish()
        output.say(damage_line(f"{image} -P {partition}" if partition else image, result))
        raise typer.Exit(DAMAGE)


def damage_line(image: str, result: dict[str, Any]) -> str:
    """Return the line that says what ``check`` found damaged, and the way out."""
    damaged = [f"snapshot {snapshot['name']}" for snapshot in result["snapshots"] if not snapshot["ok"]]
    step = "delete the damaged snapshots, or first take what is left out of extsnap mount --snapshot NAME"
    if not result["store"]["ok"]:
        if not damaged:
            step = "export the snapshots that are good, then extsnap strip makes a plain volume of it"
        elif len(damaged) == len(result["snapshots"]) and not any(one.get("blocks") for one in result["snapshots"]):
            step = "no snapshot can be read any more: extsnap strip makes a plain volume of it"
        damaged.insert(0, "the store")
        if result.get("mended") and len(damaged) == 1:
            step = "it was written again from its second copy, and nothing is lost"
    # None: a mounted base volume, which e2fsck cannot look at.
    if result["base"]["ok"] is False:
        damaged.insert(0, "the base volume")
        step = f"repair it with extsnap run {image} -- e2fsck -fy {{}}, or restore a snapshot"
    return f"{image}: damage found in {', '.join(damaged) or 'the volume'}; {step}"


def info(image: Image, partition: Partition = None, as_json: Json = False, version: Version = False) -> None:
    """Show the volume, what of it is extsnap's, and who serves it."""
    result = call(image, "info", writable=False, partition=partition)
    if as_json:
        output.emit_json(result)
    else:
        from extsnap.cli import render

        output.emit_table(render.volume_details(result))


def dump(
    image: Image,
    what: Annotated[
        Structure,
        typer.Argument(metavar="WHAT", help="header, log, records, snapshots or bitmaps.", show_default=False),
    ],
    partition: Partition = None,
    as_json: Json = False,
    version: Version = False,
) -> None:
    """Show the store's structures, for people who debug."""
    result = call(image, "dump", writable=False, partition=partition, what=what.value)
    if as_json:
        output.emit_json(result)
    else:
        from extsnap.cli import render

        output.emit_lines(render.dump_lines(what.value, result))

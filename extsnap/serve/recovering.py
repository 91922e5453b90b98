"""What stock e2fsck does before, or after, our own work: replaying a journal, repairing what needs no decisions."""

from __future__ import annotations

import contextlib
import os
import subprocess

from extsnap.errors import ExtsnapError, NeedsRecovery
from extsnap.ext.locate import Place
from extsnap.serve import control, moment, tools
from extsnap.serve.control import ControlClient
from extsnap.serve.private import CLOSE_PATIENCE
from extsnap.serve.session import key_of, place_of
from extsnap.serve.starting import private


class GaveUp(NeedsRecovery):
    """Stock e2fsck -p wants decisions.

    Attributes:
        reason: Why, in its own words; may be empty.
    """

    reason = ""

    @classmethod
    def of(cls, name: str, reason: str = "") -> GaveUp:
        error = cls(
            f"{name}: e2fsck -p could not recover the filesystem" + (f": {reason}" if reason else ""),
            hint=f"run extsnap run {name} -- e2fsck -fy {{}}, or extsnap restore --no-safety {name} SNAPSHOT",
        )
        error.reason = reason
        return error


def _reason(done: subprocess.CompletedProcess[str], directory: str) -> str:
    """Why e2fsck -p gave up: what it found last before it said so."""
    # It says so on either stream; "(i.e., without -a or -p options)" is how the verdict ends, not why.
    found = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines()]
    lines = [line for line in (line.removeprefix(f"{directory}/volume:").strip() for line in found) if line]
    given_up = [number for number, line in enumerate(lines) if "UNEXPECTED INCONSISTENCY" in line]
    return lines[given_up[0] - 1] if given_up and given_up[0] else tools.last_line(done)


def replay(name: str, keeper: ControlClient, directory: str) -> None:
    """Replay the journal of a marked volume through its server, and have the mark taken off.

    Raises:
        NeedsRecovery: Stock e2fsck wants decisions.
    """
    preen(name, directory)
    if not keeper.call("server.recovered").get("clean"):
        raise GaveUp.of(name)


def preen(name: str, directory: str) -> None:
    """Have stock e2fsck do on a served volume what needs no decisions.

    Raises:
        NeedsRecovery: It wants some.
    """
    done = tools.run("e2fsck", "-p", os.path.join(directory, "volume"), ok=None)
    if not 0 <= done.returncode <= moment.REPAIRED_MAX:
        raise GaveUp.of(name, _reason(done, directory))


def recover(place: Place, *, always: bool = False) -> None:
    """Make a marked volume whole again, with a server of our own that serves nobody else.

    Args:
        always: Have e2fsck look at one that needs no recovery, too.
    """
    server = private(place, lazy=True, repair=always)
    try:
        if server.hello["needs_replay"]:
            replay(place.name, server.keeper, server.directory)
        elif always:
            preen(place.name, server.directory)
    except BaseException:
        server.abandon()
        raise
    server.end()


def let_go_of_orphans(image: str, partition: int | None, snapshot: str) -> None:
    """Have e2fsck do on a restored volume what the moment of its snapshot left to be done.

    Until then the volume is as the snapshot's moment left it, and a next mount or e2fsck does the same: an end at any
    point loses nothing.

    Raises:
        NeedsRecovery: That is not done: e2fsck wants decisions, or could not be run.
    """
    place = place_of(image, partition)
    served = control.connect(key_of(place))
    try:
        if served is None:
            recover(place, always=True)
        else:
            client, hello = served
            with client:  # nobody else has a turn, or opens the volume, meanwhile
                client.call("server.provision", alone=True, only=True, patience=CLOSE_PATIENCE)
                try:
                    preen(place.name, str(hello["directory"]))
                finally:  # answered before we end, so that whoever comes next is not refused
                    with contextlib.suppress(ExtsnapError, OSError):
                        client.call("server.done")
    except (ExtsnapError, OSError) as error:
        reason = error.message if isinstance(error, ExtsnapError) else str(error)
        if isinstance(error, GaveUp) and error.reason:
            reason = error.reason
        raise NeedsRecovery(
            f"{place.name} is restored, but e2fsck -p gave up on what the moment of {snapshot} left to be done: "
            f"{reason}",
            hint=f"run extsnap run {place.name} -- e2fsck -fy {{}}",
        ) from error

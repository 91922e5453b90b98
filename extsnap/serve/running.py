"""``run``: a command on the served volume, with a snapshot to go back to if that is wanted."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from extsnap.errors import ExtsnapError, NeedsRecovery, ServerError
from extsnap.serve import commands, control, tools
from extsnap.serve.control import ControlClient
from extsnap.serve.private import CLOSE_PATIENCE, pass_on
from extsnap.serve.recovering import replay
from extsnap.serve.session import key_of, place_of
from extsnap.serve.starting import private


def run(
    image: str,
    command: Sequence[str],
    *,
    atomic: bool = False,
    ok: Collection[int] = frozenset({0}),
    partition: int | None = None,
) -> int:
    """Serve the image while a command runs.

    Args:
        image: Path of the image.
        command: The command; ``{}`` in an argument becomes the path of the served volume, and for a partition
            ``{disk}`` that of the served disk.
        atomic: Take a snapshot first, restore it if the command fails, delete it in both cases.
        ok: The exit statuses that are no failure.
        partition: Number of the partition; None and 0 as `locate` takes them.

    Returns:
        The command's exit status; 126 if it cannot be executed, 127 if it is not found, 128+N if signal N
        ended it.

    Raises:
        ExtsnapError, OSError: A failure of our own (the command line exits with 125).
    """
    if not command:
        raise ServerError("no command to run")
    place = place_of(image, partition)
    served = control.connect(key_of(place))
    if served is not None:
        client, hello = served
        with client:
            status, refusal = _run_on(client, os.path.join(hello["directory"], "volume"), command, atomic, ok)
            said = client.call("server.hello")["said"]
            pass_on({"said": said[len(hello["said"]) :]})
            return _checked_status(status, refusal, ok, atomic)
    # Without the kernel's delays a tool learns of a refused write at once, not after a hundred others.
    server = private(place, writeback=False, repair=not atomic)
    try:
        if server.hello["needs_replay"]:
            try:
                replay(place.name, server.keeper, server.directory)
            except NeedsRecovery as error:
                if atomic:
                    raise
                # This command may be the repair.
                tools.notice(f"{error.message}; running the command on the volume as it is")
        status, refusal = _run_on(server.keeper, server.file(), command, atomic, ok)
    except BaseException:
        server.abandon()
        raise
    try:
        if not server.end():
            tools.notice(f"{place.name} still needs recovery; run extsnap run {place.name} -- e2fsck -fy {{}}")
    except NeedsRecovery as left:
        if status in ok and not refusal:
            raise
        tools.notice(str(left))
    return _checked_status(status, refusal, ok, atomic)


def _run_on(
    client: ControlClient, path: str, command: Sequence[str], atomic: bool, ok: Collection[int]
) -> tuple[int, str]:
    """Run a command on the served volume; returns its status, and what was refused of its writes."""
    snapshot = ""
    if atomic:
        client.call("server.provision", alone=True, patience=CLOSE_PATIENCE)
        snapshot = str(client.call("create", kind="atomic")["name"])
    before = client.call("server.hello")
    ran, status, refusal = True, -1, ""  # an error between here and the end of the command is a failed command
    try:
        status, ran = commands.execute(commands.filled(command, path, before.get("partition") is not None))
        after = client.call("server.hello")
        refusal = after["refusal"] if after["refused"] > before["refused"] else ""
    finally:
        if snapshot:
            if ran and (status not in ok or refusal):
                try:
                    client.call("restore", name=snapshot, safety=False, patience=CLOSE_PATIENCE)
                except (ExtsnapError, OSError) as error:
                    raise ServerError(
                        f"the command ended with status {status}, and the volume could not be restored: {error}",
                        hint=f"snapshot {snapshot} is kept: restore it",
                    ) from error
            client.call("delete", names=[snapshot], patience=CLOSE_PATIENCE)
    return status, refusal


def _checked_status(status: int, refusal: str, ok: Collection[int], atomic: bool) -> int:
    """The status of a command; one that calls itself successful although writes of it were refused is none.

    Raises:
        ServerError: It is such a one.
    """
    if not refusal:
        return status
    if status in ok:
        raise ServerError(
            f"the command ended with status {status}, but {refusal}",
            hint="the volume was restored" if atomic else "run extsnap check, then repair or restore the volume",
        )
    tools.notice(f"{refusal}; {'the volume was restored' if atomic else 'see extsnap check for what it left'}")
    return status

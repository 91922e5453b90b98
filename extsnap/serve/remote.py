"""What a client does itself with a served volume, where the server would be busy with it for long.

The server takes turns: while it works for one client, nobody else's request is served, not even a read of the volume.
So long work is done here: an export reads the served file like anybody, and a check of all copies asks for a piece at
a time.  Neither can wait for itself either, as a server would that writes to a filesystem which it serves.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from extsnap.errors import ExtsnapError, ServerError
from extsnap.serve.control import ControlClient


class ServedSnapshot:
    """A snapshot's served file as what `extsnap.snapshot.export` takes; it cannot be deleted while this is open."""

    def __init__(self, client: ControlClient, directory: str, name: str) -> None:
        """Open.

        Raises:
            SnapshotNotFound: There is none of that name.
        """
        self._name = name
        try:
            self._descriptor = os.open(os.path.join(directory, "snapshots", name), os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError):
            client.call("layout", name=name)  # says it in better words
            raise
        try:
            # Asked after the file is open: it is about the snapshot that we have, not an older one of its name.
            self.layout = client.call("layout", name=name)
        except BaseException:
            self.close()
            raise
        self.size = int(self.layout["volume_bytes"])

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def pread(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes at ``offset``."""
        buffer = bytearray(length)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``.

        Raises:
            ExtsnapError: It cannot be read there.
        """
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                if not count:
                    raise OSError(errno.EIO, "the file ends")
                done += count
        except OSError as error:
            raise ExtsnapError(
                f"snapshot {self._name!r} cannot be read at byte {offset + done}: {error.strerror}",
                hint="run extsnap check to see what is damaged",
            ) from error

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of everything that the snapshot preserves; the rest is zeros."""
        import numpy as np

        from extsnap.snapshot.view import pieces

        runs = np.array(self.layout["runs"], np.int64).reshape(-1, 2)
        for offset, count in pieces(runs, int(self.layout["block_size"]), self.size):
            yield offset, self.pread(offset, count)


@contextlib.contextmanager
def scratch(client: ControlClient, directory: str, name: str = "") -> Iterator[str]:
    """A file over a snapshot, or over the base volume at rest if ``name`` is empty, that can be written.

    What is written goes to a throw-away layer, which ends with the ``with``, or with the last who has the file open.

    Raises:
        SnapshotNotFound: There is none of that name.
        ExtsnapError: No layer can be made.
    """
    file = str(client.call("server.scratch", name=name)["file"])
    try:
        yield os.path.join(directory, file)
    finally:
        with contextlib.suppress(ServerError):  # it has ended, and with it the layer
            client.call("server.unscratch", file=file)


def export(
    client: ControlClient, image: str, directory: str, name: str, out: str, *, force: bool = False
) -> dict[str, Any]:
    """Export a snapshot of a served volume; the same answer as the verb gives.

    Raises:
        ExtsnapError, OSError: As the verb does.
    """
    from extsnap.snapshot import export as exporting

    source = ServedSnapshot(client, directory, name)
    try:
        with exporting.new_file(out, image, force=force) as descriptor:
            exporting.write_image(
                source, int(source.layout["block_size"]), int(source.layout["created_seconds"]), descriptor
            )
    finally:
        source.close()
    return {"version": source.layout["version"], "name": name, "out": out, "bytes": source.size}


def check(client: ControlClient, names: list[str]) -> dict[str, Any]:
    """Check the store of a served volume a piece at a time; the same answer as the verb gives.

    Raises:
        ExtsnapError, OSError: As the verb does.
    """
    from extsnap.snapshot.check import Findings

    report = client.call("check", names=names, copies=False)
    found = Findings()
    first: int | None = 0
    try:
        while first is not None:
            piece = client.call("check_copies", first=first)
            found.add(piece)
            first = piece["next"]
    except ExtsnapError as error:
        found.errors.append(str(error))
    found.close()
    report["store"]["errors"] += found.errors
    report["store"]["ok"] = not report["store"]["errors"]
    for entry in report["snapshots"]:
        entry["errors"] += found.by_snapshot.get(entry["name"], [])
        entry.setdefault("blocks", []).extend(found.blocks.get(entry["name"], []))
    return report

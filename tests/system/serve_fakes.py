"""A volume of its own kind for the tests of serving: a plain file, its snapshots whole copies beside it.

It keeps the contract of ``extsnap.snapshot.volume.Volume`` as far as the server can see it, with none
of the engine: what breaks with it is the server's fault.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from extsnap.blockdev.base import Pieces
from extsnap.errors import DamagedCopy, NeedsRecovery, SnapshotExists, SnapshotNotFound, VolumeBusy
from extsnap.snapshot.above import Above

_KEEP_SIZE_PUNCH_HOLE = 3
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class FakeView:
    def __init__(self, path: Path, number: int) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.id = number
        self.size = os.fstat(self._fd).st_size
        self._broken = path.name.endswith("broken")

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if self._broken:
            raise DamagedCopy("a copy is damaged")
        assert os.preadv(self._fd, [buffer], offset) == len(buffer)

    def close(self) -> None:
        os.close(self._fd)


class FakeVolume:
    """State beside the image: ``IMAGE.json`` (snapshots and ids, mark, a journal of what was called)."""

    block_size = 4096
    is_lost = False

    def __init__(self, path: str, writable: bool) -> None:
        self.path = path
        self._writable = writable
        self._fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise VolumeBusy(f"{path} is locked", hint="wait") from None
        self.size = os.fstat(self._fd).st_size
        found = os.fstat(self._fd)
        self.device_id = (found.st_dev, found.st_ino)
        self._state_path = Path(path + ".json")
        self._state: dict[str, Any] = {"next": 1, "snapshots": {}, "kinds": {}, "mark": False, "calls": []}
        if self._state_path.exists():
            self._state = json.loads(self._state_path.read_text())

    @classmethod
    def open(cls, path: str, *, writable: bool, partition: int | None = None, clock: object = None) -> FakeVolume:
        return cls(path, writable)

    def __enter__(self) -> FakeVolume:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def _save(self) -> None:
        self._state_path.write_text(json.dumps(self._state))

    def _called(self, what: str) -> None:
        self._state["calls"].append(what)
        self._save()

    # data

    def readinto(self, offset: int, buffer: memoryview) -> None:
        assert os.preadv(self._fd, [buffer], offset) == len(buffer)

    def where(self, offset: int, length: int) -> None:
        """It stands in no file."""

    def write(self, offset: int, data: memoryview) -> None:
        assert os.pwrite(self._fd, data, offset) == len(data)

    def write_many(self, writes: Pieces) -> bool:
        for offset, data in writes:
            self.write(offset, data)
        return True

    @property
    def holds(self) -> bool:
        return True

    def let_out(self) -> None:
        """Nothing is held."""

    def punch(self, offset: int, length: int) -> None:
        if _libc.fallocate(self._fd, _KEEP_SIZE_PUNCH_HOLE, offset, length) != 0:
            raise OSError(ctypes.get_errno(), "punch")

    def grow(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        self.size = size

    def flush(self) -> None:
        os.fdatasync(self._fd)

    # snapshots

    def snapshot_names(self) -> list[str]:
        return list(self._state["snapshots"])

    def _copy(self, name: str) -> Path:
        try:
            number = self._state["snapshots"][name]
        except KeyError:
            raise SnapshotNotFound(f"no snapshot {name}", hint="list shows them") from None
        return Path(f"{self.path}.{number}" + (".broken" if name == "broken" else ""))

    def open_view(self, name: str) -> FakeView:
        return FakeView(self._copy(name), self._state["snapshots"][name])

    def verb(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        return dict(getattr(self, f"_verb_{name}")(**arguments))

    def _verb_create(
        self, name: str = "", kind: str = "manual", message: str = "", quiesced: bool = False
    ) -> dict[str, Any]:
        name = name or f"auto-{self._state['next']}"
        if name in self._state["snapshots"]:
            raise SnapshotExists(f"snapshot {name} exists", hint="choose another name")
        self._state["snapshots"][name] = self._state["next"]
        self._state["kinds"][name] = kind
        self._state["next"] += 1
        self.flush()
        shutil.copyfile(self.path, self._copy(name))
        self._called(f"create {name}")
        return {"name": name, "kind": kind}

    def _verb_delete(self, names: list[str]) -> dict[str, Any]:
        for name in names:
            self._copy(name).unlink()
            del self._state["snapshots"][name]
            self._called(f"delete {name}")
        return {"deleted": names}

    def _verb_restore(self, name: str, safety: bool = True) -> dict[str, Any]:
        data = self._copy(name).read_bytes()
        if b"REFUSE THE RESTORE" in data[:1024]:
            raise DamagedCopy("a copy is damaged", hint="nothing was changed")
        os.pwrite(self._fd, data, 0)
        self._called(f"restore {name}")
        return {"restored": name}

    def _verb_list(self) -> dict[str, Any]:
        return {"version": 1, "snapshots": [{"name": n, "kind": k} for n, k in self._state["kinds"].items()]}

    def _verb_info(self) -> dict[str, Any]:
        return {"version": 1, "offset": 0, "attached": None}

    def _verb_check(self, names: list[str], copies: bool = True) -> dict[str, Any]:
        for name in names:
            self._copy(name)
        return {
            "store": {"ok": True, "errors": []},
            "snapshots": [{"name": name, "errors": []} for name in names or self._state["snapshots"]],
        }

    def _verb_check_copies(self, first: int) -> dict[str, Any]:
        return {"next": None, "doubled": 0, "damaged": []}

    def _verb_bug(self) -> dict[str, Any]:
        raise ZeroDivisionError("a bug")

    def _verb_pid(self) -> dict[str, Any]:
        return {"pid": os.getpid()}

    # serving

    def _unclean(self) -> bool:
        """The journal must be replayed (s_feature_incompat), or errors were found (s_state)."""
        raw = os.pread(self._fd, 1024, 1024)
        return raw[0x38:0x3A] == b"\x53\xef" and bool(raw[0x60] & 4 or raw[0x3A] & 2)

    @property
    def needs_replay(self) -> bool:
        return bool(self._state["mark"]) and self._unclean()

    def serve_below(self, above: Above) -> None:
        self.above = above

    growth = None

    def begin_serving(
        self, *, grow: bool = True, set_up: bool = False, repair: bool = False, live: bool = False
    ) -> None:
        if Path(self.path + ".refuse").exists():
            raise NeedsRecovery("refused to serve", hint="this is a test")
        self._state["mark"] = True
        self._called(f"begin grow={grow}")

    def end_serving(self) -> bool:
        clean = not self._unclean()
        self._state["mark"] = not clean
        self._called(f"end clean={clean}")
        return clean


def calls(image: str | Path) -> list[str]:
    """What was called on an image's volume, over all processes."""
    return list(json.loads(Path(f"{image}.json").read_text())["calls"])

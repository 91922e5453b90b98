"""What the server needs of a volume: the part of ``extsnap.snapshot.volume.Volume`` seen from above.

The server is started with the *name* of a factory (``module:attribute``), so that nothing here imports
the engine before the process that serves it exists, and tests serve volumes of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, cast

from extsnap.snapshot.above import Above

if TYPE_CHECKING:
    from extsnap.blockdev.base import Pieces
    from extsnap.snapshot.growth import Growth

Buffer = bytes | bytearray | memoryview

DEFAULT_FACTORY = "extsnap.snapshot.volume:Volume.open"


class ServedView(Protocol):
    """A snapshot as a read-only run of bytes.  ``id`` is never used again for another snapshot."""

    @property
    def size(self) -> int: ...

    @property
    def id(self) -> int: ...

    def readinto(self, offset: int, buffer: memoryview) -> None: ...

    def close(self) -> None: ...


class ServedVolume(Protocol):
    """The base volume and its snapshots: what the FUSE files read and write."""

    @property
    def size(self) -> int: ...

    def readinto(self, offset: int, buffer: memoryview) -> None: ...

    def where(self, offset: int, length: int) -> tuple[int, int] | None:
        """The descriptor of a file that has just what `readinto` gives, and the offset there; None: no file has."""

    def write(self, offset: int, data: Buffer) -> None: ...

    def write_many(self, writes: Pieces) -> bool:
        """All of them as ``write`` would, in their order; False or an error: they are to be written one by one."""
        ...

    @property
    def holds(self) -> bool:
        """Whether something is held back, to go out with more that is written soon."""
        ...

    def let_out(self) -> None:
        """Hand down what is held back to go out with more."""

    def punch(self, offset: int, length: int) -> None: ...

    def flush(self) -> None: ...

    def grow(self, size: int) -> None: ...

    def snapshot_names(self) -> list[str]: ...

    def open_view(self, name: str) -> ServedView: ...


class EngineVolume(ServedVolume, Protocol):
    """A whole volume: the files, the verbs, and the two ends of serving it."""

    @property
    def block_size(self) -> int: ...

    @property
    def needs_replay(self) -> bool: ...

    @property
    def is_lost(self) -> bool: ...

    def verb(self, name: str, /, **arguments: Any) -> dict[str, Any]: ...

    def serve_below(self, above: Above) -> None: ...

    @property
    def growth(self) -> Growth | None: ...

    def begin_serving(
        self, *, grow: bool = True, set_up: bool = False, repair: bool = False, live: bool = False
    ) -> None: ...

    def end_serving(self) -> bool: ...

    def close(self) -> None: ...

    def __enter__(self) -> EngineVolume: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> object: ...


class VolumeFactory(Protocol):
    """``Volume.open``: locks the volume, raises ``ExtsnapError`` subclasses."""

    def __call__(self, path: str, *, writable: bool, partition: int | None = None) -> EngineVolume: ...


def load_factory(spec: str) -> VolumeFactory:
    """Return the callable that ``module:attribute.attribute`` names."""
    module, _, attributes = spec.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return cast(VolumeFactory, cast(Callable[..., EngineVolume], found))

"""A volume with its snapshots: opening, recovery, serving, and the Python API.

    with extsnap.open("disk.img") as volume:
        volume.create("before-upgrade")
        volume.snapshots["before-upgrade"].open().read(1024)

States of the image (`DESIGN`, "The image at rest, and the dirty mark"):

    mark  header      means                                    the next writing command
    no    not open    at rest                                  goes on
    yes   not open    an edit was interrupted, or the mark     finishes what is pending, takes the mark off
                      was just put on or about to come off
    yes   open        a server ended without closing           finishes, has the journal replayed, takes it off
    no    open        somebody else took the mark away         refuses: written outside extsnap
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from extsnap.arrays import Ints, expand
from extsnap.blockdev.base import Buffer, CloningDevice, Device, Pieces, where
from extsnap.blockdev.durable import Durable
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.inuse import require_free, require_unwritten
from extsnap.errors import (
    ExtsnapError,
    FormatError,
    NeedsRecovery,
    NotExtError,
    OutsideWrite,
    SnapshotNotFound,
    StoreDamaged,
    VolumeBusy,
    VolumeFull,
)
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.locate import Place, locate
from extsnap.ext.magic import recognise
from extsnap.snapshot import format as fmt
from extsnap.snapshot import graft, hidden, limits
from extsnap.snapshot.above import Above
from extsnap.snapshot.engine import Engine
from extsnap.snapshot.full import NEVER, fill, make_room, warning
from extsnap.snapshot.hidden import Hidden
from extsnap.snapshot.later import Later
from extsnap.snapshot.medium import SUPERBLOCK_BYTES, Medium, SuperblockState
from extsnap.snapshot.moment import (
    detect_outside_write,
    fingerprint,
    how_to_repair,
    in_use,
    left_undone,
    require_clean,
)
from extsnap.snapshot.root import Extents, RestoreIntent, Root
from extsnap.snapshot.store import Store
from extsnap.snapshot.view import View, ViewFile
from extsnap.sparsebits import SparseBits

if TYPE_CHECKING:
    from extsnap.blockdev.deferred import Deferred
    from extsnap.snapshot import edit, recovery, served, taking
    from extsnap.snapshot.growth import Growth
    from extsnap.snapshot.vital import Vital
    from extsnap.snapshot.warden import Warden
else:
    edit, recovery, served, taking = map(Later, ("edit", "recovery", "served", "taking"))

#: Bytes; a stray seek must not make bitmaps that fill the memory.
LARGEST_VOLUME = 64 << 40


@dataclass(frozen=True)
class _Before:
    """What is to be known of a state in memory that was given up, until it has been read anew.

    Attributes:
        hidden: The hidden runs of a volume that is served: they may be younger than what is committed.
        is_torn: The superblocks may have different guards, marks or pointers.
        is_batch_unsure: The log may have a batch that nobody waited for.
    """

    hidden: Hidden | None
    is_torn: bool
    is_batch_unsure: bool


class SnapshotHandle:
    """One snapshot, as the Python API shows it.

    Attributes:
        info: The entry of the snapshot table.
    """

    def __init__(self, volume: Volume, info: fmt.Snapshot) -> None:
        self._volume = volume
        self.info = info

    @property
    def name(self) -> str:
        """The snapshot's name."""
        return self.info.name

    @property
    def id(self) -> int:
        """Unique for ever in this volume."""
        return self.info.id

    def open(self) -> ViewFile:
        """A read-only, seekable binary file of the view."""
        return ViewFile(self._volume.open_view(self.info.name))

    def delete(self) -> None:
        """Delete this snapshot."""
        self._volume.verb("delete", names=[self.info.name])


class Volume:
    """An opened image.  Use `Volume.open`.

    Attributes:
        above: What serves it, if anything does.
        stale: The header of a store without snapshots that the filesystem has elsewhere or no more.
        growth: How the store grows while the kernel has the served volume mounted; None while it is not served.
        path: Absolute path of the image.
        name: The same with the partition, as the command line takes both; for messages.
        offset: Where the volume begins in the image, in bytes.
        partition: Number of the partition; 0: the whole image.
        device_id: (st_dev, st_ino) of the image.
        size: Bytes of the volume.
        writable: Whether this process may change it.
        mended: Structures of the store that were damaged and are whole again, from their second copies.
        needs_replay: The filesystem must be replayed by stock e2fsck on the served volume before anything else.
    """

    def __init__(
        self,
        device: CloningDevice,
        *,
        path: str = "image",
        place: Place | None = None,
        device_id: tuple[int, int] = (0, 0),
        writable: bool = False,
        clock: Callable[[], int] = time.time_ns,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        place = place or Place(path)
        self.path = path
        self.name = replace(place, path=path).name
        self.offset = place.offset
        self.partition = place.partition
        self.device_id = device_id
        self.writable = writable
        self.random_bytes = random_bytes
        self._clock = clock
        self._device = Durable(device)
        self.medium = Medium(self._device)
        self.store: Store | None = None
        self.engine: Engine | None = None
        self.serving = False
        self.above: Above | None = None
        self.copied_before = 0
        self._views: weakref.WeakSet[View] = weakref.WeakSet()
        self.look_at = NEVER  # free blocks of the store below which `write` looks at the watermarks
        self.warned: set[str] = set()
        self.needs_replay = False
        self.mended: list[str] = []
        self.outside_write = False
        self.warden: Warden | None = None
        self.vital: Vital | None = None
        self.growth: Growth | None = None
        self.restoring: fmt.Snapshot | None = None  # to what, where an error came before all of it was done
        self.hindrance: ExtsnapError | OSError | None = None  # why opening could not finish a restore; told once
        self._lost: _Before | None = None  # the state in memory was given up, and could not be read anew
        self.deferred: Deferred | None = None  # a repair: whole or not at all
        self.repair: Medium | None = None  # the same with superblocks as the medium below shows them
        if writable and self.medium.state.mark:
            # It was not closed.  Copies and batches that are only in the host's cache, because the flush that was to
            # make them durable failed, would be taken for durable, and the next overwrite is then the end of both.
            self._device.reread()
        self._load()
        if writable:
            recovery.recover(self)
        elif self.store is not None and not self.medium.state.mark:
            detect_outside_write(self)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writable: bool = False,
        partition: int | None = None,
        clock: Callable[[], int] = time.time_ns,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> Volume:
        """Open an image file, or a partition in one.

        With ``writable`` the volume is locked, must not be in use, and what an earlier command left half done
        is finished first.  Other partitions of the image can be used at the same time.

        Args:
            path: An image file or block device.
            writable: Whether it may be changed.
            partition: Number of the partition; None and 0 as `extsnap.ext.locate.locate` takes them.
            clock: Nanoseconds since 1970.
            random_bytes: Where identifiers come from.

        Raises:
            ImageNotFound, NotExtError, FormatError: There is no ext volume.
            ExtsnapError: Several partitions may be meant, or the one that is meant cannot be used.
            VolumeBusy: Somebody else has it.
            StoreDamaged, OutsideWrite: The snapshots cannot be trusted.
        """
        place = locate(os.fspath(path), partition)
        image = ImageFile(
            place.path,
            writable=writable,
            lock="exclusive" if writable else "shared",
            start=place.offset,
            length=place.length,
        )
        try:
            # After our own lock: of two who come at once through different devices, at least one sees the other.
            if writable:
                require_free(image)
            else:
                require_unwritten(image)
            return cls(
                image,
                path=image.path,
                place=place,
                device_id=image.device_id,
                writable=writable,
                clock=clock,
                random_bytes=random_bytes,
            )
        except BaseException:
            image.close()
            raise

    # -- opening ----------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Read superblock, store, index; changes nothing."""
        self.medium = Medium(self._device)
        self.size = self.medium.size
        self.store = self.engine = None
        self.stale: Root | None = None
        if not self.medium.offsets:
            found, hint = recognise(self._device)
            what = f"{found}, not ext2, ext3 or ext4" if found else "no ext2, ext3 or ext4 filesystem"
            where = "choose another partition with -P" if self.partition else "check the path"
            raise NotExtError(f"{self.name} holds {what}", hint=hint or where)
        fs = Filesystem.open(self.medium)
        if self.writable and not (self.medium.state.mark or self.serving):  # the mark keeps all others away: it was us
            user = fs.mmp_user()
            if user:
                path = f"{self.path}?offset={self.offset}" if self.offset else self.path  # as e2fsprogs take it
                hint = f"unmount it there; if nobody has it, run tune2fs -f -E clear_mmp {path}"
                raise VolumeBusy(f"{self.name} is in use by {user}, as its MMP block says", hint=hint)
        self.block_size = fs.geometry.block_size
        slots = fmt.parse_pointer(self.medium.state.pointer) if self.medium.state.pointer else None
        if slots is None:
            slots = self._slots_by_path(fs)
        if slots is None:
            if self.medium.state.mark:
                raise StoreDamaged(
                    f"{self.name} carries the dirty mark but no store can be found", hint="run e2fsck on a copy of it"
                )
            # A plain volume: its superblocks pass as they are, a read-only feature of the user's own included.
            self.medium.offsets = []
            return
        store = Store.load(self.medium.device, slots, self.block_size, writable=self.writable)
        self.medium.set_offsets(store.root.superblocks)
        self.adopt(store)
        if self.writable and not (self.medium.state.mark or self.serving):
            self.forget_stale()

    def forget_stale(self) -> bool:
        """Give up a store without snapshots that the filesystem has elsewhere, or no more: its word counts."""
        store = self.require_store()
        if self.require_engine().snapshots:
            return False
        fs = Filesystem.open(self.medium)
        try:
            is_ours = graft.is_whole(fs, store.root) or graft.is_left_by_kernel(fs, store.root)
            if is_ours and graft.is_marked_used(fs, store.root):
                return False
        except FormatError:  # a damaged bitmap is not the store's fault, and found again by whoever needs it
            return False
        self.stale = store.root
        self.medium.offsets = []
        self.store = self.engine = None
        return True

    def _slots_by_path(self, fs: Filesystem) -> tuple[int, int] | None:
        """Where the slots are by ``/.extsnap/store``, for a superblock that lost its pointer."""
        try:
            number = fs.lookup(graft.PATH)
            if number is None:
                return None
            data = fs.file_map(number).data
        except ExtsnapError:
            return None
        if not len(data) or data[0, 0] != 0:
            return None
        blocks = expand(data[:2, 1], data[:2, 2])
        return (int(blocks[0]), int(blocks[1])) if len(blocks) > 1 else None

    def adopt(self, store: Store) -> None:
        """Take over a store: read its tables and build the engine above it."""
        fs = Filesystem.open(self.medium)
        self.store = store
        table: list[fmt.Snapshot] = []
        if (fmt.BlobKind.SNAPSHOTS, 0) in store.root.blobs:
            table = fmt.parse_snapshots(store.read_blob(fmt.BlobKind.SNAPSHOTS, 0))
        table = [snapshot for snapshot in table if store.root.counting >> snapshot.bit & 1]
        limits.require_snapshots(table)
        longest = max((snapshot.volume_bytes for snapshot in table), default=0)
        if longest > self.size:
            raise StoreDamaged(
                f"{self.name} has {self.size} bytes and a snapshot of it {longest}: the image was cut",
                hint=f"make it as long again (truncate -s {self.offset + longest}), then run extsnap check",
            )
        self.medium.set_offsets(store.root.superblocks)
        if not self.medium.state.pointer:
            pointer = fmt.build_pointer(store.slot_block(0), store.slot_block(1))
            self.medium.state = replace(self.medium.state, pointer=pointer)
        geometry = fs.geometry
        layout = self.medium, store, geometry.clusters_per_group, geometry.first_data_block, table
        self.engine = Engine(*layout)
        try:
            self.engine.load()
        except StoreDamaged as error:
            if self.writable and self.medium.state.mark:
                raise  # what was interrupted cannot be finished
            # Which snapshots there were is seen, and that none can be read; nothing is written but by a strip.
            self.engine = Engine(*layout)
            self.engine.lost = error.message
        if self.engine.lost_parts and self.writable and self.medium.state.mark:
            raise StoreDamaged(self.engine.lost_parts.texts[0])  # what was interrupted cannot be finished
        self.engine.pin()
        self.engine.vital = self.vital
        for view in self._views:  # those that are open go on with what is recorded from now on
            view.engine = self.engine
        if self.writable:
            self.engine.rebuild_need()
        self.copied_before = store.available

    def superblock_offsets(self, fs: Filesystem) -> list[int]:
        """Byte offsets of all superblocks of the filesystem."""
        geometry = fs.geometry
        return [
            int(block) * geometry.block_size + geometry.superblock_offset(int(block))
            for block in geometry.superblock_blocks
        ]

    def retarget(self, offsets: list[int]) -> None:
        """From the next header commit on the superblocks are at ``offsets``; the mark must be on.

        One that is a superblock no more is freed of guard, mark and pointer first: then it reads the same whether
        or not it is listed, which is what a crash before the commit leaves.
        """
        root = self.require_store().root
        gone = sorted(set(root.superblocks) - set(offsets))
        for at in gone:
            if at + SUPERBLOCK_BYTES <= self.size:
                self.medium.device.pwrite(at, self.medium.superblock(at))
        if gone:
            self.medium.flush()
        root.superblocks = sorted(offsets)
        self.medium.set_offsets(root.superblocks)
        self.require_engine().pin()

    def require_trusted(self) -> None:
        """Refuse to change a volume that was written outside extsnap.

        Raises:
            OutsideWrite: Names the snapshots at risk.
            NeedsRecovery: The journal must be replayed through the write path first.
        """
        self.require_inside()
        if self.needs_replay:
            undone = left_undone(self.filesystem()) or "was not closed"
            raise NeedsRecovery(f"{self.name} {undone}", hint=how_to_repair(self.name))

    def damaged_names(self) -> list[str]:
        """Snapshots of which records are lost: whatever is written could be what they need."""
        engine = self.engine
        entries = self.snapshot_list()
        if engine is None or engine.lost:
            return [entry.name for entry in entries]
        return [entry.name for entry in entries if engine.lost_parts.of(entry.bit).any()]

    def require_inside(self, going: Iterable[str] = ()) -> None:
        """Refuse to change a volume that was written outside extsnap, whose records are lost, or under repair.

        What a repair writes waits above the engine, which therefore must be the same from its beginning to its end;
        a change that fails half way would have it built anew.

        A restore that was begun and failed is finished first.

        Args:
            going: Snapshots that the command deletes.
        """
        if self.deferred is not None:
            raise NeedsRecovery(
                f"{self.name} is being repaired, and its snapshots stay as they are meanwhile",
                hint="wait until that command has ended, then try again",
            )
        self.finish_restore()
        if self.engine is not None and self.engine.lost_parts and not set(self.damaged_names()) <= set(going):
            damaged = self.damaged_names()
            whole = "the others" if len(damaged) < len(self.engine.snapshots) else "the volume"
            raise StoreDamaged(
                f"{self.name}: {self.engine.lost_parts.texts[0]}: snapshots that cannot be read whole: "
                f"{', '.join(map(ascii, damaged))}",
                hint="take what is left out of extsnap mount --snapshot NAME, then "
                f"extsnap delete {shlex.join([self.name, *damaged])} makes {whole} whole again",
            )
        if self.engine is not None and self.engine.lost:
            raise StoreDamaged(
                f"{self.name}: {self.engine.lost}: its snapshots cannot be read any more",
                hint="extsnap strip makes a plain volume of it",
            )
        if self.outside_write:
            names = ", ".join(ascii(snapshot.name) for snapshot in self.snapshot_list())
            raise OutsideWrite(
                f"{self.name} was written outside extsnap; snapshots at risk: {names}",
                hint=f"extsnap accept {self.name} goes on with them marked tainted",
            )

    # -- pieces -----------------------------------------------------------------------------------------

    def require_store(self) -> Store:
        """The store; it must exist."""
        if self.store is None:
            raise self._without_store()
        return self.store

    def require_engine(self) -> Engine:
        """The engine; the store must exist."""
        if self.engine is None:
            raise self._without_store()
        return self.engine

    @property
    def is_lost(self) -> bool:
        """Whether the state could not be read anew after an error: see `reload`."""
        return self._lost is not None

    def _without_store(self) -> Exception:
        if self.is_lost:
            return OSError(errno.EIO, f"{self.name}: its snapshots could not be read again after an error")
        return ExtsnapError(f"{self.name} has no store", hint="take a snapshot first")

    @property
    def base(self) -> Device:
        """The base volume as a device: the engine where there is a store, else the medium.

        Raises:
            OSError: After an error the state could not be read again: writing on could damage snapshots.  Or a
                restore that was begun is not finished: what is written would be lost by that.
        """
        if self.is_lost:
            raise self._without_store()
        if self._restore_begun:
            raise OSError(errno.EIO, f"{self.name}: a restore was begun, and the next command has to finish it first")
        if self.repair is not None:
            return self.repair
        return self.engine if self.engine is not None else self.medium

    def filesystem(self, *, lenient: bool = False) -> Filesystem:
        """The base volume's filesystem as it is now; held writes are seen.  ``lenient``: as `Filesystem.open`."""
        return Filesystem.open(self.base, lenient=lenient)

    @property
    def in_use(self) -> bool:
        """Whether somebody above writes to the served volume: then its filesystem is theirs alone to edit."""
        return self.serving and self.above is not None and self.above.in_use()

    def require_unused(self) -> None:
        """Refuse to edit a filesystem that somebody else has in memory.

        Where nobody has it, what they gave the store and it has not taken in yet is dropped: the edit gives it back.

        Raises:
            VolumeBusy: It is in use.
        """
        if self.in_use:
            raise VolumeBusy(
                f"{self.name} is in use, and its filesystem cannot be changed underneath",
                hint="unmount or close it first",
            )
        if self.growth is not None:
            self.growth.drop()

    @property
    def guard_wanted(self) -> bool:
        """Whether the image is to be guarded at rest."""
        return bool(self.require_store().root.flags & fmt.SlotFlags.GUARD)

    def now_seconds(self) -> int:
        """Seconds since 1970."""
        return self._clock() // 10**9

    def now_ns(self) -> int:
        """Nanoseconds since 1970."""
        return self._clock()

    def needed_groups(self) -> SparseBits:
        """Blocks that a living snapshot preserves; read byte by byte as ext's block bitmaps are."""
        engine = self.require_engine()
        return engine.history.union().reshaped(engine.rows, engine.row_bytes, -1 if engine.shift else 0)

    def set_mark(self, mark: bool) -> None:
        """Put the dirty mark on, or take it off and set the guard as it should be; durable on return."""
        store = self.require_store()
        if mark and self.medium.state.mark and not self.medium.is_torn:
            return
        if not mark and (store.root.pending is not None or store.root.restore is not None):
            return  # without the mark nobody would finish it
        guard = self.medium.state.guard
        if not mark:
            guard = self.guard_wanted and bool(self.require_engine().snapshots)
        pointer = fmt.build_pointer(store.slot_block(0), store.slot_block(1))
        state = SuperblockState(guard=guard, mark=mark, pointer=pointer)
        if state != self.medium.state or self.medium.is_torn:
            self.medium.set_state(state)

    def forget_store(self) -> None:
        """The store is gone from the filesystem: take guard, mark and pointer away in one write each."""
        self.medium.set_state(SuperblockState())
        self.medium.offsets = []
        self.store = self.engine = None

    def settle(self) -> None:
        """Bring the image to rest: fold write counts, fingerprint, header not open, mark off, guard on.

        While serving, only the header and the need of the mark are brought up to date.
        """
        engine, store = self.require_engine(), self.require_store()
        engine.commit()
        if self.serving:
            if engine.snapshots and not self.medium.state.mark:
                self.open_header()
            served.watch(self)
            return
        engine.flush()
        engine.index.apply_writes()
        if store.log_position or any(level.touched for level in engine.index.levels):
            self._try_fold()
        engine, store = self.require_engine(), self.require_store()  # it may have read them anew
        fs = self.filesystem()
        offsets = self.superblock_offsets(fs)
        if sorted(offsets) != sorted(store.root.superblocks) and (self.medium.state.mark or not engine.snapshots):
            self.retarget(offsets)  # a tool resized the filesystem
        store.root.flags &= ~fmt.SlotFlags.OPEN
        store.root.fingerprint = fingerprint(fs)
        store.commit()
        if not engine.hidden.some:  # else there was no room to settle them: nobody else may read the image
            self.set_mark(False)

    def reveal(self) -> None:
        """Bring a volume that is not written meanwhile to where no block is hidden, growing the store if it must.

        Durable on return.  Where room is lacking all the same, the oldest snapshots make it if they are to; else blocks
        in use stay hidden and the mark stays on.
        """
        engine = self.require_engine()
        if not engine.hidden.some:
            return
        self.set_mark(True)
        fs = self.filesystem()
        used = in_use(fs, engine.rows, engine.row_bytes, engine.shift, engine.blocks)
        missing = hidden.reveal(engine, used)
        if missing and edit.grow(self, engine.blocks_for(missing) + edit.MINIMUM_ROOM):
            missing = hidden.reveal(engine, used)
        if missing:
            need = f"zeros that were written to it need {missing * self.block_size} bytes more for copies"
            refusal = VolumeFull(f"{self.name} keeps the dirty mark: {need}", hint="delete a snapshot")
            try:
                make_room(self, refusal, engine.hidden.pieces())
            except VolumeFull:
                self.say(f"{refusal.message}; {refusal.hint}")
            else:
                self.reveal()

    def own(self, extents: Extents, fresh: Ints) -> None:
        """The filesystem has given ``fresh`` blocks to the store, which has ``extents`` now; durable on return.

        Raises:
            ExtsnapError, OSError: It does not have them; nothing was changed.
        """
        try:
            self.require_engine().own(extents, np.sort(fresh))
        except BaseException:
            self.reload()
            raise
        served.watch(self)

    def disown(self, runs: Ints) -> None:
        """Give up free logical ``runs`` of the store; durable on return: then the filesystem may free them.

        Nothing may be held: what is chosen to go could be where its copies are put.

        Raises:
            ExtsnapError, OSError: It still has them.
        """
        engine, store = self.require_engine(), self.require_store()
        try:
            wanted = edit.without(store.root, runs)
            store.withdraw(runs)
            engine.disown(wanted)
        except BaseException:
            self.reload()
            raise
        self.copied_before -= int(runs[:, 1].sum())

    def watch(self) -> None:
        """Who writes from above has changed: see `served.watch`."""
        served.watch(self)

    def count_room(self, blocks: int) -> None:
        """The store has so many free blocks more, by growth: that is no sign of how much a session uses."""
        self.copied_before += blocks

    def _try_fold(self) -> None:
        """Write counts are worth a fold only where there is room for it: the log holds the records anyway."""
        engine = self.require_engine()
        try:
            engine.fold(commit=False, counts=True)
        except VolumeFull:
            self.reload()

    def open_header(self) -> None:
        store = self.require_store()
        if self.medium.state.mark and store.root.flags & fmt.SlotFlags.OPEN:
            return  # a recovery that may be refused changes nothing
        self.set_mark(True)
        store.root.flags |= fmt.SlotFlags.OPEN
        try:
            store.commit()
        except BaseException:
            store.root.flags &= ~fmt.SlotFlags.OPEN
            raise

    @property
    def standing(self) -> RestoreIntent | None:
        """The restore that was begun and is for this process to finish: the base volume is half restored."""
        if self.is_lost or self.store is None or not (self.writable and self.medium.state.mark):
            return None
        return self.store.root.restore

    @property
    def _restore_begun(self) -> bool:
        """Whether this process has to finish a restore, or to bring to rest what was restored."""
        return self.standing is not None or (self.restoring is not None and not self.is_lost)

    def finish_restore(self) -> None:
        """Finish a restore that this process began, where an error came between: see `restore.finish`."""
        self.recall()
        if self._restore_begun:
            from extsnap.snapshot.restore import finish

            finish(self)

    def reload(self) -> None:
        """Forget the state in memory and read the committed one: after an operation that failed half way.

        What failed may have been a barrier, and then what is read is not yet what a power cut would leave.  So first
        all that was written is made durable; a batch of the log that nobody waited for is looked at as after a crash,
        since its copies may have been written over; and an edit that was committed is finished.

        Raises:
            ExtsnapError, OSError: That failed.  The volume refuses everything until `recall` could read it.
        """
        if self._lost is None:
            engine = self.engine
            shown = engine.hidden if engine is not None else None
            unsure = self.store is not None and self.store.is_batch_unsure
            self._lost = _Before(shown, self.medium.is_torn, unsure)
        before = self._lost
        try:
            if self.writable:
                self._device.flush()
            self._load()
            if self.engine is not None:
                self._take_over(self.engine, before)
        except BaseException:
            self.store = self.engine = None
            raise
        self._lost = None

    def _take_over(self, engine: Engine, before: _Before) -> None:
        """Have the engine that was read anew go on where the one before it stood."""
        if before.hidden is not None:
            engine.hidden.take_over(before.hidden)
            engine.pin()
        if not self.writable:
            return
        if before.is_torn:
            self.medium.set_state(self.medium.state)
        if before.is_batch_unsure:
            engine.repair_last_batch()
        engine.rebuild_need()
        engine.spared = edit.MINIMUM_ROOM if self.serving else 0
        edit.finish(self)

    def recall(self) -> None:
        """Where the state could not be read anew after an error, try it once more: see `reload`."""
        if self.is_lost:
            self.reload()
            if not self._restore_begun:  # else whoever finishes it does that
                served.watch(self)

    # -- snapshots --------------------------------------------------------------------------------------

    def snapshot_list(self) -> list[fmt.Snapshot]:
        """The living snapshots, oldest first."""
        return sorted(self.engine.snapshots, key=lambda entry: entry.id) if self.engine else []

    @property
    def snapshots(self) -> dict[str, SnapshotHandle]:
        """Handles by name, oldest first."""
        return {entry.name: SnapshotHandle(self, entry) for entry in self.snapshot_list()}

    def find(self, name: str) -> fmt.Snapshot:
        """The snapshot of that name.

        Raises:
            SnapshotNotFound: There is none; the message lists some that are there.
        """
        if self.is_lost:
            raise self._without_store()
        entries = self.snapshot_list()
        for entry in entries:
            if entry.name == name:
                return entry
        known = ", ".join(ascii(entry.name) for entry in entries[:5]) + (", ..." if len(entries) > 5 else "")
        raise SnapshotNotFound(
            f"{self.name} has no snapshot {name!a}",
            hint=f"it has: {known}" if entries else "it has none; take one with extsnap create",
        )

    def snapshot_names(self) -> list[str]:
        """Names of the living snapshots, oldest first."""
        return [entry.name for entry in self.snapshot_list()]

    def open_view(self, name: str) -> View:
        """The view of a snapshot."""
        view = View(self.require_engine(), self.find(name))
        self._views.add(view)
        return view

    def back_to_rest(self) -> None:
        """After an operation that was refused or failed: the committed state, and what it had begun is finished.

        A server goes on from here, so nothing of the operation may be left in memory for a later commit to make true.
        """
        if self.store is None and not self.is_lost:
            return
        self.reload()
        store, at_rest = self.store, not (self.serving or self.needs_replay)
        if store is not None and at_rest and self.medium.state.mark and store.root.restore is None:
            self.settle()

    def back_to_size(self, before: Extents | None) -> None:
        """After a refusal: the committed state, the store as large as when it had ``before``; None: there was none.

        One that is served gives back what it does not need at the end of that.
        """
        self.back_to_rest()
        if self.store is None or self.serving:
            return
        if before is None:
            edit.remove(self)
            return
        edit.give_back_growth(self, before)
        self.settle()

    def create(
        self,
        name: str | None = None,
        message: str = "",
        *,
        kind: fmt.Kind = fmt.Kind.MANUAL,
        quiesced: bool = False,
    ) -> SnapshotHandle:
        """Take a snapshot: see `taking.create`."""
        return SnapshotHandle(self, taking.create(self, name, message, kind=kind, quiesced=quiesced))

    def delete(self, names: list[str], *, dropped: bool = False) -> int:
        """Delete snapshots: see `taking.delete`."""
        return taking.delete(self, names, dropped=dropped)

    def needs_live(self) -> tuple[int, int]:
        """What a snapshot of a volume that somebody writes to needs: see `taking.needs_live`."""
        return taking.needs_live(self)

    def set_states(self, snapshots: list[fmt.Snapshot]) -> None:
        """Commit other states of the living snapshots, at once and whole.

        Raises:
            ExtsnapError, OSError: They are as they were, in memory too.
        """
        self.require_engine().commit()  # nothing may be held where the state is read anew
        try:
            taking.write_tables(self, snapshots)
            self.require_store().commit()
            self.require_engine().set_snapshots(snapshots)
        except BaseException:
            self.reload()
            raise

    @contextlib.contextmanager
    def changing(self) -> Iterator[Store]:
        """Change what the store remembers; a volume without one gets it, and afterwards all is at rest again."""
        self.require_inside()
        if self.engine is not None:
            self.engine.commit()  # if it fails, what is held stays held; a way back to rest would forget it
        try:
            if self.store is None:
                fs = self.filesystem()
                fs.require_supported()
                require_clean(fs, self.name)
                edit.set_up(self)
            yield self.require_store()
            if not self.needs_replay:
                self.settle()
        except (ExtsnapError, OSError):
            self.back_to_rest()
            raise

    def give_back(self, freed: int, *, everything: bool = False) -> None:
        """Return freed blocks to the filesystem; the store keeps what its next edit needs."""
        engine, store = self.require_engine(), self.require_store()
        least = engine.reserve() + edit.MINIMUM_ROOM
        spare = max(0, store.available - least)
        edit.shrink(self, spare if everything else min(freed, spare))

    # -- the served data path ---------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read the base volume."""
        self.base.readinto(offset, buffer)

    def where(self, offset: int, length: int) -> tuple[int, int] | None:
        """Where in a file this part of the base volume stands as it is; None where nowhere."""
        return where(self.base, offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """Read the base volume."""
        return self.base.pread(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        """Write the base volume; durable after `flush`.

        Raises:
            StoreProtected: It would take the store from the filesystem; nothing was written.
            VolumeFull: There is no room for the copies; nothing was written.
        """
        if self.growth is not None and self.growth.cookie is not None:
            for at, piece in self.growth.cookie.sift(offset, data):
                self._write(at, piece)
        else:
            self._write(offset, data)
        self._look_at_watermarks()

    def write_many(self, writes: Pieces) -> bool:
        """Write the base volume in many places at once, as so many `write` in their order would.

        Returns:
            False where they are to be written one by one, and nothing was.

        Raises:
            ExtsnapError, OSError: One by one they are found out which is refused, and why; any of them was made.
        """
        engine = self.engine
        if engine is None or self.base is not engine or (self.growth is not None and self.growth.cookie is not None):
            return False
        if int(np.bitwise_or.reduce(writes.offsets | writes.lengths)) & (self.block_size - 1):
            return False
        if self.warden is not None and self.warden.watches(writes):
            return False
        if self.vital is not None:
            for offset, data in writes:
                self.vital.examine(offset, data)
        if not engine.write_many(writes):
            return False
        self._look_at_watermarks()
        return True

    def _write(self, offset: int, data: Buffer) -> None:
        if self.warden is not None:
            self.warden.examine(offset, data)
        if self.vital is not None:
            self.vital.examine(offset, data)
        while True:
            try:
                self.base.pwrite(offset, data)
                break
            except VolumeFull as refusal:
                self._drop_for(refusal, offset, len(data))

    def punch(self, offset: int, length: int) -> None:
        """Make a range of the base volume read as zeros; raises as `write`."""
        if self.warden is not None:
            self.warden.examine_punch(offset, length)
        while True:
            try:
                self.base.punch(offset, length)
                break
            except VolumeFull as refusal:
                self._drop_for(refusal, offset, min(length, self.size - offset))
        self._look_at_watermarks()

    def _drop_for(self, refusal: VolumeFull, offset: int, length: int) -> None:
        """Make room for a write by deleting snapshots, if that is wanted; raises as `full.make_room`."""
        if self.growth is not None and self.growth.hope:
            raise refusal
        make_room(self, refusal, self.require_engine().needed_by(offset, length))

    def _look_at_watermarks(self) -> None:
        """Say once a session that the store fills up; look again when a good part of its room is gone."""
        engine = self.engine
        if engine is None or engine.left >= self.look_at:
            return
        self.look_at = engine.left - engine.room() // 16
        found = fill(self, engine.blocks_to_preserve())
        if found.watermark is not None and found.watermark not in self.warned:
            self.warned.add(found.watermark)
            self.say(warning(self, found))

    def say(self, message: str) -> None:
        """Tell whoever looks after the server one line."""
        if self.above is not None:
            self.above.say(message)

    def serve_below(self, above: Above) -> None:
        """Name what serves this volume."""
        self.above = above

    @property
    def holds(self) -> bool:
        """Whether writes are held, to go out with more: the first ones to blocks that a snapshot needs."""
        return self.engine is not None and self.engine.holds

    def let_out(self) -> None:
        """Hand down to the host what is held to go out with more: an end of this process does not take it with it."""
        if self.engine is not None and self.base is self.engine:
            self.engine.commit()

    def flush(self) -> None:
        """Everything written before is durable when this returns."""
        self.base.flush()

    def grow(self, size: int) -> None:
        """Make the volume ``size`` bytes long, as a file grows by a write past its end; what is new reads as zeros.

        The image file becomes longer at once and stays so after a crash; the filesystem does not mind.

        Raises:
            OSError: ENOSPC for a partition, a block device, or a volume under repair, EFBIG past `LARGEST_VOLUME`,
                or the host's.
        """
        if size > LARGEST_VOLUME:
            raise OSError(errno.EFBIG, f"{self.name}: {size} bytes are more than a volume may have")
        if self.deferred is not None:
            raise OSError(errno.ENOSPC, f"{self.name} cannot grow while it is repaired")
        self._resize(size)

    def cut(self, size: int) -> None:
        """Make the volume ``size`` bytes long where nothing behind that is anybody's: else it stays as it is.

        Nothing is lost by a crash before or after: a filesystem does not mind what lies behind its end.
        """
        engine, store = self.require_engine(), self.require_store()
        longest = max((entry.volume_bytes for entry in engine.snapshots), default=0)
        mine = int(store.root.allocation_runs().sum(axis=1).max()) * self.block_size
        theirs = self.filesystem().geometry.blocks_count * self.block_size
        if size < self.size and size >= max(longest, mine, theirs) and not engine.history.reaches(engine.rows_of(size)):
            with contextlib.suppress(OSError):  # a partition or a device
                self._resize(size)

    def _resize(self, size: int) -> None:
        self.medium.resize(size)
        self.size = self.medium.size
        if self.engine is not None:
            self.engine.resize(self.size)
            self.vital = None  # metadata may be elsewhere
            self.watch()

    def begin_serving(
        self, *, grow: bool = True, set_up: bool = False, repair: bool = False, live: bool = False
    ) -> None:
        """Get ready for writes from above: see `served.begin`."""
        served.begin(self, grow=grow, set_up=set_up, repair=repair, live=live)

    def end_serving(self) -> bool:
        """Bring the image to rest after serving: see `served.end`."""
        return served.end(self)

    # -- verbs ------------------------------------------------------------------------------------------

    def verb(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """Run a command by name; returns the dict that ``--json`` prints."""
        from extsnap.snapshot.verbs import VERBS, run

        if name not in VERBS:
            raise ExtsnapError(f"there is no command {name!r}")
        return run(self, name, arguments)

    def close(self) -> None:
        """Close the image; held writes of a volume that nobody ended serving are lost, as at a power cut."""
        self.drop_repair()
        self._device.close()

    def drop_repair(self) -> None:
        """Forget what a repair wrote, if there is one: nothing of it has been done."""
        if self.deferred is not None:
            self.deferred.close()
        self.deferred = self.repair = None

    def __enter__(self) -> Volume:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.engine is not None and self.writable and not self.serving:
            self.engine.flush()
        self.close()


def open_volume(path: str | Path, *, writable: bool = True) -> Volume:
    """`Volume.open` under the name that the package exports as ``extsnap.open``."""
    return Volume.open(path, writable=writable)

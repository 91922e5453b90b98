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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from extsnap.arrays import Ints, expand
from extsnap.blockdev.base import Buffer, CloningDevice, Device, where
from extsnap.blockdev.deferred import Deferred
from extsnap.blockdev.durable import Durable
from extsnap.blockdev.image import ImageFile
from extsnap.blockdev.inuse import require_free, require_unwritten
from extsnap.errors import (
    ExtsnapError,
    FormatError,
    InvalidName,
    NeedsRecovery,
    NotExtError,
    OutsideWrite,
    SnapshotExists,
    SnapshotNotFound,
    StoreDamaged,
    VolumeBusy,
    VolumeDirty,
    VolumeFull,
)
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.locate import Place, locate
from extsnap.ext.magic import recognise
from extsnap.snapshot import edit, graft, hidden, limits
from extsnap.snapshot import format as fmt
from extsnap.snapshot.above import Above
from extsnap.snapshot.check import note
from extsnap.snapshot.engine import Engine
from extsnap.snapshot.full import fill, make_room, warning
from extsnap.snapshot.growth import Growth, Reserve
from extsnap.snapshot.medium import SUPERBLOCK_BYTES, Medium, SuperblockState
from extsnap.snapshot.moment import (
    fingerprint,
    how_to_repair,
    in_use,
    is_at_rest,
    left_undone,
    preserved,
    require_clean,
)
from extsnap.snapshot.settings import note_dropped
from extsnap.snapshot.store import Extents, Root, Store
from extsnap.snapshot.view import View, ViewFile
from extsnap.snapshot.vital import Vital
from extsnap.snapshot.warden import Warden
from extsnap.sparsebits import SparseBits

ALWAYS, NEVER = 1 << 62, -1
#: Bytes; a stray seek must not make bitmaps that fill the memory.
LARGEST_VOLUME = 64 << 40


def validate_name(name: str) -> str:
    """Return ``name`` if it can name a snapshot.

    Raises:
        InvalidName: It breaks a rule, which the message states.
    """
    shown = ascii(name)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidName(f"snapshot name {shown} is not UTF-8", hint="choose another name") from error
    rule = fmt.fault_of_name(name)
    if rule:
        raise InvalidName(f"snapshot name {shown} {rule}", hint="choose another name")
    return name


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
        self._copied_before = 0
        self._look_at = NEVER  # free blocks of the store below which `write` looks at the watermarks
        self._warned: set[str] = set()
        self.needs_replay = False
        self.mended: list[str] = []
        self.outside_write = False
        self._warden: Warden | None = None
        self._vital: Vital | None = None
        self.growth: Growth | None = None
        self._lost = False  # a failed reload: without the engine nothing would be copied
        self._deferred: Deferred | None = None  # a repair: whole or not at all
        self._repair: Medium | None = None  # the same with superblocks as the medium below shows them
        if writable and self.medium.state.mark:
            # It was not closed.  Copies and batches that are only in the host's cache, because the flush that was to
            # make them durable failed, would be taken for durable, and the next overwrite is then the end of both.
            self._device.reread()
        self._load()
        if writable:
            self._recover()
        elif self.store is not None and not self.medium.state.mark:
            self._detect_outside_write(bool(self.store.root.flags & fmt.SlotFlags.OPEN))

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
            self._forget_stale()

    def _forget_stale(self) -> bool:
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
        self.engine.vital = self._vital
        if self.writable:
            self.engine.rebuild_need()
        self._copied_before = store.available

    def superblock_offsets(self, fs: Filesystem) -> list[int]:
        """Byte offsets of all superblocks of the filesystem."""
        geometry = fs.geometry
        return [
            int(block) * geometry.block_size + geometry.superblock_offset(int(block))
            for block in geometry.superblock_blocks
        ]

    def _recover(self) -> None:
        """Finish what an interrupted command left; see the table at the top of this module."""
        store = self.store
        if store is None:
            return
        is_open = bool(store.root.flags & fmt.SlotFlags.OPEN)
        marked = self.medium.state.mark
        engine = self.require_engine()
        if engine.lost:
            return
        if not marked:
            self._detect_outside_write(is_open)
            if engine.lost_parts:
                return  # nothing is written but by a delete of all that are affected, or a strip
            if not self.outside_write:
                self._require_own_blocks()
            if not self.outside_write and (store.worn or engine.history.worn):
                self.mended = note(self, [], [])
            return
        engine.repair_last_batch()
        edit.finish(self)
        if self.store is None:
            return
        if store.root.restore is not None:
            from extsnap.snapshot.restore import complete

            complete(self)
        fs = self.filesystem()
        if left_undone(fs) or (is_open and not fs.is_clean):
            self.needs_replay = True
            return
        try:
            self._reconcile(fs)
            self.reveal()
            self.settle()
        except FormatError:
            self.needs_replay = True

    def _detect_outside_write(self, is_open: bool) -> None:
        root = self.require_store().root
        if not self.require_engine().snapshots:
            return
        if is_open or (root.fingerprint and fingerprint(self.filesystem()) != root.fingerprint):
            self.outside_write = True
            hidden.forget(self.require_engine())  # the base is what the others saw

    def _require_own_blocks(self) -> None:
        """Refuse to write into a store that claims blocks of the filesystem's own, or of other files.

        Nobody wrote outside extsnap, so header and inode agree, whoever made them.

        Raises:
            StoreDamaged: They do not, or the blocks hold metadata of the filesystem.
        """
        root = self.require_store().root
        fs = Filesystem.open(self.medium)
        hint = "its snapshots can be read and exported; extsnap check tells more"
        try:
            taken = graft.has_metadata(fs, root)
        except FormatError:  # a damaged descriptor is not the store's fault, and found again by whoever needs it
            return
        if taken:
            raise StoreDamaged(f"{self.name}: the store claims blocks of the filesystem's metadata", hint=hint)
        if not graft.is_whole(fs, root):
            raise StoreDamaged(f"{self.name}: the store's header and its inode name different blocks", hint=hint)

    def _reconcile(self, fs: Filesystem) -> None:
        """After writes from above or a replay: filesystem and header say the same about the store again.

        A tool may have given the store's blocks or inodes free in the bitmaps, and a replay may have brought back
        the removal that the warden refused before: all that is put back.  Nodes may be elsewhere: that is fine.

        Raises:
            StoreDamaged: Files have blocks or inodes of the store now; nothing was changed.
        """
        store = self.require_store()
        if graft.is_left_by_kernel(fs, store.root):
            edit.resize(self, store.root.extents)
            fs = self.filesystem()
        if not graft.is_whole(fs, store.root) or not graft.is_marked_used(fs, store.root):
            edit.reassert(self)
            return
        mapping = fs.file_map(store.root.store_inode).mapping
        if set(mapping.tolist()) != set(store.root.mapping.tolist()):
            store.root.mapping = mapping

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
        self._require_inside()
        if self._deferred is not None:
            raise NeedsRecovery(f"{self.name} is being repaired", hint="wait until that command has ended")
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

    def _require_inside(self, going: Iterable[str] = ()) -> None:
        """Refuse to change a volume that was written outside extsnap, or whose records are lost.

        Args:
            going: Snapshots that the command deletes.
        """
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
            raise ExtsnapError(f"{self.name} has no store", hint="take a snapshot first")
        return self.store

    def require_engine(self) -> Engine:
        """The engine; the store must exist."""
        if self.engine is None:
            raise ExtsnapError(f"{self.name} has no store", hint="take a snapshot first")
        return self.engine

    @property
    def base(self) -> Device:
        """The base volume as a device: the engine where there is a store, else the medium.

        Raises:
            OSError: After an error the state could not be read again: writing on could damage snapshots.
        """
        if self._lost:
            raise OSError(errno.EIO, f"{self.name}: its snapshots could not be read again after an error")
        if self._repair is not None:
            return self._repair
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

        Raises:
            VolumeBusy: It is in use.
        """
        if self.in_use:
            raise VolumeBusy(
                f"{self.name} is in use, and its filesystem cannot be changed underneath",
                hint="unmount or close it first",
            )

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
        if mark and self.medium.state.mark:
            return
        if not mark and (store.root.pending is not None or store.root.restore is not None):
            return  # without the mark nobody would finish it
        guard = self.medium.state.guard
        if not mark:
            guard = self.guard_wanted and bool(self.require_engine().snapshots)
        pointer = fmt.build_pointer(store.slot_block(0), store.slot_block(1))
        state = SuperblockState(guard=guard, mark=mark, pointer=pointer)
        if state != self.medium.state:
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
                self._open_header()
            self._watch()
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
        if missing and edit.grow(self, engine.blocks_for(missing) + MINIMUM_ROOM):
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

    def _watch(self) -> None:
        """While writes come from above and there are snapshots, a warden judges them, and room is kept for metadata.

        A replay is exempt from both.
        """
        if self.growth is None and self.serving and not self.needs_replay and self.engine is not None:
            self.growth = Growth(self)
        watched = self.serving and not self.needs_replay and self.engine is not None and bool(self.engine.snapshots)
        self._look_at = ALWAYS if watched else NEVER
        if not watched:
            self._warden = self._vital = None
        else:
            if self._warden is None:
                self._warden = Warden(self)
            else:
                self._warden.locate()
            engine = self.require_engine()
            if self._vital is None and engine.spared:
                with contextlib.suppress(ExtsnapError):  # a filesystem that a repair is about to mend
                    fs = self.filesystem(lenient=True)
                    self._vital = Vital(fs, engine.rows, engine.row_bytes, engine.shift)
            if self._vital is not None:
                self._vital.count_again(engine.rows)
        if self.engine is not None:
            self.engine.vital = self._vital

    def own(self, extents: Extents, fresh: Ints) -> None:
        """The filesystem has given ``fresh`` blocks to the store, which has ``extents`` now; durable on return.

        Raises:
            ExtsnapError, OSError: It does not have them; nothing was changed.
        """
        try:
            self.require_engine().own(extents, np.sort(fresh))
        except BaseException:
            self._reload()
            raise
        self._watch()

    def disown(self, runs: Ints) -> None:
        """Give up free logical ``runs`` of the store; durable on return: then the filesystem may free them.

        Raises:
            ExtsnapError, OSError: It still has them.
        """
        engine, store = self.require_engine(), self.require_store()
        engine.commit()
        try:
            wanted = edit.without(store.root, runs)
            store.withdraw(runs)
            engine.disown(wanted)
        except BaseException:
            self._reload()
            raise
        self._copied_before -= int(runs[:, 1].sum())

    def count_room(self, blocks: int) -> None:
        """The store has so many free blocks more, by growth: that is no sign of how much a session uses."""
        self._copied_before += blocks

    def _try_fold(self) -> None:
        """Write counts are worth a fold only where there is room for it: the log holds the records anyway."""
        engine = self.require_engine()
        try:
            engine.fold(commit=False, counts=True)
        except VolumeFull:
            self._reload()

    def _open_header(self) -> None:
        store = self.require_store()
        if self.medium.state.mark and store.root.flags & fmt.SlotFlags.OPEN:
            return  # a recovery that may be refused changes nothing
        self.set_mark(True)
        store.root.flags |= fmt.SlotFlags.OPEN
        store.commit()

    def _reload(self) -> None:
        """Forget the state in memory and read the committed one: after an operation that failed half way."""
        serving = self.serving
        shown = self.engine.hidden if self.engine is not None else None
        self._lost = True
        self._load()
        if self.engine is not None and shown is not None:
            self.engine.hidden.take_over(shown)
            self.engine.pin()
        self._lost = False
        self.serving = serving
        if self.engine is not None and self.writable:
            self.engine.rebuild_need()
            self.engine.spared = MINIMUM_ROOM if serving else 0

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
        return View(self.require_engine(), self.find(name))

    def create(
        self,
        name: str | None = None,
        message: str = "",
        *,
        kind: fmt.Kind = fmt.Kind.MANUAL,
        quiesced: bool = False,
    ) -> SnapshotHandle:
        """Take a snapshot of the base volume as it is.

        Durable on return.  A crash before the header commit leaves no snapshot, after it a whole one.  Of a
        filesystem marked with errors it is recorded as such; groups whose bitmaps do not verify are preserved whole.

        A volume that somebody writes to gets the consistency ``frozen`` if they were brought to rest (``quiesced``)
        and its journal agrees, else ``crash``: what a power cut would leave.  Its filesystem is not edited, so the
        store must have the room, and the mark goes on before the commit, not after it: between the two a crash
        would leave a snapshot that a stock replay could write to.

        Raises:
            SnapshotExists, InvalidName: The name cannot be used.
            NeedsRecovery, VolumeDirty, UnsupportedFeature, VolumeFull: The volume cannot take one; nothing changed.
        """
        self.require_trusted()
        created = self.now_ns()
        chosen = self._free_name(created) if name is None else validate_name(name)
        if chosen in self.snapshot_names():
            raise SnapshotExists(f"{self.name} has a snapshot {chosen!a} already", hint="choose another name")
        if self.engine is not None:
            self.engine.flush()
        in_use = self.in_use
        fs = self.filesystem(lenient=in_use)
        fs.require_supported()
        consistency = fmt.Consistency.CLEAN
        if not in_use:
            require_clean(fs, self.name)
        elif quiesced and is_at_rest(fs):
            consistency = fmt.Consistency.FROZEN
            if self.growth is not None:
                self.growth.settled()
        else:
            consistency = fmt.Consistency.CRASH
        before = self.store.root.extents if self.store is not None else None
        try:
            if self.store is None:
                edit.set_up(self)
            bits = self.make_room_for_snapshot(consistency=consistency)
            entry = self.stage_snapshot(chosen, message, kind, created, consistency=consistency, bits=bits)
            if in_use:
                self.set_mark(True)
                self.require_store().root.flags |= fmt.SlotFlags.OPEN
            self.commit_snapshot()
            if self.serving and not in_use:
                self._grow_ahead()
            self.settle()
        except (ExtsnapError, OSError) as error:
            if isinstance(error, VolumeFull):
                self.back_to_size(before)
            else:
                self._back_to_rest()
            if isinstance(error, VolumeFull | FormatError) and fs.has_errors:
                unsound = int((~fs.sound_groups).sum())
                reason = f"{self.name} is marked with errors"
                if unsound:
                    reason += f", and {unsound} of its {len(fs.sound_groups)} groups do not verify and are left alone"
                raise VolumeDirty(f"{reason}: {error.message}", hint=how_to_repair(self.name)) from error
            raise
        return SnapshotHandle(self, entry)

    def _back_to_rest(self) -> None:
        """After an operation that was refused or failed: the committed state, and what it had begun is finished.

        A server goes on from here, so nothing of the operation may be left in memory for a later commit to make true.
        """
        if self.store is None:
            return
        self._reload()
        store = self.store
        if store is None:
            return
        if store.root.pending is not None:
            edit.finish(self)
        if self.store is not None and self.medium.state.mark and not self.serving and store.root.restore is None:
            self.settle()

    def back_to_size(self, before: Extents | None) -> None:
        """After a refusal: the committed state, the store as large as when it had ``before``; None: there was none.

        One that is served gives back what it does not need at the end of that.
        """
        self._back_to_rest()
        if self.store is None or self.serving:
            return
        if before is None:
            edit.remove(self)
            return
        edit.give_back_growth(self, before)
        self.settle()

    def _free_name(self, created: int) -> str:
        base = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(created // 10**9))
        taken = set(self.snapshot_names())
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        return name

    def preserved_now(self, consistency: fmt.Consistency = fmt.Consistency.CLEAN) -> SparseBits:
        """What a snapshot taken now would preserve, by position."""
        engine, store = self.require_engine(), self.require_store()
        crash = consistency == fmt.Consistency.CRASH
        fs = self.filesystem(lenient=crash)
        owned = store.root.extents[:, 1:]
        return preserved(fs, engine.rows, engine.row_bytes, engine.shift, engine.blocks, owned, crash=crash)

    def snapshot_blocks(self, bits: SparseBits | None = None) -> int:
        """Blocks that the tables of a snapshot taken now would take, which preserves ``bits``."""
        engine, store = self.require_engine(), self.require_store()
        bits = self.preserved_now() if bits is None else bits
        rows, stored = engine.history.changed_rows(store.root.next_id - 1, bits)
        entry = fmt.HISTORY_DTYPE.itemsize + fmt.HISTORY_TWIN_DTYPE.itemsize
        return 2 * len(stored) + len(rows) * entry * 4 // self.block_size + 2 * hidden.zero_blocks(engine, bits)

    def snapshot_needs_live(self) -> tuple[int, int]:
        """(`snapshot_blocks`, blocks to preserve from then on) of a volume that somebody writes to.

        Its bitmaps need not agree on the medium: a group that they do not tell of may get bitmaps of its own.
        """
        engine, store = self.require_engine(), self.require_store()
        fs = self.filesystem(lenient=True)
        owned = store.root.extents[:, 1:]
        found = [
            preserved(fs, engine.rows, engine.row_bytes, engine.shift, engine.blocks, owned, crash=crash)
            for crash in (False, True)
        ]
        tables = max(map(self.snapshot_blocks, found)) + 2 * int((~fs.sound_groups).sum())
        return tables, engine.blocks_to_preserve(found[1])

    def make_room_for_snapshot(self, *, consistency: fmt.Consistency = fmt.Consistency.CLEAN) -> SparseBits:
        """See that the store has room for one more snapshot, growing it where needed and possible.

        Returns:
            What the snapshot preserves, by position.

        Raises:
            VolumeFull: It cannot be had.
        """
        engine, store = self.require_engine(), self.require_store()
        while True:
            for _ in range(4):
                engine.flush()
                bits = self.preserved_now(consistency)
                tables = self.snapshot_blocks(bits) + MINIMUM_ROOM
                if self.in_use:  # whoever has it mounted would lose all of it with the first write of metadata
                    tables += engine.blocks_for(self._vital_with(bits))
                wanted = engine.reserve() + tables
                if store.available >= wanted:
                    return bits
                if self.in_use or not edit.grow(self, max(wanted - store.available + 32, 64)):
                    break
            limit = self.store_limit()
            refusal = VolumeFull(
                f"the snapshot needs {wanted} free blocks in the store, which has {store.available} and cannot grow"
                + (f" past {limit} bytes, the largest file of this filesystem" if limit else ""),
                hint="delete a snapshot" if limit else "delete a snapshot, delete files, or grow the volume",
            )
            make_room(self, refusal, blocks=tables)

    def _vital_with(self, bits: SparseBits) -> int:
        """Copies to keep for metadata once a snapshot is taken that preserves ``bits``."""
        engine = self.require_engine()
        vital = self._vital or Vital(self.filesystem(lenient=True), engine.rows, engine.row_bytes, engine.shift)
        need = engine.need.copy()
        need |= bits
        return vital.count(need, self.require_store().root.owned)

    def store_limit(self) -> int:
        """Bytes that the store can have on this filesystem, where it has got so far; else 0."""
        fs, owned = self.filesystem(), self.require_store().root.owned
        return fs.largest_file * self.block_size if owned + fs.geometry.cluster_blocks > fs.largest_file else 0

    def stage_snapshot(
        self,
        name: str,
        message: str,
        kind: fmt.Kind,
        created: int,
        *,
        consistency: fmt.Consistency = fmt.Consistency.CLEAN,
        bits: SparseBits | None = None,
        restored_from: str = "",
    ) -> fmt.Snapshot:
        """Write everything of a new snapshot, which preserves ``bits``, but the header commit that makes it true."""
        engine, store = self.require_engine(), self.require_store()
        bits = self.preserved_now(consistency) if bits is None else bits
        errors = fmt.SnapshotFlags.FILESYSTEM_ERRORS if self.filesystem().has_errors else fmt.SnapshotFlags.NONE
        rows, stored = engine.history.changed_rows(store.root.next_id - 1, bits)
        refs = np.concatenate(store.allocate_pair(len(stored)))
        engine.history.add(store.root.next_id, rows, bits, refs, store.write_padded)
        bit = (~store.root.counting & (store.root.counting + 1)).bit_length() - 1
        entry = fmt.Snapshot(
            id=store.root.next_id,
            bit=bit,
            name=name,
            message=message,
            kind=kind,
            consistency=consistency,
            state=fmt.State.OK,
            created_ns=created,
            volume_bytes=self.size,
            used_blocks=bits.total(),
            restored_from=restored_from,
            flags=errors,
        )
        store.root.counting |= 1 << bit
        store.root.next_id += 1
        engine.set_snapshots(engine.snapshots)  # masks have room for its bit
        hidden.record_zeros(engine, bit, bits)
        self._staged = ([*engine.snapshots, entry], bits)
        self._write_tables(self._staged[0])
        return entry

    def commit_snapshot(self) -> None:
        """Make the staged snapshot true and let the write path know before the next write."""
        engine, store = self.require_engine(), self.require_store()
        store.commit()
        snapshots, bits = self._staged
        engine.set_snapshots(snapshots)
        engine.need |= bits
        if engine.vital is not None:
            engine.vital.count_again(engine.rows)

    @contextlib.contextmanager
    def changing(self) -> Iterator[Store]:
        """Change what the store remembers; a volume without one gets it, and afterwards all is at rest again."""
        self._require_inside()
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
            self._back_to_rest()
            raise

    def _write_tables(self, snapshots: list[fmt.Snapshot]) -> None:
        engine, store = self.require_engine(), self.require_store()
        engine.write_history()
        table = b"".join(entry.build() for entry in sorted(snapshots, key=lambda entry: entry.id))
        flags = fmt.RO_COMPAT_SNAPSHOT_FLAGS if any(entry.flags for entry in snapshots) else 0
        store.root.ro_compat = store.root.ro_compat & ~fmt.RO_COMPAT_SNAPSHOT_FLAGS | flags
        store.write_blob(fmt.BlobKind.SNAPSHOTS, 0, table)

    def delete(self, names: list[str], *, dropped: bool = False) -> int:
        """Delete snapshots, in any order; returns the bytes of copies that this freed.  ``dropped``: to make room.

        One header commit takes the bits away and drops the records that nobody needs any more; a crash
        before it leaves all of the snapshots, after it none of them.  Then freed blocks go back to the filesystem.
        A filesystem that needs recovery is not touched: this is what makes room for its recovery.
        """
        self._require_inside(names)
        engine, store = self.require_engine(), self.require_store()
        gone = [self.find(name) for name in dict.fromkeys(names)]
        ids = {entry.id for entry in gone}
        engine.commit()
        rest = [entry for entry in engine.snapshots if entry.id not in ids]
        try:
            if dropped:
                note_dropped(store.root, gone, self.now_ns())
            for entry in gone:
                store.root.counting &= ~(1 << entry.bit)
            kept = {entry.id & 0xFFFFFFFF for entry in rest}
            for kind, key in list(store.root.blobs):
                if kind == fmt.BlobKind.CHECKSUMS and key not in kept:
                    store.drop_blob(fmt.BlobKind.CHECKSUMS, key)
            engine.set_snapshots(rest)
            freed = engine.purge()
            store.release(engine.history.collect())
            self._write_tables(rest)
            engine.fold(commit=False)
            if not rest:
                self.set_mark(True)  # the guard goes with the last snapshot, also if this is as far as we get
            store.commit()
            hidden.release(engine)
            if not rest:
                engine.rebuild_need()
            if self.needs_replay or (dropped and not self.serving):
                return freed * self.block_size  # the mark stays, or the command that needs the room goes on
            if not self.serving and not left_undone(self.filesystem()):
                self.reveal()
                self.give_back(freed, everything=not rest)
            self.settle()
        except (ExtsnapError, OSError):
            self._back_to_rest()
            raise
        return freed * self.block_size

    def give_up_snapshots(self) -> None:
        """Delete all snapshots of a store whose records are lost, with one header commit; the mark goes on and stays.

        A crash before the commit leaves all as it was, after it a store without snapshots.
        """
        require_clean(self.filesystem(), self.name)
        store = self.require_store()
        self.set_mark(True)
        store.root.counting = 0
        for kind, key in list(store.root.blobs):
            store.drop_blob(fmt.BlobKind(kind), key)
        store.new_epoch()
        store.commit()
        self._reload()

    def give_back(self, freed: int, *, everything: bool = False) -> None:
        """Return freed blocks to the filesystem; the store keeps what its next edit needs."""
        engine, store = self.require_engine(), self.require_store()
        least = engine.reserve() + MINIMUM_ROOM
        spare = max(0, store.available - least)
        edit.shrink(self, spare if everything else min(freed, spare))

    def set_states(self, snapshots: list[fmt.Snapshot]) -> None:
        """Commit other states of the living snapshots, at once and whole."""
        self._write_tables(snapshots)
        self.require_store().commit()
        self.require_engine().set_snapshots(snapshots)

    def accept_outside_write(self) -> list[str]:
        """Go on after an outside write: every snapshot of then is marked tainted; returns their names.

        Where the filesystem needs recovery, what is durable is: the mark, then with one header commit the taint and
        OPEN.  That is an image whose server was killed, which the next command recovers through the write path.

        Raises:
            StoreDamaged: The outside write hit the store's own structures.
        """
        if not self.outside_write:
            return []
        engine, store = self.require_engine(), self.require_store()
        fs, root = self.filesystem(), store.root
        self.needs_replay = bool(left_undone(fs))
        if self.needs_replay:
            self.set_mark(True)
        else:
            try:
                graft.verify(fs, root)
            except ExtsnapError as error:
                raise StoreDamaged(
                    f"the store's header and its inode do not agree: {error.message}", hint="run extsnap check"
                ) from error
        tainted = [replace(entry, state=fmt.State.TAINTED) for entry in engine.snapshots]
        self._write_tables(tainted)
        store.root.flags &= ~fmt.SlotFlags.OPEN
        if self.needs_replay:
            store.root.flags |= fmt.SlotFlags.OPEN
        store.root.fingerprint = fingerprint(fs)
        if engine.hidden.changed:
            engine.fold(commit=False)
        store.commit()
        engine.set_snapshots(tainted)
        self.outside_write = False
        if not self.needs_replay:
            self.set_mark(False)
        return [entry.name for entry in tainted]

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
        if self.engine is not None and self.engine.left < self._look_at:
            self._look_at_watermarks()

    def _write(self, offset: int, data: Buffer) -> None:
        if self._warden is not None:
            self._warden.examine(offset, data)
        if self._vital is not None:
            self._vital.examine(offset, data)
        while True:
            try:
                self.base.pwrite(offset, data)
                break
            except VolumeFull as refusal:
                self._drop_for(refusal, offset, len(data))

    def punch(self, offset: int, length: int) -> None:
        """Make a range of the base volume read as zeros; raises as `write`."""
        if self._warden is not None:
            self._warden.examine_punch(offset, length)
        while True:
            try:
                self.base.punch(offset, length)
                break
            except VolumeFull as refusal:
                self._drop_for(refusal, offset, min(length, self.size - offset))
        if self.engine is not None and self.engine.left < self._look_at:
            self._look_at_watermarks()

    def _drop_for(self, refusal: VolumeFull, offset: int, length: int) -> None:
        """Make room for a write by deleting snapshots, if that is wanted; raises as `full.make_room`."""
        if self.growth is not None and self.growth.hope:
            raise refusal
        make_room(self, refusal, self.require_engine().needed_by(offset, length))

    def _look_at_watermarks(self) -> None:
        """Say once a session that the store fills up; look again when a good part of its room is gone."""
        engine = self.require_engine()
        self._look_at = engine.left - engine.room() // 16
        found = fill(self, engine.blocks_to_preserve())
        if found.watermark is not None and found.watermark not in self._warned:
            self._warned.add(found.watermark)
            self.say(warning(self, found))

    def say(self, message: str) -> None:
        """Tell whoever looks after the server one line."""
        if self.above is not None:
            self.above.say(message)

    def serve_below(self, above: Above) -> None:
        """Name what serves this volume."""
        self.above = above

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
        if self._deferred is not None:
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
            if self._vital is not None:
                self._vital.count_again(self.engine.rows)

    def begin_serving(
        self, *, grow: bool = True, set_up: bool = False, repair: bool = False, live: bool = False
    ) -> None:
        """Get ready for writes from above: the store grows first, then mark and header say open.

        The store takes the smaller of the bytes still to preserve and half of the free space.  With ``live`` it takes
        no more than it needs until it can grow further through a kernel mount (`growth`).  What is written to a
        filesystem with snapshots that needs recovery, or may be repaired, waits until `end_serving`.

        Args:
            grow: False serves the volume as it is: for a replay.
            set_up: Give a volume without snapshots its store now, with room as if one had just been taken.
            repair: The command above may be the repair: serve a filesystem that needs one.
            live: The kernel will mount it.  A volume that has no room for a store is served all the same.

        Raises:
            NeedsRecovery, VolumeDirty: It needs recovery, and this is no repair.
        """
        self._require_inside()
        fs = self.filesystem()
        undone = bool(left_undone(fs))
        if grow and not self.needs_replay and not (repair and undone):
            fs.require_supported()
            require_clean(fs, self.name)
            if self.store is None and set_up:
                with contextlib.suppress(*[VolumeFull] if live else []):
                    edit.set_up(self)
            if self.store is not None:
                self._grow_ahead(live=live)
        self.serving = True
        self._warned.clear()
        if self.engine is not None:
            # Neither that nor room for metadata is kept where a replay may need it all.
            self.engine.spared = MINIMUM_ROOM if grow and not self.needs_replay else 0
            self._copied_before = self.require_store().available
            if self.engine.snapshots:
                self._open_header()
                if self.needs_replay or (repair and (undone or fs.has_errors)):
                    self._deferred = Deferred(self.engine, self.block_size)
                    # A replay may bring superblocks with guard and pointer, which a kernel had mounted.
                    self._repair = Medium(self._deferred)
                    self._repair.set_offsets(self.medium.offsets)
        self._watch()

    def _grow_ahead(self, *, live: bool = False) -> None:
        """Grow the store to what the session ahead may need, and bring a volume without snapshots to rest."""
        engine, store = self.require_engine(), self.require_store()
        fs = self.filesystem()
        half = max(0, fs.free_blocks - fs.geometry.reserved_blocks) // 2
        needed = engine.blocks_to_preserve() if engine.snapshots else self.preserved_now().total()
        if live:
            reserve = Reserve.of(fs, self.size)
            needed = min(needed, reserve.in_flight + reserve.chunk)
        edit.grow(self, min(engine.blocks_for(needed) + MINIMUM_ROOM + engine.reserve() - store.available, half))
        if not engine.snapshots:
            self.settle()

    def end_serving(self) -> bool:
        """Bring the image to rest after serving.

        Returns:
            True if it is clean and carries no mark; False if its filesystem needs recovery, which leaves the mark.

        Raises:
            VolumeFull: A repair needs more copies than there is room for; nothing of it was done, the mark stays.
        """
        self.base.flush()
        self.serving = False
        self.growth = None
        self._watch()
        if self.engine is not None:
            self.engine.spared = 0
        try:
            self._let_repair_through()
        except ExtsnapError:
            if not self.needs_replay:
                self.settle()  # only marked with errors: at rest as before
            raise
        if self.engine is None:
            return True
        fs = self.filesystem()
        # An e2fsck that gives up after a crash sets the flag of errors; without a journal no bitmap is right then.
        if left_undone(fs) or (self.needs_replay and not fs.is_clean):
            return not self.medium.state.mark
        self.needs_replay = False
        if self._forget_stale():
            return True
        try:
            self._reconcile(fs)
        except FormatError as error:
            raise NeedsRecovery(
                f"{self.name}: its filesystem was left damaged: {error.message}",
                hint=f"{how_to_repair(self.name)}, or extsnap restore --no-safety {self.name} SNAPSHOT",
            ) from error
        self.reveal()
        store = self.require_store()
        used = max(0, self._copied_before - store.available)
        spare = self.engine.room() - MINIMUM_ROOM
        if spare > 4 * used + 2 * MINIMUM_ROOM:
            edit.shrink(self, spare - 2 * used)
        self.settle()
        return not self.engine.hidden.some

    def _let_repair_through(self) -> None:
        """Write what a repair wrote, if all of its copies have room; else drop it.

        Raises:
            VolumeFull: They have not; names the bytes.  Nothing was changed.
        """
        deferred, self._deferred, self._repair = self._deferred, None, None
        if deferred is None:
            return
        engine = self.require_engine()
        try:
            engine.commit()
            while True:
                copies = engine.copies_for(engine.needed_of(deferred.written, deferred.blocks()))
                room = max(0, engine.room() - REPAIR_MARGIN)
                if copies <= room:
                    break
                size = self.block_size
                refusal = VolumeFull(
                    f"the repair of {self.name} needs {copies * size} bytes for copies of what snapshots need, and the "
                    f"store has {room * size}; nothing was changed",
                    hint="delete a snapshot and run it again; extsnap export saves the snapshot elsewhere first",
                )
                make_room(self, refusal, engine.needed_of(deferred.written, deferred.blocks()), REPAIR_MARGIN)
            deferred.let_through()
        finally:
            deferred.close()

    # -- verbs ------------------------------------------------------------------------------------------

    def verb(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """Run a command by name; returns the dict that ``--json`` prints."""
        from extsnap.snapshot.verbs import VERBS, run

        if name not in VERBS:
            raise ExtsnapError(f"there is no command {name!r}")
        return run(self, name, arguments)

    def close(self) -> None:
        """Close the image; held writes of a volume that nobody ended serving are lost, as at a power cut."""
        if self._deferred is not None:
            self._deferred.close()
            self._deferred = self._repair = None
        self._device.close()

    def __enter__(self) -> Volume:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.engine is not None and self.writable and not self.serving:
            self.engine.flush()
        self.close()


MINIMUM_ROOM = edit.MINIMUM_ROOM
#: Room that a repair leaves for new masks and for what its records are rounded up to.
REPAIR_MARGIN = 8


def open_volume(path: str | Path, *, writable: bool = True) -> Volume:
    """`Volume.open` under the name that the package exports as ``extsnap.open``."""
    return Volume.open(path, writable=writable)

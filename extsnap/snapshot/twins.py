"""The two copies of every small vital structure: looked at one by one, and the damaged one mended from the other.

    structure                    first copy                  second copy
    header                       slot A and its root chain   slot B and its root chain
    blobs (index levels too)     BLOBS                       TWINS
    preserved bitmaps            HISTORY                     HISTORY_TWINS
    log                          LOG                         LOG_TWIN

What is durable when: `examine` with ``mend`` puts into blocks of the store the content that the committed header says
they have, so a crash leaves a block damaged or mended, and nothing else changed.  The header itself is written by a
commit, which begins with the slot that is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints
from extsnap.errors import StoreDamaged
from extsnap.snapshot import format as fmt
from extsnap.snapshot.history import History
from extsnap.snapshot.parts import Parts
from extsnap.snapshot.store import PIECE_BYTES, Store, read_slot

#: What messages call a blob.
NAMES = {
    fmt.BlobKind.SNAPSHOTS: "the snapshot table",
    fmt.BlobKind.MASKS: "the mask table",
    fmt.BlobKind.HISTORY: "the history table",
    fmt.BlobKind.HISTORY_TWINS: "the table of second bitmaps",
    fmt.BlobKind.INDEX: "index level",
    fmt.BlobKind.INDEX_CRCS: "the checksums of index level",
    fmt.BlobKind.INDEX_PARTS: "the table of parts of index level",
    fmt.BlobKind.REDO: "the redo blocks",
    fmt.BlobKind.CHECKSUMS: "the table of checksums",
    fmt.BlobKind.HIDDEN: "the table of hidden runs",
}
#: Blocks that one message names.
_NAMED = 8


@dataclass
class Examined:
    """What is damaged.

    Attributes:
        worn: Structures with one damaged copy; nothing is lost.
        lost: Structures without a whole copy.
        snapshots: Ids of the snapshots that need what is lost; None: all of them.
    """

    worn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    snapshots: set[int] | None = field(default_factory=set)

    def lose(self, what: str, snapshots: set[int] | None) -> None:
        """Note a structure that is lost, and who needs it."""
        self.lost.append(what)
        self.snapshots = None if snapshots is None or self.snapshots is None else self.snapshots | snapshots


def examine(store: Store, history: History, snapshots: list[fmt.Snapshot], *, mend: bool = False) -> Examined:
    """Look at both copies of every structure; the store is at rest, or served by who calls.

    Args:
        mend: Write the damaged copies again from the whole ones; durable on return.
    """
    found = Examined()
    for kind, key in sorted(store.root.blobs):
        _examine_blob(store, kind, key, found, mend)
    _examine_bitmaps(store, history, snapshots, found, mend)
    _examine_log(store, found, mend)
    header = list(_header_faults(store))
    found.worn += header
    if mend and found.worn:
        store.device.flush()
        if header:
            store.commit()
    return found


def name_of(kind: int, key: int) -> str:
    """What messages call a blob."""
    try:
        name = NAMES[fmt.BlobKind(kind)]
    except (KeyError, ValueError):
        return f"blob {kind}.{key}"
    return f"{name} {key}" if name.endswith("level") else name


def _blocks_text(store: Store, logical: Ints) -> str:
    blocks = store.physical(logical).tolist()
    text = ", ".join(map(str, blocks[:_NAMED]))
    more = f" and {len(blocks) - _NAMED} more" if len(blocks) > _NAMED else ""
    return f"block{'s' if len(blocks) > 1 else ''} {text}{more}"


def _header_faults(store: Store) -> Iterator[str]:
    """What is wrong with either slot; one that is older is what a crash between the two leaves, and no damage."""
    device, size = store.device, store.block_size
    for index in range(2):
        block = store.slot_block(index)
        name = f"slot {'AB'[index]} of the header (block {block})"
        try:
            read_slot(device, block, size, device.size // size)
        except StoreDamaged as error:
            yield f"{name} is damaged, the other slot is whole: {error.message}"


def _is_whole(store: Store, kind: fmt.BlobKind, key: int, copy: int) -> bool:
    try:
        for _ in store.blob_pieces(kind, key, copy):
            pass
    except StoreDamaged:
        return False
    return True


def _examine_blob(store: Store, kind: int, key: int, found: Examined, mend: bool) -> None:
    name: tuple[fmt.BlobKind, int] = kind, key  # type: ignore[assignment]  # a kind of a later version is a number
    copies = [0, 1] if name in store.root.twins else [0]
    whole = [_is_whole(store, *name, copy) for copy in copies]
    if all(whole):
        return
    what = name_of(kind, key)
    if not any(whole):
        if kind in (fmt.BlobKind.INDEX, fmt.BlobKind.INDEX_CRCS) and _examine_parts(store, *name, found, mend):
            return
        blocks = _blocks_text(store, store.blob_blocks(*name))
        needed_by = set[int]() if kind in (fmt.BlobKind.CHECKSUMS, fmt.BlobKind.INDEX_PARTS) else None
        found.lose(
            f"{what} fails its checksum ({blocks}{', and its second copy' if len(copies) > 1 else ''})", needed_by
        )
        return
    good, bad = (store.blob_blocks(*name, copy) for copy in (whole.index(True), whole.index(False)))
    differ = []
    step = max(1, PIECE_BYTES // store.block_size)
    for low in range(0, len(good), step):
        content, damaged = store.read_blocks(good[low : low + step]), store.read_blocks(bad[low : low + step])
        inside = max(0, store.root.blobs[name].length - low * store.block_size)  # what follows is anything
        content.reshape(-1)[inside:] = damaged.reshape(-1)[inside:] = 0
        wrong = (content != damaged).any(axis=1)
        if mend and wrong.any():
            store.write_blocks(bad[low : low + step][wrong], content[wrong].reshape(-1).data)
        differ.append(bad[low : low + step][wrong])
    found.worn.append(_worn(store, what, np.concatenate(differ), whole.index(False)))


def _examine_parts(store: Store, kind: fmt.BlobKind, key: int, found: Examined, mend: bool) -> bool:
    """Both copies of a blob of the index are damaged: together they may be whole.  False: nothing tells.

    What is lost in both is for the engine to name, which has tried to read it (`Engine.lost_parts`).
    """
    try:
        parts = Parts(store, key)
    except StoreDamaged:
        return False
    whole = parts.index_whole if kind == fmt.BlobKind.INDEX else parts.crcs_whole
    if not whole.any(axis=0).all():
        found.lost.append(f"{name_of(kind, key)} is damaged in both copies in the same place")
        return True
    found.worn.append(f"both copies of {name_of(kind, key)} are damaged, each in other places")
    if mend:
        content = b"".join(parts.content(kind, part) for part in range(whole.shape[1]))
        for copy in range(2):
            store.write_blocks(store.blob_blocks(kind, key, copy), content)
    return True


def _worn(store: Store, what: str, blocks: Ints, copy: int) -> str:
    which, other = ("first", "second") if copy == 0 else ("second", "first")
    return f"the {which} copy of {what} is damaged ({_blocks_text(store, blocks)}), the {other} one is whole"


def _examine_bitmaps(
    store: Store, history: History, snapshots: list[fmt.Snapshot], found: Examined, mend: bool
) -> None:
    stored = history.stored()
    step = max(1, PIECE_BYTES // store.block_size)
    for low in range(0, len(stored), step):
        entries = stored[low : low + step]
        places = [history.table["ref"][entries].astype(np.int64), history.twins[entries]]
        has_twin = places[1] >= 0
        whole = np.zeros((2, len(entries)), np.bool_)
        whole[0] = history.are_whole(entries, places[0])
        whole[1, has_twin] = history.are_whole(entries[has_twin], places[1][has_twin])
        for copy in range(2):
            worn = ~whole[copy] & whole[1 - copy] & has_twin
            if worn.any():
                rows = ", ".join(map(str, history.table["row"][entries[worn]][:_NAMED].tolist()))
                found.worn.append(_worn(store, f"the preserved bitmap of group row {rows}", places[copy][worn], copy))
                if mend:
                    _rewrite(store, places[copy][worn], store.read_blocks(places[1 - copy][worn]))
        lost = entries[~whole.any(axis=0)]
        if len(lost):
            names = history.ids_of(lost, [snapshot.id for snapshot in snapshots])
            rows = ", ".join(map(str, history.table["row"][lost][:_NAMED].tolist()))
            blocks = _blocks_text(store, history.table["ref"][lost].astype(np.int64))
            found.lose(f"the preserved bitmap of group row {rows} fails its checksum ({blocks})", set(names))


def _rewrite(store: Store, logical: Ints, content: npt.NDArray[np.uint8]) -> None:
    order = np.argsort(logical)
    store.write_blocks(logical[order], content[order].reshape(-1).data)


def _examine_log(store: Store, found: Examined, mend: bool) -> None:
    """Every batch that counts stands in both copies of the log."""
    starts = store.log_copies()
    if len(starts) < 2:
        return
    copies = [store.read_log(start) for start in starts]
    position = number = 0
    while position < store.log_position:
        parsed = [store.parse_batch(raw, position, number) for raw in copies]
        good = next((index for index, batch in enumerate(parsed) if batch is not None), None)
        if good is None:
            found.lose(f"log: batch {number} at byte {position} is damaged in both copies", None)
            return
        length = parsed[good][1]  # type: ignore[index]  # it is the one that is not None
        if parsed[1 - good] is None:
            blocks = np.arange(position, position + length, fmt.SECTOR) // store.block_size + starts[1 - good]
            found.worn.append(_worn(store, f"batch {number} of the log", np.unique(blocks), 1 - good))
            if mend:
                store.write_log(starts[1 - good], position, copies[good][position : position + length])
        position += length
        number += 1

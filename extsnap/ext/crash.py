"""Which blocks a filesystem uses that was not brought to rest: what a crash now would leave.

What was fsynced may be in use by the journal alone: after a replay its blocks are used, in the bitmaps on the medium
they are free (measured: all 10,240 blocks of a 40 MiB file).  A replay is not needed to know them: the bitmap of a
group after it is the one on the medium or one of those in the log, so all of them together have every block that can
be in use.  Which transactions count, revocations and checksums need not be looked at: blocks too many do no harm.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Ints
from extsnap.errors import FormatError
from extsnap.ext.bitmaps import expand_clusters
from extsnap.ext.filesystem import Filesystem
from extsnap.ext.journal import Journal
from extsnap.ext.log import walk
from extsnap.ondisk.journal import MAGIC
from extsnap.ondisk.superblock import Compat
from extsnap.sparsebits import SparseBits

_PART = 256  # bitmaps that are read at once


@dataclass(frozen=True)
class Logged:
    """Blocks that stand in the log.

    Attributes:
        blocks: int64[n], where they belong.
        places: int64[n], the block of the log that has the content.
        escaped: bool[n], where its first four bytes are the magic, and zeros in the log.
    """

    blocks: Ints
    places: Ints
    escaped: npt.NDArray[np.bool_]


def used_after_crash(fs: Filesystem) -> SparseBits:
    """All blocks that may be in use after a recovery, in rows as `Filesystem.block_bitmaps` has them.

    Without a journal, or where somebody writes who does not use it (fuse2fs), and with fast commits, which log no
    bitmaps, every block may be.

    Args:
        fs: Opened leniently: the bitmaps of a group and its descriptor need not agree on the medium.
    """
    geometry, journal = fs.geometry, fs.journal
    if journal is not None and not (fs.superblock.s_feature_compat & Compat.fast_commit and fs.needs_recovery):
        if journal.is_empty and (fs.is_clean or fs.needs_recovery):
            return fs.block_bitmaps()
        with contextlib.suppress(FormatError):  # a log that cannot be
            if not journal.is_empty:
                used = fs.block_bitmaps()
                _add_logged(fs, used, logged(fs, journal))
                return used
    everything = SparseBits(geometry.groups, geometry.blocks_per_group // 8)
    everything.set(np.array([[0, geometry.groups * geometry.blocks_per_group]], np.int64))
    return everything


def logged(fs: Filesystem, journal: Journal) -> Logged:
    """Every block in the log of a journal that is not empty, in the order of the log; looks at no checksum."""
    blocks, places, escaped = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)]
    for block in walk(fs, journal):
        if block.tags is not None and block.places is not None:
            blocks.append(block.tags.blocks)
            escaped.append(block.tags.escaped)
            places.append(block.places)
    return Logged(np.concatenate(blocks), np.concatenate(places), np.concatenate(escaped))


def _add_logged(fs: Filesystem, used: SparseBits, found: Logged) -> None:
    """Add the bits of the block bitmaps in a log."""
    geometry = fs.geometry
    bitmaps = fs.groups.column("bg_block_bitmap")
    order = np.argsort(bitmaps, kind="stable")
    at = np.minimum(np.searchsorted(bitmaps[order], found.blocks), len(order) - 1)
    which = np.flatnonzero(bitmaps[order[at]] == found.blocks)
    which = which[np.argsort(order[at[which]], kind="stable")]  # by group
    groups = order[at[which]]
    for low in range(0, len(which), _PART):
        part = which[low : low + _PART]
        rows = fs.read_blocks(found.places[part])[:, : geometry.clusters_per_group // 8].copy()
        rows[found.escaped[part], :4] = np.frombuffer(MAGIC.to_bytes(4, "big"), np.uint8)
        here = groups[low : low + _PART]
        starts = np.flatnonzero(np.diff(here, prepend=-1))
        rows = np.bitwise_or.reduceat(rows, starts, axis=0)
        if geometry.cluster_blocks > 1:
            rows = expand_clusters(rows, geometry.cluster_blocks)
        used.add(here[starts], rows)

"""Full volumes: filesystems filled to the last block, overwritten until copies have no room, and on from there.

A part is a kind of filesystem, and whether snapshots come and go while it is served (``attached``) or between
sessions (``offline``).  A case is a volume's life from one seed: snapshots, a file that takes the last free block,
overwrites and punches of any size, some across several snapshots' needs, creates, deletes, restores, reopened views,
and ``on-full`` both ways.  After every step:

* a write that was refused changed nothing of the base, and each one that was taken reads back;
* every living snapshot reads, byte for byte, as when it was taken;
* with ``on-full=drop-oldest`` a write succeeds, unless views that are open keep what it would need; what goes is
  the oldest that nobody has open, is told and stands in ``info``;
* with ``on-full=refuse`` nothing goes;
* a snapshot can be deleted, whatever is full, and at rest ``check`` and ``e2fsck -fn`` find nothing.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import lab
import numpy as np

from campaigns.report import Campaign, Report
from extsnap.errors import VolumeFull
from extsnap.snapshot.volume import Volume

BLOCK = lab.BLOCK
STEPS = 36
PARTS = tuple(f"{kind}-{when}" for kind in ("ext2", "ext3", "ext4") for when in ("attached", "offline"))
_OPTIONS = {
    "ext2": ["-O", "none,filetype,sparse_super,large_file"],
    "ext3": ["-O", "none,filetype,sparse_super,large_file,has_journal", "-J", "size=1"],
    "ext4": ["-O", "none,filetype,sparse_super,large_file,has_journal,extent,64bit,metadata_csum", "-J", "size=1"],
}


@functools.cache
def plain_image(kind: str) -> bytes:
    """A volume of 6 MiB with 1 KiB blocks, three fifths of it in six files."""
    rng = random.Random(kind)
    with tempfile.TemporaryDirectory(prefix="extsnap-full-") as name:
        tree, image = Path(name) / "tree", Path(name) / "image"
        tree.mkdir()
        for number in range(6):
            (tree / f"f{number}").write_bytes(rng.randbytes(600 * BLOCK))
        image.write_bytes(bytes(6144 * BLOCK))
        uuid = "00000000-1111-2222-3333-444444444444"
        words = ["-q", "-F", "-b", str(BLOCK), "-g", "2048", "-N", "64", "-m", "0", "-I", "256", "-U", uuid]
        lab.run("mke2fs", *words, *_OPTIONS[kind], "-E", f"hash_seed={uuid}", "-d", str(tree), str(image))
        return image.read_bytes()


def filled(content: bytes) -> bytes:
    """The filesystem with a file that takes all but a few of its free blocks, and another one the rest."""
    free = lab.survey(content).free
    for name in ("n0", "n1"):
        # A file needs mapping blocks too: take a little less, then what is left.
        size = free - free // 200 - 4 if name == "n0" else lab.survey(content).free
        while size > 0:
            tried = lab.tried_by_debugfs(content, f"write {{}} {name}", data=b"x" * size * BLOCK)
            if tried is not None:
                content = tried
                break
            size -= 1
    return content


class Life:
    """One volume beside a model of it.

    Args:
        kind: Of filesystem.
        attached: Snapshots come and go while it is served.
        rng: All chance.
    """

    def __init__(self, kind: str, attached: bool, rng: random.Random) -> None:
        self.attached = attached
        self.rng = rng
        self.clock = iter(range(10**18, 2 * 10**18, 10**9))
        self.device = lab.MemoryDevice(plain_image(kind))
        self.said: list[str] = []
        self.opened: list[str] = []
        self.views: dict[str, bytes] = {}
        self.number = 0
        self.dropping = rng.random() < 0.5
        self.drops = self.refusals = 0
        self._open()
        self.volume.verb("set", values={"on-full": "drop-oldest" if self.dropping else "refuse"})
        self.create()

    # -- what serves the volume

    def say(self, message: str) -> None:
        self.said.append(message)

    def in_use(self) -> bool:
        return False

    def open_views(self) -> list[str]:
        return self.opened

    def snapshots_changed(self) -> None:
        """It asks anew each time."""

    # -- steps

    def _open(self) -> None:
        self.volume = Volume(
            self.device, writable=True, clock=lambda: next(self.clock), random_bytes=random.Random(1).randbytes
        )
        self.volume.serve_below(self)

    def begin(self) -> None:
        if not self.volume.serving:
            self.volume.begin_serving()
        self.base = bytearray(self.volume.read(0, self.volume.size))
        self.files = np.flatnonzero(lab.survey(bytes(self.base)).files)

    def end(self) -> None:
        """At rest, and proved to be well."""
        if not self.volume.serving:
            return
        before = self.volume.snapshot_names()
        clean = self.volume.end_serving()
        self._note_dropped(before)
        if not clean:
            self.make_clean()
        rested = self.volume.read(0, self.volume.size)
        wrong = lab.unequal(rested, self.base) & lab.survey(rested).files
        assert not wrong.any(), f"the end of the session changed file data in blocks {np.flatnonzero(wrong)[:10]}"
        self._open()
        assert not self.volume.outside_write, "it looks as if it had been written outside extsnap"
        complaint = lab.complaint(bytes(self.device.content))
        assert not complaint, complaint
        checked = self.volume.verb("check")
        assert checked["store"]["ok"], checked["store"]["errors"]
        assert not any(entry["errors"] for entry in checked["snapshots"]), checked["snapshots"]
        self.opened = []

    def make_clean(self) -> None:
        """Zeros that were written without copies, and find no room for them now: a delete makes it."""
        assert not self.dropping or self.opened, "snapshots could have made room"
        assert self.volume.medium.state.mark, "it was not left clean and has no mark"
        hidden = self.volume.verb("dump", what="header")["header"]["hidden"]
        assert hidden, "it was not left clean"
        assert any("keeps the dirty mark" in line for line in self.said), self.said
        while self.volume.medium.state.mark:
            oldest = self.volume.snapshot_names()[0]
            self.volume.delete([oldest])
            self.views.pop(oldest, None)

    def fill(self) -> None:
        """Take the last free block."""
        self.begin()
        old = bytes(self.base)
        new = filled(old)
        assert lab.survey(new).free == 0, "it is not full: this case would show nothing"
        for offset, length in lab.changed_runs(old, new, BLOCK):
            self._write(offset, new[offset : offset + length])
        assert bytes(self.base) == new, "there was no room for the copies of metadata"
        self.files = np.flatnonzero(lab.survey(new).files)

    def write(self) -> None:
        """Overwrite blocks of files, next to each other or not, or punch them."""
        start = self.rng.randrange(len(self.files))
        count = self.rng.choice([1, 1, 4, 32, 200, 1200])
        blocks = self.files[start : start + count]
        if self.rng.random() < 0.2:
            blocks = np.array(self.rng.sample(self.files.tolist(), min(64, len(self.files))))
        for first, length in lab.runs(blocks):
            skip, short = self.rng.choice([(0, 0), (0, 0), (100, 0), (0, 512), (512, 300)])
            offset, size = first * BLOCK + skip, length * BLOCK - skip - short
            if self.rng.random() < 0.25:
                self._write(offset, None, size)
            else:
                self._write(offset, self.rng.randbytes(size))
        if self.rng.random() < 0.3:
            self.volume.flush()

    def _write(self, offset: int, data: bytes | None, size: int = 0) -> None:
        """Write, or punch ``size`` bytes; it is done, or refused and nothing is changed."""
        before = self.volume.snapshot_names()
        size = len(data) if data is not None else size
        try:
            if data is not None:
                self.volume.write(offset, data)
            else:
                self.volume.punch(offset, size)
        except VolumeFull:
            self.refusals += 1
            kept = [name for name in before if name in self.opened]
            assert not self.dropping or kept, "nobody has a view open, and the write was refused"
            assert self.volume.snapshot_names() == before, "a write was refused, and snapshots went all the same"
        else:
            self.base[offset : offset + size] = data if data is not None else bytes(size)
        assert self.volume.read(offset, size) == self.base[offset : offset + size], f"bytes at {offset} are others"
        self._note_dropped(before)

    def _note_dropped(self, before: list[str]) -> None:
        left = self.volume.snapshot_names()
        gone = [name for name in before if name not in left]
        if not gone:
            return
        self.drops += len(gone)
        assert self.dropping, f"{gone} went, and nobody wanted that"
        assert gone == [name for name in before if name not in self.opened][: len(gone)], f"{gone} are not the oldest"
        named = [entry["name"] for entry in self.volume.verb("info")["dropped"]]
        assert named[-len(gone) :] == gone[-len(named) :], f"info names {named}"
        for name in gone:
            assert any(f"dropped snapshot '{name}'" in line for line in self.said), f"nobody was told of {name}"
            del self.views[name]

    def create(self) -> None:
        if not self.attached:
            self.end()
        before = self.volume.snapshot_names()
        self.number += 1
        name = f"s{self.number}"
        try:
            self.volume.create(name)
        except VolumeFull:
            self.refusals += 1
            assert self.volume.snapshot_names() == before, "a create was refused, and snapshots went all the same"
            return
        self._note_dropped(before)
        self.views[name] = self.view(name)
        base = self.volume.read(0, self.volume.size)
        wrong = lab.unequal(self.views[name], base) & lab.survey(base).files
        assert not wrong.any(), f"{name} is not what the base was: blocks {np.flatnonzero(wrong)[:10]}"
        complaint = lab.complaint(self.views[name])
        assert not complaint, f"{name}: {complaint}"

    def delete(self) -> None:
        if not self.attached:
            self.end()  # which may drop some
        names = [name for name in self.volume.snapshot_names() if name not in self.opened]
        if not names:
            return
        gone = self.rng.sample(names, self.rng.randint(1, min(2, len(names))))
        self.volume.delete(gone)
        for name in gone:
            del self.views[name]

    def restore(self) -> None:
        if not self.volume.snapshot_names():
            return
        self.end()  # which may drop some
        names = self.volume.snapshot_names()
        if not names:
            return
        name = self.rng.choice(names)
        try:
            taken = self.volume.verb("restore", name=name, safety=self.rng.random() < 0.5)["safety"]
        except VolumeFull:
            self.refusals += 1
            return
        if taken:
            self.views[taken] = self.view(taken)
        base = self.volume.read(0, self.volume.size)
        wrong = lab.unequal(base, self.views[name]) & lab.survey(self.views[name]).files
        assert not wrong.any(), f"the restored volume is not {name}: blocks {np.flatnonzero(wrong)[:10]}"

    def look(self) -> None:
        """Somebody opens a view, or all are closed."""
        names = self.volume.snapshot_names()
        self.opened = [self.rng.choice(names)] if names and self.rng.random() < 0.5 else []

    def switch(self) -> None:
        self.dropping = not self.dropping
        self.volume.verb("set", values={"on-full": "drop-oldest" if self.dropping else "refuse"})

    def view(self, name: str) -> bytes:
        view = self.volume.open_view(name)
        return view.pread(0, view.size)

    def judge(self) -> None:
        """Every living snapshot reads as when it was taken."""
        assert self.volume.snapshot_names() == sorted(self.views, key=self._age), "others than those that were taken"
        for name, content in self.views.items():
            if self.view(name) != content:
                wrong = np.flatnonzero(lab.unequal(self.view(name), content))
                raise AssertionError(f"snapshot {name} differs in {len(wrong)} blocks: {wrong[:10].tolist()}")

    def _age(self, name: str) -> int:
        return self.volume.find(name).id

    def live(self) -> None:
        """The whole of it."""
        self.begin()
        full_at = self.rng.randrange(3)
        steps = [self.write] * 12 + [self.create] * 5 + [self.delete] * 2 + [self.look] * 4
        steps += [self.restore, self.switch]
        for number in range(STEPS):
            if number == full_at:
                self.fill()
            self.rng.choice(steps)()
            if not self.volume.serving:
                self.begin()
            if number % 4 == 0:
                self.judge()
        self.judge()
        self.end()
        self.judge()
        names = self.volume.snapshot_names()
        self.rng.shuffle(names)
        for name in names:  # a full volume gives room again, one by one
            self.volume.delete([name])
            del self.views[name]
            self.judge()
            complaint = lab.complaint(bytes(self.device.content))
            assert not complaint, complaint


def run(report: Report, part: str, cases: int, rng: random.Random) -> None:
    """Lives of one part; in some there must be no room."""
    drops = refusals = 0
    for _ in range(cases):
        seed = rng.getrandbits(32)
        with report.case(f"{part}:{seed}", part):
            life = _life(part, seed)
            drops += life.drops
            refusals += life.refusals
    if not report.failures and not drops + refusals:
        report.fail(part, "no snapshot was dropped and no write refused: this shows nothing")
    report.seen["snapshots dropped"] += drops
    report.seen["writes refused"] += refusals


def _life(part: str, seed: int) -> Life:
    kind, when = part.split("-")
    life = Life(kind, when == "attached", random.Random(seed))
    life.live()
    return life


def replay(report: Report, token: str) -> None:
    """One life again."""
    part, seed = token.split(":")
    with report.case(token, part):
        _life(part, int(seed))


CAMPAIGN = Campaign(
    "full", "volumes filled to the last block, overwritten until copies have no room", PARTS, 24, 300, run, replay
)

"""One volume through everything: set-up, copies, growth, shrinking, restore, undo, delete, export, strip.

In one process and without a kernel mount, so that it runs for every kind of volume that e2fsprogs can make.  What
changes the volume is ``debugfs -w`` on a copy of what the served volume reads as; the blocks that differ are then
written through it.  What judges is e2fsck, after every step, and the whole-image copies.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import images
import lab
import oracle
import pytest

import extsnap
from extsnap.errors import UnsupportedFeature
from extsnap.snapshot.volume import Volume


@dataclass
class Journey:
    """A volume on its way.

    Attributes:
        image: The image, which is changed.
        scratch: A directory for copies.
        top: Where the files of `variants` are.
    """

    image: Path
    scratch: Path
    top: str = ""
    seed: int = 1
    copies: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.facts = oracle.volume_facts(self.image)
        self.clock = iter(range(1_700_000_000 * 10**9, 1_800_000_000 * 10**9, 10**9))

    def open(self) -> Volume:
        volume = extsnap.open(self.image)
        volume._clock = lambda: next(self.clock)
        return volume

    # -- steps ------------------------------------------------------------------------------------------

    def travel(self) -> None:
        """The whole way; raises AssertionError at the first thing that is wrong."""
        plain = oracle.superblock_facts(self.image)["Filesystem features"]
        original = oracle.tree_of_image(self.image)
        with self.open() as volume:
            self.create(volume, "one")
        oracle.assert_same_tree(original, oracle.tree_of_image(self.copies["one"]))
        with self.open() as volume:
            self.change(volume, "first")
            self.create(volume, "two")
            self.change(volume, "second")
            self.judge(volume, "one", "two")
        before = oracle.tree_of_image(self.image)
        with self.open() as volume:
            safety = volume.verb("restore", name="one")["safety"]
            self.clean()
            self.judge(volume, "one", "two")
            oracle.assert_same_tree(oracle.tree_of_image(self.copies["one"]), oracle.tree_of_image(self.image))
            undone = volume.verb("restore", undo=True)["safety"]
            self.clean()
            oracle.assert_same_tree(before, oracle.tree_of_image(self.image))
            out = self.scratch / "exported"
            volume.verb("export", name="one", out=str(out))
            oracle.assert_clean(out)
            assert oracle.superblock_facts(out)["Filesystem features"] == plain
            oracle.assert_same_tree(oracle.tree_of_image(self.copies["one"]), oracle.tree_of_image(out))
            assert volume.verb("check")["store"]["ok"]
            order = ["one", "two", safety, undone]
            self.random.shuffle(order)
            volume.verb("delete", names=order[:1])
            self.clean()
            self.judge(volume, *(name for name in ("one", "two") if name != order[0]))
            volume.verb("delete", names=order[1:])
            self.clean()
            volume.verb("strip")
        self.clean()
        assert oracle.superblock_facts(self.image)["Filesystem features"] == plain
        assert not oracle.debugfs_knows(self.image, "/.extsnap")
        oracle.assert_same_tree(before, oracle.tree_of_image(self.image))

    def create(self, volume: Volume, name: str) -> None:
        volume.verb("create", name=name)
        self.clean()
        self.copies[name] = oracle.copy_image(self.image, self.scratch / f"{name}.copy")

    def clean(self) -> None:
        oracle.assert_clean(self.image)

    def judge(self, volume: Volume, *names: str) -> None:
        for name in names:
            view = self.scratch / "view"
            with volume.snapshots[name].open() as file, view.open("wb") as out:
                while piece := file.read(1 << 22):
                    out.write(piece)
            oracle.assert_view_is_copy(view, self.copies[name])
            oracle.assert_clean(view)

    def change(self, volume: Volume, tag: str) -> None:
        """Files come, go, move and are overwritten, while the volume is served."""
        size = self.facts.block_size
        volume.begin_serving()
        base = self.scratch / "base"
        base.write_bytes(volume.read(0, volume.size))
        sources = []
        for number, length in enumerate((0, 5, 40, 3 * size + 1, 100 * 1024)):
            sources.append(self.scratch / f"{tag}-{number}")
            sources[-1].write_bytes(self.random.randbytes(length))
        commands = [f"cd {self.top or '/'}", f"mkdir {tag}", f"cd {tag}"]
        commands += [f"write {source} new{number}" for number, source in enumerate(sources)]
        commands += [f"cd {self.top}/many"]
        commands += (
            [f"rm {number:04d}-{'n' * 40}" for number in self.random.sample(range(40), 3)] if tag == "first" else []
        )
        commands += [f"write {sources[1]} {tag}{number}-{'m' * 60}" for number in range(8)]
        commands += [
            f"cd {self.top or '/'}",
            *(
                f"zap_block -f file6 -p {self.random.randrange(256)} {number}"
                for number in range(0, 300 * 1024 // size, 3)
            ),
        ]
        commands += ["rm file4"] if tag == "first" else ["rm first/new3"]
        script = self.scratch / "script"
        script.write_text("".join(f"{line}\n" for line in commands))
        after = oracle.copy_image(base, self.scratch / "after")
        lab.run("debugfs", "-w", "-f", str(script), str(after))
        if "quota" in self.facts.features:  # debugfs leaves the usage to e2fsck
            images.tool("e2fsck", "-fy", str(after), ok=(0, 1))
        oracle.assert_clean(after)
        new = after.read_bytes()
        old = base.read_bytes()
        for offset, length in lab.changed_runs(old, new):
            volume.write(offset, new[offset : offset + length])
        volume.flush()
        assert volume.read(0, volume.size) == new
        assert volume.end_serving()
        self.clean()


def refusal(image: Path) -> str:
    """What a volume is refused for; nothing may have been changed."""
    before = oracle.sha256(image)
    with extsnap.open(image) as volume, pytest.raises(UnsupportedFeature) as refused:
        volume.verb("create", name="no")
    assert oracle.sha256(image) == before
    return str(refused.value)

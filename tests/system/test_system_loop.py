"""A loop device that a user puts over the served volume: its page cache writes whole pages, whatever the block size."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable

import images
import numpy as np
import oracle
import pytest
from arena import arena

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.system
def test_pages_that_span_blocks_of_the_store(run_cli: Cli) -> None:
    """In the fragmented image, pages hold blocks of the store and of a file: writing to the file rewrites both."""
    rng = random.Random(9)
    with arena() as top:
        image = oracle.copy_image(images.image("ext2-1k"), top / "disk.img")
        run_cli("create", image, "one")
        copy = oracle.copy_image(image, top / "copy.img")
        directory = top / "served"
        directory.mkdir()
        content = rng.randbytes(1_500_000)
        (top / "source").write_bytes(content)
        run_cli("attach", image, directory)
        try:
            store = oracle.store_blocks(directory / "volume")
            assert store is not None
            filler = oracle.file_blocks(directory / "volume", "/filler")
            pages = np.isin(filler.data_blocks // 4, store.data_blocks // 4)
            zapped = np.flatnonzero(pages)[:40].tolist()
            assert len(zapped) == 40, "no page has blocks of both: this test would show nothing"
            loop = subprocess.run(
                ["losetup", "--find", "--show", directory / "volume"], check=True, capture_output=True, text=True
            ).stdout.strip()
            try:
                oracle.debugfs_write(
                    loop, f"write {top / 'source'} written", *(f"zap_block -f filler -p 9 {n}" for n in zapped)
                )
                subprocess.run(["blockdev", "--flushbufs", loop], check=True)
            finally:
                subprocess.run(["losetup", "--detach", loop], check=True)
            oracle.assert_view_is_copy(directory / "snapshots" / "one", copy)
        finally:
            run_cli("detach", image)
        oracle.assert_clean(image)
        with oracle.mounted(image) as mount:
            assert (mount / "written").read_bytes() == content
            with open(mount / "filler", "rb") as file:
                file.seek(zapped[-1] * 1024)
                assert file.read(1024) == bytes([9]) * 1024

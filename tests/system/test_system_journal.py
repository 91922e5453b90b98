"""The journal is not copied: its content at a clean moment is nothing that a snapshot needs."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable

import numpy as np
import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
FSYNCS = 1000


@pytest.mark.system
def test_a_thousand_fsyncs_record_no_block_of_the_journal(run_cli: Cli) -> None:
    rng = random.Random(3)
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 48, "-J", "size=4", files={"file": rng.randbytes(200_000)})
        journal = oracle.file_blocks(image, oracle.JOURNAL).data_blocks
        size = oracle.volume_facts(image).block_size
        run_cli("create", image, "before")
        copy = oracle.copy_image(image, top / "copy.img")
        mount = top / "mount"
        mount.mkdir()
        run_cli("mount", image, mount)
        try:
            with open(mount / "file", "r+b", buffering=0) as file:
                for number in range(FSYNCS):
                    # Every other one changes metadata as well: the journal is written by both.
                    file.seek(200_000 + number if number % 2 else rng.randrange(199_990))
                    file.write(rng.randbytes(10))
                    os.fsync(file.fileno())
        finally:
            run_cli("umount", mount)
        oracle.assert_clean(image)

        everything = np.zeros(os.path.getsize(image) // size, np.bool_)
        everything[journal] = True
        assert len(oracle.unequal_blocks(image, copy, everything)) > len(journal) // 2, "the journal was not used"
        records = json.loads(run_cli("dump", "--json", image, "records").stdout)["records"]
        assert records
        recorded = {block for record in records for block in range(record["block"], record["block"] + record["length"])}
        assert recorded.isdisjoint(journal[1:].tolist())
        directory = top / "served"
        directory.mkdir()
        run_cli("attach", image, directory)
        try:
            oracle.assert_view_is_copy(directory / "snapshots" / "before", copy)
            oracle.assert_clean(directory / "snapshots" / "before")
        finally:
            run_cli("detach", image)

"""A server whose program is replaced, or out of reach, while it serves: it has all of it in memory."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

import extsnap

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.system


def test_everything_works_though_the_package_is_gone(run_cli: Cli) -> None:
    with arena() as top:
        big = random.Random(7).randbytes(1 << 20)
        image = make_volume(top / "disk.img", "ext4", 24, files={"big": big})
        blocks = oracle.file_blocks(image, "/big").data_blocks.tolist()
        run_cli("create", image, "one")
        before = oracle.copy_image(image, top / "before.img")
        site = top / "site"
        shutil.copytree(Path(extsnap.__file__).parent, site / "extsnap")
        served = top / "served"
        served.mkdir()
        attach = "import sys; from extsnap.cli.app import main; sys.exit(main(sys.argv[1:]))"
        subprocess.run(
            [sys.executable, "-c", attach, "attach", str(image), str(served)],
            cwd=top,
            env={**os.environ, "PYTHONPATH": str(site)},
            check=True,
            timeout=60,
        )
        try:
            (site / "extsnap").rename(site / "elsewhere")
            with (served / "volume").open("r+b", buffering=0) as volume:
                for block in blocks[::3]:
                    os.pwrite(volume.fileno(), b"new" * 900, block * 4096)
                os.fsync(volume.fileno())
            run_cli("create", image, "two")
            for arguments in (("list", image), ("show", image, "one"), ("info", image), ("check", image, "--quick")):
                run_cli(*arguments)
            run_cli("export", image, "one", top / "one.img")
            run_cli("restore", image, "one")
            run_cli("delete", image, "two")
            run_cli("set", image, "on-full=drop-oldest")
            oracle.assert_view_is_copy(served / "snapshots" / "one", before)
            run_cli("strip", image)
        finally:
            run_cli("detach", image)
        oracle.assert_clean(top / "one.img")
        oracle.assert_clean(image)

"""Multiple-mount protection: a volume that another machine has mounted is left alone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import oracle
import pytest
import variants
from arena import arena

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.system
@pytest.mark.slow
def test_a_volume_in_use_elsewhere_is_refused(run_cli: Cli) -> None:
    """The copy of a mounted image is what a shared disk looks like from another machine."""
    with arena() as top:
        image = oracle.copy_image(variants.image("mmp"), top / "disk.img")
        with oracle.mounted(image, writable=True):
            elsewhere = oracle.copy_image(image, top / "elsewhere.img")
        before = elsewhere.read_bytes()
        node = subprocess.run(["uname", "-n"], check=True, capture_output=True, text=True).stdout.strip()
        for command in (("create", elsewhere, "no"), ("attach", elsewhere, top), ("delete", elsewhere, "no")):
            refused = run_cli(*command, status=1)
            assert f"in use by a mount on {node} (loop" in refused.stderr, refused
            assert "clear_mmp" in refused.stderr
        assert run_cli("list", elsewhere).returncode == 0
        assert elsewhere.read_bytes() == before
        # Unmounted it is free again.
        assert run_cli("create", image, "yes").stdout == "yes\n"
        oracle.assert_clean(image)

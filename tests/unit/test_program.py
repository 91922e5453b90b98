"""How the tests start the program: as a process of its own, that ends as subprocess would tell."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import lab
import program
import pytest


@pytest.fixture
def loaded() -> Iterator[program.Loaded]:
    loaded = program.Loaded()
    yield loaded
    loaded.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "disk.img").write_bytes(lab.plain_image("ext4"))
    return tmp_path / "disk.img"


@pytest.mark.parametrize("words", [["--version"], ["list", "disk.img"], ["list", "nonesuch"], ["bogus"], ["create"]])
def test_as_the_installed_program(words: list[str], loaded: program.Loaded, image: Path) -> None:
    """In the same directory, with the same environment: the same status and words."""
    script = Path(sys.executable).with_name("extsnap")
    there = subprocess.run([script, *words], cwd=image.parent, capture_output=True, text=True, check=False)
    here = loaded.run(words, cwd=image.parent, env=os.environ, timeout=60)
    assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)


def test_its_own_environment_and_process(loaded: program.Loaded, image: Path) -> None:
    script = 'echo "$SOMETHING $PPID"; cat; exit 7'
    for something in ("one", "two"):
        done = loaded.run(
            ["run", str(image), "--", "sh", "-c", script],
            env={"PATH": os.environ["PATH"], "SOMETHING": something},
            input="from afar",
            timeout=60,
        )
        assert done.returncode == 7
        said, parent = done.stdout.removesuffix("from afar").split()
        assert said == something
        assert int(parent) not in (os.getpid(), loaded._process.pid)
    assert not loaded.run(["list", str(image)], env=os.environ, timeout=60).stdout


def test_a_signal_and_the_end_of_patience(loaded: program.Loaded, image: Path) -> None:
    done = loaded.run(["run", str(image), "--", "sh", "-c", "kill -KILL $PPID"], env=os.environ, timeout=60)
    assert done.returncode == -9
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        loaded.run(["run", str(image), "--", "sh", "-c", "exec sleep 2"], env=os.environ, timeout=0.5)
    assert time.monotonic() - began < 60
    assert loaded.run(["--version"], env=os.environ, timeout=60).returncode == 0


def test_two_at_once(loaded: program.Loaded, image: Path, tmp_path: Path) -> None:
    """The first one ends only when the second one has run."""
    os.mkfifo(tmp_path / "fifo")
    ended = []

    def first() -> None:
        command = ["run", str(image), "--", "cat", str(tmp_path / "fifo")]
        ended.append(loaded.run(command, env=os.environ, timeout=60))

    waiting = threading.Thread(target=first)
    waiting.start()
    try:
        assert loaded.run(["--version"], env=os.environ, timeout=60).returncode == 0
    finally:
        (tmp_path / "fifo").write_text("done")
        waiting.join()
    assert ended[0].stdout == "done"

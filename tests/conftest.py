"""What all tests share: images, the installed program, the `system` marker, and a look for leftovers at the end.

Modules beside this file (`oracle`) and in ``tools/`` (`images`) are imported by their plain names.
"""

from __future__ import annotations

import gc
import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for _directory in (HERE, HERE.parent / "tools"):
    if str(_directory) not in sys.path:
        sys.path.insert(0, str(_directory))

import images  # noqa: E402
import oracle  # noqa: E402
import program  # noqa: E402

CI = any(os.environ.get(name, "").lower() in ("1", "true", "yes") for name in ("CI", "EXTSNAP_CI"))  # tools/test
# The tests run e2fsprogs by name; for an ordinary user these directories may be missing.
os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def why_no_system_tests() -> str | None:
    """Return what is missing for tests that mount, or None if all is there."""
    if os.geteuid() != 0:
        return "not root"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse"
    if subprocess.run(["losetup", "--find"], capture_output=True, check=False).returncode:
        return "no loop device"
    return None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is there for good out of the search for garbage.

    Beside thousands of tests it would take place too seldom: volumes are cycles, and of small ones in memory each has
    all of a medium.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # counts what is left, by which Python judges when it is time again


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a system test where the machine cannot run it; on CI that is a failure."""
    if item.get_closest_marker("system") is not None:
        reason = why_no_system_tests()
        if reason is not None:
            pytest.skip(f"system test: {reason}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Make every skip of a system test a failure on CI, whatever skipped it."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if CI and report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("system") is not None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: a system test must not be skipped on CI: {report.longrepr}"


def leftovers(under: str) -> list[str]:
    """Return mounts, loop devices and processes that have to do with paths below a directory."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            source = fields[fields.index("-") + 2]
            if under in fields[4] or under in source:
                found.append(f"mount of {source} at {fields[4]}")
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name = backing.read_text(errors="surrogateescape").strip()
        except OSError:
            continue  # detached in the meantime
        if under in name:
            found.append(f"loop device {backing.parent.parent.name} on {name}")
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
            except OSError:
                continue  # ended in the meantime
            if any(argument.startswith(under) for argument in command[1:]) and "pytest" not in " ".join(command[:3]):
                found.append(f"process {process.name}: {' '.join(command)[:200]}")
    return found


_left: list[str] = []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if anything of its own is still mounted, attached or running."""
    factory = getattr(session.config, "_tmp_path_factory", None)
    base = getattr(factory, "_basetemp", None)
    if base is not None:
        _left.extend(leftovers(str(base)))
        if _left and session.exitstatus == 0:
            session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left behind, and say once why system tests were skipped."""
    for line in _left:
        terminalreporter.write_line(f"LEFT BEHIND: {line}", red=True)
    reason = why_no_system_tests()
    if reason is not None:
        terminalreporter.write_line(f"system tests were not run: {reason}", yellow=True)


@pytest.fixture(scope="session")
def matrix_image() -> Callable[[str], Path]:
    """Return the path of a matrix image in the cache; copy it before writing."""
    return images.image


@pytest.fixture
def fresh_image(tmp_path: Path) -> Callable[[str], Path]:
    """Return a new writable copy of a matrix image, under the test's own directory."""

    def copy(name: str) -> Path:
        number = len(list(tmp_path.glob(f"{name}*.img")))
        return oracle.copy_image(images.image(name), tmp_path / f"{name}{f'-{number}' if number else ''}.img")

    return copy


@pytest.fixture
def fixture_image(tmp_path: Path) -> Callable[[str], Path]:
    """Return a new writable copy of an image of ``tests/fixtures``, by its name there without ``.img.gz``."""

    def unpack(name: str) -> Path:
        path = tmp_path / f"{name}.img"
        path.write_bytes(gzip.decompress((HERE / "fixtures" / f"{name}.img.gz").read_bytes()))
        return path

    return unpack


RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def extsnap_program() -> Path:
    """Return the installed program, beside this Python."""
    program = Path(sys.executable).parent / "extsnap"
    if not program.exists():
        pytest.fail(f"{program} is not there: run tools/setup")
    return program


@pytest.fixture
def run_cli() -> RunCli:
    """Run `extsnap` as a process of its own.

    ``run_cli("create", image, "one")`` fails the test unless the status is 0; pass ``status=1`` to expect another
    one, ``status=None`` to take any.  Standard output and error are kept apart, as text.
    """

    def run(
        *arguments: str | os.PathLike[str],
        status: int | None = 0,
        timeout: float = 120,
        env: dict[str, str] | None = None,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        words = [os.fspath(argument) for argument in arguments]
        done = program.loaded().run(
            words,
            timeout=timeout,
            input=input or "",
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **(env or {})},
        )
        shown = f"extsnap {' '.join(words)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        assert status is None or done.returncode == status, shown
        assert "Traceback (most recent call last)" not in done.stderr, shown
        return done

    return run


@pytest.fixture
def call_cli(capfd: pytest.CaptureFixture[str]) -> RunCli:
    """Call the same command line in this process, for tests of many commands that are not about its start.

    Servers, mounts and programs are what they always are; arguments and result are as those of ``run_cli``.
    """
    from extsnap.cli.app import main

    def call(*arguments: str | os.PathLike[str], status: int | None = 0) -> subprocess.CompletedProcess[str]:
        words = [os.fspath(argument) for argument in arguments]
        capfd.readouterr()
        try:
            ended = main(words)
        except SystemExit as leaving:
            ended = int(leaving.code or 0)
        done = subprocess.CompletedProcess(words, ended, *capfd.readouterr())
        shown = f"extsnap {' '.join(words)} ended with {ended}\n{done.stdout}{done.stderr}"
        assert status is None or ended == status, shown
        return done

    return call

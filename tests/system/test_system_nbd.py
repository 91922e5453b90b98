"""``serve``: the volume and its snapshots by NBD, read and written by qemu-img, qemu-io and nbdcopy."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.system

PROGRAMS = ["nbdkit", "qemu-nbd"]
SECONDS = 20 if os.environ.get("EXTSNAP_MUTANT") else 180
OLD = b"as it was then " * 20_000


def snapshotted(top: Path, cli: Cli) -> tuple[Path, Path]:
    """An image with a snapshot `then`, and the whole copy of that moment."""
    image = make_volume(top / "disk.img", "ext4", 24, "-b", "4096", files={"file": OLD})
    cli("create", image, "then")
    return image, oracle.copy_image(image, top / "then.copy")


class Serving:
    """``extsnap serve`` as a process, and what it printed.

    Attributes:
        process: It.
        uri: Its address.
    """

    def __init__(self, program: Path, *arguments: str | Path) -> None:
        words = [str(program), "serve", *map(str, arguments)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        self.uri = self.process.stdout.readline().strip() if readable else ""
        while self.uri.startswith("{") and not self.uri.endswith("}"):
            self.uri += self.process.stdout.readline().strip()
        if not self.uri:
            self.process.kill()
            pytest.fail(f"{words}: {self.process.communicate()[1]}")

    def end(self, number: int = signal.SIGTERM, status: int = 0) -> str:
        """End it by a signal; returns what it said."""
        self.process.send_signal(number)
        return self.ended(status)

    def ended(self, status: int) -> str:
        out, said = self.process.communicate(timeout=SECONDS)
        assert (self.process.returncode, out) == (status, ""), said
        return said


Serve = Callable[..., contextlib.AbstractContextManager[Serving]]


@pytest.fixture
def serve(extsnap_program: Path) -> Serve:
    @contextlib.contextmanager
    def start(*arguments: str | Path) -> Iterator[Serving]:
        serving = Serving(extsnap_program, *arguments)
        try:
            yield serving
        finally:
            if serving.process.poll() is None:
                serving.process.terminate()
                serving.process.communicate(timeout=SECONDS)

    return start


def refused(program: Path, *arguments: str | Path) -> str:
    """What ``serve`` says that does not begin to."""
    words = [str(program), "serve", *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline():
        process.terminate()
        process.communicate(timeout=SECONDS)
        pytest.fail(f"{words} serves")
    said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 1, said
    return said


def sh(*words: str | Path, status: int = 0) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == status, (words, done.stdout, done.stderr)
    return done.stdout + done.stderr


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + SECONDS
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        time.sleep(0.02)
    return not os.path.exists(f"/proc/{pid}")


def test_the_first_snapshot_of_a_volume_that_is_in_use(serve: Serve, run_cli: Cli) -> None:
    """Its filesystem cannot be changed any more: the store must be there."""
    with arena() as top:
        image = make_volume(top / "disk.img", "ext4", 24, "-b", "4096", files={"file": OLD})
        with serve(image) as serving:
            sh("qemu-io", "-f", "raw", "-c", "read 0 4096", serving.uri)
            run_cli("create", image, "first")
            listed = json.loads(run_cli("list", "--json", image).stdout)["snapshots"]
            assert [(entry["name"], entry["consistency"]) for entry in listed] == [("first", "crash")]
            serving.end()
        oracle.assert_clean(image)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_volume_is_written(program: str, serve: Serve, call_cli: Cli) -> None:
    with arena() as top:
        image, copy = snapshotted(top, call_cli)
        first = oracle.file_blocks(image, "/file").data_blocks[0]
        with serve(image, "--with", program) as serving:
            path = Path(serving.uri.removeprefix("nbd+unix:///?socket="))
            mode = path.stat().st_mode
            assert (stat.S_IMODE(mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
            facts = json.loads(sh("qemu-img", "info", "--output=json", serving.uri))
            assert (facts["format"], facts["virtual-size"]) == ("raw", 24 << 20)
            sh("qemu-io", "-f", "raw", "-c", f"write -P 90 {first * 4096} 8192", "-c", "flush", serving.uri)
            sh("nbdcopy", serving.uri, top / "now.img")
            said = call_cli("restore", image, "then", status=1).stderr
            assert f"volume is in use: extsnap (pid {serving.process.pid})" in said
            assert serving.end(signal.SIGINT) == ""
            assert not path.exists()
        oracle.assert_clean(image)
        for volume in (image, top / "now.img"):
            with volume.open("rb") as file:
                file.seek(first * 4096)
                assert file.read(8192) == b"\x5a" * 8192
        out = top / "then.out"
        with serve(image, "--snapshot", "then", "--with", program) as serving:
            sh("qemu-img", "convert", "-f", "raw", "-O", "raw", serving.uri, out)
            sh("nbdinfo", "--is", "read-only", serving.uri)
            sh("qemu-io", "-f", "raw", "-c", "write 0 4096", serving.uri, status=1)
            serving.end()
        oracle.assert_view_is_copy(out, copy)


def test_a_snapshot_is_written_and_thrown_away(serve: Serve, call_cli: Cli) -> None:
    with arena() as top:
        image, _ = snapshotted(top, call_cli)
        before = oracle.sha256(image)
        with serve(image, "--snapshot", "then", "--scratch", "--json", "--socket", top / "here") as serving:
            said = json.loads(serving.uri)
            uri = f"nbd+unix:///?socket={top}/here"
            assert (said["uri"], said["read_only"], said["program"]) == (uri, False, "nbdkit")
            assert stat.S_IMODE((top / "here").stat().st_mode) == 0o600
            for pattern in ("7", "8"):  # each with a connection of its own: the layer stays
                sh("qemu-io", "-f", "raw", "-c", f"write -P {pattern} 1M 1M", "-c", "flush", uri)
                sh("qemu-io", "-f", "raw", "-c", f"read -P {pattern} 1M 1M", uri)
            assert serving.end() == ""
        assert oracle.sha256(image) == before
        assert not (top / "here").exists()


def test_served_where_the_volume_is_attached(serve: Serve, call_cli: Cli, extsnap_program: Path) -> None:
    with arena() as top:
        image, copy = snapshotted(top, call_cli)
        (top / "served").mkdir()
        (top / "mnt").mkdir()
        call_cli("attach", image, top / "served")
        try:
            call_cli("mount", image, top / "mnt")
            assert f"volume is in use: mounted at {top}/mnt" in refused(extsnap_program, image)
            call_cli("umount", top / "mnt")
            with serve(image, "--snapshot", "then") as serving:
                assert "snapshot then is open" in call_cli("delete", image, "then", status=1).stderr
                sh("nbdcopy", serving.uri, top / "out")
                serving.end()
            oracle.assert_view_is_copy(top / "out", copy)
            taken = top / "taken"
            taken.touch()
            said = refused(extsnap_program, image, "--socket", taken)
            assert f"cannot listen at {taken}: Address already in use" in said
            assert taken.exists()
            with serve(image) as serving:
                call_cli("detach", image, "--force")
                assert "the server of the volume has ended" in serving.ended(1)
        finally:
            call_cli("detach", image, status=None)


def test_what_ends_with_what(serve: Serve, call_cli: Cli) -> None:
    """Neither outlives the other, and the volume is whole whatever ends."""
    with arena() as top:
        image, _ = snapshotted(top, call_cli)
        with serve(image) as serving:
            (program,) = children(serving.process.pid)
            os.kill(program, signal.SIGKILL)
            assert f"nbdkit ended with status {-signal.SIGKILL}" in serving.ended(1)
        oracle.assert_clean(image)
        with serve(image, "--with", "qemu-nbd") as serving:
            sh("qemu-io", "-f", "raw", "-c", "read 0 4096", serving.uri)
            (program,) = children(serving.process.pid)
            server = json.loads(call_cli("info", image, "--json").stdout)["attached"]["pid"]
            serving.end(signal.SIGKILL, -signal.SIGKILL)
            try:
                assert gone(program)
                assert gone(server)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(program, signal.SIGKILL)
        oracle.assert_clean(image)
        call_cli("check", image)


def certificates(top: Path) -> tuple[Path, Path]:
    """Directories for a server and for a client, of one authority."""
    quiet = {"check": True, "capture_output": True}
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    ca = ["-x509", "-days", "30", "-subj", "/CN=authority", "-addext", "keyUsage=keyCertSign,digitalSignature"]
    subprocess.run([*new, *ca, "-keyout", top / "ca.key", "-out", top / "ca.pem"], **quiet)
    directories = []
    for name in ("server", "client"):
        directory = top / name
        directory.mkdir()
        wanted = ["-subj", f"/CN={name}", "-keyout", directory / f"{name}-key.pem", "-out", top / "request"]
        subprocess.run([*new, *wanted], **quiet)
        extensions = top / "extensions"
        extensions.write_text(
            f"subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage={name}Auth\nkeyUsage=digitalSignature\n"
        )
        sign = ["openssl", "x509", "-req", "-days", "30", "-CA", top / "ca.pem", "-CAkey", top / "ca.key"]
        sign += ["-CAcreateserial", "-extfile", extensions, "-in", top / "request"]
        subprocess.run([*sign, "-out", directory / f"{name}-cert.pem"], **quiet)
        (directory / "ca-cert.pem").write_bytes((top / "ca.pem").read_bytes())
        directories.append(directory)
    return directories[0], directories[1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_tcp_with_certificates(program: str, serve: Serve, call_cli: Cli) -> None:
    with arena() as top:
        image, copy = snapshotted(top, call_cli)
        server, client = certificates(top)
        stranger = top / "stranger"
        stranger.mkdir()
        (stranger / "ca-cert.pem").write_bytes((top / "ca.pem").read_bytes())
        arguments = (image, "--snapshot", "then", "--with", program, "--tcp", "0")
        with serve(*arguments, "--tls", server) as serving:
            assert serving.uri.startswith("nbds://localhost:")
            sh("nbdcopy", f"{serving.uri}?tls-certificates={client}", top / "out")
            sh("nbdinfo", f"{serving.uri}?tls-certificates={stranger}", status=1)
            sh("nbdinfo", serving.uri.replace("nbds:", "nbd:"), status=1)
            serving.end()
        oracle.assert_view_is_copy(top / "out", copy)
        if program != "nbdkit":
            return
        with serve(*arguments, "--insecure") as serving:
            assert serving.uri.startswith("nbd://localhost:")
            assert sh("nbdinfo", "--size", serving.uri).strip() == str(24 << 20)
            serving.end()

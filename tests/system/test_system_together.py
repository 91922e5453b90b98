"""Many at once: the campaign's short form, and the single cases that it, or reading the code, has found."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
from arena import arena, make_volume
from campaigns.report import short_form
from campaigns.together import CAMPAIGN
from campaigns.together_place import Place, until
from hosts import loop

from extsnap.serve import control

pytestmark = pytest.mark.system


@pytest.mark.slow
@pytest.mark.parametrize("part", CAMPAIGN.parts)
def test_together(part: str) -> None:
    short_form(CAMPAIGN, part)


@pytest.fixture
def place() -> Iterator[Place]:
    with arena() as top:
        found = Place(top)
        try:
            with found.here():
                yield found
        finally:
            left = found.left()
            found.clear()
        assert not left


@pytest.fixture
def image(place: Place) -> Path:
    path = make_volume(place.top / "disk.img", "ext4", 32, "-b", "4096", files={"data": os.urandom(3 << 20)})
    (place.top / "served").mkdir()
    (place.top / "mnt").mkdir()
    return path


def connection(image: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.settimeout(30)
    found.connect(os.fspath(control.socket_path(control.image_key(os.fspath(image)))))
    return found


def memory(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def server_of(place: Place, image: Path) -> int:
    return int(json.loads(place.extsnap("info", "--json", image).out)["attached"]["pid"])


def test_a_client_that_never_reads_costs_one_answer(place: Place, image: Path) -> None:
    place.extsnap("create", image, "one")
    place.extsnap("attach", image, place.top / "served")
    server = server_of(place, image)
    before = memory(server)
    with connection(image) as silent:
        silent.settimeout(0.2)
        asked = 0
        try:
            while asked < 32 << 20:
                asked += silent.send(b'{"verb": "dump", "args": {"what": "header"}}\n' * 500)
        except TimeoutError:
            pass
        assert 500 < asked < 32 << 20, "the server reads on and on"
        assert len(json.loads(place.extsnap("list", "--json", image).out)["snapshots"]) == 1
        assert memory(server) - before < 32 << 20
    place.extsnap("detach", image)


def test_a_request_in_pieces_keeps_nobody_waiting(place: Place, image: Path) -> None:
    place.extsnap("attach", image, place.top / "served")
    request = b'{"verb": "list", "args": {}}\n'
    with connection(image) as slow:
        for at in range(len(request)):
            slow.sendall(request[at : at + 1])
            if at == 5:
                done = subprocess.run(["ls", place.top / "served" / "snapshots"], capture_output=True, timeout=10)
                assert done.returncode == 0
                place.extsnap("create", image, "one")
        # One who says all that he has to say, and then that he is done, still gets his answer.
        slow.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := slow.recv(65536):
            answer += piece
    assert [entry["name"] for entry in json.loads(answer)["result"]["snapshots"]] == ["one"]
    place.extsnap("detach", image)


def test_more_clients_than_there_is_place_for(place: Place, image: Path) -> None:
    """They wait, and the server does not spin; who is silent for long goes for one who is not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))  # what the server starts with: place for sixteen
    try:
        place.extsnap("attach", image, place.top / "served")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    server = server_of(place, image)
    crowd = [connection(image) for _ in range(20)]
    try:
        began, used = time.monotonic(), _cpu_seconds(server)
        late = place.start("list", "--json", image)
        try:
            late.ready()
            late.go(0)
            assert until(lambda: late.process.poll() is not None, 30), "one who asks is not served"
            assert late.end().status == 0
        finally:
            late.kill()
        assert _cpu_seconds(server) - used < 0.5 * (time.monotonic() - began) + 0.5, "the server spins"
        # What it has to do for a command of its own it still can: who has the directory open, and the unmount.
        held = os.open(place.top / "served" / "volume", os.O_RDONLY)
        refused = place.extsnap("detach", image, ok=False)
        os.close(held)
        assert f"pid {os.getpid()}" in refused.err
    finally:
        for one in crowd:
            one.close()
    place.extsnap("detach", image)


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_export_into_a_filesystem_on_the_served_volume(place: Place, image: Path) -> None:
    """The server would wait for itself: for the writes of its own fsync."""
    place.extsnap("create", image, "one")
    place.extsnap("mount", image, place.top / "mnt")
    out = place.top / "mnt" / "one.img"
    place.extsnap("export", image, "one", out)
    oracle.assert_clean(out)
    out.unlink()
    place.extsnap("umount", place.top / "mnt")


def test_two_first_creates(place: Place, image: Path) -> None:
    """Both find a plain volume: one sets it up, and the other one waits for that or is refused."""
    for number in range(4):
        path = oracle.copy_image(image, place.top / f"first-{number}.img")
        both = [place.start("create", path, name) for name in ("left", "right")]
        for one in both:
            one.ready()
        for one in both:
            one.go(0)
        ended = [one.end() for one in both]
        for one in both:
            one.kill()
        made = [name for one, name in zip(ended, ("left", "right"), strict=True) if not one.status]
        assert made, list(map(str, ended))
        for one in ended:
            assert one.status == 0 or "in use by extsnap in process" in one.err, str(one)
        oracle.assert_clean(path)
        listed = json.loads(place.extsnap("list", "--json", path).out)["snapshots"]
        assert sorted(entry["name"] for entry in listed) == sorted(made)
        assert json.loads(place.extsnap("check", "--json", path).out)["ok"]


def test_served_and_at_rest_an_export_is_the_same(place: Place, image: Path) -> None:
    place.extsnap("create", image, "one")
    at_rest, served = place.top / "rest.img", place.top / "served.img"
    place.extsnap("export", image, "one", at_rest)
    place.extsnap("attach", image, place.top / "served")
    place.extsnap("export", image, "one", served)
    missing = place.extsnap("export", image, "../volume", place.top / "no.img", ok=False)
    assert missing.status == 1
    assert "no snapshot" in missing.err
    place.extsnap("detach", image)
    assert served.read_bytes() == at_rest.read_bytes()
    assert not (place.top / "no.img").exists()


@pytest.mark.parametrize("served", [False, True], ids=["at-rest", "served"])
def test_two_exports_to_one_name(place: Place, image: Path, served: bool) -> None:
    """Without --force nothing is replaced, also not what came while the export was made."""
    place.extsnap("create", image, "one")
    if served:
        place.extsnap("attach", image, place.top / "served")
    out = place.top / "out.img"
    both = [place.start("export", image, "one", out) for _ in range(2)]
    for one in both:
        one.ready()
    for one in both:
        one.go(0)
    ended = [one.end() for one in both]
    for one in both:
        one.kill()
    assert sorted(one.status for one in ended) == [0, 1], list(map(str, ended))
    assert any(f"{out} exists already" in one.err for one in ended)
    assert sorted(path.name for path in place.top.glob("out.img*")) == ["out.img"]
    oracle.assert_clean(out)
    if served:
        place.extsnap("detach", image)


def test_reading_by_another_device_what_is_being_written(place: Place, image: Path) -> None:
    """A loop device has a cache and a lock of its own: what it shows of a file that is written may be anything."""
    place.extsnap("create", image, "one")
    place.extsnap("attach", image, place.top / "served")
    server = server_of(place, image)
    with loop(image) as device:
        for command in (["list"], ["check"], ["export"]):
            more = ["one", place.top / "out.img"] if command == ["export"] else []
            refused = place.extsnap(*command, device, *more, ok=False)
            assert refused.status == 1
            assert f"in use by extsnap in process {server}" in refused.err
        refused = place.extsnap("detach", device, ok=False)
        assert f"served at {place.top}/served by the path {image} (pid {server})" in refused.err
    place.extsnap("detach", image)
    with loop(image) as device:
        place.extsnap("attach", device, place.top / "served")
        server = server_of(place, Path(device))
        refused = place.extsnap("list", image, ok=False)
        assert f"in use by extsnap in process {server}" in refused.err
        place.extsnap("detach", device)


def test_a_dead_socket_is_not_cleared_over_a_living_server(place: Place, image: Path) -> None:
    """One who has seen that a server is dead, and then stands still, must not take away the next one's mount."""
    place.extsnap("attach", image, place.top / "served")
    key = control.image_key(os.fspath(image))
    record = control.socket_path(key).with_suffix(".json")
    os.kill(json.loads(record.read_text())["pid"], 9)
    until(lambda: not place.servers(), 10)
    # The same as `connect` does up to the moment at which it stands still.
    script = (
        "import os, sys; from extsnap.serve import control; greet = control._greet\n"
        "def stopped(path):\n"
        "    try:\n        return greet(path)\n"
        "    except ConnectionRefusedError:\n"
        "        control._greet = greet; print('dead', flush=True); sys.stdin.readline(); raise\n"
        "control._greet = stopped\n"
        "found = control.connect(control.image_key(sys.argv[1]))\n"
        "print('served' if found else 'gone', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=place.environment,
    ) as late:
        assert late.stdin is not None
        assert late.stdout is not None
        try:
            assert late.stdout.readline() == "dead\n"
            place.extsnap("attach", image, place.top / "served")
            late.stdin.write("\n")
            late.stdin.flush()
            assert late.stdout.readline() == "served\n"
        finally:
            late.kill()
    assert (place.top / "served" / "volume").stat().st_size == image.stat().st_size
    place.extsnap("detach", image)


def test_a_failed_start_leaves_the_log_of_the_one_who_serves(place: Place, image: Path) -> None:
    place.extsnap("attach", image, place.top / "served")
    key = control.image_key(os.fspath(image))
    log = control.log_path(key)
    inode = log.stat().st_ino
    socket_file = control.socket_path(key)
    away = socket_file.with_suffix(".away")
    socket_file.rename(away)  # as for one who looks before it is there
    try:
        refused = place.extsnap("attach", image, place.top / "mnt", ok=False)
    finally:
        away.rename(socket_file)
    assert "in use by extsnap in process" in refused.err
    assert log.stat().st_ino == inode
    place.extsnap("detach", image)
    assert not log.exists()


def test_a_check_of_a_served_volume_does_not_keep_its_server(place: Place, image: Path) -> None:
    """Damage is found by pieces as it is by the whole, and named the same way."""
    place.extsnap("create", image, "one")
    (_, start, count), *_ = oracle.file_blocks(image, "/data").data.tolist()
    script = "import os, sys; f = os.open(sys.argv[1], os.O_RDWR); os.pwrite(f, os.urandom(%d), %d)"
    place.extsnap("run", image, "--", sys.executable, "-c", script % (count * 4096, start * 4096), "{}")
    whole = json.loads(place.extsnap("check", "--json", "--quick", image).out)
    assert whole["ok"]
    records = json.loads(place.extsnap("dump", "--json", image, "records").out)["records"]
    copy = max(records, key=lambda record: record["length"] * (record["copy"] is not None))["copy"]
    store = oracle.store_blocks(image)
    assert store is not None
    damaged = 30
    with image.open("r+b") as file:
        for logical in range(copy, copy + damaged):
            file.seek(int(store.data_blocks[logical]) * 4096)
            file.write(b"damage")
    at_rest = place.extsnap("check", "--json", "--quick", image, ok=False)
    place.extsnap("attach", image, place.top / "served")
    served = place.extsnap("check", "--json", "--quick", image, ok=False)
    place.extsnap("detach", image)
    assert at_rest.status == served.status == 3
    assert json.loads(served.out)["store"] == json.loads(at_rest.out)["store"]
    assert json.loads(served.out)["snapshots"] == json.loads(at_rest.out)["snapshots"]
    assert json.loads(served.out)["store"]["errors"][-1] == f"{damaged} copies fail their checksum"

"""Who started whom, by /proc."""

from __future__ import annotations

from pathlib import Path

_GENERATIONS = 64


def parent(pid: int) -> int:
    """Number of a process's parent; 0 if it is gone, or nobody's child."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything


def is_of(pid: int, ancestor: int) -> bool:
    """Whether a process is ``ancestor``, or was started by it or by a process that was; of one that is not seen: yes.

    Not seen (0) is who asks from another namespace of processes.
    """
    if not pid:
        return True
    for _ in range(_GENERATIONS):
        if pid in (0, ancestor):
            break
        pid = parent(pid)
    return pid == ancestor

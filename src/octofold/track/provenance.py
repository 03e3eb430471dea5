"""Who made a run: the process, the machine, and the code, as tags that can be checked later."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path


def identity() -> dict[str, str]:
    """Return tags that tell this process from any other, now or after a reboot."""
    import psutil

    started = f"{psutil.Process().create_time():.2f}"
    return {"pid": str(os.getpid()), "pid.started": started, **_place()}


def _place() -> dict[str, str]:
    """Return where a process number means what it means here: the host, since its boot, in this container."""
    return {"host": socket.gethostname(), "boot_id": _boot_id(), "pid.space": _pid_space()}


@lru_cache(maxsize=1)
def _pid_space() -> str:
    """The kernel's name of the process numbers we see: each container has its own on one host."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


@lru_cache(maxsize=1)
def _boot_id() -> str:
    import psutil

    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{psutil.boot_time():.0f}"


def is_orphan(tags: Mapping[str, str]) -> bool:
    """Tell whether the process that wrote these tags is known to be gone: same host, and rebooted or no such pid."""
    import psutil

    if tags.get("host") != socket.gethostname() or "pid" not in tags:
        return False
    if tags.get("boot_id") != _boot_id():
        return True
    if tags.get("pid.space", "") != _pid_space():
        return False  # another container's processes cannot be seen from here
    try:
        started = psutil.Process(int(tags["pid"])).create_time()
    except (psutil.NoSuchProcess, ValueError):
        return True
    return bool(abs(started - float(tags.get("pid.started", started))) > 1.0)


def outlive(tags: Mapping[str, str], patience_s: float = 10.0) -> None:
    """Wait for the process that wrote these tags, if it lives here: a lost Ray node's worker speaks a little longer."""
    if any(tags.get(key, "") != value for key, value in _place().items()) or tags.get("pid") == str(os.getpid()):
        return
    until = time.monotonic() + patience_s
    while not is_orphan(tags) and time.monotonic() < until:
        time.sleep(0.2)


@lru_cache(maxsize=1)
def git_tags() -> dict[str, str]:
    """Return ``git.commit`` and ``git.dirty`` of the code that runs (empty and "unknown" outside a repository)."""
    commit = _git("rev-parse", "HEAD")
    dirty = "unknown" if commit is None else str(bool(_git("status", "--porcelain"))).lower()
    return {"git.commit": (commit or "").strip(), "git.dirty": dirty}


def git_diff(limit: int = 1_000_000) -> str:
    """Return what the working tree changes against the commit, at most `limit` characters."""
    untracked = _git("ls-files", "--others", "--exclude-standard") or ""
    return ((_git("diff", "HEAD") or "") + "\n# untracked:\n" + untracked)[:limit]


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout

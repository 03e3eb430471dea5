"""A run's tags tell whether its process still lives."""

import socket
import subprocess
import sys
import threading

import psutil
import pytest

from octofold.track.provenance import git_tags, identity, is_orphan, outlive


def test_this_process_lives() -> None:
    assert not is_orphan(identity())


def test_a_dead_process_is_an_orphan() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    tags = identity() | {"pid": str(child.pid), "pid.started": f"{psutil.Process(child.pid).create_time():.2f}"}
    child.wait()
    assert is_orphan(tags)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"boot_id": "an earlier boot"}, True),
        ({"pid.started": "1.0"}, True),  # the number was given to another process since
        ({"pid": "999999999"}, True),
        ({"pid.space": "pid:[1]", "pid": "999999999"}, False),  # another container
        ({"host": "another-machine", "pid": "999999999"}, False),  # nobody here can know
    ],
)
def test_what_makes_an_orphan(change: dict[str, str], expected: bool) -> None:
    assert is_orphan(identity() | change) is expected


def test_runs_without_our_tags_are_left_alone() -> None:
    assert not is_orphan({})
    assert not is_orphan({"host": socket.gethostname()})


def test_git_tags_name_the_commit() -> None:
    tags = git_tags()
    assert set(tags) == {"git.commit", "git.dirty"}
    assert tags["git.dirty"] in ("true", "false", "unknown")


def test_a_process_that_is_about_to_end_is_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tags = identity() | {"pid": str(child.pid), "pid.started": f"{psutil.Process(child.pid).create_time():.2f}"}
    outlive(identity())  # ourselves: no
    outlive(tags | {"host": "another"})  # nobody whom we could see go
    outlive(tags, patience_s=0.0)
    assert not is_orphan(tags)
    reaper = threading.Thread(target=lambda: child.communicate(b"go"))
    reaper.start()
    outlive(tags, patience_s=60.0)
    assert is_orphan(tags)
    reaper.join()

"""Writing is whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octofold.errors import UserError, known, preview
from octofold.files import atomic, existing, read_json, sha256_json, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_scrap(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def write_half() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    """A real full disk: the process's own file-size limit makes the kernel refuse the bytes."""
    code = (
        "import resource, signal, sys; from octofold.files import write_text; from octofold.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_text(sys.argv[1], 'x' * 100_000)\n"
        "except UserError as error: print(error)"
    )
    path = tmp_path / "big.txt"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "free disk space" in done.stdout
    assert os.listdir(tmp_path) == []


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = write_json(tmp_path / "ü x.json", {"b": [1, None], "a": "é"})
    assert read_json(path) == {"a": "é", "b": [1, None]}
    path.write_text("{")
    with pytest.raises(UserError, match="valid JSON"):
        read_json(path)
    with pytest.raises(UserError, match="no such file"):
        existing(tmp_path / "none", "a file")


def test_hash_ignores_key_order_only() -> None:
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 2, "b": 1})


def test_known_lists_the_names() -> None:
    assert known("view", "flip", {"flip": 1}) == "flip"
    with pytest.raises(UserError, match="one of geo4, geo8"):
        known("view", "geo9", {"geo8": 1, "geo4": 2})
    assert preview(range(7), 5) == "0, 1, 2, 3, 4 and 2 more"

"""Files: where the house stands, fingerprints, and writing that is whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octofold.errors import UserError


def _find_root() -> Path:
    if home := os.environ.get("OCTOFOLD_HOME"):
        return Path(home).resolve()
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "MLproject").exists() else Path.cwd()


ROOT = _find_root()
"""The project folder: holds `mlruns/`, `data/` and `configs/`. `OCTOFOLD_HOME` moves it."""


def resolve(path: Path | str) -> Path:
    """Return `path` made absolute: as the caller wrote it if it exists, else inside the project folder.

    ``configs/x.yaml`` therefore works from any working directory.
    """
    path = Path(path).expanduser()
    if path.is_absolute() or path.exists():
        return path.absolute()
    return ROOT / path if (ROOT / path).exists() else path.absolute()


def existing(path: Path | str, what: str, fix: str = "") -> Path:
    """Return `path` resolved, or refuse: `what` names the thing looked for.

    Raises:
        UserError: nothing is there.
    """
    found = resolve(path)
    if not found.exists():
        raise UserError(found, expected=what, got="no such file or folder", fix=fix or "check the path")
    return found


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it becomes `path`, on any failure it is removed.

    A reader sees the old file or the whole new one, never half of it, whatever kills the writer.
    The suffix is kept, because writers such as pandas and matplotlib choose the format by it.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            path,
            expected="to write this file",
            got=reason,
            fix="free disk space or choose another folder; nothing was changed",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> Path:
    """Write UTF-8 text atomically and return the path."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: Path | str, value: Any) -> Path:
    """Write JSON atomically (sorted keys, readable) and return the path."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path | str, what: str = "a JSON file") -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    path = existing(path, what)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(path, expected=f"{what}, valid JSON", got=str(error)) from error


def sha256_file(path: Path | str) -> str:
    """Return the hex sha256 of a file's bytes, reading it in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the hex sha256 of a value's canonical JSON: equal values, equal hash, whatever the key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()

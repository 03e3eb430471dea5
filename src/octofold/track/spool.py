"""A queue on disk of what could not be told to the tracking server, so that an outage loses nothing.

One JSON-lines file per run; a line is appended and flushed before the caller goes on. Delivery is oldest first, and
doing it twice is harmless, because MLflow keeps one copy of a metric with the same key, step, time and value.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

Note = dict[str, Any]


class Spool:
    """Notes of one run that wait for the server, oldest first, in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return len(_parse(self.path.read_bytes()))
        return 0

    def append(self, note: Note) -> None:
        """Put a note at the end; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked("a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write((b"\n" if torn else b"") + json.dumps(note).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def deliver(self, send: Callable[[list[Note]], None]) -> int:
        """Give every note to `send` in the order they came and forget them; return how many.

        If `send` raises, all stay: the next delivery repeats them. Two processes cannot deliver at once.
        """
        try:
            opened = self._locked("r+b")
        except FileNotFoundError:
            return 0
        with opened as file:
            notes = _parse(file.read())
            if notes:
                send(notes)
            self.path.unlink()
        return len(notes)

    def _locked(self, mode: str) -> IO[bytes]:
        """Open the file and wait for its lock; anew, if it was delivered and removed while we waited."""
        while True:
            file = self.path.open(mode)
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            file.close()


def untold(notes: Sequence[Note], history: Callable[[str], Iterable[Any]], status: str) -> list[Note]:
    """Leave out what others have told of a run since these notes were written: they took it over and went on.

    Args:
        notes: of a process that is gone.
        history: of a metric's name, what the run has of it: ``step`` and ``timestamp`` (ms).
        status: of the run; what ended an ended one otherwise than FINISHED is no news.
    """
    keys = {row[0] for note in notes if note["kind"] == "metrics" for row in note["rows"]}
    there = [(key, item.step, item.timestamp) for key in keys for item in history(key)]
    latest = {(key, step): time for key, step, time in sorted(there, key=lambda item: int(item[2]))}
    found = []
    for note in notes:
        if note["kind"] == "metrics":
            rows = [row for row in note["rows"] if latest.get((row[0], row[3]), -1) < row[2]]
            found.append({**note, "rows": rows})
        elif status == "RUNNING" or note["status"] == "FINISHED" != status:
            found.append(note)
    return found


def _parse(text: bytes) -> list[Note]:
    """A line cut by a full disk or a kill was never confirmed: leave it out."""
    notes = []
    for line in text.split(b"\n"):
        with contextlib.suppress(ValueError):
            notes.append(json.loads(line))
    return notes

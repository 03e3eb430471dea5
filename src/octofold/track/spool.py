"""A queue on disk of what could not be told to the tracking server, so that an outage loses nothing.

One JSON-lines file per run; a line is appended and flushed before the caller goes on. Delivery is oldest first, and
doing it twice is harmless, because MLflow keeps one copy of a metric with the same key, step, time and value.
"""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Note = dict[str, Any]


class Spool:
    """Notes of one run that wait for the server, oldest first, in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return len(self._read()) if self.path.exists() else 0

    def append(self, note: Note) -> None:
        """Put a note at the end; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(note) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def deliver(self, send: Callable[[list[Note]], None]) -> int:
        """Give every note to `send` in the order they came and forget them; return how many.

        If `send` raises, all stay: the next delivery repeats them. Two processes cannot deliver at once.
        """
        if not self.path.exists():
            return 0
        with self.path.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            notes = _parse(file.read())
            if notes:
                send(notes)
            file.truncate(0)
            self.path.unlink(missing_ok=True)
        return len(notes)

    def _read(self) -> list[Note]:
        return _parse(self.path.read_text(encoding="utf-8"))


def _parse(text: str) -> list[Note]:
    """A line cut by a full disk or a kill is the last one, and was never confirmed: leave it out."""
    notes = []
    for line in text.splitlines():
        try:
            notes.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return notes

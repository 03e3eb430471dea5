"""The journal of decisions: append-only JSON lines, one per act of a reviewer.

Nothing is ever changed in place: an undo is an entry, a change of mind is an entry, raw labels stay raw. An entry
names its sample by `sample_id`, which is content, so decisions outlive moves, renames and new folds.
"""

import json
import math
import os
import re
import stat
import threading
import unicodedata
import uuid
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from octofold.errors import UserError

ACTIONS = ("keep", "relabel", "drop", "skip", "undo")
"""What a reviewer can do; `skip` decides nothing, `undo` takes one earlier entry back."""

_ID = re.compile(r"[A-Za-z0-9_.\-]{1,100}")
_START = b'{"sample_id"'  # of a line that `Entry.line` wrote; inside a text its quotes would be escaped
_END = 4096  # bytes of what was read that must still be there
_LONGEST = 2000  # characters of any text in an entry; a class name or a path is shorter


@dataclass(frozen=True)
class Entry:
    """One act.

    Attributes:
        sample_id: the image judged.
        action: one of `ACTIONS`.
        label: the label the reviewer saw ("" for keypoints).
        target: the new label of a relabel, else "".
        undoes: the entry an undo takes back, else "".
        after: the sample's latest entry when the reviewer looked, "" if none: how overwriting is noticed.
        reviewer, time: who, and when (ISO 8601, UTC).
        manifest_hash: of the manifest under review.
        path: where the image was then; for people, never used to find it.
        entry: a unique id, so that the same entry read twice counts once.
    """

    sample_id: str
    action: str
    label: str = ""
    target: str = ""
    undoes: str = ""
    after: str = ""
    reviewer: str = ""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    manifest_hash: str = ""
    path: str = ""
    entry: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, str) or len(value) > _LONGEST or not _is_text(value):
                raise ValueError(f"'{name}' must be text of at most {_LONGEST} characters")
        if self.action not in ACTIONS:
            raise ValueError(f"no such action: {self.action[:40]!r}; one of {', '.join(ACTIONS)}")
        for name in ("sample_id", "entry"):
            if not _ID.fullmatch(getattr(self, name)):
                raise ValueError(f"'{name}' must be an id: letters, digits, _ . -")
        if (self.action == "relabel") != bool(self.target):
            raise ValueError("a relabel, and nothing else, has a 'target'")
        if (self.action == "undo") != bool(self.undoes):
            raise ValueError("an undo, and nothing else, 'undoes' an entry")

    def line(self) -> str:
        """Return the entry as one line of JSON, empty fields left out."""
        return json.dumps({key: value for key, value in asdict(self).items() if value}, ensure_ascii=False) + "\n"


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it (a lone surrogate cannot be written)."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def parse(line: str) -> Entry:
    """Read one line of a journal.

    Raises:
        ValueError: cut short, not JSON, or not an entry; the text says which.
    """
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"cut short or not JSON ({str(error)[:80]})") from error
    if not isinstance(values, dict):
        raise ValueError("not an object")
    missing = {"sample_id", "action", "entry", "time"} - set(values)
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))}")
    # A newer version may write more fields: what we know is read, the rest is left alone.
    known = {key: value for key, value in values.items() if key in Entry.__dataclass_fields__}
    for name in ("label", "target"):  # an older one wrote class names as the disk does; manifests compose them (NFC)
        if isinstance(known.get(name), str):
            known[name] = unicodedata.normalize("NFC", known[name])
    return Entry(**known)


class Journal:
    """One journal file, shared safely by threads, tabs and processes.

    Attributes:
        path: the JSONL file; made at the first append.
        entries: every sound entry so far, in file order, each id once.
        damaged: ``(line number, what is wrong)`` of lines that are not entries. They are kept in the file.
        touched: the sample of each entry as it was read or, where the file was replaced, forgotten. It only grows, so
            whoever knows its length learns what may stand otherwise since.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._mutex = threading.RLock()
        self.touched: list[str] = []
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self.entries: list[Entry] = []
        self.damaged: list[tuple[int, str]] = []
        self._by_id: dict[str, Entry] = {}
        self._standing: dict[str, list[Entry]] = {}  # in order of time
        self._moments: dict[str, tuple[float, int]] = {}
        self._offset = 0
        self._lines = 0
        self._last = b""  # the end of what was read
        self._file = 0  # which file it was (inode)

    def _start_over(self) -> None:
        self.touched += [entry.sample_id for entry in self.entries]
        self._forget()

    def refresh(self) -> None:
        """Take in what others have appended since.

        Raises:
            UserError: the file is a folder, or cannot be read.
        """
        with self._mutex:
            try:
                status = self.path.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise UserError(self.path, expected="a journal (JSON lines)", got="something that is no file")
                with self.path.open("rb") as file:
                    if not self._goes_on(file):  # an older copy put back, two journals made one: this is the truth now
                        self._start_over()
                    self._file = os.fstat(file.fileno()).st_ino
                    file.seek(self._offset)
                    fresh = file.read()
            except FileNotFoundError:
                self._start_over()
                return
            except OSError as error:
                raise UserError(self.path, expected="a journal (JSON lines)", got=error.strerror or "") from error
            whole = fresh[: fresh.rfind(b"\n") + 1]  # the rest is a line still being written, or cut by a kill
            self._offset += len(whole)
            self._last = (self._last + whole)[-_END:]
            for line in whole.split(b"\n")[:-1]:
                self._lines += 1
                self._take(line)

    def _goes_on(self, file: IO[bytes]) -> bool:
        """Whether a file begins with what was read of it before: the same one, and the same bytes at the end of it."""
        if self._offset and os.fstat(file.fileno()).st_ino != self._file:
            return False
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) == self._last

    def _take(self, line: bytes) -> None:
        if not line.strip(b" \t\r\0"):
            return  # a blank, or the zeros some file systems leave after a power cut
        try:
            entry = parse(line.decode("utf-8").removeprefix("\ufeff"))
        except ValueError as error:  # UnicodeDecodeError is one too
            self.damaged.append((self._lines, str(error)))
            if (start := line.rfind(_START)) > 0:  # a file was put behind one whose last line had been cut
                self._take(line[start:])
            return
        known = self._by_id.get(entry.entry)
        if known is not None:
            if known != entry:
                self.damaged.append((self._lines, f"entry {entry.entry} says something else than before"))
            return
        if entry.action == "undo" and not self._undo(entry):
            self.damaged.append((self._lines, f"undoes {entry.undoes}, which does not stand here"))
            return
        self._moments[entry.entry] = self._moment(entry)
        if entry.action != "undo":
            insort(self._standing.setdefault(entry.sample_id, []), entry, key=lambda one: self._moments[one.entry])
        self._by_id[entry.entry] = entry
        self.entries.append(entry)
        self.touched.append(entry.sample_id)

    def _moment(self, entry: Entry) -> tuple[float, int]:
        """When an act was done (s) and its line: in a file made of two, a later line may be the earlier act.

        Clocks differ, so an act is never earlier than the one its reviewer saw. Where the time cannot be read, the
        line stands in for it: as late as the line before.
        """
        before = self._moments[self.entries[-1].entry][0] if self.entries else -math.inf
        seen = self._moments.get(entry.after, (-math.inf, 0))[0]
        try:
            time = datetime.fromisoformat(entry.time)
            own = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            own = before
        return max(own, seen), self._lines

    def _undo(self, undo: Entry) -> bool:
        standing = self._standing.get(undo.sample_id, [])
        kept = [entry for entry in standing if entry.entry != undo.undoes]
        self._standing[undo.sample_id] = kept
        return len(kept) < len(standing)

    def standing(self, sample_id: str) -> Entry | None:
        """The latest entry of a sample that no undo has taken back, or None."""
        found = self._standing.get(sample_id)
        return found[-1] if found else None

    def decision(self, sample_id: str) -> Entry | None:
        """As `standing`, skips left out: a skip decides nothing."""
        found = self._standing.get(sample_id, [])
        return next((entry for entry in reversed(found) if entry.action != "skip"), None)

    def decisions(self) -> dict[str, Entry]:
        """``{sample_id: decision}`` of all that have one, in order of time."""
        found = [entry for one in self._standing if (entry := self.decision(one))]
        return {entry.sample_id: entry for entry in sorted(found, key=lambda one: self._moments[one.entry])}

    def relabel_of(self, decision: Entry) -> Entry | None:
        """The relabel that a standing decision comes to: itself, or the one that a keep confirms; None for others.

        A keep confirms the latest relabel before it to the very label it saw: a manifest with that relabel replayed
        was under review. On raw labels it is the relabel that must go on to hold.
        """
        if decision.action == "relabel":
            return decision
        before = self._standing.get(decision.sample_id, []) if decision.action == "keep" else []
        before = before[: before.index(decision)] if decision in before else []
        return next((one for one in reversed(before) if one.target == decision.label != ""), None)

    def append(self, entries: Iterable[Entry]) -> tuple[list[Entry], list[tuple[Entry, Entry | None]]]:
        """Write acts at once, those first checked against what others wrote meanwhile.

        An act is refused when the sample's standing entry is no longer the one its reviewer saw (`after`), or
        when an undo's entry no longer stands. Written means on the disk (fsync). The same entry sent twice, at
        whatever time, is written once.

        Returns:
            the entries written (or already there), and the refused ones, each with what stands instead.

        Raises:
            UserError: the file cannot be written; entries not returned were not written.
        """
        written: list[Entry] = []
        refused: list[tuple[Entry, Entry | None]] = []
        with self._mutex, self._locked() as file:
            self.refresh()
            lines = []
            touched: set[str] = set()  # a second act on one sample in one call could not have seen the first
            for entry in entries:
                if (known := self._by_id.get(entry.entry)) and replace(entry, time=known.time) == known:
                    written.append(known)
                    continue
                now = self.standing(entry.sample_id)
                if entry.sample_id in touched or (now.entry if now else "") != (entry.undoes or entry.after):
                    refused.append((entry, now))
                    continue
                touched.add(entry.sample_id)
                lines.append(entry.line().encode())
                written.append(entry)
            if lines:
                self._write(file, self._mend_tail(file) + lines)
                self.refresh()
        return written, refused

    def _mend_tail(self, file: IO[bytes]) -> list[bytes]:
        """A kill may have left half a line: end it, so that it spoils no line of ours."""
        return [b"\n"] if file.seek(0, os.SEEK_END) > self._offset else []

    def _write(self, file: IO[bytes], lines: list[bytes]) -> None:
        rest = memoryview(b"".join(lines))
        try:
            while rest:  # a full disk takes a part without complaint, and refuses the next
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            self.path, expected="to append to the journal", got=error.strerror or str(error), fix="free disk space"
        )

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        import fcntl

        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = self.path.open("ab", buffering=0)
            except OSError as error:
                raise self._unwritable(error) from error
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file closes, even by a kill
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                break
            file.close()  # another file was moved here meanwhile: what is written to this one nobody would find
        with file:
            yield file


def read(path: Path | str) -> Journal:
    """Read a journal that must be there, its last line even if a kill cut the line end off.

    Raises:
        UserError: no such file, or not one that can be read, or it has lines, and none of them is an entry.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(path, expected="a journal of decisions (JSONL)", got="no such file", fix="run clean first")
    journal = Journal(path)
    with path.open("rb") as file:
        file.seek(journal._offset)
        tail = file.read()
    if tail:
        journal._lines += 1
        journal._take(tail)
    if journal.damaged and not journal.entries:
        number, what = journal.damaged[0]
        raise UserError(path, expected="a journal of decisions (JSONL)", got=f"no entry in it; line {number}: {what}")
    return journal


def in_memory(entries: Sequence[Entry]) -> Journal:
    """Return the journal that these acts, in this order, would make; nothing is written."""
    journal = Journal.__new__(Journal)
    journal.touched = []
    journal._forget()
    for number, entry in enumerate(entries, start=1):
        journal._lines = number
        journal._take(entry.line().encode())
    return journal

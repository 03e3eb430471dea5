"""The spool keeps order, loses nothing that was confirmed, and forgets only what was delivered."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from octofold.track.spool import Note, Spool, untold


def note(number: int) -> Note:
    return {"kind": "metrics", "rows": [["loss", float(number), 0, number]]}


def test_delivers_in_order_and_forgets(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a" / "run.jsonl")
    for number in range(5):
        spool.append(note(number))
    sent: list[Note] = []
    assert len(spool) == 5
    assert spool.deliver(sent.extend) == 5
    assert sent == [note(number) for number in range(5)]
    assert len(spool) == 0
    assert spool.deliver(sent.extend) == 0


def test_a_failed_delivery_keeps_everything(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run.jsonl")
    spool.append(note(1))
    with pytest.raises(ConnectionError):
        spool.deliver(_refuse)
    spool.append(note(2))
    sent: list[Note] = []
    spool.deliver(sent.extend)
    assert sent == [note(1), note(2)]


def _refuse(notes: list[Note]) -> None:
    raise ConnectionError


def test_a_line_cut_in_the_middle_is_left_out(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run.jsonl")
    spool.append(note(1))
    with spool.path.open("a") as file:
        file.write('{"kind": "metr')
    spool.append(note(2))
    spool.append(note(3))
    sent: list[Note] = []
    spool.deliver(sent.extend)
    assert sent == [note(1), note(2), note(3)]


def test_a_note_that_waited_for_a_delivery_is_not_lost(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run.jsonl")
    spool.append(note(1))
    sent: list[Note] = []
    late = threading.Thread(target=spool.append, args=[note(2)])

    def send(notes: list[Note]) -> None:
        sent.extend(notes)
        late.start()
        time.sleep(0.3)  # it has opened the file by now, and waits for the lock

    spool.deliver(send)
    late.join()
    assert spool.deliver(sent.extend) == 1
    assert sent == [note(1), note(2)]


def test_what_a_successor_has_told_since_is_not_told_again() -> None:
    """A process died with two epochs and its end unsaid; another, elsewhere, trained the second anew and finished."""

    def history(key: str) -> list[SimpleNamespace]:
        return (
            [SimpleNamespace(step=step, timestamp=time) for step, time in ((0, 100), (1, 900))] if key == "loss" else []
        )

    notes: list[Note] = [
        {"kind": "metrics", "rows": [["loss", 0.5, 110, 0], ["loss", 0.4, 120, 1], ["lr", 1e-3, 120, 1]]},
        {"kind": "end", "status": "KILLED", "time": 130},
    ]
    rows = [["loss", 0.5, 110, 0], ["lr", 1e-3, 120, 1]]
    assert untold(notes, history, "FINISHED") == [{"kind": "metrics", "rows": rows}]
    assert untold(notes, history, "RUNNING") == [{"kind": "metrics", "rows": rows}, notes[1]]
    end: list[Note] = [{"kind": "end", "status": "FINISHED", "time": 130}]
    assert untold(end, history, "KILLED") == end, "it was thought dead"
    assert untold(end, history, "FINISHED") == []

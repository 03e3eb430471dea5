"""The spool keeps order, loses nothing that was confirmed, and forgets only what was delivered."""

from pathlib import Path

import pytest

from octofold.track.spool import Note, Spool


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
    sent: list[Note] = []
    spool.deliver(sent.extend)
    assert sent == [note(1)]

"""The journal: written at once, robust to cuts, shared by many, replayed twice = once."""

import fcntl
import json
import multiprocessing
import os
import signal
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.data.journal import ACTIONS, Entry, Journal, parse, read
from octofold.data.replay import replay
from octofold.errors import UserError

CLASSES = ("apple", "kiwi", "лимон")


def table(**labels: str) -> pd.DataFrame:
    """Samples a, b, … with these labels; fold and group travel along."""
    names = list(labels)
    return pd.DataFrame(
        {"sample_id": names, "path": [f"{name}.jpg" for name in names], "label": list(labels.values())}
    ).assign(group="", fold=range(len(names)))


def labels_of(frame: pd.DataFrame) -> dict[str, str]:
    return dict(zip(frame["sample_id"], frame["label"], strict=True))


def act(sample: str, action: str = "keep", label: str = "apple", **more: str) -> Entry:
    return Entry(sample, action, label=label, **more)


def at(minute: int, sample: str, action: str = "keep", label: str = "apple", **more: str) -> Entry:
    return act(sample, action, label, time=f"2026-05-01T10:{minute:02d}:00.000+00:00", **more)


def test_every_decision_does_what_it_says() -> None:
    before = table(a="apple", b="apple", c="apple", d="apple", e="apple")
    untouched = before.copy()
    entries = [act("a"), act("b", "relabel", target="kiwi"), act("c", "drop"), act("d", "skip")]
    done = replay(entries, before, CLASSES)
    assert labels_of(done.table) == {"a": "apple", "b": "kiwi", "d": "apple", "e": "apple"}
    assert done.table["fold"].tolist() == [0, 1, 3, 4], "folds stay with their samples"
    assert dict(zip(done.report["sample_id"], done.report["outcome"], strict=True)) == {
        "a": "confirmed",
        "b": "applied",
        "c": "applied",
    }
    pd.testing.assert_frame_equal(before, untouched)


def test_an_undo_brings_back_what_stood_before() -> None:
    first = act("a", "relabel", target="kiwi")
    second = act("a", "drop", after=first.entry)
    undo = act("a", "undo", undoes=second.entry)
    assert labels_of(replay([first, second], table(a="apple"), CLASSES).table) == {}
    assert labels_of(replay([first, second, undo], table(a="apple"), CLASSES).table) == {"a": "kiwi"}
    undo_all = [first, second, undo, act("a", "undo", undoes=first.entry)]
    assert labels_of(replay(undo_all, table(a="apple"), CLASSES).table) == {"a": "apple"}


@pytest.mark.parametrize(
    ("entry", "now", "outcome", "label"),
    [
        (act("a", "relabel", target="kiwi"), "лимон", "applied", "kiwi"),  # judged the image: holds
        (act("a", "relabel", target="kiwi"), "kiwi", "already", "kiwi"),
        (act("a", "keep"), "лимон", "conflict", "лимон"),  # judged a label that is gone
        (act("a", "relabel", target="plum"), "apple", "unknown class", "apple"),
        (act("gone", "relabel", target="kiwi"), "apple", "gone", "apple"),
        (act("gone", "drop"), "apple", "already", "apple"),
    ],
)
def test_a_manifest_that_moved_on(entry: Entry, now: str, outcome: str, label: str) -> None:
    done = replay([entry], table(a=now), CLASSES)
    assert done.report["outcome"].tolist() == [outcome]
    assert labels_of(done.table)["a"] == label
    assert outcome in done.summary()


def test_a_keep_of_what_a_relabel_made_confirms_it(tmp_path: Path) -> None:
    """Raw labels know nothing of the relabel; whoever kept the new label was shown a manifest that did."""
    relabel = at(1, "a", "relabel", target="kiwi", reviewer="anna")
    keep = at(2, "a", label="kiwi", reviewer="ben")
    for name, entries in {"one": [relabel, keep], "two put together": [keep, relabel]}.items():
        (tmp_path / name).write_text("".join(entry.line() for entry in entries))
        done = replay(read(tmp_path / name), table(a="apple"), CLASSES)
        assert labels_of(done.table) == {"a": "kiwi"}
        assert done.report[["action", "outcome", "after", "reviewer"]].values.tolist() == [
            ["keep", "confirmed", "kiwi", "ben"]
        ]
        assert "relabel" in done.report["note"][0]
        assert labels_of(replay(read(tmp_path / name), done.table, CLASSES).table) == {"a": "kiwi"}


def test_class_names_that_an_older_journal_wrote_decomposed_are_known(tmp_path: Path) -> None:
    names = "caf\u00e9", "th\u00e9"
    apart = [unicodedata.normalize("NFD", name) for name in names]
    relabel, keep = at(1, "a", "relabel", label=apart[1], target=apart[0]), at(2, "b", label=apart[1])
    (tmp_path / "old").write_text(relabel.line() + keep.line())
    done = replay(read(tmp_path / "old"), table(a=names[1], b=names[1]), names)
    assert done.report["outcome"].tolist() == ["applied", "confirmed"]
    assert labels_of(done.table) == {"a": names[0], "b": names[1]}


@pytest.mark.parametrize(
    ("between", "outcome", "label"),
    [
        ([at(2, "a", "drop"), at(3, "a", "skip")], "confirmed", "kiwi"),  # the image was back when it was kept
        ([at(2, "a", "relabel", "kiwi", target="лимон")], "confirmed", "kiwi"),  # a change of mind, then back
        ([at(2, "a")], "confirmed", "kiwi"),
        ([at(2, "a", "undo", undoes="first")], "conflict", "apple"),
    ],
)
def test_a_keep_looks_for_its_relabel_among_what_stands(between: list[Entry], outcome: str, label: str) -> None:
    first = at(1, "a", "relabel", target="kiwi", entry="first")
    done = replay([first, *between, at(9, "a", label="kiwi")], table(a="apple"), CLASSES)
    assert done.report["outcome"].tolist() == [outcome]
    assert labels_of(done.table) == {"a": label}


def test_a_keep_of_the_raw_label_takes_a_relabel_back() -> None:
    done = replay([at(1, "a", "relabel", target="kiwi"), at(2, "a")], table(a="apple"), CLASSES)
    assert labels_of(done.table) == {"a": "apple"}
    confirmed = [at(1, "a", "relabel", target="plum"), at(2, "a", label="plum")]
    assert replay(confirmed, table(a="apple"), CLASSES).report["outcome"].tolist() == ["unknown class"]


def test_decisions_follow_a_re_encoded_image_and_say_so() -> None:
    done = replay([act("old", "relabel", target="kiwi")], table(new="apple"), CLASSES, same_as={"old": "new"})
    assert labels_of(done.table) == {"new": "kiwi"}
    assert "re-encoded" in done.report["note"][0]


def test_the_later_decision_wins_where_two_ids_became_one_image() -> None:
    entries = [act("old", "drop"), act("new", "keep")]
    assert labels_of(replay(entries, table(new="apple"), CLASSES, same_as={"old": "new"}).table) == {"new": "apple"}


def test_the_later_decision_wins_in_two_journals_put_together(tmp_path: Path) -> None:
    """By the clock, whichever file came first; and an undo takes back its own entry, no other."""
    one = [at(5, "a", "drop"), at(1, "b", "relabel", target="kiwi"), at(7, "c", "drop", entry="mistake")]
    one += [at(8, "c", "undo", undoes="mistake"), at(9, "d", "skip"), at(3, "old", "drop")]
    two = [at(2, "a"), at(6, "b", "relabel", target="лимон"), at(3, "c", "relabel", target="kiwi")]
    two += [at(4, "d", "drop"), at(2, "new")]
    for number, files in enumerate(((one, two), (two, one))):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(entry.line() for part in files for entry in part))
        found = read(path)
        assert found.damaged == []
        assert {name: found.decisions()[name].action for name in "abcd"} == {
            "a": "drop", "b": "relabel", "c": "relabel", "d": "drop"
        }  # fmt: skip
        standing = found.standing("a")
        assert standing is not None
        assert standing.action == "drop"
        done = replay(found, table(a="apple", b="apple", c="apple", d="apple", new="apple"), CLASSES, {"old": "new"})
        assert labels_of(done.table) == {"b": "лимон", "c": "kiwi"}, "of two ids that are one image, too"


def test_a_slow_clock_does_not_undo_a_change_of_mind(tmp_path: Path) -> None:
    """Two machines on one journal: who saw the other's act and overrode it is later, whatever the clocks say."""
    journal = Journal(tmp_path / "j.jsonl")
    first = at(30, "a", reviewer="clock runs ahead")
    second = at(10, "a", "drop", reviewer="right clock", after=first.entry)
    third = at(11, "a", "relabel", target="kiwi", after=second.entry)
    for entry in (first, second, third):
        assert journal.append([entry]) == ([entry], [])
        assert journal.standing("a") == entry
    assert journal.append([at(12, "a", "undo", undoes=third.entry)])[1] == []
    assert journal.standing("a") == second
    assert read(journal.path).decisions() == {"a": second}


@pytest.mark.parametrize("time", ["yesterday", "0001-01-01T00:00:00+23:59", "2026-05-01T10:00:00", "9999-12-31"])
def test_any_time_is_read(time: str) -> None:
    """An unreadable time: lines in their order. A time without a zone is UTC."""
    done = replay([act("a", "drop", time=time), act("a", time=time)], table(a="apple"), CLASSES)
    assert done.report["action"].tolist() == ["keep"]


def test_keypoints_have_no_label_and_can_be_dropped() -> None:
    points = pd.DataFrame({"sample_id": ["a", "b"], "nose_x": [1.0, 2.0], "nose_y": [3.0, float("nan")]})
    done = replay([act("a", "drop", label=""), act("b", label="")], points, ("nose",))
    assert done.table["sample_id"].tolist() == ["b"]
    assert done.report["outcome"].tolist() == ["applied", "confirmed"]


def test_a_table_with_every_row_dropped_keeps_its_columns() -> None:
    drops = [act("a", "drop"), act("b", "drop")]
    once = replay(drops, table(a="apple", b="kiwi"), CLASSES)
    assert len(once.table) == 0
    again = replay(drops, once.table, CLASSES)
    assert again.table.columns.tolist() == once.table.columns.tolist() == table(a="apple").columns.tolist()


samples = st.sampled_from(["a", "b", "c", "gone"])


@st.composite
def histories(draw: st.DrawFn) -> list[Entry]:
    """Any acts in any order, undos of anything included."""
    entries: list[Entry] = []
    for number in range(draw(st.integers(0, 12))):
        action = draw(st.sampled_from(ACTIONS))
        sample, target, undoes = draw(samples), "", ""
        if action == "undo":
            if not entries:
                continue
            chosen = draw(st.sampled_from(entries))
            sample, undoes = chosen.sample_id, chosen.entry
        if action == "relabel":
            target = draw(st.sampled_from([*CLASSES, "plum"]))
        entries.append(
            act(sample, action, draw(st.sampled_from(CLASSES)), target=target, undoes=undoes, entry=f"e{number}")
        )
    return entries


@given(histories())
def test_the_same_decisions_twice_are_the_same_as_once(entries: list[Entry]) -> None:
    before = table(a="apple", b="kiwi", c="лимон")
    once = replay(entries, before, CLASSES)
    pd.testing.assert_frame_equal(once.table, replay(entries + entries, before, CLASSES).table)
    pd.testing.assert_frame_equal(once.table, replay(entries, once.table, CLASSES).table)


line_breakers = st.text(max_size=40) | st.sampled_from(["\u2028", "\x85", "\n", "\r\n", '"', "\x00", "\ufeff", "</x>"])


@given(label=line_breakers, path=line_breakers, reviewer=line_breakers)
def test_an_entry_survives_its_line(label: str, path: str, reviewer: str) -> None:
    entry = act("a", label=label, path=path, reviewer=reviewer)
    line = entry.line()
    assert line.count("\n") == 1
    assert parse(line) == entry


@given(data=st.binary(max_size=300) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_read_without_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "j.jsonl"
    good = act("a", "relabel", target="kiwi")
    path.write_bytes(data + b"\n" + good.line().encode() + data)
    journal = read(path)
    assert good in journal.entries or b"\n" not in data + b"\n"
    replay(journal, table(a="apple"), CLASSES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Entry.__dataclass_fields__, "new"]), json_values | st.sampled_from(ACTIONS)))
def test_any_object_is_an_entry_or_is_refused_by_name(values: dict[str, object]) -> None:
    try:
        entry = parse(json.dumps(values))
    except ValueError:
        return
    assert all(isinstance(getattr(entry, name), str) for name in Entry.__dataclass_fields__)


def test_a_cut_at_any_byte_loses_only_the_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    entries = [act(name, "relabel", target="лимон") for name in "abc"]
    whole = "".join(entry.line() for entry in entries).encode()
    ends = {0, *(len("".join(entry.line() for entry in entries[: n + 1]).encode()) for n in range(3))}
    for length in sorted({*range(0, len(whole), 9), *(end + step for end in ends for step in (-2, -1, 0, 1))}):
        path.write_bytes(whole[:length])
        sound = sum(
            len(whole[:length]) >= len("".join(e.line() for e in entries[: n + 1]).encode()) - 1 for n in range(3)
        )
        if sound or not length:
            assert read(path).entries == entries[:sound]
        else:
            with pytest.raises(UserError, match="no entry in it; line 1: "):
                read(path)
        late = act("late", "drop")
        assert Journal(path).append([late]) == ([late], [])
        assert read(path).entries == [*entries[:sound], late], "what is written after a cut is whole"


def test_a_damaged_line_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(act("a").line() + '{"sample_id": "b", "act\n' + '{"action":"fly"}\n' + act("c").line())
    journal = read(path)
    assert [number for number, _ in journal.damaged] == [2, 3]
    assert [entry.sample_id for entry in journal.entries] == ["a", "c"]
    journal.append([act("d")])
    assert '"act\n' in path.read_text(), "append-only: even a damaged line stays"


def test_a_journal_put_behind_a_cut_one_loses_nothing(tmp_path: Path) -> None:
    """``cat a.jsonl b.jsonl``, where a kill left half a line at the end of a."""
    path = tmp_path / "j.jsonl"
    cut, tricky, last = act("b").line()[:30], act("c", "drop", path='{"sample_id": "no"}'), act("d")
    path.write_text(act("a").line() + cut + tricky.line() + cut + cut + last.line() + cut)
    journal = read(path)
    assert [entry.sample_id for entry in journal.entries] == ["a", "c", "d"]
    assert [number for number, _ in journal.damaged] == [2, 3, 4], "the halves are told of"


@pytest.mark.parametrize("text", ["image,label\n1.png,a\n2.png,b\n", '{"sample_id": "00', "{}\n"])
def test_a_file_without_any_entry_is_no_journal(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="no entry in it; line 1"):
        read(path)
    path.write_text("\n")
    assert read(path).entries == []


def test_two_reviewers_never_overwrite_each_other(tmp_path: Path) -> None:
    one, two = Journal(tmp_path / "j.jsonl"), Journal(tmp_path / "j.jsonl")
    mine = act("a", reviewer="one")
    theirs = act("a", "drop", reviewer="two")
    assert one.append([mine]) == ([mine], [])
    assert two.append([theirs]) == ([], [(theirs, mine)]), "two has not seen it: refused, and shown what stands"
    seen = act("a", "drop", reviewer="two", after=mine.entry)
    assert two.append([seen]) == ([seen], [])
    stale_undo = act("a", "undo", undoes=mine.entry)
    assert one.append([stale_undo]) == ([], [(stale_undo, seen)])
    assert one.append([mine]) == ([mine], []), "sent again after a lost answer: written once"
    assert len(read(tmp_path / "j.jsonl").entries) == 2


def test_one_call_cannot_judge_a_sample_twice(tmp_path: Path) -> None:
    first, second = act("a"), act("a", "drop")
    assert Journal(tmp_path / "j.jsonl").append([first, second]) == ([first], [(second, None)])


def _append_many(path: Path, name: str) -> None:
    journal = Journal(path)
    for number in range(60):
        journal.append([act(f"{name}{number}", reviewer=name)])


def test_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_append_many, args=(tmp_path / "j.jsonl", name)) for name in "xyz"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    journal = read(tmp_path / "j.jsonl")
    assert len(journal.entries) == 180
    assert journal.damaged == []


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        journal = Journal(path)
        for number in range(100_000):
            entry = act(f"s{number}")
            journal.append([entry])
            os.write(send, f"{entry.entry}\n".encode())
    os.close(send)
    acknowledged = os.read(receive, 33 * 20)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(receive, "rb") as rest:
        names = (acknowledged + rest.read()).decode().split("\n")[:-1]
    found = {entry.entry for entry in read(path).entries}
    assert names
    assert set(names) <= found


def test_a_journal_put_back_from_a_backup_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    first, second = act("a"), act("b")
    journal.append([first])
    backup = path.read_bytes()
    journal.append([second])
    path.write_bytes(backup)
    journal.refresh()
    assert journal.entries == [first]
    path.unlink()
    journal.refresh()
    assert journal.entries == []


@pytest.mark.parametrize("in_place", [False, True])
def test_a_journal_merged_while_it_is_open_is_read_again(tmp_path: Path, in_place: bool) -> None:
    """``cat ben.jsonl decisions.jsonl > new && mv new decisions.jsonl``: longer, and another beginning."""
    path, new = tmp_path / "j.jsonl", tmp_path / "new"
    mine, theirs = act("a"), [act("b", "drop"), act("c", "drop")]
    journal = Journal(path)
    journal.append([mine])
    merged = "".join(entry.line() for entry in [*theirs, mine])
    if in_place:
        path.write_text(merged)
    else:
        new.write_text(merged)
        new.replace(path)
    journal.refresh()
    assert (journal.entries, journal.damaged) == ([*theirs, mine], [])
    assert journal.touched[1:] == ["a", "b", "c", "a"], "all of them may stand otherwise now"
    unseen = act("b")
    assert journal.append([unseen]) == ([], [(unseen, theirs[0])])


def test_another_file_of_the_same_length_is_noticed(tmp_path: Path) -> None:
    path, new = tmp_path / "j.jsonl", tmp_path / "new"
    journal = Journal(path)
    journal.append([act(f"s{number}") for number in range(60)])
    new.write_text(path.read_text().replace('"s0"', '"t0"'))
    new.replace(path)
    journal.refresh()
    assert journal.entries[0].sample_id == "t0"


def test_what_is_written_while_the_journal_is_replaced_is_in_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, new = tmp_path / "j.jsonl", tmp_path / "new"
    journal, first, second = Journal(path), act("a"), act("b")
    journal.append([first])
    new.write_bytes(path.read_bytes())
    lock = fcntl.flock

    def slow_lock(*arguments: Any) -> None:
        lock(*arguments)
        if new.exists():
            new.replace(path)

    monkeypatch.setattr(fcntl, "flock", slow_lock)
    assert journal.append([second]) == ([second], [])
    assert read(path).entries == [first, second]


def test_refusals_say_where_and_what(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="journal"):
        Journal(tmp_path)
    journal = Journal(tmp_path / "folder" / "j.jsonl")
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(UserError, match="append to the journal"):
        journal.append([act("a")])

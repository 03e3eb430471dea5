"""Leases: commands that share a member train no slot twice, and what a silent one held is taken over."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import furnish
from octofold.errors import Handover
from octofold.track import leases, tracking
from octofold.track.leases import Lessee
from team import Team, check_shared_out, read_until

LEASE_S = 60.0


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sign(parent: str, owner: str, beat: int, **whose: Any) -> None:
    """A sign of life of a command on some host."""
    told = {"host": "elsewhere", "pid": "1", "lease_s": LEASE_S, "beat": beat, **whose}
    tracking.client().set_tag(parent, f"lease.{owner}", json.dumps(told))


@pytest.fixture
def parent(mlruns: Path) -> str:
    """A parent run whose leases are asked for."""
    return leases.sole_run("tiny", "m", {"entry": "train"})[0]


def test_there_is_one_parent_run_whoever_asks(mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, is_new = leases.sole_run("tiny", "m", {"entry": "train"})
    assert (is_new, leases.sole_run("tiny", "m", {"entry": "train"})) == (True, (first, False))
    other = tracking.client().create_run(tracking.experiment("tiny")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", other)
    assert leases.sole_run("tiny", "m", {"entry": "train", "member": "new"}) == (other, True)


def test_first_come_first_served_until_it_falls_silent(parent: str) -> None:
    clock = Clock()
    first, second = Lessee(parent, "first"), Lessee(parent, "second", clock)
    sign(parent, "first", 0)
    sign(parent, "second", 0)
    assert first.claim("f0.s0")
    assert first.claim("f0.s0")  # a worker begun again
    assert not second.claim("f0.s0")
    assert second.claim("f1.s0")
    assert second.holders(["f0.s0", "f1.s0", "f2.s0"]) == {"f0.s0": "first", "f1.s0": "second"}
    for beat in range(1, 40):  # it lives on, beyond any lease
        sign(parent, "first", beat)
        clock.now += LEASE_S / leases.BEATS
        assert not second.claim("f0.s0")
    looks = 0
    while not second.claim("f0.s0"):
        clock.now += 10 * LEASE_S  # looks far apart: an outage for all, perhaps
        looks += 1
    assert looks == leases.BEATS / 2
    second.check("f0.s0")
    with pytest.raises(Handover, match="second took it over"):
        first.check("f0.s0")


@pytest.mark.parametrize("end", ["goodbye", "gone"])
def test_who_is_known_to_be_gone_is_not_waited_for(parent: str, end: str) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    here = {name: value for name, value in tracking.identity().items() if name != "pid.started"}
    sign(parent, "first", 0, **here | {"pid": str(os.getpid() if end == "goodbye" else dead.pid)})
    assert Lessee(parent, "first").claim("f0.s0")
    if end == "goodbye":
        assert not Lessee(parent, "second").claim("f0.s0")
        tracking.client().delete_tag(parent, "lease.first")
    assert Lessee(parent, "second").claim("f0.s0")


def test_a_lessee_shows_life_and_says_goodbye(parent: str) -> None:
    with leases.lessee(parent, 0.06) as one:
        before = tracking.get_run(parent).tags[f"lease.{one.owner}"]
        while tracking.get_run(parent).tags[f"lease.{one.owner}"] == before:
            pass
    assert f"lease.{one.owner}" not in tracking.get_run(parent).tags


@given(st.dictionaries(st.sampled_from(["lease.f0.s0.", "lease.f1.s0.", "cfg."]), st.integers(1, 20)))
def test_the_newest_lease_counts(newest: dict[str, int]) -> None:
    params = {f"{key}{number}": f"{key}{number}" for key, last in newest.items() for number in range(1, last + 1)}
    last = newest.get("lease.f0.s0.", 0)
    assert leases._newest(params, "f0.s0") == (last, f"lease.f0.s0.{last}" if last else "")


CLAIM = """
import sys
from octofold.track.leases import Lessee
parent, owner, count = sys.argv[1:]
one = Lessee(parent, owner)
print(*[slot for slot in range(int(count)) if one.claim(f"f{slot}.s0")])
"""


@pytest.mark.slow
def test_processes_that_ask_at_once_share_the_slots_out(parent: str) -> None:
    owners = ["a", "b", "c"]
    for owner in owners:
        sign(parent, owner, 0)
    command = [sys.executable, "-c", CLAIM, parent]
    asking = [subprocess.Popen([*command, owner, "12"], stdout=subprocess.PIPE, text=True) for owner in owners]
    got = [one.communicate(timeout=120)[0].split() for one in asking]
    assert sorted(sum(got, [])) == sorted(map(str, range(12)))


# ---- whole commands -------------------------------------------------------------------------------------------------


def local(folder: Path, empty_store: Path) -> str:
    """A store of one file that both reach."""
    return f"sqlite:///{furnish(folder / 'store', empty_store).home / 'mlruns' / 'mlflow.db'}"


def shut(process: "subprocess.Popen[str]", database: Path) -> None:
    """Stop a command between two of its writes: in one it would hold the database's lock, which no laptop does."""
    while True:
        process.send_signal(signal.SIGSTOP)
        try:
            with contextlib.closing(sqlite3.connect(database, timeout=0.5)) as probe:
                probe.execute("BEGIN IMMEDIATE")
                return
        except sqlite3.OperationalError:
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)


@pytest.mark.slow
def test_two_machines_train_each_slot_once(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team(tmp_path, local(tmp_path, empty_store))
    both = [team.start(name, "--seeds", "0,1") for name in ("one", "two")]
    said = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(err for _, err in said)
    check_shared_out([json.loads(out.splitlines()[-1]) for out, _ in said], team.runs(monkeypatch), (0, 1))
    begun = Counter(re.findall(r"m f\d s\d epoch 0:", "".join(err for _, err in said)))
    assert sorted(begun.values()) == [1, 1, 1, 1]


@pytest.mark.slow
def test_what_a_silent_machine_held_is_taken_over_and_it_gives_way(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = Team(tmp_path, local(tmp_path, empty_store))
    silent = team.start("one", "--lease_min", "0.05")
    read_until(silent, "m f0 s0 epoch 1:")
    shut(silent, tmp_path / "store" / "mlruns" / "mlflow.db")  # as a laptop: it does not know that it is gone
    other = team.start("two", "--lease_min", "0.05")
    out, err = other.communicate(timeout=900)
    assert other.returncode == 0, err
    assert "held elsewhere: f0.s0 by" in err
    assert "f0.s0: taken over from" in err
    silent.send_signal(signal.SIGCONT)
    late, rest = silent.communicate(timeout=900)
    assert silent.returncode == 0, rest
    assert "took it over" in rest
    check_shared_out([json.loads(text.splitlines()[-1]) for text in (out, late)], team.runs(monkeypatch), (0,))
    assert not list(tmp_path.glob("*/mlruns/work/tiny/m/*"))

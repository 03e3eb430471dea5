"""Workers: every job done, in any order of deaths; errors told; nobody left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY
from octofold import compute, workers
from octofold.errors import UserError
from octofold.workers import Job

PLACES = [{"OMP_NUM_THREADS": "1", "PLACE": "a"}, {"OMP_NUM_THREADS": "1", "PLACE": "b"}]


def double(number: int) -> int:
    return 2 * number


def place() -> tuple[str, str]:
    return os.environ["PLACE"], os.environ["OMP_NUM_THREADS"]


def die_once(folder: str, number: int) -> int:
    """Be killed in the middle of the work the first time."""
    mark = Path(folder) / str(number)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(message: str) -> None:
    raise UserError(message, fix="do otherwise") if message else ZeroDivisionError("a defect")


def wait_for_the_end(folder: str) -> None:
    """Wait until stopped, and leave a mark on the way out, as training leaves a checkpoint."""
    (Path(folder) / "begun").touch()
    try:
        signal.pause()
    except KeyboardInterrupt:
        (Path(folder) / "checkpoint").touch()
        raise


def stop_when_begun(folder: str) -> None:
    """End as a training whose `stop` file was found, and count how often."""
    while not (Path(folder) / "begun").exists():
        pass
    with (Path(folder) / "stops").open("a") as file:
        file.write("x")
    raise KeyboardInterrupt


def fail_when_begun(folder: str) -> None:
    while not (Path(folder) / "begun").exists():
        pass
    fail("stop")


def run(function: object, jobs: list[Job], retries: int = 1) -> tuple[dict[str, object], list[str]]:
    done: list[str] = []
    return workers.run(function, jobs, 2, PLACES, retries, done.append), done  # type: ignore[arg-type]


@pytest.mark.slow
def test_results_come_in_the_order_of_the_jobs() -> None:
    jobs = [Job(f"job {number}", (number,)) for number in range(7)]
    results, done = run(double, jobs)
    assert list(results.items()) == [(f"job {number}", 2 * number) for number in range(7)]
    assert sorted(done) == sorted(results)


@pytest.mark.slow
def test_each_process_has_its_own_environment() -> None:
    results, _ = run(place, [Job("1"), Job("2")])
    assert set(results.values()) == {("a", "1"), ("b", "1")}
    assert "PLACE" not in os.environ


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_its_job_begun_again(tmp_path: Path) -> None:
    results, _ = run(die_once, [Job(str(number), (str(tmp_path), number)) for number in range(3)])
    assert results == {"0": 0, "1": 1, "2": 2}


@pytest.mark.slow
def test_a_job_that_always_kills_its_process_is_named() -> None:
    with pytest.raises(UserError, match=r"job bad(.|\n)*died 2 times \(signal SIGKILL\)"):
        run(die, [Job("bad")])


@pytest.mark.slow
def test_a_users_mistake_stays_one_and_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(UserError, match="no such thing"):
        run(fail, [Job("1", ("no such thing",))])
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a defect"):
        run(fail, [Job("1", ("",))])


@pytest.mark.slow
def test_when_one_fails_the_others_are_stopped_in_order(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stop"):
        workers.run(
            workers.call,
            [
                Job("long", ("test_workers", "wait_for_the_end", (str(tmp_path),))),
                Job("bad", ("test_workers", "fail_when_begun", (str(tmp_path),))),
            ],
            2,
            PLACES,
            1,
            lambda _: None,
        )
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_stops_all_and_is_not_begun_again(tmp_path: Path) -> None:
    jobs = [
        Job("long", ("test_workers", "wait_for_the_end", (str(tmp_path),))),
        Job("asked", ("test_workers", "stop_when_begun", (str(tmp_path),))),
    ]
    with pytest.raises(KeyboardInterrupt):
        run(workers.call, jobs)
    assert (tmp_path / "stops").read_text() == "x"
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("visible", "places"),
    [(None, ["0", "1", "0"]), ("5,3", ["5", "3", "5"]), ("GPU-8f, GPU-2a", ["GPU-8f", "GPU-2a", "GPU-8f"])],
)
def test_workers_share_the_gpus_the_user_lets_us_see(
    visible: str | None, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    told = [compute._environment(2, 2, place) for place in range(3)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in told] == places
    assert {one["OMP_NUM_THREADS"] for one in told} == {"2"}
    assert "CUDA_VISIBLE_DEVICES" not in compute._environment(2, 0, 0)


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "from octofold import workers; import test_workers as t\n"
        "if __name__ == '__main__':\n"
        f"    workers.run(t.wait_for_the_end, [workers.Job('1', ({str(tmp_path)!r},))], 1, t.PLACES, 0, print)"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.PIPE)
    while not (tmp_path / "begun").exists():
        assert parent.poll() is None
    parent.kill()
    assert parent.stderr is not None
    parent.stderr.read()  # ends when the last process that inherited it has ended
    parent.wait()
    parent.stderr.close()
    assert (tmp_path / "checkpoint").exists()

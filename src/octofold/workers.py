"""Workers: the processes of one machine that do jobs side by side, and are replaced when they are killed.

A job is a key and a few plain arguments; what it returns is small (ids, numbers, paths), never arrays. Every job must
bear being done again: it finds its MLflow run by tags and goes on, because the process that did it first may be gone.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from octofold.errors import UserError, blank_logs

log = logging.getLogger("octofold")
_SPAWN = multiprocessing.get_context("spawn")  # fork would share torch's threads and MLflow's connections


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        key: its name, the same whenever it is done again.
        arguments: what the function gets; plain values that pickle.
    """

    key: str
    arguments: tuple[Any, ...] = ()


@dataclass
class _Worker:
    process: Any
    connection: Connection
    place: int
    job: Job | None = None


def run(
    function: Callable[..., Any],
    jobs: Sequence[Job],
    count: int,
    environments: Sequence[Mapping[str, str]],
    retries: int,
    report: Callable[[str], Any],
) -> dict[str, Any]:
    """Do every job in one of `count` processes; return the results by key.

    Args:
        function: a module's function, called with a job's arguments.
        jobs: what to do, keys unique.
        count: processes at once.
        environments: variables of each process, set before it imports anything (threads, its GPU).
        retries: how often a job is begun again after its process was killed.
        report: told each key as it is done.

    Raises:
        UserError: a job's own, or its process died `retries` + 1 times. The others are stopped as by Ctrl-C.
        RuntimeError: a job failed otherwise; the text holds its traceback.
        KeyboardInterrupt: a job was asked to stop, by a file or a signal to its process; so are the others.
    """
    waiting, died = deque(jobs), Counter[str]()
    results: dict[str, Any] = {}
    crew: dict[int, _Worker] = {}
    try:
        while len(results) < len(jobs):
            for place in range(count):
                if waiting and (place not in crew or crew[place].job is None):
                    worker = crew.get(place) or _start(place, environments[place])
                    crew[place] = worker
                    _give(worker, function, waiting.popleft())
            busy = {worker.connection: worker for worker in crew.values() if worker.job is not None}
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]
                job, worker.job = worker.job, None
                assert job is not None
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):
                    del crew[worker.place]
                    worker.process.join()
                    died[job.key] += 1
                    _mourn(job, worker.process.exitcode, died[job.key], retries)
                    waiting.appendleft(job)
                    continue
                if kind == "stopped":
                    raise KeyboardInterrupt
                if kind != "done":
                    raise value if isinstance(value, UserError) else RuntimeError(f"job {job.key} failed:\n{value}")
                results[job.key] = value
                report(job.key)
    finally:
        _dismiss(crew.values())
    return {job.key: results[job.key] for job in jobs}


def _mourn(job: Job, code: int | None, times: int, retries: int) -> None:
    why = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
    if times > retries:
        raise UserError(
            f"job {job.key}",
            expected="to be finished",
            got=f"its process died {times} times ({why})",
            fix="if memory ran out, use fewer --workers; the same command goes on from here",
        )
    log.warning("the process of job %s died (%s); beginning it again", job.key, why)


def _start(place: int, environment: Mapping[str, str]) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs,), name=f"octofold-{place}", daemon=False)
    with _environ(environment):
        process.start()
    theirs.close()  # so that its end reads as closed when the process dies
    return _Worker(process, ours, place)


def _give(worker: _Worker, function: Callable[..., Any], job: Job) -> None:
    worker.job = job
    with contextlib.suppress(OSError):  # it died meanwhile: reading from it will tell
        worker.connection.send((function.__module__, function.__qualname__, job.arguments))


def _dismiss(crew: Any) -> None:
    """Stop the processes: the idle by closing their door, the busy as by Ctrl-C, so that they write a checkpoint."""
    crew = list(crew)
    for worker in crew:
        worker.connection.close()
        if worker.job is not None:
            worker.process.terminate()
    for worker in crew:
        worker.process.join(timeout=60)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


@contextlib.contextmanager
def _environ(extra: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _serve(connection: Connection) -> None:
    """Body of a worker process: take jobs until the door closes."""
    os.dup2(2, 1)  # stdout belongs to the parent's last line
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, who stops us in order
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            module, name, arguments = connection.recv()
            connection.send(_outcome(module, name, arguments))


def _outcome(module: str, name: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "done", call(module, name, arguments)
    except UserError as error:
        return "error", error
    except KeyboardInterrupt:  # by its `stop` file, or by us, who then no longer listen
        return "stopped", None
    except Exception:
        return "error", traceback.format_exc()


def call(module: str, name: str, arguments: tuple[Any, ...], environment: Mapping[str, str] | None = None) -> Any:
    """Import a function by name, in this environment, and call it."""
    os.environ.update(environment or {})
    blank_logs()
    return getattr(importlib.import_module(module), name)(*arguments)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _die_with_parent() -> None:
    """A worker whose parent was killed would train on unseen: stop it in order."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

"""Leases: which command may train a slot, agreed through the tracking store alone.

A lease is a param of the member's parent run, ``lease.<slot>.<n>`` = its owner, because MLflow never lets a param
change: of two who write it, one is refused, and both read the same name afterwards. The owner, a command, keeps
rewriting one tag as a sign of life. Nobody compares clocks: a lease is over when its owner said goodbye, when the
owner's process is known to be gone (same host), or when the sign stood still for as long as the owner said, watched.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from octofold.errors import Handover
from octofold.track.outage import error_code, is_outage, patiently
from octofold.track.provenance import identity, is_orphan
from octofold.track.store import adopt, lock_file, locked, uri
from octofold.track.tracking import client, experiment, find_runs, get_run

log = logging.getLogger("octofold")
BEATS = 6  # signs of life in the time of a lease
SETTLE_S = 2.0
"""How long a new parent run waits for others made at the same moment on other machines, seconds."""


# ---- one parent run -------------------------------------------------------------------------------------------------


def sole_run(competition: str, name: str, tags: Mapping[str, str]) -> tuple[str, bool]:
    """Return the id of the one run with these tags, and whether it was made now; all who ask at once get the same one.

    On one machine a file lock sees to it. Between machines a new run waits for a moment, and of several the one that
    leases already refer to is kept, else the eldest.
    """
    client()  # before the lock: the first call takes it too
    with locked(lock_file(uri())):
        if found := find_runs(competition, tags):
            return found[0].id, False
        labels = {"competition": competition, **tags}
        adopted = adopt()
        if adopted:
            for key, value in labels.items():
                client().set_tag(adopted, key, value)
        mine = adopted or client().create_run(experiment(competition), tags=labels, run_name=name).info.run_id
        if uri().startswith("sqlite"):
            return mine, True
        time.sleep(SETTLE_S)
        found = find_runs(competition, tags)
    first = min(found, key=lambda run: (not any(map(_LEASE.match, run.params)), run.start_time, run.id))
    if first.id == mine:
        return mine, True
    if adopted:
        client().set_tag(mine, "entry", "train.joined")
    else:
        client().delete_run(mine)
    return first.id, False


# ---- leases ---------------------------------------------------------------------------------------------------------

_LEASE = re.compile(r"lease\.(?P<slot>.+)\.(?P<number>\d+)$")


class Lessee:
    """A command that may hold leases of a parent run's slots.

    Args:
        parent_id: the member's parent run.
        owner: the command's name; the processes that work for it use the same.
        clock: seconds that only go forward.
    """

    def __init__(self, parent_id: str, owner: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.parent_id, self.owner, self._clock = parent_id, owner, clock
        self._seen: dict[str, tuple[str, float, float]] = {}  # owner: sign, when looked at, silent for (seconds)
        self._asked_at = clock()

    def claim(self, slot: str) -> bool:
        """Take the lease of a slot unless somebody living has it; tell whether it is ours."""
        now = patiently(lambda: get_run(self.parent_id))
        number, owner = _newest(now.params, slot)
        if owner == self.owner:
            return True
        if owner and self._lives(owner, now.tags):
            return False
        wanted = number + 1, self.owner
        try:
            patiently(lambda: client().log_param(self.parent_id, f"lease.{slot}.{wanted[0]}", self.owner))
        except Exception as error:  # somebody was first: reading it again tells
            if not error_code(error):
                raise
        won = _newest(patiently(lambda: get_run(self.parent_id)).params, slot) == wanted
        if won and owner:
            log.info("%s: taken over from %s", slot, owner)
        return won

    def check(self, slot: str, at_once: bool = True) -> None:
        """See that a lease is still ours.

        Args:
            at_once: else only where it has not been asked for a while, and where the store is there.

        Raises:
            Handover: another command has it; it saw no sign of life of ours.
        """
        if not at_once and self._clock() - self._asked_at < 30:
            return
        self._asked_at = self._clock()
        try:
            run = patiently(lambda: get_run(self.parent_id)) if at_once else get_run(self.parent_id)
        except Exception as error:
            if at_once or not is_outage(error):
                raise
            return
        if (owner := _newest(run.params, slot)[1]) != self.owner:
            raise Handover(f"{slot}: {owner} took it over, having seen no sign of life of ours; leaving it to them")

    def holders(self, slots: Sequence[str]) -> dict[str, str]:
        """Return who holds each slot that has a lease."""
        params = patiently(lambda: get_run(self.parent_id)).params
        return {slot: owner for slot in slots if (owner := _newest(params, slot)[1])}

    def _lives(self, owner: str, tags: Mapping[str, str]) -> bool:
        sign = tags.get(f"lease.{owner}")
        if sign is None:  # it said goodbye
            return False
        told = json.loads(sign)
        if is_orphan(told):
            return False
        now, lease_s = self._clock(), float(told["lease_s"])
        before, at, silent = self._seen.get(owner, ("", now, 0.0))
        # A long gap between two looks may have been an outage for both of us: it counts as two missed signs.
        silent = silent + min(now - at, 2 * lease_s / BEATS) if sign == before else 0.0
        self._seen[owner] = (sign, now, silent)
        return silent < lease_s


def _newest(params: Mapping[str, str], slot: str) -> tuple[int, str]:
    """The number of a slot's newest lease and its owner; 0 and '' where there was none."""
    found = [(int(match["number"]), value) for key, value in params.items()
             if (match := _LEASE.match(key)) and match["slot"] == slot]  # fmt: skip
    return max(found, default=(0, ""))


@contextlib.contextmanager
def lessee(parent_id: str, lease_s: float) -> Iterator[Lessee]:
    """Be somebody who holds leases, and show it by a sign of life until the end.

    Args:
        parent_id: the member's parent run.
        lease_s: how long others wait for a sign before they take over, seconds.
    """
    host = re.sub(r"[^\w.-]", "-", socket.gethostname())
    one = Lessee(parent_id, f"{host}-{os.getpid()}-{secrets.token_hex(3)}")
    rung = threading.Event()
    whose = {**identity(), "lease_s": lease_s}
    patiently(lambda: _sign(one, json.dumps(whose | {"beat": 0})))
    thread = threading.Thread(target=_beat, args=(one, whose, lease_s / BEATS, rung), daemon=True)
    thread.start()
    try:
        yield one
    finally:
        rung.set()
        thread.join()
        with contextlib.suppress(Exception):  # away just now: it will be noticed by its silence
            client().delete_tag(parent_id, f"lease.{one.owner}")


def _beat(one: Lessee, whose: Mapping[str, object], every_s: float, rung: threading.Event) -> None:
    beat = 0
    while not rung.wait(every_s):
        beat += 1
        try:
            _sign(one, json.dumps({**whose, "beat": beat}))
        except Exception as error:  # whatever it is, the training goes on, and others notice the silence
            log.debug("no sign of life this time: %s", error)


def _sign(one: Lessee, text: str) -> None:
    client().set_tag(one.parent_id, f"lease.{one.owner}", text)

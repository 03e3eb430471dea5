"""A tracking server that went away: telling it from a server that says no, and waiting for it."""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from octofold.errors import UserError, redact
from octofold.track.store import uri

log = logging.getLogger("octofold")
T = TypeVar("T")

OUTAGE_S = float(os.environ.get("OCTOFOLD_OUTAGE_S", "900"))
"""How long an upload waits for a server that went away in mid-run, seconds."""
PAUSE_S = 2.0
"""Between two tries, seconds."""


def is_outage(error: BaseException) -> bool:
    """Tell whether an error means "the server is away for now" rather than "the server says no"."""
    import requests

    text = str(error)
    if isinstance(error, (requests.ConnectionError, requests.Timeout, ConnectionError, TimeoutError)):
        return True
    away = r"Max retries exceeded|Connection (refused|reset|aborted)|RemoteDisconnected|database is locked"
    away += r"|error code 50[234]|50[234] (Server Error|Bad Gateway|Service)|OperationalError|server closed the conn"
    return bool(re.search(away, text)) or (error.__cause__ is not None and is_outage(error.__cause__))


def patiently(act: Callable[[], T]) -> T:
    """Do `act`; while the server is away, wait for it (up to `OUTAGE_S`) and do it again. `act` must bear repeating.

    Raises:
        UserError: still away after `OUTAGE_S`; what is on disk stays, and the same command goes on from there.
    """
    until = time.monotonic() + OUTAGE_S
    warned = False
    while True:
        try:
            return act()
        except Exception as error:  # anything but an outage goes straight on to the caller
            if not is_outage(error):
                raise
            if time.monotonic() > until:
                raise UserError(
                    f"MLFLOW_TRACKING_URI={redact(uri())}",
                    expected="the tracking server to come back",
                    got=f"no answer for {OUTAGE_S:.0f} s",
                    fix="start the server and run the same command again: it goes on from here",
                ) from error
            if not warned:
                log.warning("the tracking server is away; waiting for it (%s)", redact(str(error))[:120])
            warned = True
            time.sleep(PAUSE_S)


def beside_others(act: Callable[[], T], tries: int = 5) -> T:
    """Do `act` patiently, and again if it is refused: where MLflow looks and then inserts, two may both have looked."""
    for _ in range(tries - 1):
        try:
            return patiently(act)
        except Exception as error:
            if not error_code(error):
                raise
            log.debug("refused, once more: %s", error)
    return patiently(act)


@contextlib.contextmanager
def explained(store: str) -> Iterator[None]:
    """Turn whatever the first contact with the store raises (refused, no store) into the user's words.

    Raises:
        UserError: anything went wrong.
    """
    try:
        yield
    except Exception as error:
        fix = "check the address, user and password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"
        if "out-of-date database schema" in str(error):
            fix = f"back the database up, then: mlflow db upgrade {redact(store)}"
        if "database is locked" in str(error):
            fix = "another process holds the database: wait for it, or end it, and run the same command again"
        got = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"MLFLOW_TRACKING_URI={redact(store)}", expected="an MLflow store", got=got, fix=fix) from error


def error_code(error: BaseException) -> str:
    """Return the code MLflow gives with a refusal, such as ``RESOURCE_DOES_NOT_EXIST``, or an empty text."""
    return str(getattr(error, "error_code", "") or "")

"""Where the tracking store is: its URI, its lock, the folder of its artifacts, and whether anybody answers there."""

import contextlib
import fcntl
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from octofold.config import environment, log
from octofold.errors import UserError, redact
from octofold.files import ROOT

_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}


def uri() -> str:
    """Return the tracking store's URI: ``MLFLOW_TRACKING_URI``, or sqlite in the project's ``mlruns/``."""
    environment()
    given = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{ROOT / 'mlruns' / 'mlflow.db'}"
    path = given.removeprefix("sqlite:///")
    if path != given and not path.startswith("/") and not Path(path).exists():
        return f"sqlite:///{ROOT / path}"  # relative: here if it is here, else in the project folder
    return given


def adopt() -> str | None:
    """Take over the run that `mlflow run` opened for this process, if it did: its id, once.

    Called from another folder and told nothing, MLflow opens its default store there and not in `mlruns/`: said.
    """
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    own = (ROOT / "mlruns" / "mlflow.db").resolve()
    if run_id and uri().startswith("sqlite:") and database(uri()).name == own.name and database(uri()) != own:
        log.warning(
            "this run is kept in %s, mlflow's default in the folder you called it from, and 'make ui' will not show it;"
            " call mlflow from the project's folder, or set MLFLOW_TRACKING_URI=sqlite:///%s",
            database(uri()),
            own,
        )
    return run_id


def database(store: str) -> Path:
    """Return the sqlite file behind a URI, symlinks followed."""
    return Path(store.split(":///", 1)[1].split("?")[0]).absolute().resolve()


def lock_file(store: str) -> Path:
    """Return the file whose lock lets one process at a time make the store's tables."""
    if store.startswith("sqlite"):
        return database(store).with_suffix(".lock")
    name = re.sub(r"\W+", "-", urlsplit(store).netloc.rsplit("@", 1)[-1])
    return Path(tempfile.gettempdir()) / f"octofold-{os.getuid()}-{name}.lock"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel lets go of it when the process dies."""
    try:
        file = path.open("a")
    except OSError as error:
        raise UserError(path, expected="to write here", got=error.strerror or str(error)) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_reachable(store: str) -> None:
    """Knock once: a name that is wrong or a server that is down is told at once, not after MLflow's retries."""
    address = urlsplit(store)
    if not address.hostname:
        return
    try:
        port = address.port or _PORTS.get(address.scheme.split("+")[0], 443)
    except ValueError:  # its text shows what it took for a port
        raise UserError(
            f"MLFLOW_TRACKING_URI={redact(store)}",
            expected="scheme://user@host:port/…",
            got="a port that is no number",
            fix="in a password write / as %2F, @ as %40, : as %3A",
        ) from None
    try:
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"MLFLOW_TRACKING_URI={redact(store)}",
            expected="a tracking server that answers",
            got=error.strerror or str(error) or type(error).__name__,
            fix="start the server, or unset MLFLOW_TRACKING_URI to use mlruns/mlflow.db",
        ) from None
    if not address.scheme.startswith("http"):
        _sign_in(store)


def _sign_in(store: str) -> None:
    """Try the database once: MLflow repeats a refused password for two minutes, and shows every refusal."""
    import sqlalchemy

    try:
        sqlalchemy.create_engine(store, poolclass=sqlalchemy.pool.NullPool).connect().close()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        lacks = isinstance(error, ImportError)
        raise UserError(
            f"MLFLOW_TRACKING_URI={redact(store)}",
            expected="a database that lets us in",
            got=str(error).strip().splitlines()[0][:300],
            fix="pip install 'octofold[postgres]'" if lacks else "check user, password and database name",
        ) from None


def artifact_root(store: str, name: str = "") -> str | None:
    """Return where a new experiment keeps its artifacts: beside a local database, or where the server says (None)."""
    if store.startswith("http") or "databricks" in store:
        return None
    folder = ROOT / "mlruns"
    if store.startswith("sqlite"):
        folder = database(store).parent
        folder = folder if folder.name == "mlruns" else folder / "mlruns"
    return (folder / "artifacts" / name).as_uri()


def quoted(text: str) -> str:
    """Return a value as MLflow's filters want it.

    Raises:
        UserError: it holds both kinds of quotes, for which MLflow's filters have no spelling.
    """
    if "'" in text and '"' in text:
        raise UserError(repr(text), expected="a name without quotes", got="both ' and \"")
    return f'"{text}"' if "'" in text else f"'{text}'"


def pages(page: Callable[[str | None], Any]) -> list[Any]:
    """Return every item of an MLflow listing that comes in pages; `page` takes the token of the next one."""
    found: list[Any] = []
    token = None
    while True:
        got = page(token)
        found += got
        token = got.token
        if not token:
            return found

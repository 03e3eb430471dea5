"""Storage: `mlruns/` moved to another folder or machine works again, and what nothing refers to can be removed.

MLflow writes absolute paths into its database. `relocate` rewrites them, and only them, in one transaction.
"""

import contextlib
import logging
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from octofold.errors import UserError, preview
from octofold.track import registry, tracking, versions
from octofold.track.store import database, lock_file, locked, pages, uri

log = logging.getLogger("octofold")
HOUSEKEEPING = "housekeeping"
"""The experiment in which `relocate` and `gc`, which belong to no competition, say what they did."""
_ALL = 3  # MLflow's ViewType.ALL: active and deleted

_COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
}
"""Where MLflow keeps the place of artifacts. Params, tags and dataset sources are history: they stay as they were."""


@dataclass(frozen=True)
class Rubbish:
    """Something nothing refers to: a folder, or a run deleted in MLflow."""

    path: Path
    why: str
    bytes: int
    run_id: str = ""


# ---- relocate -------------------------------------------------------------------------------------------------------


def relocate(old: str = "", dry: bool = False) -> dict[str, int]:
    """Make the sqlite store of this project point at the folder it stands in now.

    Args:
        old: where ``mlruns`` stood; empty = found out from the store itself.
        dry: only count.

    Returns:
        Changed values by ``table.column``.

    Raises:
        UserError: the store is a server's, `old` is in it nowhere, or several old places are.
    """
    if not uri().startswith("sqlite"):
        raise UserError(
            "relocate",
            expected="a local sqlite store",
            got="a server",
            fix="artifacts behind a server are addressed through it: nothing needs to be rewritten",
        )
    file = database(uri())
    if not file.exists():
        raise UserError(file, expected="the store that was moved here", got="no such file")
    here = _home(file)
    with locked(lock_file(uri())), closing(sqlite3.connect(file, timeout=60)) as base:
        before = _as_folder(old) if old else _old_place(base, here)
        if before is None or before == here:
            return {}
        changed = {}
        with base:  # one transaction: all or nothing
            for table, column in _present(base):
                count = 0
                for was, new in ((before.as_uri(), here.as_uri()), (str(before), str(here))):
                    rows = f"{column} = ? OR substr({column}, 1, ?) = ?"
                    where = (was, len(was) + 1, was + "/")
                    count += int(base.execute(f"SELECT count(*) FROM {table} WHERE {rows}", where).fetchone()[0])
                    if not dry:
                        update = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {rows}"
                        base.execute(update, (new, len(was) + 1, *where))
                if count:
                    changed[f"{table}.{column}"] = count
        done = _is_all_here(base, here)
    if old and not changed and not done:
        raise UserError(
            f"--old {old}", expected="the folder mlruns stood in before", got="nothing in the store is there"
        )
    return changed


def _home(file: Path) -> Path:
    """The `mlruns` folder in which a sqlite store keeps its artifacts (see `store.artifact_root`)."""
    return file.parent if file.parent.name == "mlruns" else file.parent / "mlruns"


def _as_folder(text: str) -> Path:
    path = Path(unquote(urlsplit(text).path) if text.startswith("file:") else text).expanduser().absolute()
    return path if path.name == "mlruns" else path / "mlruns"


def _present(base: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    for table, columns in _COLUMNS.items():
        have = {row[1] for row in base.execute(f"PRAGMA table_info({table})")}
        yield from ((table, column) for column in columns if column in have)


def _is_all_here(base: sqlite3.Connection, here: Path) -> bool:
    """Whether there are runs, and all keep their artifacts in `here`: the store was relocated before."""
    found = [str(row[0]) for row in base.execute("SELECT artifact_uri FROM runs")]
    return bool(found) and all(place.startswith((f"{here.as_uri()}/", f"{here}/")) for place in found)


def _old_place(base: sqlite3.Connection, here: Path) -> Path | None:
    """The one `mlruns` folder, other than `here`, that runs keep artifacts in."""
    found = set()
    for (location,) in base.execute("SELECT DISTINCT artifact_uri FROM runs"):
        path = Path(unquote(urlsplit(location or "").path)) if (location or "").startswith(("file:", "/")) else None
        while path is not None and path != path.parent and path.name != "mlruns":
            path = path.parent
        if path is not None and path.name == "mlruns" and path != here:
            found.add(path)
    if len(found) > 1:
        raise UserError(
            "relocate", expected="one folder that mlruns stood in", got=preview(sorted(found)), fix="name it by --old"
        )
    return found.pop() if found else None


# ---- gc -------------------------------------------------------------------------------------------------------------


def rubbish(work_days: float = 7.0) -> list[Rubbish]:
    """List what nothing refers to, biggest first; nothing is removed.

    Runs deleted in MLflow that no registered version comes from, if their artifacts are in ``mlruns/``; artifact
    folders of this store's experiments whose run it does not know; downloaded models that no version has; unfinished
    trainings untouched for `work_days` days.
    """
    if not uri().startswith("sqlite"):
        raise UserError(
            "gc", expected="a local sqlite store", got="a server", fix="run `mlflow gc` where the server runs"
        )
    api, mlruns = tracking.client(), _home(database(uri()))
    # Folders before runs and versions, or what is begun meanwhile looks unknown.
    folders = [folder for folder in sorted(mlruns.glob("artifacts/*/*")) if folder.is_dir() and len(folder.name) == 32]
    cached = sorted(mlruns.glob("cache/*"))
    listed = pages(lambda token: api.search_experiments(view_type=_ALL, page_token=token))
    ids = [experiment.experiment_id for experiment in listed]
    runs = pages(lambda token: api.search_runs(ids, run_view_type=_ALL, max_results=1000, page_token=token))
    kept = versions.versions_of([model.name for model in versions.registered_models("")])
    needed, shas = {version.run_id for version in kept}, {registry.kept_as(version) for version in kept}
    found = [
        Rubbish(folder, "run deleted in MLflow", _size(folder), run.info.run_id)
        for run in runs
        if run.info.lifecycle_stage == "deleted" and run.info.run_id not in needed
        for folder in [_local(run.info.artifact_uri)]
        if folder.is_relative_to(mlruns)
    ]
    known = {run.info.run_id for run in runs} | _runs_beside(mlruns)
    ours = {item.artifact_location for item in listed}
    for folder in folders:
        if folder.name not in known and folder.parent.as_uri() in ours:
            found.append(Rubbish(folder, "artifacts of a run that is not in the store", _size(folder)))
    for folder in cached:
        if folder.name not in shas:
            found.append(Rubbish(folder, "downloaded model of no version", _size(folder)))
    return sorted([*found, *_stale(mlruns / "work", work_days)], key=lambda item: -item.bytes)


def _runs_beside(mlruns: Path) -> set[str]:
    """Runs of every sqlite store that keeps its artifacts in this `mlruns` (see `_home`)."""
    found: set[str] = set()
    for file in {*mlruns.glob("*.db"), *mlruns.parent.glob("*.db")}:
        with contextlib.suppress(sqlite3.DatabaseError), closing(sqlite3.connect(file, timeout=60)) as base:
            found |= {row[0] for row in base.execute("SELECT run_uuid FROM runs")}
    return found


def _stale(work: Path, days: float) -> Iterator[Rubbish]:
    for folder in sorted(work.glob("*/*/*")):
        files = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        if folder.is_dir() and time.time() - max(files, default=folder.stat().st_mtime) > days * 86400:
            yield Rubbish(folder, f"unfinished training, untouched for {days:g} days", _size(folder))


def remove(items: Sequence[Rubbish]) -> int:
    """Remove rubbish: folders, and deleted runs, rows and all; return the bytes freed.

    ``mlflow gc --run-ids`` would also purge every deleted experiment, with runs that registered versions come from.
    """
    api = tracking.client()
    freed = 0
    for item in items:
        if item.run_id:
            if api.get_run(item.run_id).info.lifecycle_stage != "deleted":
                log.info("left %s: its run was restored meanwhile", item.path)
                continue
            api._tracking_client.store._hard_delete_run(item.run_id)
        shutil.rmtree(item.path, ignore_errors=True)
        freed += item.bytes
        log.info("removed %s (%s)", item.path, item.why)
    return freed


def _local(address: str) -> Path:
    """The run's own folder behind its artifact URI; a path that is not there for remote ones."""
    path = Path(unquote(urlsplit(address).path))
    return path.parent if path.name == "artifacts" else path


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

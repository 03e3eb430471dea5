"""Tracking: runs, metrics and artifacts. The only file (with served.py) that says `mlflow`.

The store is sqlite under ``mlruns/`` unless ``MLFLOW_TRACKING_URI`` names a server; nothing else changes.
Runs are kept by id, never as MLflow's global "active run", so threads, nested runs and retried jobs cannot mix.
"""

import contextlib
import json
import logging
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from octofold.config import Section, dump, flatten
from octofold.errors import Handover, UserError, redact
from octofold.files import ROOT
from octofold.track.outage import PAUSE_S, beside_others, explained, is_outage, patiently
from octofold.track.provenance import git_diff, git_tags, identity, is_orphan
from octofold.track.spool import Note, Spool, untold
from octofold.track.store import adopt, artifact_root, check_reachable, database, lock_file, locked, pages, quoted, uri

log = logging.getLogger("octofold")
_MOVED = "was it deleted, or mlruns/ moved? `relocate` mends a moved folder"
_SPOOL = ROOT / "mlruns" / "spool"
# MLflow's defaults wait four minutes for a server that is not there; during training the spool waits instead.
_SETTINGS = {"HTTP_REQUEST_MAX_RETRIES": "2", "HTTP_REQUEST_BACKOFF_FACTOR": "1", "HTTP_REQUEST_TIMEOUT": "60"}
_SETTINGS["SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout is for the result


def client() -> Any:
    """Return the `MlflowClient` of the store, checked and made ready on first use.

    Raises:
        UserError: the server is not there, refuses us, or its database is of another MLflow.
    """
    return _client(uri())


@lru_cache(maxsize=4)
def _client(store: str) -> Any:
    if (scheme := urlsplit(store).scheme.split("+")[0]) in ("", "file"):
        expected = "sqlite:///…, postgresql://… or http(s)://… (MLflow has given up its file store)"
        raise UserError(f"MLFLOW_TRACKING_URI={store}", expected=expected, fix="unset it to use mlruns/mlflow.db")
    if scheme == "sqlite":
        database(store).parent.mkdir(parents=True, exist_ok=True)
    else:
        check_reachable(store)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(f"MLFLOW_{name}", value)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # MLflow's own, against SQLAlchemy
        return _connect(store, scheme)


def _connect(store: str, scheme: str) -> Any:
    import mlflow

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(store)
    # Two processes that both find an empty database both build it, and leave it broken for good: one at a time.
    with locked(lock_file(store)), explained(store):
        if scheme == "sqlite" and not database(store).exists():
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            SqlAlchemyStore(store, artifact_root(store))  # type: ignore[no-untyped-call]  # else Default's are in the cwd
        made = mlflow.MlflowClient(tracking_uri=store)
        made.search_experiments(max_results=1)
    return made


def experiment(name: str) -> str:
    """Return the id of the experiment `name`, made if missing; artifacts of a local store go under its ``mlruns/``.

    Raises:
        UserError: the experiment was deleted in MLflow and not yet restored or removed.
    """
    from mlflow.exceptions import MlflowException

    store, api = uri(), client()
    found = api.get_experiment_by_name(name)
    if found is None:
        try:
            return str(api.create_experiment(name, artifact_location=artifact_root(store, name)))
        except MlflowException as error:
            if (found := api.get_experiment_by_name(name)) is None:  # nobody else made it just now
                raise UserError(f"experiment '{name}'", got=redact(str(error))) from error
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment '{name}'", got="deleted in MLflow", fix=f"mlflow experiments restore -x {found.experiment_id}"
        )
    return str(found.experiment_id)


@dataclass(frozen=True)
class RunInfo:
    """What the store knows of a run."""

    id: str
    status: str
    name: str
    tags: dict[str, str] = field(repr=False)
    params: dict[str, str] = field(repr=False)
    metrics: dict[str, float] = field(repr=False)
    artifact_uri: str = ""
    start_time: int = 0


def find_runs(
    competition: str,
    tags: Mapping[str, str] | None = None,
    statuses: Sequence[str] = ("RUNNING", "FINISHED", "FAILED", "KILLED", "SCHEDULED"),
) -> list[RunInfo]:
    """Return the competition's runs that carry these tags, newest first, in whatever experiment they are.

    ``mlflow run`` puts a run in the experiment it was told, so the tag `competition` counts, not the experiment.
    """
    api = client()
    clauses = [f"tags.`{key}` = {quoted(value)}" for key, value in {"competition": competition, **(tags or {})}.items()]
    if len(statuses) == 1:
        clauses.append(f"attributes.status = '{statuses[0]}'")
    ids = [item.experiment_id for item in pages(lambda token: api.search_experiments(page_token=token))]
    found = pages(
        lambda token: api.search_runs(
            ids, " and ".join(clauses), max_results=1000, order_by=["attributes.start_time DESC"], page_token=token
        )
    )
    return [_info(run) for run in found if run.info.status in statuses]


def get_run(run_id: str) -> RunInfo:
    """Return what the store knows of a run; a UserError if it has no such run."""
    from mlflow.exceptions import MlflowException

    try:
        return _info(client().get_run(run_id))
    except MlflowException as error:
        if is_outage(error):
            raise
        raise UserError(f"run '{run_id}'", expected=f"a run in {redact(uri())}", got=redact(str(error))) from error


def _info(run: Any) -> RunInfo:
    about, data = run.info, run.data
    return RunInfo(
        about.run_id, about.status, about.run_name or "", dict(data.tags), dict(data.params), dict(data.metrics),
        about.artifact_uri, about.start_time,
    )  # fmt: skip


class Run:
    """A run that is being written. Metrics survive an outage of the server; uploads wait for it."""

    def __init__(self, run_id: str, competition: str, artifact_uri: str, experiment_id: str) -> None:
        self.id = run_id
        self.competition = competition
        self.artifact_uri, self.experiment_id = artifact_uri, experiment_id
        self._spool = Spool(_SPOOL / f"{run_id}.jsonl")
        self._try_again_at = 0.0

    @property
    def url(self) -> str:
        """Where to look at the run in MLflow's UI."""
        base = uri() if uri().startswith("http") else "http://127.0.0.1:5000"
        return f"{redact(base)}/#/experiments/{self.experiment_id}/runs/{self.id}"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a step. If the server is away they wait on disk and arrive later, in order."""
        now = int(time.time() * 1000)
        rows = [[key, float(value), now, int(step or 0)] for key, value in metrics.items()]
        self._tell({"kind": "metrics", "rows": rows})

    def _tell(self, note: Note) -> None:
        self._spool.append(note)
        if time.monotonic() < self._try_again_at:
            return
        try:
            self._spool.deliver(lambda notes: _send(self.id, notes))
        except Exception as error:  # an outage is survived, everything else is the caller's
            if not is_outage(error):
                raise
            log.warning("the tracking server is away; %d note(s) wait in %s", len(self._spool), self._spool.path)
            self._try_again_at = time.monotonic() + PAUSE_S

    def metric_steps(self, key: str) -> set[int]:
        """Return the steps already logged for `key`: a resumed run logs the others."""
        return {int(item.step) for item in patiently(lambda: client().get_metric_history(self.id, key))}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log params the run does not have yet (MLflow never lets one change); secrets are blanked."""
        from mlflow.entities import Param

        def log_new() -> None:  # two commands that share a run may both look before either has written
            have = client().get_run(self.id).data.params
            new = [Param(key, redact(str(value))[:6000]) for key, value in params.items() if key not in have]
            for start in range(0, len(new), 100):
                client().log_batch(self.id, params=new[start : start + 100])

        beside_others(log_new)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; secrets are blanked."""
        from mlflow.entities import RunTag

        rows = [RunTag(key, redact(str(value))[:5000]) for key, value in tags.items()]
        patiently(lambda: client().log_batch(self.id, tags=rows))

    def log_artifact(self, path: Path | str, folder: str = "") -> None:
        """Upload one file under `folder`."""
        patiently(lambda: client().log_artifact(self.id, str(path), folder or None))

    def log_artifacts(self, directory: Path | str, folder: str = "") -> None:
        """Upload a directory's contents under `folder`."""
        patiently(lambda: client().log_artifacts(self.id, str(directory), folder or None))

    def log_text(self, text: str, name: str) -> None:
        """Upload text as the artifact `name` (may hold folders); secrets are blanked."""
        patiently(lambda: client().log_text(self.id, redact(text), name))

    def log_dict(self, value: Any, name: str) -> None:
        """Upload a value as the JSON artifact `name`; secrets are blanked."""
        self.log_text(json.dumps(value, indent=2, ensure_ascii=False, default=str), name)

    def log_figure(self, figure: Any, name: str) -> None:
        """Upload a matplotlib figure as the picture `name`."""
        from octofold.plots import literal

        literal(figure)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            figure.savefig(path, bbox_inches="tight")
            self.log_artifact(path, str(Path(name).parent) if "/" in name else "")

    def log_dataset(self, table: Any, name: str, context: str, source: Path | str = "") -> None:
        """Log a pandas table as an MLflow dataset: name, digest, schema and size, for the run's Datasets column."""
        from mlflow.data.pandas_dataset import from_pandas
        from mlflow.entities import DatasetInput, InputTag

        with warnings.catch_warnings(action="ignore"):  # hints on integer columns, and MLflow's own use of pandas
            made = from_pandas(table, source=str(source or name), name=name)
            entry = DatasetInput(made._to_mlflow_entity(), tags=[InputTag("mlflow.data.context", context)])
        beside_others(lambda: client().log_inputs(self.id, datasets=[entry]))

    def _end(self, status: str) -> None:
        self._try_again_at = 0.0
        self._tell({"kind": "end", "status": status, "time": int(time.time() * 1000)})


def _send(run_id: str, notes: Sequence[Note]) -> None:
    """Give waiting notes to the server, in order."""
    from mlflow.entities import Metric

    rows = [Metric(*row) for note in notes if note["kind"] == "metrics" for row in note["rows"]]
    for start in range(0, len(rows), 1000):
        client().log_batch(run_id, metrics=rows[start : start + 1000])
    for note in notes:
        if note["kind"] == "end":
            client().set_terminated(run_id, note["status"], note["time"])


def _deliver_left(run_id: str) -> None:
    """Deliver what a process that is gone had no time to tell and nobody who took its run over has told since."""
    spool, history = Spool(_SPOOL / f"{run_id}.jsonl"), partial(client().get_metric_history, run_id)
    spool.deliver(lambda notes: _send(run_id, untold(notes, history, get_run(run_id).status)))


def deliver_leftovers() -> None:
    """Deliver what processes that are gone left in the spool."""
    for path in sorted(_SPOOL.glob("*.jsonl")):
        try:
            if is_orphan(get_run(path.stem).tags):
                _deliver_left(path.stem)
        except Exception as error:  # somebody's old notes must not stop this run
            log.warning("%s waits on: %s", path, redact(str(error)).splitlines()[0])


def close_orphans(competition: str) -> None:
    """Close as KILLED the competition's runs whose process died without a word."""
    closed = [info.id for info in find_runs(competition, statuses=("RUNNING",)) if is_orphan(info.tags)]
    for run_id in closed:
        client().set_terminated(run_id, "KILLED")
    if closed:
        log.info("closed %d run(s) of processes that were killed: %s", len(closed), ", ".join(closed))


@contextlib.contextmanager
def run(
    entry: str,
    config: Section | None,
    competition: str,
    name: str | None = None,
    tags: Mapping[str, Any] | None = None,
    parent: "Run | str | None" = None,
    resume_id: str | None = None,
) -> Iterator[Run]:
    """Open a run, and close it FINISHED, FAILED (an error) or KILLED (an interruption).

    Args:
        entry: what runs: ``train``, ``train.slot``, ``blend`` …
        config: settings, logged as params under ``cfg.`` and whole as ``config.yaml``.
        competition: names the experiment. A run that ``mlflow run`` opened is adopted where it is.
        name: shown in MLflow's list; none = the entry's.
        tags: beside competition, entry, git commit and process identity.
        parent: the run (or its id) this one is nested in, in the same experiment.
        resume_id: go on with this run instead of making one.

    Raises:
        UserError: the tracking server is not there.
    """
    adopted = adopt() if parent is None else None
    if parent is None:
        deliver_leftovers()
        close_orphans(competition)
    given = {"competition": competition, "entry": entry, **identity(), **git_tags(), **(tags or {})}
    labels, name = {key: redact(str(value)) for key, value in given.items()}, redact(name or entry)
    if resume_id:  # what its killed process had no time to tell is told first, or it would be told twice
        patiently(lambda: _deliver_left(resume_id))
    current = patiently(lambda: _open(client(), competition, name, labels, parent, resume_id or adopted))
    if adopted and resume_id:  # what `mlflow run` opened stays empty and points to the run that goes on
        client().set_tag(adopted, "continued_in", resume_id)
    made = Run(current.info.run_id, competition, current.info.artifact_uri, current.info.experiment_id)
    try:
        made.set_tags(labels)
        if config is not None:
            made.log_params({f"cfg.{key}": value for key, value in flatten(config).items()})
            made.log_text(dump(config), "config.yaml")
        if parent is None and labels["git.dirty"] == "true":
            made.log_text(git_diff(), "git.diff")
        yield made
    except Handover:  # the run is another command's by now
        raise
    except KeyboardInterrupt:
        made._end("KILLED")
        raise
    except BaseException as error:
        with contextlib.suppress(Exception):  # the error itself matters more than telling the store of it
            client().set_tag(made.id, "error", redact("".join(traceback.format_exception_only(error)))[:1000])
        made._end("FAILED")
        raise
    made._end("FINISHED")


def _open(
    api: Any, competition: str, name: str, labels: Mapping[str, str], parent: "Run | str | None", run_id: str | None
) -> Any:
    if run_id:
        api.update_run(run_id, status="RUNNING", name=name)
        return api.get_run(run_id)
    if parent is None:
        return api.create_run(experiment(competition), tags=dict(labels), run_name=name)
    above = parent if isinstance(parent, str) else parent.id
    place = api.get_run(above).info.experiment_id if isinstance(parent, str) else parent.experiment_id
    return api.create_run(place, tags={**labels, "mlflow.parentRunId": above}, run_name=name)


def download(run_id: str, path: str) -> Path:
    """Return a local path of a run's artifact: the stored file itself on a local store, else a downloaded copy.

    Raises:
        UserError: the run or the artifact is not there.
    """
    return fetch_uri(f"{get_run(run_id).artifact_uri.rstrip('/')}/{path}", f"artifact '{path}' of run {run_id}")


def fetch_uri(address: str, what: str) -> Path:
    """Return a local path of the artifact at a URI; `what` names it in the error.

    Raises:
        UserError: it is not there.
    """
    import requests
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    client()  # models:/ and runs:/ are looked up in the store it opens
    try:
        local = Path(patiently(lambda: download_artifacts(artifact_uri=address)))
    except (MlflowException, OSError, requests.RequestException) as error:
        got = redact(str(error)).splitlines()[0][:300]
        raise UserError(what, expected=f"in {redact(uri())}", got=got, fix=_MOVED) from error
    if not local.exists():
        raise UserError(what, got=f"nothing at {local}", fix=_MOVED)
    return local


def list_artifacts(run_id: str, folder: str = "") -> dict[str, int]:
    """Return ``{path: bytes}`` of every file of a run under `folder`, subfolders walked."""
    found: dict[str, int] = {}
    for item in patiently(lambda: client().list_artifacts(run_id, folder or None)):
        found |= list_artifacts(run_id, item.path) if item.is_dir else {item.path: int(item.file_size or 0)}
    return found

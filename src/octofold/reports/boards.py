"""Boards: public and private scores recorded on the runs that made the submissions, and read back."""

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from octofold import commands
from octofold.blend import ledger
from octofold.data import manifest
from octofold.errors import UserError, preview
from octofold.files import ROOT
from octofold.metrics import METRICS, adopt
from octofold.reports.scores import Score, read_history
from octofold.track import tracking

PUBLIC, PRIVATE = "score/public", "score/private"


def asked_for(config: commands.Score) -> str:
    """Return the competition that is meant.

    Raises:
        UserError: none is named, another than the ledger's is, or a score comes without the submission it is of.
    """
    if config.submission is None:
        given = {"--public": config.public, "--private": config.private, "--notes": config.notes or None}
        loose = [flag for flag, value in given.items() if value is not None]
        if loose:
            raise UserError(preview(loose), expected="--submission, the file they are about", got="none")
        if not config.competition:
            raise UserError("score", expected="--submission, or --competition", got="neither")
        return config.competition
    told = str(ledger.load(config.submission).about["competition"])
    if config.competition not in ("", told):
        said = f"'{told}', as the ledger beside {config.submission.name} says"
        raise UserError("--competition", expected=said, got=f"'{config.competition}'", fix="leave it out")
    return told


def is_new(competition: str, has_history: bool = False) -> bool:
    """Whether nothing is known yet of a competition; scores made elsewhere may be the first of it, nothing may not.

    Args:
        competition: name of the problem.
        has_history: past submissions are about to be recorded.

    Raises:
        UserError: neither data, runs nor a history are there: the name is mistyped, most likely.
    """
    data = ROOT / "data"
    # A report of nothing is a run too, and makes no competition.
    if (data / competition).is_dir() or any(
        info.tags.get("entry") != "score" for info in tracking.find_runs(competition)
    ):
        return False
    if not has_history:
        there = sorted(file.parent.name for file in data.glob("*/manifest.csv"))
        raise UserError(
            f"competition '{competition}'",
            expected=f"one that was prepared here ({preview(there) or 'none was yet'}), or that has runs",
            got="neither data nor runs of that name",
            fix="mend the name; --history makes a competition of scores alone",
        )
    return True


def record(submission: Path | str, public: float | None, private: float | None, notes: str = "") -> Score:
    """Write what the boards said on the run that made a submission.

    Args:
        submission: the CSV, where blend wrote it (its ledger beside it).
        public, private: scores, or None.
        notes: anything worth remembering.

    Raises:
        UserError: no ledger, no score, a score that is not finite, or a run that is gone.
    """
    if public is None and private is None:
        raise UserError("score", expected="--public, --private, or both", got="neither")
    told = {PUBLIC: public, PRIVATE: private}
    for name, value in told.items():
        if value is not None and not math.isfinite(value):
            raise UserError(name, expected="a number", got=str(value))
    about = ledger.load(submission).about
    info = tracking.get_run(about["run_id"])
    for name, value in told.items():
        if value is not None:
            tracking.client().log_metric(info.id, name, value)
    tags = {"submission_file": Path(submission).name, **({"score.notes": notes} if notes else {})}
    for key, text in tags.items():
        tracking.client().set_tag(info.id, key, text)
    return _score(tracking.get_run(info.id))


def import_history(path: Path | str, competition: str, parent: tracking.Run) -> list[Score]:
    """Record a CSV of past submissions, one run for each; a file that is already there is brought up to date.

    Raises:
        UserError: see `scores.read_history`.
    """
    rows = read_history(path)
    there = {info.tags.get("submission_file"): info for info in tracking.find_runs(competition, {"entry": "score.row"})}
    for row in rows:
        numbers = {PUBLIC: row.public, PRIVATE: row.private}
        tags = {"submission_file": row.submission, "score.date": row.date, "score.category": row.category,
                "score.notes": row.notes}  # fmt: skip
        if info := there.get(row.submission):
            _renew(info, numbers, tags)
            continue
        with tracking.run("score.row", None, competition, name=row.submission, tags=tags, parent=parent) as run:
            run.log_metrics({name: value for name, value in numbers.items() if math.isfinite(value)})
    return rows


def _renew(info: tracking.RunInfo, numbers: dict[str, float], tags: dict[str, str]) -> None:
    """Write what a row says otherwise than its run does; a score it no longer has becomes NaN, MLflow forgets none."""
    for name, value in numbers.items():
        before = info.metrics.get(name, math.nan)
        if before != value and (math.isfinite(before) or math.isfinite(value)):
            tracking.client().log_metric(info.id, name, value)
    for key, text in tags.items():
        if info.tags.get(key, "") != text:
            tracking.client().set_tag(info.id, key, text)


def recorded(competition: str, metric: str = "") -> list[Score]:
    """Return every submission of a competition that a board has spoken of, oldest first.

    Args:
        competition: name of the problem.
        metric: of the board: an estimate in another one is left out. Empty = each blend's own.
    """
    found = [_score(info, metric) for info in reversed(tracking.find_runs(competition))]
    return [score for score in found if math.isfinite(score.public) or math.isfinite(score.private)]


def direction(competition: str, metric: str = "") -> float:
    """1 where higher is better, -1 where lower is, 0 where nobody can say.

    Args:
        competition: name of the problem.
        metric: of the board; empty = the newest blend's. With neither, points have nothing but losses.

    Raises:
        UserError: no such metric.
    """
    if metric:
        task = _task(competition) or (METRICS[metric].task if metric in METRICS else "classify")
        return float(METRICS[adopt(metric, task)].sign)
    runs = tracking.find_runs(competition, {"entry": "blend"}, ("FINISHED",))
    if not runs:
        return -1.0 if _task(competition) == "keypoints" else 0.0
    tags = runs[0].tags
    row = METRICS.get(tags.get("metric", ""))
    return float(row.sign if row is not None else tags.get("metric.sign", 1))  # without a row: somebody's own function


def _task(competition: str) -> str:
    file = ROOT / "data" / competition / "manifest.csv"
    return manifest.read(file).task if file.exists() else ""


def _score(info: Any, metric: str = "") -> Score:
    def number(name: str) -> float:
        return float(info.metrics.get(name, math.nan))

    judged_by = [f"estimate/{name}" for name in (info.tags.get("metric", "accuracy"), "accuracy", "mse")]
    key = next((name for name in judged_by if name in info.metrics), "")
    is_comparable = not metric or key == f"estimate/{metric.rpartition(':')[2]}"  # a user's own goes by its function
    # One of `oof` was never meant for the test images.
    is_forecast = bool(key) and is_comparable and info.tags.get("estimate.of") != "oof"
    name, date = info.tags.get("submission_file", info.name), info.tags.get("score.date", "")
    if info.tags.get("entry") == "blend":  # every blend writes a submission.csv
        name, date = f"{name} of {info.id[:8]}", date or f"{datetime.fromtimestamp(info.start_time / 1000):%Y-%m-%d}"
    return Score(
        submission=name,
        public=number(PUBLIC),
        private=number(PRIVATE),
        estimate=number(key) if is_forecast else math.nan,
        low=number("estimate/low") if is_forecast else math.nan,
        high=number("estimate/high") if is_forecast else math.nan,
        date=date,
        category=info.tags.get("score.category", info.tags.get("method", "")),
        notes=info.tags.get("score.notes", ""),
        run_id=info.id,
    )

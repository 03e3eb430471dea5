"""Scores: what the boards said of submissions, beside what was expected."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from octofold.errors import UserError, preview
from octofold.files import existing

COLUMNS = ("date", "submission_file", "public_score", "private_score", "category", "notes")
"""Of a CSV of past submissions, as original 000 kept it. `date`, `category` and `notes` may be missing or empty."""


@dataclass(frozen=True)
class Score:
    """A submission on the boards; NaN where a board has not spoken.

    Attributes:
        submission: file name.
        public, private: scores.
        estimate, low, high: what was expected, with its 95 % interval; NaN if nothing was.
        date, category, notes: as given.
        run_id: of the run it is recorded on.
    """

    submission: str
    public: float = math.nan
    private: float = math.nan
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    date: str = ""
    category: str = ""
    notes: str = ""
    run_id: str = ""


def read_history(path: Path | str) -> list[Score]:
    """Read a CSV of past submissions.

    Raises:
        UserError: no file, not UTF-8, missing columns, more cells than columns, a score that is no number, or one file
            named twice with different scores.
    """
    path = existing(path, "a CSV of past submissions")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(path, expected="a CSV of past submissions, in UTF-8", got=str(error)) from error
    missing = [name for name in COLUMNS[1:4] if name not in names]
    if missing:
        raise UserError(path, expected=f"columns {', '.join(COLUMNS)}", got=f"no {preview(missing)}")
    found: dict[str, Score] = {}
    for line, row in enumerate(rows, start=2):
        if None in row:  # where DictReader puts what is beyond the header: 0,87 without quotes is a 0 and an 87
            raise UserError(
                path, expected="as many cells as the header", got=f"more in line {line}",
                fix="quote cells that hold a comma",
            )  # fmt: skip
        score = Score(
            submission=(row["submission_file"] or "").strip(),
            public=_number(row["public_score"], path, line),
            private=_number(row["private_score"], path, line),
            date=row.get("date") or "",
            category=row.get("category") or "",
            notes=row.get("notes") or "",
        )
        if not score.submission:
            raise UserError(path, expected="a submission_file in every row", got=f"none in line {line}")
        before = found.setdefault(score.submission, score)
        if str((before.public, before.private)) != str((score.public, score.private)):
            raise UserError(path, expected="one score for each file", got=f"two for {score.submission} (line {line})")
    return list(found.values())


def _number(text: str | None, path: Path, line: int) -> float:
    if not (text or "").strip():
        return math.nan
    try:
        value = float(str(text).replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(path, expected="numbers, or nothing, as scores", got=f"{text!r} in line {line}")
    return value


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's correlation of two boards (ties share their rank); NaN with fewer than three pairs or no spread."""
    from scipy.stats import rankdata

    pairs = [(a, b) for a, b in zip(one, other, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < 3:
        return math.nan
    a, b = (rankdata(side) for side in zip(*pairs, strict=True))
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else math.nan


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """What the boards have taught so far.

    Returns:
        ``submissions``; ``public_private_correlation`` (Spearman); ``estimate_error`` (mean absolute, against the
        private score, or the public one where there is no other) and ``inside_interval`` (share), where estimates are.
    """
    truth = [score.private if math.isfinite(score.private) else score.public for score in scores]
    judged = [(s, t) for s, t in zip(scores, truth, strict=True) if math.isfinite(s.estimate) and math.isfinite(t)]
    found = {
        "submissions": float(len(scores)),
        "public_private_correlation": rank_correlation([s.public for s in scores], [s.private for s in scores]),
    }
    if judged:
        found["estimate_error"] = float(np.mean([abs(score.estimate - t) for score, t in judged]))
        found["inside_interval"] = float(np.mean([score.low <= t <= score.high for score, t in judged]))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def told(scores: Sequence[Score], sign: float = 1.0) -> list[str]:
    """The boards in words, best private (then public) first.

    Args:
        scores: what was recorded.
        sign: 1 where higher is better, -1 where lower is, 0 where nobody knows: then nothing is called the best.
    """
    order = sorted(scores, key=lambda s: [-sign * v if math.isfinite(v) else math.inf for v in (s.private, s.public)])
    lines = [f"{'submission':32} {'public':>9} {'private':>9} {'estimate':>9}  interval"]
    for score in order:
        numbers = [
            f"{v:9.5f}" if math.isfinite(v) else f"{'-':>9}" for v in (score.public, score.private, score.estimate)
        ]
        span = f"[{score.low:.4f}, {score.high:.4f}]" if math.isfinite(score.low) else ""
        lines.append(f"{score.submission[:32]:32} {' '.join(numbers)}  {span}".rstrip())
    found = summary(scores)
    if "public_private_correlation" in found:
        lines.append(f"Public against private, rank correlation: {found['public_private_correlation']:+.2f}.")
        both = [s for s in scores if math.isfinite(s.public) and math.isfinite(s.private)]
        public_best = max(both, key=lambda s: sign * s.public)
        beaten = sum(sign * s.private > sign * public_best.private for s in both)
        lines.append(
            f"The best public score ({public_best.public:.5f}, {public_best.submission}) is number {beaten + 1} of "
            f"{len(both)} on the private board."
            if sign
            else "Nothing is blended here, so nobody knows which score is the best: name the board's by --metric."
        )
    if "estimate_error" in found:
        lines.append(
            f"Estimates were off by {found['estimate_error']:.4f} on average; {found['inside_interval']:.0%} of the "
            "95 % intervals held the truth so far."
        )
    return lines

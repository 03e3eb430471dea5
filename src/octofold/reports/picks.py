"""Picks: the two submissions to choose as finals, now that the public board has spoken of some."""

import math
from collections.abc import Sequence

import numpy as np

from octofold.blend import finals
from octofold.blend.lineup import test_set
from octofold.data import manifest
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import ROOT
from octofold.metrics import METRICS, adopt
from octofold.predictions import Predictions
from octofold.reports import boards, chronicle
from octofold.reports.chronicle import Blended

MOST = 30  # blends: those with a public score first, then the newest


def told(competition: str, metric: str = "") -> list[str]:
    """Choose two among a competition's blends by out-of-fold and public scores, in words; nothing to choose, no words.

    Candidates are blends of the present manifest whose out-of-fold predictions are kept; how many with a public score
    are none is said.

    Args:
        competition: name of the problem.
        metric: of the board; empty = the newest blend's, candidate or not.
    """
    file = ROOT / "data" / competition / "manifest.csv"
    if not file.exists():
        return []
    table = manifest.read(file)
    blends = chronicle.blends(competition)
    oofs = _candidates(blends, table)
    public = np.array([_public(blended) for blended, _ in oofs])
    left = sum(math.isfinite(_public(blended)) for blended in blends) - int(np.isfinite(public).sum())
    lines = [
        f"{left} blend{'s' * (left > 1)} with a public score could not be weighed: made of another version of the data,"
        " or without kept out-of-fold predictions of all its rows."
    ][: left > 0]
    test = test_set(table)
    if len(oofs) < 2 or not np.isfinite(public).any() or test is None:
        return lines
    wanted = metric or blends[-1].settings.get("metric") or ("accuracy" if table.task == "classify" else "mse")
    try:
        judge = METRICS[adopt(wanted, table.task)]
    except UserError:  # the file of the user's own metric is gone
        return lines
    belief = finals.believe(
        [oof.values for _, oof in oofs], table.target, table.groups, judge, public, len(test.table),
        float(oofs[-1][0].settings.get("public_share", 0.3)),
    )  # fmt: skip
    if belief is None:
        return lines
    chosen = [oofs[place][0] for place in finals.best_two(belief)]
    named = ", ".join(map(_name, chosen))
    return [
        f"Two final submissions, by out-of-fold and public scores together: {named}.",
        *_passed_over(competition, chosen, [blended for blended, _ in oofs], judge.sign),
        *lines,
    ]


def _candidates(blends: Sequence[Blended], table: Manifest) -> list[tuple[Blended, Predictions]]:
    """Blends with their out-of-fold predictions, oldest first."""
    there = [blended for blended in blends if blended.manifest_hash == table.hash]
    kept = sorted(there, key=lambda blended: (math.isfinite(_public(blended)), blended.when))[-MOST:]
    kept.sort(key=lambda blended: blended.when)
    return [(blended, oof) for blended in kept if (oof := chronicle.blend_oof(blended, table)) is not None]


def _passed_over(competition: str, chosen: list[Blended], weighed: list[Blended], sign: int) -> list[str]:
    """Say of the best public score of all that are recorded why it is not chosen, if it is not."""
    runs = {blended.run: blended for blended in weighed}
    scores = [score for score in boards.recorded(competition) if math.isfinite(score.public)]
    best = max(scores, key=lambda score: (sign * score.public, score.run_id in runs))
    if any(_public(blended) == best.public for blended in chosen):
        return []
    if best.run_id in runs:
        name = _name(runs[best.run_id])
        return [f"Not the best public score ({name}): on so few images it is luck more than merit."]
    return [f"Not the best public score ({best.submission}, public {best.public:.4f}): it could not be weighed."]


def _public(blended: Blended) -> float:
    return blended.number(boards.PUBLIC)


def _name(blended: Blended) -> str:
    public = _public(blended)
    said = f", public {public:.4f}" if math.isfinite(public) else ""
    return f"{blended.method} of {blended.when:%Y-%m-%d %H:%M} (run {blended.run[:8]}{said})"

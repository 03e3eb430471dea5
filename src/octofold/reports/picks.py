"""Picks: the two submissions to choose as finals, now that the public board has spoken of some."""

import math

import numpy as np

from octofold.blend import finals
from octofold.blend.lineup import test_set
from octofold.data import manifest
from octofold.errors import UserError
from octofold.files import ROOT
from octofold.metrics import METRICS, adopt
from octofold.reports import chronicle
from octofold.reports.chronicle import Blended

MOST = 30  # blends, the newest


def told(competition: str, metric: str = "") -> list[str]:
    """Choose two among a competition's blends by out-of-fold and public scores, in words; nothing to choose, no words.

    Candidates are the newest blends of the present manifest whose out-of-fold predictions are kept.

    Args:
        competition: name of the problem.
        metric: of the board; empty = the newest candidate's.
    """
    file = ROOT / "data" / competition / "manifest.csv"
    if not file.exists():
        return []
    table = manifest.read(file)
    there = [blended for blended in chronicle.blends(competition)[-MOST:] if blended.manifest_hash == table.hash]
    oofs = [(blended, oof) for blended in there if (oof := chronicle.blend_oof(blended, table)) is not None]
    public = np.array([blended.number("score/public") for blended, _ in oofs])
    test = test_set(table)
    if len(oofs) < 2 or not np.isfinite(public).any() or test is None:
        return []
    newest = oofs[-1][0]
    wanted = metric or newest.settings.get("metric") or ("accuracy" if table.task == "classify" else "mse")
    try:
        judge = METRICS[adopt(wanted, table.task)]
    except UserError:  # the file of the user's own metric is gone
        return []
    belief = finals.believe(
        [oof.values for _, oof in oofs], table.target, table.groups, judge, public, len(test.table),
        float(newest.settings.get("public_share", 0.3)),
    )  # fmt: skip
    if belief is None:
        return []
    one, other = finals.best_two(belief)
    names = [_name(blended) for blended, _ in oofs]
    best = int(np.nanargmax(judge.sign * public))
    lines = [f"Two final submissions, by out-of-fold and public scores together: {names[one]}, {names[other]}."]
    if best not in (one, other):
        lines.append(f"Not the best public score ({names[best]}): on so few images it is luck more than merit.")
    return lines


def _name(blended: Blended) -> str:
    public = blended.number("score/public")
    said = f", public {public:.4f}" if math.isfinite(public) else ""
    return f"{blended.method} of {blended.when:%Y-%m-%d %H:%M} (run {blended.run[:8]}{said})"

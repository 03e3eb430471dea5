"""Advice: what to do next in a competition, the most telling first, each with its reason and its command."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from octofold.blend.forecast import WARN
from octofold.files import ROOT


class Step(NamedTuple):
    """Something worth doing."""

    what: str
    why: str
    command: str = ""


def next_steps(page: dict[str, Any], facts: Any, most: int = 6) -> list[Step]:
    """Read the page's numbers as a colleague would.

    Args:
        page: from `report.analyse`.
        facts: from `report.collect`.
        most: steps to return.
    """
    rules = (_blend, _flatter, _simpler, _one_seed, _stale, _labels, _pair, _alike, _calibrate, _record, _choose, _tune)
    found = [step for rule in rules if (step := rule(page, facts)) is not None]
    return found[:most]


def _path(facts: Any) -> str:
    """The manifest's path as one would type it in the project folder."""
    file = Path(facts.manifest.file)
    return str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)


def _blend(page: dict[str, Any], facts: Any) -> Step | None:
    ready = [member for member in facts.members if member.stage == "production"]
    if not facts.members:
        return Step(
            "Train a first member",
            "Nothing is registered yet.",
            f"python entrypoints/train.py --manifest {_path(facts)} --config configs/….yaml --stage production",
        )
    if facts.main is None and not ready:
        name = facts.members[0].name
        return Step(
            "Promote the members that should count",
            "No member stands in production, so there is nothing to blend.",
            f"python entrypoints/promote.py --competition {facts.competition} --member {name} --stage production",
        )
    if facts.main is None:
        return Step(
            "Blend the members in production",
            f"{len(ready)} stand there; without a blend there is no estimate for the test images.",
            f"python entrypoints/blend.py --competition {facts.competition}",
        )
    return None


def _flatter(page: dict[str, Any], facts: Any) -> Step | None:
    shown = page["headline"]
    if not facts.metric.higher_is_better or "estimate" not in shown:
        return None
    flatters = shown["oof"] - shown["estimate"]
    if not (math.isfinite(flatters) and flatters > 0.01 and shown["folds_flatter"] > WARN):
        return None
    return Step(
        "Do not choose by OOF alone",
        f"The folds flatter by {flatters:.3f}: they hold near-copies of what was trained on, the test images do not. "
        "Group what belongs together, so that folds are as hard as the test.",
        f"python entrypoints/prepare.py --competition {facts.competition} --group COLUMN …",
    )


def _simpler(page: dict[str, Any], facts: Any) -> Step | None:
    method = facts.main.method.removeprefix("auto: ") if facts.main else ""
    for name, over, gain in page["gains"]["rows"]:
        if name == "blend" and "plain mean" in over and gain.low <= 0 and method not in ("equal", "soft_vote"):
            worse = "they are worse" if gain.high < 0 else "not separable, and the simpler choice cannot overfit"
            return Step(
                "Take the plain mean",
                f"The fitted weights gain {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] over it: {worse}.",
                f"python entrypoints/blend.py --competition {facts.competition} --method equal",
            )
    return None


def _one_seed(page: dict[str, Any], facts: Any) -> Step | None:
    single = [member.name for member in facts.members if len({slot.seed for slot in member.slots}) == 1]
    if not facts.members or len(single) < len(facts.members):
        return None
    return Step(
        "Train a second seed",
        "Every member has one, so no interval here knows how much the luck of a training run matters; "
        "averaging seeds also helps the score.",
        f"python entrypoints/train.py --manifest {_path(facts)} --config configs/….yaml --seeds 0,1",
    )


def _stale(page: dict[str, Any], facts: Any) -> Step | None:
    stale = [member.name for member in facts.members if member.missing == "another data version"]
    if not stale:
        return None
    return Step(
        f"Retrain {', '.join(stale[:3])}",
        "Trained on another version of the data, so they cannot be compared or blended with the rest.",
        f"python entrypoints/train.py --manifest {_path(facts)} --config configs/….yaml",
    )


def _labels(page: dict[str, Any], facts: Any) -> Step | None:
    found = page["confusion"]
    if not found or found["sure"] < 3:
        return None
    return Step(
        f"Look at {found['sure']} labels",
        "The models contradict them with more than 0.9 confidence, although none trained on the image in question.",
        f"python entrypoints/clean.py --manifest {_path(facts)} --competition {facts.competition}",
    )


def _pair(page: dict[str, Any], facts: Any) -> Step | None:
    found = page["confusion"]
    if not found or found["errors"] < 10 or found["top"][2] < 0.2:
        return None
    one, other, share = found["top"]
    return Step(
        f"Train an expert for {one} and {other}",
        f"{share:.0%} of the {found['errors']} errors are between these two.",
    )


def _alike(page: dict[str, Any], facts: Any) -> Step | None:
    found = page["correlation"]
    if not found:
        return None
    table = found["table"]
    pairs = [(table[i][j], i, j) for i in range(len(table)) for j in range(i) if math.isfinite(table[i][j])]
    if not pairs or max(pairs)[0] < 0.9:
        return None
    value, i, j = max(pairs)
    return Step(
        f"Replace {found['names'][i]} or {found['names'][j]}",
        f"Their errors correlate at {value:.2f}, so the second adds little; another architecture, input size or "
        "augmentation errs elsewhere.",
    )


def _calibrate(page: dict[str, Any], facts: Any) -> Step | None:
    found = page["calibration"]
    if not found or abs(found["gap"]) < 0.03:
        return None
    what = "too sure of itself" if found["gap"] > 0 else "too modest"
    return Step(
        "Mind the confidences",
        f"The {page['shown']} is {what}: mean confidence less accuracy is {found['gap']:+.3f}. Labels do not care, "
        "log-loss and thresholds do; method log_loss weighs for it.",
    )


def _record(page: dict[str, Any], facts: Any) -> Step | None:
    if facts.main is None or page["boards"]["rows"]:
        return None
    return Step(
        "Record what the board says",
        "No score is recorded yet, so nobody knows how far estimates here can be trusted.",
        "python entrypoints/score.py --submission runs/blend/…/submission.csv --public 0.…",
    )


def _choose(page: dict[str, Any], facts: Any) -> Step | None:
    found = page["risk"]
    if not found or not found["flips"]:
        return None
    name, chance = max(found["flips"], key=lambda item: item[1])
    if chance < 0.2:
        return None
    return Step(
        "Do not pick by the public board",
        f"It would order {page['shown']} and {name} wrongly with probability {chance:.2f} by chance alone.",
    )


def _tune(page: dict[str, Any], facts: Any) -> Step | None:
    if facts.tuned or not facts.members:
        return None
    return Step(
        "Tune a head overnight",
        "No study has been run; with a frozen trunk a trial costs seconds, and the verdict says whether it is noise.",
        f"python entrypoints/tune.py --manifest {_path(facts)} --config configs/tune/….yaml",
    )

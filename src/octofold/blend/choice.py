"""Choice of views: which of the nested view sets out-of-fold predictions support, with the cost of having chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.blend import estimate, lineup
from octofold.blend.lineup import Lineup
from octofold.commands import Blend
from octofold.data.manifest import Manifest
from octofold.metrics import Metric
from octofold.tta import NESTED

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Choice:
    """A lineup in the views that were chosen.

    Attributes:
        lineup: in the views chosen by all rows, or in those asked for.
        scores: of the plain mean of members in each view set; empty where nothing was chosen.
        unseen: fold -> the views that would have been chosen without it.
        instead: fold -> OOF ``(M, N, …)`` in those views, where they are others than the lineup's.
    """

    lineup: Lineup
    scores: dict[str, float]
    unseen: dict[int, str]
    instead: Mapping[int, Array]

    def told(self) -> list[str]:
        """The choice in words."""
        if not self.scores:
            return []
        listed = ", ".join(f"{views} {score:.4f}" for views, score in self.scores.items())
        others = [f"fold {fold} {views}" for fold, views in self.unseen.items() if views != self.lineup.views]
        without = f"; without a fold: {', '.join(others)}" if others else "; the same without any one fold"
        return [f"Views chosen by OOF: {self.lineup.views} (plain mean of members: {listed}){without}."]


def choose(config: Blend, manifest: Manifest, metric: Metric) -> Choice:
    """Gather the members in the views asked for, or, with ``tta: auto``, in those whose OOF scores best.

    The choice is made on all rows for the test images, and once more without each fold for the estimate: a fold is
    never scored in views that it helped to choose. Ties go to fewer views.

    Raises:
        UserError: see `lineup.gather`.
    """

    def gather(views: str) -> Lineup:
        return lineup.gather(config.competition, config.stage, config.members, manifest, views, config.mixed)

    if config.tta != "auto":
        return Choice(gather(config.tta), {}, {}, {})
    found = {views: gather(views) for views in NESTED}
    rows = next(iter(found.values())).rows
    means = {views: one.oof[: one.voters].mean(axis=0) for views, one in found.items()}

    def best(mask: Array) -> tuple[str, dict[str, float]]:
        scores = {views: metric.score(mean[mask], rows.target[mask]) for views, mean in means.items()}
        return max(scores, key=lambda views: metric.sign * scores[views]), scores

    chosen, scores = best(np.ones(len(rows.target), bool))
    unseen = {fold: best(rows.fold != fold)[0] for fold in estimate.folds_of(rows.fold)}
    instead = {fold: found[views].oof for fold, views in unseen.items() if views != chosen}
    return Choice(found[chosen], scores, unseen, instead)

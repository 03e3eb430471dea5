"""The origin of a slot: the weights its training starts from, and whether they have seen the rows held out.

Whatever trains a slot asks here, be it a member's or a trial's.
"""

import logging
from pathlib import Path

from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import existing, sha256_file
from octofold.nets.models import read_card
from octofold.recipe import Recipe
from octofold.track import registry, tracking
from octofold.track.tracking import RunInfo

SHA = "start.sha256"  # the tag of a slot's run that says which weights it started from
log = logging.getLogger("octofold")


def find(recipe: Recipe, fold: int, seed: int) -> Path | None:
    """Return the file or checkpoint folder a slot's training starts from, if the recipe names one.

    ``{fold}`` and ``{seed}`` in `model.weights` become the slot's, so that each fold goes on from a model that has not
    seen its held-out rows either.

    Raises:
        UserError: nothing is there.
    """
    place = recipe.model.weights.replace("{fold}", str(fold)).replace("{seed}", str(seed))
    if place in ("none", "pretrained", "package"):
        return None
    if place.startswith("models:/"):
        return registry.find_checkpoint(tracking.fetch_uri(place, f"model.weights: {place}"))
    return existing(place, "weights (.safetensors, .pth, .pt, or a checkpoint folder)")


def sha256(start: Path) -> str:
    """Hex sha256 of the file, or of the weights in the checkpoint folder, that a training starts from."""
    return sha256_file(start / "model.safetensors" if start.is_dir() else start)


def same(runs: list[RunInfo], recipe: Recipe, fold: int, seed: int) -> list[RunInfo]:
    """Of a slot's runs, those that started from what lies there now: an alias moves, a file is replaced.

    Runs that do not say where they started count as the same.
    """
    if not any(SHA in run.tags for run in runs):
        return runs
    start = find(recipe, fold, seed)
    now = None if start is None else sha256(start)
    return [run for run in runs if run.tags.get(SHA, now) == now]


def check(recipe: Recipe, table: Manifest, fold: int, start: Path | None) -> None:
    """Refuse starting weights of this competition that have trained on the rows held out here: OOF would flatter.

    Raises:
        UserError: they are a model of another fold.
    """
    if start is None or not (start.is_dir() or start.name == "model.safetensors"):
        return
    folder = start if start.is_dir() else start.parent
    card = read_card(folder) if (folder / "model.json").exists() else None
    if card is None or card.competition != table.competition:
        return
    where, origin = f"model.weights: {recipe.model.weights}", f"{card.member} of fold {card.fold}"
    if card.fold != fold:
        raise UserError(
            where,
            expected=f"weights that have not seen the rows held out in fold {fold} of {table.competition}",
            got=f"{origin}, which was trained on them: the OOF would flatter",
            fix="use {fold} in model.weights, so that each fold goes on from the model of the same fold",
        )
    if card.manifest_hash != table.hash:
        log.warning(
            "%s: %s was trained on manifest %s, not on this one (%s). If folds were drawn anew it has seen rows held"
            " out here, and the OOF flatters; prepare --previous keeps old samples in their folds",
            where, origin, card.manifest_hash[:12] or "unknown", table.hash[:12],
        )  # fmt: skip

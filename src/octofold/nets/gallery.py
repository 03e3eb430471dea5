"""Gallery: what an augmentation preset does to one photo of this competition, to be looked at before training."""

from typing import Any

from octofold import plots
from octofold.data.images import PixelSpec, load, square
from octofold.data.manifest import Manifest
from octofold.nets import augment
from octofold.recipe import Recipe

SHOWN = 11
"""Augmented versions shown beside the plain square."""


def draw(recipe: Recipe, table: Manifest, row: int = 0) -> dict[str, Any]:
    """Draw one photo under each preset of a recipe, its key points on it.

    Args:
        recipe: its phases name the presets.
        table: the photo is its row `row`.
        row: which.

    Returns:
        A figure per preset: the centre square, then `SHOWN` draws.
    """
    names = dict.fromkeys(
        name for phase in recipe.phases for name in (phase.augment or recipe.augment.preset, phase.easy_augment) if name
    )
    spec = PixelSpec.of(recipe.model)
    image, frame = load(table.paths[row], spec)
    plain, marks, place = square(image, spec.size), None, None
    if table.task == "keypoints":
        marks = frame.to_unit(table.target[row])  # of the square
        corner = ((image.shape[1] - spec.size) // 2, (image.shape[0] - spec.size) // 2)
        place = (marks * spec.size + corner) / (image.shape[1], image.shape[0])  # of the whole image
    figures = {}
    for name in names:
        transform = augment.make(name, spec.size, marks is not None, table.info.get("swap"))
        augment.reseed(transform, 0)
        drawn = [(plain, marks), *(augment.run(transform, image, place) for _ in range(SHOWN))]
        points = [{"point": found * spec.size - 0.5} for _, found in drawn if found is not None] or None
        figures[name] = plots.grid(
            [picture for picture, _ in drawn],
            ["as validation sees it", *[""] * SHOWN],
            title=f"augmentation '{name}'",
            points=points,
        )
    return figures

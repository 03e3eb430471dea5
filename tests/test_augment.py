"""Augmentation: every preset keeps dtype, size and range, is a function of its seed, and moves points with pixels."""

from collections import Counter
from pathlib import Path

import albumentations as A
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from PIL import Image as Photo

from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.nets import augment, gallery
from octofold.recipe import Augment, Model, Phase, Recipe

SIZE = 96
Image = npt.NDArray[np.uint8]


def draw_blob(height: int, width: int, x: float, y: float) -> Image:
    """A smooth white spot centred on the pixel index (x, y)."""
    rows, columns = np.mgrid[:height, :width]
    spot = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 4.0**2))
    return np.repeat((spot * 255).round().astype(np.uint8)[..., None], 3, axis=2)


def find_blob(image: Image) -> npt.NDArray[np.float64]:
    """Its centre again, as a pixel index."""
    mass = np.clip(image[..., 0].astype(float) - image.max() * 0.2, 0, None)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(mass * columns).sum(), (mass * rows).sum()]) / mass.sum()


def make_geometry(name: str, swap: list[int] | None) -> A.Compose:
    """A preset's moves alone: what degrades or covers the pixels would blur the oracle."""
    spoilers = (A.CoarseDropout, A.OneOf, A.Sharpen, A.ColorJitter, A.RandomBrightnessContrast)
    whole = augment.make(name, SIZE, points=True, swap=swap)
    kept = [step for step in whole.transforms if not isinstance(step, spoilers)]
    return A.Compose(kept, keypoint_params=A.KeypointParams(format="xy", remove_invisible=False))


@pytest.mark.parametrize("name", augment.PRESETS)
def test_the_short_way_gives_albumentations_own_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` spares what `Compose`, crop and warp do around the work, and nothing of the work."""
    photo = np.random.default_rng(0).integers(0, 256, (110, 150, 3), dtype=np.uint8)
    ours, theirs = augment.make(name, SIZE), augment.make(name, SIZE)
    for short in (augment._Affine, augment._RandomResizedCrop):
        monkeypatch.delattr(short, "apply")
    wanted = []
    for seed in range(40):
        augment.reseed(theirs, seed)
        wanted.append([theirs(image=photo)["image"] for _ in range(2)])
    monkeypatch.undo()
    for seed, images in enumerate(wanted):
        augment.reseed(ours, seed)
        for image in images:
            np.testing.assert_array_equal(augment.run(ours, photo)[0], image)


@pytest.mark.parametrize("swap", [None, [1, 0]], ids=["no swap", "swap"])
@pytest.mark.parametrize("name", augment.PRESETS)
def test_points_move_with_the_pixels(name: str, swap: list[int] | None) -> None:
    random = np.random.default_rng(0)
    transform = make_geometry(name, swap)
    augment.reseed(transform, 0)
    checked = 0
    for _ in range(25):
        x, y = random.uniform(45, 80), random.uniform(35, 60)
        points = np.array([[(x + 0.5) / 128, (y + 0.5) / 96], [np.nan, np.nan]], np.float32)
        image, moved = augment.run(transform, draw_blob(96, 128, x, y), points)
        assert moved is not None
        seen = moved[np.isfinite(moved).all(axis=1)]
        if not len(seen):  # out of the picture
            assert image[14:-14, 14:-14].max() < 128
            continue
        assert len(seen) == 1, "the missing point stays missing"
        where = seen[0] * SIZE - 0.5
        if (where > 14).all() and (where < SIZE - 14).all():  # the whole spot is inside
            assert np.abs(where - find_blob(image)).max() < 0.15
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("name", augment.PRESETS)
def test_output_is_uint8_of_the_size_and_a_function_of_the_seed(name: str) -> None:
    random = np.random.default_rng(1)
    shapes = ((SIZE, SIZE), (SIZE, 140), (120, SIZE))
    photos = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    one, other = augment.make(name, SIZE), augment.PRESETS[name](SIZE, False)

    def run(transform: A.Compose, seed: int) -> list[Image]:
        augment.reseed(transform, seed)
        return [augment.run(transform, photo)[0] for photo in photos]

    first = run(one, 7)
    run(one, 8)  # what happened before a reseed leaves no trace
    for mine, again in zip(run(one, 7), run(other, 7), strict=True):
        assert mine.dtype == np.uint8
        assert mine.shape == (SIZE, SIZE, 3)
        np.testing.assert_array_equal(mine, again)
    for mine, again in zip(first, run(one, 7), strict=True):
        np.testing.assert_array_equal(mine, again)
    if name != "none":
        assert any((a != b).any() for a, b in zip(first, run(one, 8), strict=True)), "another seed, another picture"


def test_the_steps_of_a_preset_are_drawn_apart() -> None:
    photo = np.zeros((9, 9, 3), np.uint8)
    photo[1, 3] = 255
    moves = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.Transpose(p=0.5)])
    where: Counter[int] = Counter()
    for block in range(500):
        augment.reseed(moves, block)
        where.update(int(augment.run(moves, photo)[0][..., 0].argmax()) for _ in range(8))
    assert len(where) == 8, "each of the eight is as likely as any other"
    assert all(abs(count - 500) < 5 * 21 for count in where.values())  # 4000 draws of 1/8: standard deviation 21


def test_none_is_the_centre_crop() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (SIZE, 130, 3), dtype=np.uint8)
    np.testing.assert_array_equal(augment.run(augment.make("none", SIZE), photo)[0], photo[:, 17 : 17 + SIZE])


def kinds_of(name: str, points: bool = False, swap: list[int] | None = None) -> list[str]:
    return [type(step).__name__.lstrip("_") for step in augment.make(name, SIZE, points, swap).transforms]


def test_presets_are_the_originals() -> None:
    """Against the definitions: kinds in order, ranges and chances."""
    steps = {type(step).__name__.lstrip("_"): step for step in augment.make("no_color", SIZE).transforms}
    assert list(steps) == [
        "RandomResizedCrop",
        "HorizontalFlip",
        "VerticalFlip",
        "Affine",
        "RandomRotate90",
        "OneOf",
        "Sharpen",
        "CoarseDropout",
    ]
    crop, affine, spoil, holes = (steps[k] for k in ("RandomResizedCrop", "Affine", "OneOf", "CoarseDropout"))
    assert (crop.scale, crop.ratio) == ((0.70, 1.0), (0.80, 1.25))
    assert (steps["HorizontalFlip"].p, steps["VerticalFlip"].p, steps["RandomRotate90"].p) == (0.5, 0.08, 0.15)
    assert (affine.p, affine.rotate) == (0.45, (-20, 20))
    assert affine.scale == {"x": (0.9, 1.1), "y": (0.9, 1.1)}
    assert affine.translate_percent == {"x": (-0.06, 0.06), "y": (-0.06, 0.06)}
    assert affine.shear == {"x": (-8, 8), "y": (-8, 8)}
    assert spoil.p == 0.25
    assert [type(step).__name__ for step in spoil.transforms] == ["GaussianBlur", "GaussNoise", "ImageCompression"]
    assert steps["Sharpen"].p == 0.15
    assert (holes.p, holes.num_holes_range, holes.hole_height_range) == (0.25, (1, 6), (0.04, 0.12))
    color = {"ColorJitter", "HueSaturationValue", "RandomBrightnessContrast"}
    assert not color & {type(step).__name__ for step in spoil.transforms}
    assert kinds_of("full") == [*list(steps)[:5], "OneOf", *list(steps)[5:]], "full is no_color and one colour step"
    assert kinds_of("baseline") == ["RandomResizedCrop", "HorizontalFlip", "Rotate"]
    assert kinds_of("ensemble_1") == ["CenterCrop", "HorizontalFlip", "Rotate"]
    assert kinds_of("ensemble_2") == ["RandomResizedCrop", "HorizontalFlip", "Rotate", "ColorJitter", "Sharpen"]
    assert kinds_of("hard_light") == ["RandomResizedCrop", "HorizontalFlip", "Affine"]


@pytest.mark.parametrize("name", augment.PRESETS)
def test_points_are_not_mirrored_without_a_swap_table(name: str) -> None:
    assert not {"HorizontalFlip", "VerticalFlip"} & set(kinds_of(name, points=True))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UserError, match="no_color"):
        augment.make("no_colour", SIZE)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_keeps_shares_and_pixels_in_step(kind: str) -> None:
    """Class k is drawn as grey level 20 k: the mean pixel must be the mean of the shares."""
    config = Augment.model_validate({f"{kind}_alpha": 1.0, f"{kind}_prob": 1.0})
    labels = torch.arange(8)
    images = (labels * 20).to(torch.uint8).view(8, 1, 1, 1).expand(8, 3, 32, 32).contiguous()
    changed = 0
    for seed in range(12):
        mixed, shares = augment.mix(images, torch.eye(8), config, np.random.default_rng(seed))
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(8))
        expected = (shares * labels * 20).sum(dim=1)
        torch.testing.assert_close(mixed.float().mean(dim=(1, 2, 3)), expected, atol=1e-3, rtol=0)
        again, _ = augment.mix(images, torch.eye(8), config, np.random.default_rng(seed))
        torch.testing.assert_close(again, mixed)
        changed += not torch.equal(shares, torch.eye(8))
    assert changed > 8


def test_mixing_happens_as_often_as_asked_and_never_both() -> None:
    config = Augment(mixup_alpha=0.2, mixup_prob=0.2, cutmix_alpha=1.0, cutmix_prob=0.2)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    floats = mixed = 0
    for seed in range(400):
        out, shares = augment.mix(images, torch.eye(2), config, np.random.default_rng(seed))
        floats += out.is_floating_point()
        mixed += out is not images
    assert 50 < floats < 110, "mixup in a fifth of the batches"
    assert 110 < mixed < 210, "either in two fifths"
    alone, _ = augment.mix(images[:1], torch.eye(2)[:1], config, np.random.default_rng(0))
    assert alone is not None
    assert alone.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("task", ["classify", "keypoints"])
def test_a_recipe_s_presets_are_drawn(task: str, tmp_path: Path) -> None:
    Photo.fromarray(draw_blob(60, 90, 40, 30)).save(tmp_path / "a.png")
    table = pd.DataFrame({"sample_id": ["s"], "path": ["a.png"], "label": ["x"], "x_x": [40.0], "x_y": [np.nan]})
    manifest = Manifest(table.assign(fold=0), task, ("x",), "toy", tmp_path)
    easy = Phase(name="harden", augment="hard_light", easy_augment="easy_strong" if task == "classify" else None)
    recipe = Recipe(model=Model(input_size=32), augment=Augment(preset="points"), phases=[Phase(), easy])
    figures = gallery.draw(recipe, manifest)
    assert list(figures) == ["points", "hard_light", *(["easy_strong"] if task == "classify" else [])]
    for figure in figures.values():
        shown = [axes.get_images()[0].get_array().shape for axes in figure.axes]
        assert shown == [(32, 32, 3)] * (1 + gallery.SHOWN)

"""Augmentation: what training images go through. `PRESETS` is the table; a row is a function of the size.

Points travel as pixel indices (a centre is a whole number), which is what albumentations' mirrors and turns keep
exactly. Its resizing does not (it scales the index, off by half a pixel times the zoom), so ours is corrected.
"""

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version
import albumentations as A  # noqa: E402
import cv2  # noqa: E402

from octofold import recipe  # noqa: E402
from octofold.errors import known  # noqa: E402

cv2.setNumThreads(1)  # its threads cost a small image more than they save
Array = npt.NDArray[Any]
Swap = Sequence[int] | None


class _Affine(A.Affine):  # type: ignore[misc]
    """The same warp in one call: what stands around it in albumentations takes as long as the warp."""

    def apply(self, img: Array, matrix: Array, output_shape: tuple[int, int], **params: Any) -> Array:
        height, width = output_shape
        return np.asarray(cv2.warpAffine(img, matrix[:2], (round(width), round(height)), flags=self.interpolation))


class _RandomResizedCrop(A.RandomResizedCrop):  # type: ignore[misc]
    """Crop and resize, in one call, with points that stay on their pixels' centres."""

    def apply(self, img: Array, crop_coords: tuple[int, int, int, int], **params: Any) -> Array:
        left, top, right, bottom = crop_coords
        part, (height, width) = img[top:bottom, left:right], self.size
        if part.shape[:2] == (height, width):
            return part
        how = self._get_interpolation_for_resize(part.shape[:2], "image")
        return np.asarray(cv2.resize(part, (width, height), interpolation=how))

    def apply_to_keypoints(self, keypoints: Array, crop_coords: tuple[int, int, int, int], **params: Any) -> Array:
        moved = keypoints.copy()
        moved[:, :2] += 0.5
        moved = np.asarray(super().apply_to_keypoints(moved, crop_coords=crop_coords, **params))
        moved[:, :2] -= 0.5
        return moved


class _Mirror:
    """A flip that also exchanges twins (left eye, right eye), whichever way it mirrors."""

    def __init__(self, swap: Swap, p: float) -> None:
        super().__init__(p=p)  # type: ignore[call-arg]
        self.swap = swap

    def apply_to_keypoints(self, keypoints: Array, **params: Any) -> Array:
        moved = np.asarray(super().apply_to_keypoints(keypoints, **params))  # type: ignore[misc]
        return moved if self.swap is None else moved[list(self.swap)]


class _HorizontalFlip(_Mirror, A.HorizontalFlip):  # type: ignore[misc]
    """Left-right."""


class _VerticalFlip(_Mirror, A.VerticalFlip):  # type: ignore[misc]
    """Up-down."""


def _flip(points: bool, swap: Swap, p: float = 0.5) -> list[Any]:
    """Mirror left-right; nothing, if there are points and nobody said which are each other's twins."""
    return [] if points and swap is None else [_HorizontalFlip(swap, p)]


def _crop(size: int, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> list[Any]:
    return [_RandomResizedCrop((size, size), scale=scale, ratio=ratio, area_for_downscale="image")]


def _dropout(p: float, most: int = 6) -> Any:
    return A.CoarseDropout((1, most), hole_height_range=(0.04, 0.12), hole_width_range=(0.04, 0.12), p=p)


def _none(size: int, points: bool, swap: Swap) -> list[Any]:
    return [A.CenterCrop(size, size, pad_if_needed=True)]


def _baseline(size: int, points: bool, swap: Swap) -> list[Any]:
    return [*_crop(size, (0.9, 1.0)), *_flip(points, swap), A.Rotate((-15, 15), p=1)]


def _upright(size: int, points: bool, swap: Swap) -> list[Any]:
    move = _Affine(scale=(0.85, 1.15), translate_percent=(-0.08, 0.08), rotate=(-12, 12), shear=(-6, 6), p=0.9)
    return [A.CenterCrop(size, size, pad_if_needed=True), move]


def _geometry(size: int, points: bool, swap: Swap) -> list[Any]:
    """The moves of original 000's `no_color`."""
    vertical = [] if points and swap is None else [_VerticalFlip(swap, 0.08)]
    return [
        *_crop(size, (0.70, 1.0), (0.80, 1.25)),
        *_flip(points, swap),
        *vertical,
        _Affine(scale=(0.9, 1.1), translate_percent=(-0.06, 0.06), rotate=(-20, 20), shear=(-8, 8), p=0.45),
        A.RandomRotate90(p=0.15),
    ]


def _degradation(p: float, motion: bool = False) -> Any:
    blur = [A.GaussianBlur(blur_limit=(3, 5))] + ([A.MotionBlur(blur_limit=(3, 5))] if motion else [])
    return A.OneOf([*blur, A.GaussNoise(std_range=(0.02, 0.08)), A.ImageCompression(quality_range=(75, 100))], p=p)


def _no_color(size: int, points: bool, swap: Swap) -> list[Any]:
    return [*_geometry(size, points, swap), _degradation(0.25), A.Sharpen(p=0.15), _dropout(0.25)]


def _full(size: int, points: bool, swap: Swap) -> list[Any]:
    color = A.OneOf(
        [
            A.ColorJitter((0.8, 1.2), (0.8, 1.2), (0.8, 1.2), (-0.05, 0.05), p=1),
            A.HueSaturationValue(10, 20, 15, p=1),
            A.RandomBrightnessContrast(0.2, 0.2, p=1),
        ],
        p=0.6,
    )
    return [*_geometry(size, points, swap), color, _degradation(0.25), A.Sharpen(p=0.15), _dropout(0.25)]


def _easy_strong(size: int, points: bool, swap: Swap) -> list[Any]:
    return [
        *_crop(size, (0.62, 1.0), (0.80, 1.25)),
        *_flip(points, swap),
        _Affine(rotate=(-28, 28), p=0.6),
        _degradation(0.40, motion=True),
        _dropout(0.35),
    ]


def _hard_light(size: int, points: bool, swap: Swap) -> list[Any]:
    return [*_crop(size, (0.80, 1.0), (0.80, 1.25)), *_flip(points, swap), _Affine(rotate=(-12, 12), p=0.5)]


def _stage4_easy(size: int, points: bool, swap: Swap) -> list[Any]:
    return [
        *_crop(size, (0.30, 0.92), (0.65, 1.45)),
        *_flip(points, swap),
        _Affine(rotate=(-30, 30), p=0.7),
        _degradation(0.25),
        _dropout(0.25),
    ]


def _stage4_hard(size: int, points: bool, swap: Swap) -> list[Any]:
    return [A.CenterCrop(size, size, pad_if_needed=True), A.Rotate((-10, 10), p=1)]


def _ensemble_1(size: int, points: bool, swap: Swap) -> list[Any]:
    return [A.CenterCrop(size, size, pad_if_needed=True), *_flip(points, swap), A.Rotate((-15, 15), p=1)]


def _ensemble_2(size: int, points: bool, swap: Swap) -> list[Any]:
    return [
        *_crop(size, (0.8, 1.0)),
        *_flip(points, swap),
        A.Rotate((-15, 15), p=1),
        A.ColorJitter((0.8, 1.2), (0.8, 1.2), (0.8, 1.2), (0.0, 0.0), p=1),
        A.Sharpen(p=0.3),
    ]


def _rotate_45(size: int, points: bool, swap: Swap) -> list[Any]:
    return [A.CenterCrop(size, size, pad_if_needed=True), A.Rotate((-45, 45), p=1)]


def _points(size: int, points: bool, swap: Swap) -> list[Any]:
    return [
        A.CenterCrop(size, size, pad_if_needed=True),
        *_flip(points, swap),
        _Affine(scale=(0.85, 1.15), translate_percent=(-0.06, 0.06), rotate=(-15, 15), p=0.9),
        A.RandomBrightnessContrast(0.25, 0.25, p=0.5),
        A.OneOf([A.GaussianBlur(blur_limit=(3, 5)), A.GaussNoise(std_range=(0.01, 0.05))], p=0.2),
    ]


_ROWS: dict[str, Callable[[int, bool, Swap], list[Any]]] = {
    "none": _none,  # the centre crop, as validation sees it
    "baseline": _baseline,  # 001: crop .9-1, mirror, +-15 degrees
    "upright": _upright,  # small moves, never a mirror or a turn: digits, text
    "no_color": _no_color,  # 000: hue, saturation, brightness and contrast left alone
    "full": _full,  # 000: no_color and colour
    "easy_strong": _easy_strong,  # 000 harden: classes that are easy
    "hard_light": _hard_light,  # 000 harden: the others
    "stage4_easy": _stage4_easy,  # 000 stage 4: confident samples
    "stage4_hard": _stage4_hard,  # 000 stage 4: unsure or wrong ones
    "ensemble_1": _ensemble_1,  # 001
    "ensemble_2": _ensemble_2,  # 001
    "rotate_45": _rotate_45,  # 002
    "points": _points,  # 004 and mousekp
}


def make(name: str, size: int, points: bool = False, swap: Swap = None) -> A.Compose:
    """Make a preset.

    Args:
        name: row of `PRESETS`.
        size: side of the square that comes out, px.
        points: whether key points travel along. Mirrors are then left out unless `swap` is given.
        swap: the index of each point's mirror twin.

    Returns:
        A transform of ``image`` uint8 (H, W, 3), both sides at least `size`, to uint8 (size, size, 3).

    Raises:
        UserError: an unknown name.
    """
    known("augmentation preset", name, _ROWS)
    follow = A.KeypointParams(format="xy", remove_invisible=False) if points else None
    return A.Compose(_ROWS[name](size, points, swap), keypoint_params=follow)


def _row(name: str) -> Callable[..., A.Compose]:
    def preset(size: int, points: bool = False, swap: Swap = None) -> A.Compose:
        return make(name, size, points, swap)

    return preset


PRESETS: dict[str, Callable[..., A.Compose]] = {name: _row(name) for name in _ROWS}


def reseed(transform: A.Compose, seed: int) -> None:
    """Make what follows a pure function of `seed` (any int >= 0): once per block, in the thread that augments it.

    All steps draw from one stream. albumentations' own `set_random_seed` gives every step a copy of the same stream,
    so that a picture was mirrored up-down only if it was mirrored left-right too.
    """
    transform.set_random_state(np.random.Generator(np.random.PCG64(seed)), random.Random(seed))


def run(transform: A.Compose, image: npt.NDArray[np.uint8], points: Array | None = None) -> tuple[Array, Array | None]:
    """Augment one image, and its points.

    Args:
        transform: from `make`, with `points` as given here.
        image: uint8 (H, W, 3).
        points: ``(P, 2)`` unit coordinates **of this image** (x / W, y / H), NaN where missing; or None.

    Returns:
        uint8 (size, size, 3) and the points in unit coordinates of the new square; NaN where missing or cropped away.
    """
    if points is None:
        transform.py_random.random()  # `Compose` throws its own dice first; the rest of what it does is for targets
        data = {"image": image}
        for step in transform.transforms:
            data = step(**data)
        return np.ascontiguousarray(data["image"]), None
    height, width = image.shape[:2]
    missing = np.asarray(np.isnan(points).any(axis=1))  # (P,)
    pixels = np.where(missing[:, None], 0.0, points * (width, height) - 0.5).astype(np.float32)
    tagged = np.concatenate([pixels, np.arange(len(points), dtype=np.float32)[:, None]], axis=1)
    found = transform(image=image, keypoints=tagged)
    out = np.ascontiguousarray(found["image"])
    # A mirror exchanges twins by exchanging rows, so a missing point's row moves to its twin: the tag follows it.
    rows = np.asarray(found["keypoints"], dtype=np.float32).reshape(len(points), -1)
    moved = (rows[:, :2] + 0.5) / (out.shape[1], out.shape[0])
    moved[missing[rows[:, 2].round().astype(int)] | outside(moved)] = np.nan
    return out, moved.astype(np.float32)


def outside(points: Array) -> npt.NDArray[np.bool_]:
    """Which of ``(…, 2)`` unit points lie out of the picture, where nothing could find them: ``(…)`` bool."""
    return np.asarray(((points < 0) | (points > 1)).any(axis=-1))


def mix(images: Tensor, shares: Tensor, config: recipe.Augment, dice: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mix a batch with itself in another order: mixup, or cutmix, or neither; one draw per batch (original 000).

    Args:
        images: ``(B, 3, H, W)`` uint8 or float 0..255.
        shares: ``(B, K)`` float targets that sum to 1.
        config: probabilities and Beta parameters.
        dice: decides everything.

    Returns:
        Images (float32 after mixup, else as they came) and their shares.
    """
    draw = float(dice.random())
    if len(images) < 2 or draw >= config.mixup_prob + config.cutmix_prob:
        return images, shares
    mixup = draw < config.mixup_prob
    alpha = config.mixup_alpha if mixup else config.cutmix_alpha
    if not alpha:
        return images, shares
    keep = float(dice.beta(alpha, alpha))
    order = torch.from_numpy(dice.permutation(len(images))).to(images.device)
    if mixup:
        mixed = images.float() * keep + images[order].float() * (1 - keep)
    else:
        mixed, keep = _cut(images, order, keep, dice)
    return mixed, shares * keep + shares[order] * (1 - keep)


def _cut(images: Tensor, order: Tensor, keep: float, dice: np.random.Generator) -> tuple[Tensor, float]:
    """Paste a box of the other image, of share ``1 - keep``; return also the share that really stayed."""
    height, width = images.shape[-2:]
    side = np.sqrt(1 - keep)
    y, x = int(dice.integers(height)), int(dice.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(0, y - half_y), min(height, y + half_y)
    left, right = max(0, x - half_x), min(width, x + half_x)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[order][..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)

"""Test-time augmentation: the dihedral group D4, undone exactly, each view once.

A view is ``(transposed, flip_x, flip_y)``: transpose first, then mirror. The eight of them are the symmetries of
the square. The list is nested, so the running mean after 1, 2, 4 and 8 views is `none`, `flip`, `geo4` and `geo8`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class View(NamedTuple):
    """One way of looking at an image: transpose, then mirror left-right (`x`), then up-down (`y`)."""

    transposed: bool
    flip_x: bool
    flip_y: bool


D4 = tuple(
    View(transposed, flip_x, flip_y)
    for transposed in (False, True)
    for flip_x, flip_y in ((False, False), (True, False), (False, True), (True, True))
)

# Original 000 listed id, flipW, flipH, rot90, rot180, rot270, transpose, flipW(transpose). The last *is* rot270, so
# rot270 counted twice and the anti-transpose never: seven distinct views. Kept only to reproduce that solution.
_ROT90, _ROT270 = View(True, False, True), View(True, True, False)
_ORIGINAL = (D4[0], D4[1], D4[2], _ROT90, D4[3], _ROT270, D4[4], _ROT270)

VIEWS: dict[str, tuple[View, ...]] = {
    "none": D4[:1],
    "flip": D4[:2],
    "geo4": D4[:4],
    "geo8": D4,
    "geo8_original": _ORIGINAL,
}
NESTED = ("none", "flip", "geo4", "geo8")
"""View sets of which each begins the next: one pass over `geo8` gives all four means."""


def apply(images: torch.Tensor, view: View) -> torch.Tensor:
    """Return `images` (..., H, W) as seen through `view`; (..., W, H) if it transposes."""
    if view.transposed:
        images = images.transpose(-2, -1)
    axes = [axis for axis, flipped in ((-1, view.flip_x), (-2, view.flip_y)) if flipped]
    return images.flip(axes) if axes else images


def undo(images: torch.Tensor, view: View) -> torch.Tensor:
    """Return the inverse of `apply`: ``undo(apply(x, v), v) == x`` for any (..., H, W)."""
    axes = [axis for axis, flipped in ((-1, view.flip_x), (-2, view.flip_y)) if flipped]
    images = images.flip(axes) if axes else images
    return images.transpose(-2, -1) if view.transposed else images


def undo_points(
    points: npt.NDArray[np.float32], view: View, swap: Sequence[int] | None = None
) -> npt.NDArray[np.float32]:
    """Take points found in a view back to the image.

    Args:
        points: ``(..., P, 2)`` x, y in [0, 1], pixel centres at ``(i + 0.5) / n``; with this convention a mirror
            is exactly ``1 - x`` and a transpose exactly ``(y, x)``, on non-square images too.
        view: the view they were found in.
        swap: for views that mirror an odd number of times, the index each point's twin has (left eye, right eye);
            None when no point has a twin.

    Returns:
        ``(..., P, 2)`` in the image's own frame.
    """
    x, y = points[..., 0], points[..., 1]
    x = 1 - x if view.flip_x else x
    y = 1 - y if view.flip_y else y
    back = np.stack((y, x) if view.transposed else (x, y), axis=-1)
    return back[..., list(swap), :] if swap is not None and is_mirrored(view) else back


def is_mirrored(view: View) -> bool:
    """Tell whether a view turns left into right (an odd number of reflections)."""
    return (view.transposed + view.flip_x + view.flip_y) % 2 == 1

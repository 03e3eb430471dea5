"""D4: a group, each view once, undone exactly, on images that are not square."""

from itertools import product

import numpy as np
import pytest
import torch

from octofold.tta import D4, NESTED, VIEWS, View, apply, is_mirrored, undo, undo_points

IMAGE = torch.arange(3 * 4 * 7).reshape(3, 4, 7)
SQUARE = torch.arange(3 * 5 * 5).reshape(3, 5, 5)


def seen(view: View, image: torch.Tensor = SQUARE) -> bytes:
    return apply(image, view).contiguous().numpy().tobytes()


@pytest.mark.parametrize("view", D4)
def test_undo_is_the_inverse(view: View) -> None:
    assert torch.equal(undo(apply(IMAGE, view), view), IMAGE)
    assert torch.equal(apply(undo(IMAGE, view), view), IMAGE)


def test_the_eight_views_are_eight() -> None:
    assert len({seen(view) for view in VIEWS["geo8"]}) == len(VIEWS["geo8"]) == 8


def test_they_are_the_turns_and_the_turned_mirrors() -> None:
    turns = [torch.rot90(SQUARE, k, (-2, -1)) for k in range(4)]
    expected = {t.contiguous().numpy().tobytes() for turn in turns for t in (turn, turn.flip(-1))}
    assert {seen(view) for view in D4} == expected


def test_they_are_closed() -> None:
    views = {seen(view) for view in D4}
    for first, second in product(D4, D4):
        assert apply(apply(SQUARE, first), second).contiguous().numpy().tobytes() in views


def test_the_originals_list_has_seven() -> None:
    assert len(VIEWS["geo8_original"]) == 8
    assert len({seen(view) for view in VIEWS["geo8_original"]}) == 7
    rot270 = torch.rot90(SQUARE, 3, (-2, -1)).contiguous().numpy().tobytes()
    assert [seen(view) for view in VIEWS["geo8_original"]].count(rot270) == 2


def test_nested_sets_begin_each_other() -> None:
    for smaller, larger in zip(NESTED, NESTED[1:], strict=False):
        assert VIEWS[larger][: len(VIEWS[smaller])] == VIEWS[smaller]
    assert {name: len(VIEWS[name]) for name in NESTED} == {"none": 1, "flip": 2, "geo4": 4, "geo8": 8}


def test_geo4_is_the_group_without_quarter_turns() -> None:
    assert {seen(view) for view in VIEWS["geo4"]} == {
        seen(D4[0]),
        SQUARE.flip(-1).contiguous().numpy().tobytes(),
        SQUARE.flip(-2).contiguous().numpy().tobytes(),
        SQUARE.flip(-1, -2).contiguous().numpy().tobytes(),
    }


@pytest.mark.parametrize("view", D4)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (5, 3)])
def test_an_oracles_point_survives_every_view(view: View, height: int, width: int) -> None:
    """The oracle returns the brightest pixel's centre; undoing the view must lead back to it."""
    for row, column in product(range(height), range(width)):
        image = torch.zeros(1, height, width)
        image[0, row, column] = 1
        turned = apply(image, view)[0]
        place = int(turned.argmax())
        y, x = divmod(place, turned.shape[1])
        found = np.array([[(x + 0.5) / turned.shape[1], (y + 0.5) / turned.shape[0]]], dtype=np.float32)
        np.testing.assert_allclose(
            undo_points(found, view), [[(column + 0.5) / width, (row + 0.5) / height]], atol=1e-6
        )


def test_mirrors_swap_twins_and_turns_do_not() -> None:
    points = np.array([[0.1, 0.2], [0.7, 0.4]], dtype=np.float32)
    for view in D4:
        plain, swapped = undo_points(points, view), undo_points(points, view, swap=[1, 0])
        np.testing.assert_array_equal(swapped, plain[::-1] if is_mirrored(view) else plain)
    assert sum(is_mirrored(view) for view in D4) == 4

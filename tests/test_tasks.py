"""Tasks: losses have the value their definition gives, missing points count nothing, views are undone or refused."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from octofold import tta
from octofold.errors import UserError
from octofold.nets.tasks import (
    CLASS_LOSSES,
    POINT_LOSSES,
    Classify,
    Keypoints,
    balanced_weights,
    check_swap,
    make_task,
    one_hot,
    sample_weights,
)
from octofold.recipe import Loss

NAMES = ("left", "middle", "right")


def make_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_int_targets_and_their_one_hot_shares_give_one_loss(name: str, smoothing: float) -> None:
    task, logits, target = Classify(NAMES), make_logits(8, 3), torch.arange(8) % 3
    config = Loss(name=name, label_smoothing=smoothing)
    whole = task.loss(logits, target, config)
    torch.testing.assert_close(whole, task.loss(logits, one_hot(target, 3), config))
    assert torch.autograd.grad(whole, logits)[0].abs().sum() > 0


def test_auto_is_cross_entropy_and_weights_are_torch_s() -> None:
    logits, target, weight = make_logits(8, 3), torch.arange(8) % 3, torch.tensor([1.0, 0.5, 0.2])
    ours = Classify(NAMES).loss(logits, target, Loss(label_smoothing=0.03), weight)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, weight=weight, label_smoothing=0.03))


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]], dtype=torch.bfloat16)
    assert Classify(NAMES).loss(logits, torch.tensor([1]), Loss()).dtype == torch.float32
    assert Classify(NAMES).activate(logits).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value"),
    [("mse", 9.0), ("l1", 3.0), ("smooth_l1", 2.5), ("wing", 10 * math.log(1 + 3 / 2))],
)
def test_a_point_three_percent_off_costs_what_the_definition_says(name: str, value: float) -> None:
    task = Keypoints(("nose",))
    target = torch.full((2, 1, 2), 0.5)
    loss = task.loss(torch.full((2, 2), 0.03), target, Loss(name=name))
    torch.testing.assert_close(loss, torch.tensor(value), rtol=1e-4, atol=1e-4)


def test_wing_is_continuous_at_its_knee() -> None:
    below, above = POINT_LOSSES["wing"](torch.tensor([10 - 1e-4, 10 + 1e-4]))
    assert abs(float(above - below)) < 1e-3


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.5, 0.2])])
@pytest.mark.parametrize("name", [*CLASS_LOSSES, *POINT_LOSSES])
def test_a_batch_s_loss_is_the_mean_of_its_parts_by_what_they_count(name: str, weight: torch.Tensor | None) -> None:
    task = (Classify if name in CLASS_LOSSES else Keypoints)(NAMES)
    logits, target = make_logits(8, task.outputs).detach(), torch.arange(8) % 3
    if name == "bce":
        weight = None  # its mean is over rows and classes, weights or none
    if task.name == "keypoints":
        target = torch.rand(8, 3, 2, generator=torch.Generator().manual_seed(1))
        target[0] = target[5, 1] = float("nan")
    count = task.counts(target.numpy(), None if weight is None else weight.numpy())
    assert count.shape == (8,)
    parts = sum(
        float(task.loss(logits[part], target[part], Loss(name=name), weight)) * float(count[part].sum())
        for part in (slice(0, 3), slice(3, 8))
    )
    whole = float(task.loss(logits, target, Loss(name=name), weight))
    assert parts / float(count.sum()) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", POINT_LOSSES)
def test_missing_points_count_nothing(name: str) -> None:
    task, logits = Keypoints(NAMES), make_logits(4, 6)
    target = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(1))
    target[0, 1] = float("nan")
    target[2, 0, 0] = float("nan")  # half a point is no point
    loss = task.loss(logits, target, Loss(name=name))
    (gradient,) = torch.autograd.grad(loss, logits)
    gradient = gradient.reshape(4, 3, 2)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1].abs().sum() == gradient[2, 0].abs().sum() == 0
    moved = logits.detach().clone()
    moved[0, 2:4] += 5
    torch.testing.assert_close(loss.detach(), task.loss(moved, target, Loss(name=name)))


def test_a_batch_without_any_point_is_harmless() -> None:
    logits = make_logits(2, 6)
    loss = Keypoints(NAMES).loss(logits, torch.full((2, 3, 2), float("nan")), Loss())
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].abs().sum() == 0


def test_a_loss_of_the_other_task_is_refused() -> None:
    with pytest.raises(UserError, match="one of bce, cross_entropy"):
        Classify(NAMES).loss(make_logits(2, 3), torch.zeros(2, dtype=torch.int64), Loss(name="wing"))
    with pytest.raises(UserError, match="smooth_l1"):
        Keypoints(NAMES).loss(make_logits(2, 6), torch.zeros(2, 3, 2), Loss(name="bce"))


@pytest.mark.parametrize("views", tta.VIEWS)
def test_points_found_in_a_view_come_back(views: str) -> None:
    """What a perfect network would find in each view, undone, is the truth, twins included."""
    task = Keypoints(NAMES, swap=[2, 1, 0])
    truth = np.random.default_rng(0).random((5, 3, 2)).astype(np.float32)
    for view in tta.VIEWS[views]:
        x, y = truth[..., 0], truth[..., 1]
        seen = np.stack((y, x) if view.transposed else (x, y), axis=-1)
        seen[..., 0] = 1 - seen[..., 0] if view.flip_x else seen[..., 0]
        seen[..., 1] = 1 - seen[..., 1] if view.flip_y else seen[..., 1]
        named = seen[:, [2, 1, 0]] if tta.is_mirrored(view) else seen
        np.testing.assert_allclose(task.undo(named, view), truth, atol=1e-6)


def test_mirrors_are_refused_without_a_swap_table() -> None:
    Keypoints(NAMES).check_views("none")
    Keypoints(NAMES, swap=[0, 1, 2]).check_views("geo8")
    Classify(NAMES).check_views("geo8")
    with pytest.raises(UserError, match="swap table"):
        Keypoints(NAMES).check_views("geo8")


@pytest.mark.parametrize("swap", [[0, 1], [0, 1, 3], [1, 2, 0]])
def test_a_swap_table_that_is_no_involution_is_refused(swap: list[int]) -> None:
    with pytest.raises(UserError, match="swap table"):
        check_swap(swap, NAMES)


def test_tasks_know_their_width_and_score() -> None:
    classify, points = make_task("classify", NAMES), make_task("keypoints", NAMES)
    assert (classify.outputs, points.outputs) == (3, 6)
    assert classify.score(np.eye(3), np.arange(3), classify.default_metric) == 1
    assert points.score(np.ones((2, 3, 2)), np.zeros((2, 3, 2)), points.default_metric) == 1
    assert points.activate(torch.zeros(1, 6)).flatten().tolist() == [0.5] * 6
    with pytest.raises(UserError, match="metric for keypoints"):
        points.score(np.ones((2, 3, 2)), np.zeros((2, 3, 2)), "accuracy")
    with pytest.raises(UserError, match="classify, keypoints"):
        make_task("segment", NAMES)


def test_class_weights_are_balanced_and_at_most_one() -> None:
    target = np.array([0] * 6 + [1] * 3 + [3])
    weights = balanced_weights(target, 4)
    np.testing.assert_allclose(weights, [1 / 6, 1 / 3, 0, 1], rtol=1e-6)
    chance = sample_weights(target, 4)
    np.testing.assert_allclose([chance[target == c].sum() for c in (0, 1, 3)], [1 / 3] * 3)

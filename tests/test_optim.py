"""Optimisation: schedules and averages against their closed forms, SAM against its base, groups against the recipe."""

import math

import pytest
import torch
from torch import nn

from octofold import recipe
from octofold.nets import models
from octofold.recipe import Phase
from octofold.train import optim

PHASES = [
    Phase(epochs=4, schedule="cosine", warmup_epochs=1, final_lr=0.1),
    Phase(epochs=4, schedule="cosine"),
    Phase(epochs=5, schedule="step", step_every=2, step_factor=0.5),
    Phase(epochs=5, schedule="step", step_epochs=[1, 3], step_factor=0.1),
    Phase(epochs=3, schedule="constant", warmup_epochs=0.5),
    Phase(epochs=6, schedule="plateau", step_factor=0.3),
]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: f"{phase.schedule}-{phase.warmup_epochs}")
def test_rates_stay_between_zero_and_the_peak_and_never_rise_after_the_warm_up(phase: Phase) -> None:
    rates = [optim.lr_at(phase, 0.2, step, 10) for step in range(phase.epochs * 10)]
    warm = round(phase.warmup_epochs * 10)
    assert all(0 <= rate <= 0.2 for rate in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert rates[warm] == 0.2


def test_rates_are_what_the_definitions_say() -> None:
    cosine, every, at = PHASES[0], PHASES[2], PHASES[3]
    assert optim.lr_at(cosine, 1.0, 0, 10) == pytest.approx(0.1)
    assert optim.lr_at(cosine, 1.0, 25, 10) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert [optim.lr_at(every, 1.0, epoch * 10, 10) for epoch in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert [optim.lr_at(at, 1.0, epoch * 10, 10) for epoch in range(5)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
    assert optim.lr_at(PHASES[5], 1.0, 50, 10, drops=2) == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("values", "patience", "higher", "drops"),
    [
        ([], 2, True, 0),
        ([1, 2, 3], 1, True, 0),
        ([1, 1, 1], 2, True, 1),
        ([3, 2, 1], 1, False, 0),
        ([1, 0, 0, 0, 0], 2, True, 2),
        ([1, 0, 2, 1, 1], 2, True, 1),
    ],
)
def test_plateaus_drop_after_patience_without_gain(
    values: list[float], patience: int, higher: bool, drops: int
) -> None:
    assert optim.plateau_drops(values, patience, higher) == drops


def small_net() -> models.Net:
    """A convolutional net with batch norm."""
    torch.manual_seed(0)
    return models.build(recipe.Model(name="small_cnn", input_size=16), 3)


def gradients(net: nn.Module) -> None:
    """Leave the gradient of some loss in `net`."""
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(net(images), torch.arange(8) % 3).backward()


def test_vectors_are_not_decayed_and_each_parameter_is_in_one_group() -> None:
    net = small_net()
    groups = optim.parameter_groups(net, recipe.Optim(weight_decay=0.1))
    together = [parameter for group in groups for parameter in group["params"]]
    assert len(together) == len({id(parameter) for parameter in net.parameters()})
    for group in groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_layer_decay_falls_towards_the_pixels() -> None:
    net = small_net()
    groups = optim.parameter_groups(net, recipe.Optim(layer_decay=0.5), depths=models.depths(net))
    factor = {id(parameter): group["factor"] for group in groups for parameter in group["params"]}
    trunk = [factor[id(parameter)] for parameter in net.trunk_parameters()]
    assert trunk == sorted(trunk)
    assert max(trunk) == 0.5
    assert {factor[id(parameter)] for parameter in net.head_parameters()} == {1.0}
    optimizer = optim.make_optimizer("sgd", groups, recipe.Optim())
    optim.set_lr(optimizer, 0.2)
    assert {group["lr"] / group["factor"] for group in optimizer.param_groups} == {0.2}


def test_a_frozen_trunk_is_left_out() -> None:
    net = small_net()
    groups = optim.parameter_groups(net, recipe.Optim(), head_only=True)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in net.head_parameters()}


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_with_radius_zero_moves_nothing(adaptive: bool) -> None:
    net = small_net()
    gradients(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sam = optim.Sam(net.parameters(), 0.0, adaptive)
    assert sam.ascend()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_sam_climbs_by_its_radius_and_comes_back_bit_for_bit() -> None:
    net = small_net()
    gradients(net)
    home = [parameter.detach().clone() for parameter in net.parameters()]
    sam = optim.Sam(net.parameters(), 0.05)
    assert sam.ascend()
    moved = torch.sqrt(sum(((p.detach() - h) ** 2).sum() for p, h in zip(net.parameters(), home, strict=True)))
    assert float(moved) == pytest.approx(0.05, rel=1e-4)
    sam.descend()
    assert all(torch.equal(p, h) for p, h in zip(net.parameters(), home, strict=True))


def test_sam_stays_where_it_is_if_the_gradient_overflowed() -> None:
    net = small_net()
    gradients(net)
    next(net.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
    assert not optim.Sam(net.parameters(), 0.05).ascend()


def test_the_second_pass_leaves_running_statistics_alone() -> None:
    net = small_net().train()
    gradients(net)
    before = {name: value.clone() for name, value in net.named_buffers()}
    with optim.frozen_statistics(net):
        gradients(net)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    gradients(net)
    assert any(not torch.equal(value, before[name]) for name, value in net.named_buffers())


def averaged(settings: recipe.Average, points: list[float]) -> float:
    """Average a one-weight network that takes these values in turn."""
    net = nn.Linear(1, 1, bias=False)
    average = optim.Average(settings)
    for point in points:
        with torch.no_grad():
            net.weight.fill_(point)
        average.update(net)
    return float(average.mean["weight"])


def test_swa_is_the_mean_and_ema_its_closed_form() -> None:
    points = [1.0, 5.0, 2.0, 8.0]
    assert averaged(recipe.Average(kind="swa"), points) == pytest.approx(4.0)
    mean, decay = points[0], 0.3
    for count, point in enumerate(points[1:], start=1):
        keep = min(decay, (1 + count) / (10 + count))
        mean = keep * mean + (1 - keep) * point
    assert averaged(recipe.Average(kind="ema", decay=decay), points) == pytest.approx(mean)


def test_refreshed_statistics_are_those_of_the_data() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2))
    data = torch.randn(64, 2, 4, 4) * 3 + 5
    optim.refresh_statistics(net, data.split(16), net)
    assert torch.allclose(net[0].running_mean, data.mean(dim=(0, 2, 3)), atol=1e-4)
    assert net[0].momentum == 0.1
    assert net.training


def test_statistics_are_refreshed_only_in_the_part_asked_for() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).eval()
    data = torch.randn(64, 2, 4, 4) * 3 + 5
    optim.refresh_statistics(net, data.split(16), net[1])
    assert torch.equal(net[0].running_mean, torch.zeros(2))  # it also ran with these, not with the batch's
    assert torch.allclose(net[1].running_mean, data.mean(dim=(0, 2, 3)), atol=1e-3)
    assert not net.training
    assert not net[1].training


def test_the_loss_scale_halves_on_overflow_and_recovers() -> None:
    scale = optim.LossScale(enabled=True)
    scale.update(overflowed=True)
    assert scale.value == 32768
    for _ in range(optim.LossScale.GROW_AFTER):
        scale.update(overflowed=False)
    assert scale.value == 65536
    off = optim.LossScale(enabled=False)
    off.update(overflowed=True)
    assert off.value == 1

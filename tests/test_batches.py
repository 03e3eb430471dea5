"""Batches: pure functions of their place, whoever loads them, in whatever order, alone or together."""

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from octofold import recipe
from octofold.data import images
from octofold.nets.tasks import Keypoints
from octofold.train import job, validation
from octofold.train.batches import BLOCK, Batches, Features, MicroBatch, Order, Pixels, seed_of
from world import make_world

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["classify", "keypoints"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pixels:
    home = tmp_path_factory.mktemp(request.param)
    table = make_world(home, samples=48, task=request.param)
    cache = images.open_cache(table, images.PixelSpec(16, "crop", 0.9), home / "cache", progress=False)
    return Pixels(cache, table.target, "baseline", table.info.get("swap"))


def batches(source: Pixels, **changes: object) -> Batches:
    """Batches of 24 over all rows."""
    order = Order(np.arange(48), seed=3, batch_size=24)
    return Batches(order, source, CPU, **changes)  # type: ignore[arg-type]


def same(one: list[MicroBatch], other: list[MicroBatch]) -> bool:
    """Whether two steps hold the same pixels and targets."""
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.target.nan_to_num(), b.target.nan_to_num())
               for a, b in pairs)  # fmt: skip


def test_a_step_is_the_same_whenever_it_is_loaded(source: Pixels) -> None:
    made = batches(source)
    first = made.load(0, 1, 1)
    made.load(0, 0, 0)
    assert same(first, made.load(0, 1, 1))
    assert same(first, made.load(0, 1, 1))  # twice in a row, too
    assert not same(first, made.load(0, 2, 1))
    assert not same(first, made.load(1, 1, 1))


def test_threads_change_nothing(source: Pixels) -> None:
    alone, ahead = list(batches(source).stream(0, 0)), list(batches(source, workers=3).stream(0, 0))
    assert len(alone) == len(ahead) == 2
    assert all(same(one, other) for one, other in zip(alone, ahead, strict=True))


def test_starting_in_the_middle_gives_the_rest(source: Pixels) -> None:
    assert same(list(batches(source).stream(0, 0))[1], next(batches(source).stream(0, 0, 1)))


def test_processes_share_a_step_without_gap_or_overlap(source: Pixels) -> None:
    (whole,) = batches(source).load(0, 0, 0)
    parts = [batches(source, rank=rank, world=2).load(0, 0, 0)[0] for rank in range(2)]
    assert sum(part.share for part in parts) == pytest.approx(1)
    place = {int(row): position for position, row in enumerate(whole.rows)}
    for part in parts:
        there = [place[int(row)] for row in part.rows]
        assert torch.equal(part.inputs, whole.inputs[there])
    assert sorted(np.concatenate([part.rows for part in parts])) == sorted(whole.rows)
    assert BLOCK < 24


def test_points_missing_stay_missing(source: Pixels) -> None:
    if source.target.ndim == 1:
        pytest.skip("classes have no points")
    (micro,) = batches(source).load(0, 0, 0)
    missing = np.isnan(source.target[micro.rows]).any(axis=(1, 2))
    assert missing.any()
    assert (torch.isnan(micro.target).any(dim=2).any(dim=1).numpy() == missing).all()


def test_points_count_by_how_many_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulated, shared by processes or validated in batches: the loss of all the visible points at once."""
    rng = np.random.default_rng(0)
    task, values = Keypoints(["a", "b", "c"]), rng.random((32, 6), np.float32)
    target = rng.random((32, 3, 2), np.float32)
    target[8:16, 1:] = np.nan
    target[16:24] = np.nan  # a micro-batch with nothing to see
    made: Any = SimpleNamespace(target=target, unit_target=target, task=task, recipe=recipe.Recipe(), metric="mse")
    made.class_weight = None
    whole = float(task.loss(torch.from_numpy(values), torch.from_numpy(target), recipe.Loss()))
    source, counts = Features(values, target), job.Job.counts.func(made)

    def weigh(rows: npt.NDArray[np.int64]) -> float:
        return float(counts[rows].sum())

    for size, accumulate, world in ((32, 1, 1), (8, 4, 1), (32, 1, 2), (16, 2, 2)):
        order = Order(np.arange(32), 0, size, accumulate)
        ranks = [Batches(order, source, torch.device("cpu"), 0, rank, world, weigh) for rank in range(world)]
        parts = [micro for one in ranks for micro in one.load(0, 0, 0)]
        loss = sum(one.share * float(task.loss(one.inputs, one.target, recipe.Loss())) for one in parts)
        assert loss == pytest.approx(whole, rel=1e-5)
    made.net = torch.nn.Module()
    made.net.head = torch.nn.Identity()
    made.devices = SimpleNamespace(share=lambda rows: rows, device="cpu", gather=lambda part: [part])
    made.valid_rows, made.autocast = np.arange(32), contextlib.nullcontext
    made.cache = SimpleNamespace(frames=[SimpleNamespace(to_pixels=lambda points: points)] * 32)
    for size in (8, 32):
        monkeypatch.setattr(validation, "VALID_BATCH", size)
        assert validation.validate(made, values)["valid/loss"] == pytest.approx(whole, rel=1e-5)
    nothing = Batches(Order(np.arange(16, 24), 0, 8), source, torch.device("cpu"), weigh=weigh)
    assert [micro.share for micro in nothing.load(0, 0, 0)] == [0]


def test_mixing_gives_shares_that_sum_to_one(source: Pixels) -> None:
    if source.target.ndim > 1:
        pytest.skip("points cannot be mixed")
    mix = recipe.Augment(mixup_prob=1, mixup_alpha=1)
    (micro,) = batches(source, mix=mix, classes=3).load(0, 0, 0)
    assert micro.target.shape == (24, 3)
    assert torch.allclose(micro.target.sum(dim=1), torch.ones(24))
    (left,) = batches(source, mix=mix, classes=3, rank=0, world=2).load(0, 0, 0)
    place = {int(row): position for position, row in enumerate(micro.rows)}
    assert torch.equal(left.target, micro.target[[place[int(row)] for row in left.rows]])


@pytest.mark.parametrize(("rows", "batch", "accumulate", "steps"), [(48, 24, 1, 2), (48, 10, 2, 2), (5, 8, 1, 1)])
def test_each_row_once_per_epoch_but_for_the_ragged_end(rows: int, batch: int, accumulate: int, steps: int) -> None:
    order = Order(np.arange(rows), seed=0, batch_size=batch, accumulate=accumulate)
    assert order.steps == steps
    micro = [part for step in range(order.steps) for part in order.step(0, 0, step)]
    seen = np.concatenate(micro)
    assert len(set(seen.tolist())) == len(seen)
    assert len(seen) == min(rows, steps * batch * accumulate)
    assert all(len(part) <= batch for part in micro)


def test_a_row_left_over_joins_the_micro_batch_before_it() -> None:
    def sizes(rows: int, batch: int, accumulate: int) -> list[int]:
        return [len(part) for part in Order(np.arange(rows), 0, batch, accumulate).step(0, 0, 0)]

    assert sizes(16, 5, 4) == [5, 5, 6]
    assert (sizes(17, 5, 4), sizes(20, 5, 4), sizes(6, 5, 1)) == ([5, 5, 5, 2], [5, 5, 5, 5], [5])
    assert (sizes(3, 1, 4), sizes(1, 8, 1)) == ([1, 1, 1], [1])  # alone anyway
    values = np.random.default_rng(0).random((16, 3), np.float32)
    micro = Batches(Order(np.arange(16), 0, 5, 4), Features(values, np.arange(16)), CPU).load(0, 0, 0)
    mean = sum(part.share * part.inputs.mean(dim=0) for part in micro)
    assert np.allclose(mean, values.mean(axis=0), atol=1e-6)


def test_a_weighted_sampler_draws_rare_rows_more_often() -> None:
    draw = np.where(np.arange(100) < 10, 9.0, 1.0)
    order = Order(np.arange(100), seed=0, batch_size=50, draw=draw / draw.sum())
    seen = np.concatenate([part for epoch in range(20) for step in range(2) for part in order.step(0, epoch, step)])
    assert 0.4 < (seen < 10).mean() < 0.6


def test_replicas_take_turns() -> None:
    values = np.stack([np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)])
    made = Batches(Order(np.arange(4), 0, 4), Features(values, np.arange(4)), CPU)
    assert [float(made.load(0, epoch, 0)[0].inputs.mean()) for epoch in range(3)] == [0, 1, 0]


def test_seeds_of_places_differ() -> None:
    seeds = {seed_of(0, phase, epoch, step) for phase in range(5) for epoch in range(20) for step in range(20)}
    assert len(seeds) == 2000


def test_the_order_of_places_counts() -> None:
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3) != seed_of(3, 2, 1)

"""Training: the loop on tiny worlds, the ways round it that must not matter, and what users get wrong."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from octofold.compute import Devices
from octofold.data.images import PixelSpec, open_cache
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.nets import augment, models
from octofold.predictions import Predictions
from octofold.recipe import Recipe
from octofold.train import calibration, features, interrupt, job, outcome, training
from octofold.train.features import FrozenTrunk
from world import make_world

PINNED = {"precision": "fp32", "channels_last": "on"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A house for in-process trainings."""
    for module in ("data.images", "train.features", "train.calibration", "nets.engine"):
        monkeypatch.setattr(f"octofold.{module}.ROOT", tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def recipe_of(**changes: Any) -> Recipe:
    """A recipe small enough for tests."""
    settings: dict[str, Any] = {
        "model": {"name": "small_cnn", "input_size": 16},
        "augment": {"preset": "none"},
        "phases": [{"epochs": 1}],
        "optim": {"lr": 3e-3},
        "batch_size": 8,
        "tta": "none",
        "runtime": PINNED,
    }
    return Recipe.model_validate(settings | changes)


def train(home: Path, table: Manifest, name: str = "slot", fold: int = 0, **changes: Any) -> training.SlotResult:
    """Train one slot."""
    return training.train_slot(recipe_of(**changes), table, fold, 0, home / name, lambda *_: None)


def weights(result: training.SlotResult) -> dict[str, torch.Tensor]:
    """The trained weights."""
    return dict(load_file(result.model_folder / "model.safetensors"))


def test_it_learns_and_leaves_what_the_contract_says(home: Path) -> None:
    table = make_world(home, samples=60)
    result = train(home, table, phases=[{"epochs": 6}], tta="flip", select="last")
    assert result.metrics["oof/accuracy"] > 0.9
    assert set(result.oof) == {"none", "flip"}
    held_out = table.sample_ids[table.fold == 0]
    assert result.oof["none"].sample_ids.tolist() == held_out.tolist()
    assert (result.oof["none"].fold == 0).all()
    assert result.oof["none"].model_sha == models.read_card(result.model_folder).model_sha
    assert list(result.history["epoch"]) == list(range(6))
    assert not (home / "slot" / "checkpoint.pt").exists()


def test_points_are_learned_in_original_pixels(home: Path) -> None:
    table = make_world(home, samples=60, task="keypoints")
    result = train(home, table, phases=[{"epochs": 8}], tta="geo8", augment={"preset": "baseline"})
    assert result.oof["geo8"].values.shape == (int((table.fold == 0).sum()), 1, 2)
    middle = np.nanmean((table.target[table.fold == 0] - 9.5) ** 2)
    assert result.metrics["oof/mse"] < middle


def test_the_same_seed_gives_the_same_bits_and_another_does_not(home: Path) -> None:
    table = make_world(home, samples=36)
    one, two = weights(train(home, table, "one")), weights(train(home, table, "two"))
    other = weights(training.train_slot(recipe_of(), table, 0, 1, home / "other", lambda *_: None))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_sam_with_radius_zero_is_no_sam(home: Path) -> None:
    table = make_world(home, samples=36)
    plain = weights(train(home, table, "plain"))
    optim = job.optim.Sam

    class Still(optim):  # rho = 0 means off in a recipe, so the radius is shrunk here
        def __init__(self, parameters: Any, rho: float, adaptive: bool = False) -> None:
            super().__init__(parameters, 0.0, adaptive)

    job.optim.Sam = Still  # type: ignore[misc]
    try:
        still = weights(train(home, table, "still", optim={"lr": 3e-3, "sam_rho": 1.0}))
    finally:
        job.optim.Sam = optim  # type: ignore[misc]
    assert all(torch.equal(value, still[name]) for name, value in plain.items())


def test_accumulating_two_halves_is_one_whole(home: Path) -> None:
    table = make_world(home, samples=36)
    changes: dict[str, Any] = {"model": {"name": "small_cnn", "input_size": 16}, "optim": {"name": "sgd", "lr": 0.01}}
    frozen = [{"epochs": 2, "train": "head"}]  # batch norm would see halves
    whole = weights(train(home, table, "whole", phases=frozen, batch_size=8, **changes))
    changes["optim"] = changes["optim"] | {"accumulate": 2}
    halves = weights(train(home, table, "halves", phases=frozen, batch_size=4, **changes))
    assert all(torch.allclose(value, halves[name], atol=1e-6) for name, value in whole.items())


@pytest.mark.parametrize("loss", [{}, {"label_smoothing": 0.2}, {"name": "bce"}])
def test_a_step_shared_out_is_one_whole_beside_a_teacher_of_half_the_rows(home: Path, loss: dict[str, Any]) -> None:
    table = make_world(home, samples=48, folds=2)
    table.table.loc[table.table.index % 4 == 1, "label"] = "ash"  # classes of unlike weight
    known = np.arange(0, 48, 3)
    values = np.random.default_rng(0).dirichlet(np.ones(3), len(known))
    said = Predictions(table.sample_ids[known], values, table.classes, "x", "t", "x", "none", table.fold[known])
    teacher = {"teacher": str(said.save(home / "teacher.parquet"))}

    def gradient(size: int, accumulate: int = 1, world: int = 1) -> torch.Tensor:
        settings = {"batch_size": size, "optim": {"accumulate": accumulate}, "distill": teacher}
        recipe = recipe_of(loss=loss | {"class_weights": True}, **settings)
        made = job.open_job(recipe, table, 0, 0, home / "slot", Devices(torch.device("cpu")))
        part = job.enter(made, 0)
        made.net.eval()  # batch norm would see parts
        for part.batches.rank in range(world):
            part.batches.world = world
            training._gradients(made, part, part.batches.load(0, 0, 0), 0)
        found = [one.grad.flatten() for one in made.net.parameters() if one.grad is not None]
        return torch.cat(found)

    whole = gradient(24)
    assert whole.abs().sum() > 0
    for parts in (gradient(8, 3), gradient(24, world=2), gradient(12, 2, world=2)):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_cached_features_equal_the_plain_way(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_world(home, samples=36)
    phases = [{"epochs": 3, "train": "head"}]
    cached = train(home, table, "cached", phases=phases, tta="geo8")
    assert list((home / "data" / "tiny" / "cache").glob("features-*.npy"))
    monkeypatch.setattr(job, "_is_cacheable", lambda *_: False)
    monkeypatch.setattr(job.Job, "is_frozen", False)
    plain = train(home, table, "plain", phases=phases, tta="geo8")
    assert all(torch.allclose(value, weights(plain)[name], atol=1e-5) for name, value in weights(cached).items())
    for views, predictions in cached.oof.items():
        assert np.allclose(predictions.values, plain.oof[views].values, atol=1e-5)


def test_cached_features_leave_out_the_points_that_the_crop_leaves_out(home: Path) -> None:
    table = make_world(home, samples=18, task="keypoints")
    table.table.loc[table.fold == 1, "tip_x"] = -3.0  # as left of a photo's centre square
    targets = []
    for train_what in ("all", "head"):
        recipe = recipe_of(phases=[{"epochs": 1, "train": train_what}])
        made = job.open_job(recipe, table, 0, 0, home / "slot", Devices(torch.device("cpu")))
        (micro,) = job.enter(made, 0).batches.load(0, 0, 0)
        targets.append(micro.target)
    plain, cached = targets
    assert torch.isfinite(plain).any()
    assert torch.isnan(plain[(made.unit_target[micro.rows] < 0).any((1, 2))]).all()
    assert torch.allclose(plain, cached, atol=1e-5, equal_nan=True)


def test_features_of_replicas_are_made_anew_when_the_augmentation_changed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_world(home, samples=12)
    recipe = recipe_of()
    net = models.build(recipe.model, 3).eval()
    cache = open_cache(table, PixelSpec(16, recipe.model.fit, recipe.model.crop_pct))

    def files() -> int:
        trunk = FrozenTrunk(net, cache, "tiny", "small_cnn")
        trunk.of_views()
        trunk.of_replicas("baseline", 2)
        return len(list((home / "data" / "tiny" / "cache").glob("features-*.npy")))

    assert [files(), files()] == [3, 3]  # a view and two replicas
    changed = home / "augment.py"
    changed.write_text(Path(str(augment.__file__)).read_text() + "# changed\n")
    monkeypatch.setattr(augment, "__file__", str(changed))
    assert files() == 5, "the view is what it was"
    monkeypatch.setattr(features, "version", lambda library: f"another {library}")
    assert files() == 7


def test_a_frozen_trunk_does_not_move(home: Path) -> None:
    table = make_world(home, samples=36)
    changes = {"phases": [{"epochs": 1, "train": "head"}], "augment": {"preset": "baseline"}}
    result = train(home, table, **changes)
    again = train(home, table, "more", **(changes | {"phases": [{"epochs": 3, "train": "head"}]}))
    one, two = weights(result), weights(again)
    assert all(torch.equal(value, two[name]) for name, value in one.items() if name.startswith("trunk"))
    assert any(not torch.equal(value, two[name]) for name, value in one.items() if name.startswith("head"))


@pytest.mark.parametrize("head", ["linear", pytest.param("heatmap", marks=pytest.mark.slow)])
def test_averaged_weights_keep_the_statistics_of_a_frozen_trunk(home: Path, head: str) -> None:
    """It ran with them in eval mode; counted afresh they would be others. A head that has some counts its own."""
    model = {"name": "small_cnn", "input_size": 16, "head": head}
    table = make_world(home, samples=36, task="classify" if head == "linear" else "keypoints")
    swa = {"kind": "swa", "start_epoch": 0}
    phases = [{"epochs": 2, "train": "head"}]
    result = train(home, table, model=model, phases=phases, average=swa, select="last")
    assert models.read_card(result.model_folder).info["chosen"] == "swa"
    found = weights(result)
    means = [name for name in found if name.endswith("running_mean")]
    assert {name.split(".")[0] for name in means} == ({"trunk"} if head == "linear" else {"trunk", "head"})
    for name in means:  # it began with zeros
        assert bool(found[name].any()) == name.startswith("head"), name
    moved = weights(
        train(
            home, table, "moved", model=model, phases=[*phases, {"name": "b", "epochs": 1}], average=swa, select="last"
        )
    )
    assert all(bool(moved[name].any()) for name in means)


def test_a_head_phase_is_scored_with_the_averaged_trunk_it_leaves(home: Path) -> None:
    table = make_world(home, samples=36)
    phases = [{"epochs": 2, "lr": 0.02}, {"name": "head", "epochs": 1, "train": "head", "lr": 1e-5}]
    ema = {"kind": "ema", "decay": 0.95}
    result = train(home, table, phases=phases, average=ema, select="last", metric="log_loss")
    assert result.history["valid/log_loss"].iloc[-1] == pytest.approx(result.metrics["oof/log_loss"], rel=1e-4)


def test_batchnorm_is_counted_in_equal_batches_of_all_classes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_world(home, samples=60)
    table = dataclasses.replace(table, table=table.table.sort_values("label", kind="stable").reset_index(drop=True))
    monkeypatch.setattr(outcome, "VALID_BATCH", 12)  # 39 rows to train on
    made = job.open_job(recipe_of(), table, 0, 0, home / "slot", Devices(torch.device("cpu")))
    batches = [batch.permute(0, 2, 3, 1).numpy() for batch in outcome._plain_batches(made)]
    assert [len(batch) for batch in batches] == [12, 12, 12]
    row_of = {made.cache.square(row).tobytes(): row for row in made.train_rows.tolist()}
    drawn = [[row_of[image.tobytes()] for image in batch] for batch in batches]
    assert len({row for rows in drawn for row in rows}) == 36
    assert all(len(set(table.target[rows])) == 3 for rows in drawn)
    again = [batch.permute(0, 2, 3, 1).numpy() for batch in outcome._plain_batches(made)]
    assert all(np.array_equal(one, two) for one, two in zip(batches, again, strict=True))
    monkeypatch.setattr(outcome, "VALID_BATCH", 64)
    assert [len(batch) for batch in outcome._plain_batches(made)] == [len(made.train_rows)]


def test_a_batch_too_small_for_all_processes_is_refused(home: Path) -> None:
    table, third = make_world(home, samples=36), Devices(torch.device("cpu"), 2, 3)
    with pytest.raises(UserError, match=r"batch_size 16(.|\n)*over 16 for 3 processes"):
        job.open_job(recipe_of(batch_size=16), table, 0, 0, home / "slot", third)


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("phase 0 epoch 0 step", {"optim": {"lr": 1e30, "clip_norm": None}, "phases": [{"epochs": 3}]}),
        ("mixup", {"augment": {"preset": "none", "mixup_prob": 0.5, "mixup_alpha": 1}, "task": "keypoints"}),
        ("loss.class_weights", {"loss": {"class_weights": True}, "task": "keypoints"}),
        (
            "loss.weighted_sampler, loss.label",
            {"loss": {"weighted_sampler": True, "label_smoothing": 0.1}, "task": "keypoints"},
        ),
        ("replicas", {"phases": [{"epochs": 1, "train": "head", "replicas": 2}], "task": "keypoints"}),
        ("metric", {"metric": "mse"}),
        ("classes", {"classes": ["oak"]}),
        ("views", {"tta": "geo16"}),
        ("head: heatmap", {"model": {"name": "small_cnn", "input_size": 16, "head": "heatmap"}}),
    ],
)
def test_mistakes_are_told(home: Path, where: str, changes: dict[str, Any]) -> None:
    task = changes.pop("task", "classify")
    with pytest.raises(UserError, match=where):
        train(home, make_world(home, samples=36, task=task), **changes)


def test_what_a_recipe_says_in_vain_is_told() -> None:
    def smells(**changes: Any) -> str:
        return "\n".join(recipe_of(**changes).smells())

    mixing = {"mixup_prob": 0.5, "mixup_alpha": 0.2}
    head = {"train": "head", "replicas": 2}
    assert "augment.cutmix_alpha mixes nothing" in smells(augment={"cutmix_alpha": 1, **mixing})
    assert "augment.mixup_prob mixes nothing while augment.mixup_alpha is 0" in smells(augment={"mixup_prob": 0.5})
    assert "optim.sam_adaptive does nothing" in smells(optim={"sam_adaptive": True})
    assert "replicas 2 are not used with train: all" in smells(phases=[{"epochs": 1, "replicas": 2}])
    assert "replicas 2 are not used beside mixup" in smells(phases=[head], augment=mixing)
    assert "not used beside easy_augment" in smells(phases=[head | {"easy_augment": "full"}])
    used = smells(phases=[head | {"easy_augment": "none"}], augment={"preset": "none", "mixup_prob": 0})
    assert "not used" not in used
    assert "nothing" not in used


def test_a_diverging_loss_names_step_and_remedy(home: Path) -> None:
    with pytest.raises(UserError, match="finite loss") as told:
        train(home, make_world(home, samples=36), optim={"lr": 1e30, "clip_norm": None}, phases=[{"epochs": 3}])
    assert "lower optim.lr" in str(told.value)
    assert not (home / "slot" / "done.json").exists()


def test_a_metric_that_the_fold_cannot_give_is_told_not_obeyed(home: Path) -> None:
    table = make_world(home, samples=36)
    table.table.loc[table.fold == 0, "label"] = "ash"
    with pytest.raises(UserError, match=r"metric auc(.|\n)*fold 0 lacks what auc needs(.|\n)*--metric"):
        train(home, table, metric="auc", phases=[{"epochs": 2}])
    last = train(home, table, "last", metric="auc", select="last", phases=[{"epochs": 2}])
    assert np.isnan(last.history["valid/auc"]).all(), "nothing is chosen by it"


def test_an_overflowing_gradient_skips_its_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def norm(parameters: Any) -> torch.Tensor:
        calls.append(1)
        return torch.tensor(torch.inf if len(calls) == 2 else 1.0)

    monkeypatch.setattr(training.optim, "gradient_norm", norm)
    result = train(home, make_world(home, samples=36))
    assert len(calls) == 3
    assert np.isfinite(result.history["train/loss"]).all()
    monkeypatch.setattr(training.optim, "gradient_norm", lambda parameters: torch.tensor(torch.inf))
    with pytest.raises(UserError, match="inf"):
        train(home, make_world(home, samples=60), "always", phases=[{"epochs": 5}])


@pytest.mark.slow
def test_half_precision_scales_its_loss(home: Path) -> None:
    small = {"model": {"name": "small_cnn", "input_size": 8}, "batch_size": 4}
    precise = PINNED | {"precision": "fp16"}
    result = train(home, make_world(home, samples=9), runtime=precise, optim={"sam_rho": 0.05}, **small)
    assert np.isfinite(result.history["train/loss"]).all()


def test_a_batch_of_one_works_or_is_refused(home: Path) -> None:
    table = make_world(home, samples=9)
    result = train(home, table, batch_size=1)
    assert np.isfinite(result.history["train/loss"]).all()
    model = {"name": "mobilenetv3_small_050", "input_size": 32}  # its last maps are 1x1
    with pytest.raises(UserError, match=r"batch_size 1\n.*two images(.|\n)*raise batch_size"):
        train(home, table, "alone", batch_size=1, model=model)
    table.table["fold"] = [1] + [0] * 8
    with pytest.raises(UserError, match=r"one of 1 training row\n(.|\n)*more rows"):
        train(home, table, "one", batch_size=8, model=model)


def test_a_row_left_over_by_accumulation_is_not_alone_before_batchnorm(home: Path) -> None:
    model = {"name": "mobilenetv3_small_050", "input_size": 32}  # its last maps are 1x1
    changes: dict[str, Any] = {"model": model, "batch_size": 5, "optim": {"accumulate": 4}}
    table = make_world(home, samples=24)
    table.table["fold"] = (np.arange(24) >= 16).astype(int)
    result = train(home, table, fold=1, **changes)  # 16 rows: 5, 5, 5 and 1
    assert np.isfinite(result.history["train/loss"]).all()


def test_a_class_with_one_sample_and_a_fold_without_a_class(home: Path) -> None:
    table = make_world(home, samples=36)
    label = np.where(table.fold == 0, "ash", "birch")
    label[np.flatnonzero(table.fold == 1)[0]] = "cedar"
    table.table["label"] = label
    result = train(home, table, loss={"class_weights": True}, metric="macro_f1")
    assert 0 <= result.metrics["oof/macro_f1"] <= 1
    sampled = train(home, table, "sampled", loss={"weighted_sampler": True})
    assert np.isfinite(sampled.history["train/loss"]).all()


def test_images_smaller_than_the_crop_are_enlarged(home: Path) -> None:
    result = train(home, make_world(home, samples=18, side=20), model={"name": "small_cnn", "input_size": 64})
    assert np.isfinite(result.history["train/loss"]).all()


def test_early_stopping_counts_epochs_without_gain(home: Path) -> None:
    table = make_world(home, samples=36)
    result = train(home, table, phases=[{"epochs": 30, "lr": 1e-9, "schedule": "constant"}], early_stop=2)
    assert len(result.history) < 30


def test_a_phase_that_stops_gaining_makes_room_for_the_next(home: Path) -> None:
    table = make_world(home, samples=36)
    still = {"lr": 1e-9, "schedule": "constant"}
    phases = [{"name": "probe", "epochs": 9, "train": "head", **still}, {"name": "tune", "epochs": 2, "lr": 3e-3}]
    result = train(home, table, phases=phases, early_stop=2)
    assert list(result.history["phase"]) == ["probe"] * 3 + ["tune"] * 2
    swa = {"kind": "swa", "start_epoch": 3}  # the epochs that trained the trunk: its statistics are counted afresh
    averaged = weights(train(home, table, "swa", phases=phases, early_stop=2, average=swa, select="last"))
    assert {int(value) for name, value in averaged.items() if name.endswith("num_batches_tracked")} == {1}


def test_an_average_that_never_began_is_told(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    table, still = make_world(home, samples=36), [{"epochs": 9, "lr": 1e-9, "schedule": "constant"}]
    swa = {"kind": "swa", "start_epoch": 6}
    result = train(home, table, phases=still, early_stop=2, average=swa, select="last")
    assert models.read_card(result.model_folder).info["chosen"] == "last"
    assert "nothing was averaged: it ended after 3 epochs, before average.start_epoch 6; the last" in caplog.text
    caplog.clear()
    train(home, table, "averaged", phases=still, early_stop=2, average=swa | {"start_epoch": 2})
    assert "nothing was averaged" not in caplog.text


def test_stop_files_from_before_are_forgotten(home: Path) -> None:
    (home / "stop").touch()
    interrupt.clear([home])
    with interrupt.StopRequest(home) as stop:
        assert not stop.is_set()
        (home / "stop").touch()
        assert stop.is_set()
    assert not (home / "stop").exists()


def test_calibration_is_measured_once_reported_and_can_be_pinned(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    free = recipe_of(runtime={})
    net, cpu = models.build(free.model, 3), torch.device("cpu")
    with caplog.at_level("INFO"):
        found = calibration.choose(free, net, cpu)
        assert calibration.choose(free, net, cpu) == found
    assert caplog.text.count("fastest ways to train") == 1
    assert (home / "mlruns" / "calibration.json").exists()
    pinned = calibration.choose(recipe_of(runtime={"precision": "bf16", "channels_last": "off"}), net, cpu)
    assert (pinned["precision"], pinned["channels_last"], pinned["compile"]) == ("bf16", False, False)


def test_the_way_chosen_is_done_first_with_what_it_takes_to_make_it() -> None:
    ms, makes = [100.0, 60.0, 40.0], [1.0, 1.0, 50.0]
    assert calibration.first_done(ms, makes, 10) == 1
    assert calibration.first_done(ms, makes, 10_000) == 2
    assert calibration.first_done(ms, makes, 0) == 2  # making them does not count
    assert calibration.first_done([100.0, 99.0], [0.0, 0.0], 10) == 0  # not worth leaving the first for
    assert calibration.first_done([None, 50.0], [None, 0.0], 10) == 1
    assert calibration.first_done([None, None], [None, None], 10) == 0


@pytest.mark.slow
def test_compiling_is_weighed_only_where_much_is_trained(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raced = []
    real = calibration._race
    monkeypatch.setattr(calibration, "_race", lambda *args: raced.append(args[-1]) or real(*args))
    free = recipe_of(runtime={"precision": "fp32"})
    net, cpu = models.build(free.model, 3), torch.device("cpu")
    assert not calibration.choose(free, net, cpu, steps=10)["compile"]
    assert not any(way["compile"] for way in raced[0])
    calibration.choose(free, net, cpu, steps=10**9)
    calibration.choose(free, net, cpu, steps=10**9)
    assert [[way["compile"] for way in ways] for ways in raced[1:]] == [[False, True]]


def test_one_process_shares_with_nobody() -> None:
    alone = Devices(torch.device("cpu"))
    assert (alone.sum(3.0), alone.gather("x"), alone.from_main(1)) == (3.0, ["x"], 1)
    assert list(alone.share([1, 2, 3])) == [1, 2, 3]
    assert list(Devices(torch.device("cpu"), 1, 2).share([1, 2, 3])) == [2]
    assert "WORLD_SIZE" not in os.environ


def test_bf16_learns_what_fp32_learns(home: Path) -> None:
    table, phases = make_world(home, samples=60), [{"epochs": 4}]
    exact = train(home, table, "exact", phases=phases)
    halved = train(home, table, "halved", phases=phases, runtime=PINNED | {"precision": "bf16"})
    seeds = [training.train_slot(recipe_of(phases=phases), table, 0, seed, home / f"s{seed}", lambda *_: None)
             for seed in (1, 2)]  # fmt: skip
    noise = max(float((seed.history["train/loss"] - exact.history["train/loss"]).abs().max()) for seed in seeds)
    assert float((halved.history["train/loss"] - exact.history["train/loss"]).abs().max()) < noise

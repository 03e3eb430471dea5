"""The originals' recipes, compared with their definitions: rates step by step, groups, transforms, heads; and each run.

Networks are built at full size without memory (torch's meta device); a small relative of each takes real steps.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import REPOSITORY
from octofold import config
from octofold.data import images
from octofold.data.manifest import Manifest
from octofold.nets import augment, models, networks
from octofold.recipe import Phase, Recipe
from octofold.train import features, optim, training
from octofold.train.optim import lr_at, parameter_groups

FOLDER = REPOSITORY / "configs" / "originals"
NAMES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
SMALL = {  # family -> a relative that steps in milliseconds
    "convnext": "test_convnext",
    "tf_efficientnetv2": "test_efficientnet",
    "efficientnetv2": "test_efficientnet",
    "deit3": "test_vit",
    "vit": "test_vit",
    "swin": "test_vit",
    "resn": "test_resnet",
}
STEPS = 7  # an epoch, when rates are compared


def read(name: str) -> Recipe:
    return config.build(Recipe, config.read_yaml(FOLDER / name), name)


def rates(recipe: Recipe) -> list[float]:
    """The learning rate of every step of a recipe, `STEPS` an epoch."""
    return [
        lr_at(phase, phase.lr or recipe.optim.lr, step, STEPS)
        for phase in recipe.phases
        for step in range(phase.epochs * STEPS)
    ]


def two_phase(lr: float, epochs: int, first: int, drop: float, warmup: int = 2) -> list[float]:
    """Original 000's schedule, from its words: warm up, cosine to a fifth, drop, cosine to a tenth of that."""
    found = []
    for step in range(epochs * STEPS):
        epoch = step / STEPS
        if step < warmup * STEPS:
            found.append(lr * (step + 1) / (warmup * STEPS))
        elif step < first * STEPS:
            share = (epoch - warmup) / (first - warmup)
            found.append(0.2 * lr + 0.8 * lr * (1 + math.cos(math.pi * share)) / 2)
        else:
            share = (epoch - first) / (epochs - first)
            found.append(lr / drop * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2))
    return found


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "first", "smoothing", "rho", "swa_from"),
    [
        ("000/convnext_small.yaml", 3e-4, 16, 10, 0.03, 0.05, 5),
        ("000/tf_efficientnetv2_s.yaml", 2.5e-4, 16, 10, 0.03, 0.05, 5),
        ("000/deit3_small.yaml", 2e-4, 14, 9, 0.08, 0.0, 11),
        ("000/deadline.yaml", 3e-4, 14, 9, 0.03, 0.05, 5),
    ],
)
def test_the_zoo_of_000(
    name: str, lr: float, epochs: int, first: int, smoothing: float, rho: float, swa_from: int
) -> None:
    recipe = read(name)
    np.testing.assert_allclose(rates(recipe), two_phase(lr, epochs, first, 3), rtol=2e-3)
    assert (recipe.loss.label_smoothing, recipe.optim.sam_rho, recipe.optim.clip_norm) == (smoothing, rho, 1.0)
    assert (recipe.average.kind, recipe.average.start_epoch + 1) == ("swa", swa_from), "theirs counts from 1"
    assert recipe.loss.class_weights
    assert recipe.loss.weighted_sampler
    assert any("twice" in smell for smell in recipe.smells())
    assert (recipe.model.drop_rate, recipe.model.drop_path) == (0.2, 0.2)
    assert (recipe.augment.preset, recipe.augment.mixup_alpha, recipe.augment.cutmix_alpha) == ("no_color", 0.2, 1.0)
    assert (recipe.metric, recipe.select) == ("log_loss", "best")


def test_harden_of_000_is_the_same_schedule_cut_in_two() -> None:
    recipe = read("000/harden.yaml")
    assert [phase.epochs for phase in recipe.phases] == [9, 1, 4]
    gap = np.abs(np.array(rates(recipe)) - two_phase(3e-4, 14, 9, 3))
    assert gap.max() < 0.04 * 3e-4
    last = recipe.phases[-1]
    assert (last.augment, last.easy_augment, recipe.augment.easy.by) == ("hard_light", "easy_strong", "frequency")
    assert recipe.augment.easy.count == 5


def test_stage_4_of_000() -> None:
    recipe = read("000/stage4.yaml")
    (phase,) = recipe.phases
    assert phase.keep_start
    np.testing.assert_allclose(rates(recipe)[0], 4e-5)
    assert lr_at(phase, 4e-5, 3 * STEPS, STEPS) == pytest.approx(1e-5)
    assert (recipe.augment.preset, phase.easy_augment) == ("stage4_hard", "stage4_easy")
    assert (recipe.optim.sam_rho, recipe.average.kind, recipe.loss.label_smoothing) == (0, "none", 0.02)
    kinds = [type(step).__name__ for step in augment.make("stage4_hard", 32).transforms]
    assert kinds == ["CenterCrop", "Rotate"]
    crop = augment.make("stage4_easy", 32).transforms[0]
    assert (crop.scale, crop.ratio) == ((0.30, 0.92), (0.65, 1.45))


@pytest.mark.parametrize(
    ("name", "preset", "patience"),
    [
        ("001/ensemble_1.yaml", "ensemble_1", 15),
        ("001/ensemble_2.yaml", "ensemble_2", 50),
        ("001/simple_cnn_v2.yaml", "ensemble_2", 50),
    ],
)
def test_the_runs_of_001(name: str, preset: str, patience: int) -> None:
    recipe = read(name)
    assert (recipe.augment.preset, recipe.early_stop, recipe.metric) == (preset, patience, "macro_f1")
    assert set(rates(recipe)) == {1e-3}
    assert len(rates(recipe)) == 300 * STEPS
    assert recipe.optim.name == "adam"
    assert recipe.optim.weight_decay == 0
    assert len(recipe.seeds) > 1
    assert networks.has_highpass(recipe.model) == name.endswith("v2.yaml")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("002")])
def test_the_heads_and_rates_of_002(name: str) -> None:
    recipe = read(name)
    expected = [recipe.phases[0].lr or recipe.optim.lr * 0.8 ** (epoch // 2) for epoch in range(20)]
    np.testing.assert_allclose(rates(recipe)[::STEPS], expected)
    assert (recipe.augment.preset, recipe.model.fit) == ("rotate_45", "squash")
    net = on_paper(recipe, 30)
    moving = {id(p) for group in groups_of(net, recipe, recipe.phases[0]) for p in group["params"]}
    frozen = recipe.phases[0].train == "head"
    assert frozen == (moving == {id(p) for p in net.head_parameters()})
    assert frozen != name.endswith("finetune.yaml")
    if "swin" in name:
        kinds = [type(layer).__name__ for layer in net.head]
        assert kinds == ["Linear", "ReLU", "Dropout", "Linear"]
        assert (net.head[0].out_features, net.head[2].p, recipe.model.input_size) == (512, 0.3, 384)


def test_the_baselines_of_003() -> None:
    cnn, probe = read("003/cnn.yaml"), read("003/vit_tiny_probe.yaml")
    widths = [layer[0].out_channels for layer in on_paper(cnn, 37).trunk if isinstance(layer, torch.nn.Sequential)]
    assert widths == [64, 128, 256]
    assert cnn.model.drop_rate == 0.2
    assert rates(cnn)[0] == 1e-3
    assert rates(cnn)[-1] < 1e-7, "cosine to nothing over 50 epochs"
    assert len(rates(cnn)) == 50 * STEPS
    assert (probe.optim.name, probe.phases[0].train, probe.phases[0].epochs) == ("adam", "head", 10)
    net = on_paper(probe, 37)
    assert sum(p.numel() for g in groups_of(net, probe, probe.phases[0]) for p in g["params"]) == 193 * 37
    assert net.mean == (0.5, 0.5, 0.5), "what these weights were trained with"


def test_the_landmark_recipes_of_004() -> None:
    baseline, wing, drops = (read(f"004/{name}.yaml") for name in ("baseline", "wing", "drops"))
    net = on_paper(baseline, 2 * 971)
    assert net.head[1].weight.shape == (1942, 512)
    assert net.mean == net.std == (0.5, 0.5, 0.5)
    optimizer = optim.make_optimizer("adam", groups_of(net, baseline, baseline.phases[0]), baseline.optim)
    assert optimizer.defaults["amsgrad"]
    assert (baseline.loss.name, wing.loss.name, drops.loss.name) == ("mse", "wing", "smooth_l1")
    assert wing.phases[0].schedule == "plateau"
    assert [phase.optimizer or drops.optim.name for phase in drops.phases] == ["adam", "sgd"]
    epochs = np.array(rates(drops)[::STEPS])
    np.testing.assert_allclose(epochs[[9, 10, 15, 20, 26]], [1e-3, 1e-4, 1e-5, 1e-4, 1e-5])


def on_paper(recipe: Recipe, outputs: int) -> models.Net:
    """The full network, without a byte of weights."""
    with torch.device("meta"):
        return models.build(recipe.model, outputs, load_weights=False)


def groups_of(net: models.Net, recipe: Recipe, phase: Phase) -> list[dict[str, object]]:
    return parameter_groups(net, recipe.optim, phase.train == "head")


@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_built_and_its_groups_partition_it(name: str) -> None:
    recipe = read(name)
    net = on_paper(recipe, 15)
    for phase in recipe.phases:
        groups = groups_of(net, recipe, phase)
        moving = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
        wanted = list(net.head_parameters() if phase.train == "head" else net.parameters())
        assert {id(p) for p in moving} == {id(p) for p in wanted}
        assert len(moving) == len(wanted)
        for group in groups:
            matrices = {parameter.ndim > 1 for parameter in group["params"]}  # type: ignore[attr-defined]
            assert group["weight_decay"] == (recipe.optim.weight_decay if matrices == {True} else 0)


def shrink(recipe: Recipe) -> Recipe:
    """The same recipe with a small relative, small pixels and short phases."""
    name = next((small for family, small in SMALL.items() if recipe.model.name.startswith(family)), recipe.model.name)
    model = recipe.model.model_copy(update={"name": name, "weights": "none", "input_size": 32})
    phases = [phase.model_copy(update={"epochs": 1}) for phase in recipe.phases]
    easy = recipe.augment.easy.model_copy(update={"by": "frequency", "count": 1})
    return recipe.model_copy(
        update={
            "model": model,
            "phases": phases,
            "batch_size": 8,
            "augment": recipe.augment.model_copy(update={"easy": easy}),
            "average": recipe.average.model_copy(update={"start_epoch": 0}),
            "classes": ["kiwi", "potato"] if recipe.classes else [],
        }
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Thirty noisy pictures of 40 x 36 px: three classes, or three points each."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for number in range(30):
        pixels = random.integers(0, 80, (36, 40, 3), np.uint8)
        pixels[..., number % 3] += 120
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = pd.DataFrame({"sample_id": [f"s{n:02d}" for n in range(30)], "path": [f"{n}.png" for n in range(30)]})
    rows["fold"] = np.arange(30) // 3 % 2
    points = random.uniform(4, 32, (30, 6)).astype(np.float32)
    points[5, 2:4] = np.nan
    names = ("nose", "left", "right")
    places = pd.DataFrame(points, columns=[f"{name}_{axis}" for name in names for axis in "xy"])
    classes = ("kiwi", "potato", "tomato")
    labels = pd.Series([classes[n % 3] for n in range(30)], name="label")
    return {
        "classify": Manifest(rows.assign(label=labels), "classify", classes, "toy", folder),
        "keypoints": Manifest(pd.concat([rows, places], axis=1), "keypoints", names, "toy", folder),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains(
    name: str, world: dict[str, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot from pixels to OOF, through every phase of the recipe."""
    for module in (images, features):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    recipe = shrink(read(name))
    table = world["keypoints" if name.startswith("004") else "classify"]
    seen: list[dict[str, float]] = []
    result = training.train_slot(recipe, table, 0, recipe.seeds[0], tmp_path / "slot", lambda _, row: seen.append(row))
    assert len(seen) == len(recipe.phases)
    assert all(np.isfinite(list(row.values())).all() for row in seen)
    assert result.history["phase"].tolist() == [phase.name for phase in recipe.phases]
    oof = result.oof[recipe.tta]
    assert sorted(oof.sample_ids) == sorted(table.sample_ids[table.fold == 0]), "every held-out row, a pair's too"
    assert np.isfinite(result.metrics[f"oof/{recipe.metric}"])


def small(**changes: object) -> Recipe:
    plain = {
        "model": {"name": "small_cnn", "input_size": 16},
        "augment": {"preset": "none"},
        "optim": {"lr": 3e-3},
        "batch_size": 8,
        "tta": "none",
        "metric": "log_loss",
        "runtime": {"precision": "fp32"},
    }
    return Recipe.model_validate(plain | changes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (images, features):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path / "slot"


def test_overfitting_a_batch_learns_it_and_leaves_the_fold_alone(world: dict[str, Manifest], folder: Path) -> None:
    recipe = small(overfit=1, phases=[{"epochs": 25}], augment={"preset": "easy_strong"})
    seen: list[float] = []
    result = training.train_slot(
        recipe, world["classify"], 0, 0, folder, lambda _, row: seen.append(row["valid/log_loss"])
    )
    assert seen[-1] < 0.1 * seen[0], "the rows trained on are the rows validated on, without augmentation"
    assert len(result.oof["none"].sample_ids) == (world["classify"].fold == 0).sum()


def test_a_pair_expert_tells_its_pair_and_says_nothing_of_others(world: dict[str, Manifest], folder: Path) -> None:
    table = world["classify"]
    result = training.train_slot(
        small(classes=["kiwi", "tomato"], phases=[{"epochs": 12}]), table, 0, 0, folder, _quiet
    )
    said = result.oof["none"].reorder(table.classes).take(table.sample_ids[table.fold == 0]).values
    truth = table.target[table.fold == 0]
    pair = truth != 1
    assert (said[pair].argmax(axis=1) == truth[pair]).mean() > 0.9
    assert said[:, 1].max() < 0.2, "it never met a potato"
    assert result.metrics["oof/log_loss"] < 0.5, "scored on its pair alone"


def test_a_finetune_that_only_harms_leaves_its_start(world: dict[str, Manifest], folder: Path) -> None:
    """Original 000's stage 4: epoch 0, the given weights, is kept unless validation improves."""
    first = training.train_slot(small(phases=[{"epochs": 6}]), world["classify"], 0, 0, folder, _quiet)
    harm = small(phases=[{"epochs": 1, "lr": 10.0, "keep_start": True}], select="best")
    start = first.model_folder
    again = training.train_slot(harm, world["classify"], 0, 0, folder.with_name("b"), _quiet, start=start)
    assert again.history["valid/log_loss"].iloc[-1] > 2 * first.metrics["oof/log_loss"]
    assert again.metrics["oof/log_loss"] == pytest.approx(first.metrics["oof/log_loss"])


def test_weights_handed_over_are_where_training_starts(world: dict[str, Manifest], folder: Path) -> None:
    first = training.train_slot(small(phases=[{"epochs": 6}]), world["classify"], 0, 0, folder, _quiet)
    still = small(phases=[{"epochs": 1, "lr": 1e-12}], optim={"weight_decay": 0.0})
    start = first.model_folder
    again = training.train_slot(still, world["classify"], 0, 0, folder.with_name("b"), _quiet, start=start)
    for name, value in models.read_model(start)[0].head.state_dict().items():
        torch.testing.assert_close(models.read_model(again.model_folder)[0].head.state_dict()[name], value)


def _quiet(epoch: int, metrics: dict[str, float]) -> None:
    pass
